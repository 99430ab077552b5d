"""A checkpoint as a GGUF file, for llama.cpp: 16 bits, or blocks that hold a layer's integers.

A packed layer with groups of a multiple of 32 has a form that loses nothing: Q4_0 and Q5_0 of 4 and
5 bits, symmetric, Q4_1 and Q5_1 of those whose offsets, -zero · scale, are float16, and Q8_0 of
everything else, q - zero being an int8 with the same scale.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qllm.checkpoint.formats import FP4
from qllm.checkpoint.formats.fp4 import BITS as FP4_BITS
from qllm.checkpoint.gguf_parts import CONSUMED, inner_parts, row_orders
from qllm.checkpoint.gguf_parts import OUTER as OUTER_PARTS
from qllm.checkpoint.gguf_tokenizer import tokenizer_metadata
from qllm.checkpoint.reader import Checkpoint
from qllm.checkpoint.tensors import map_file
from qllm.checkpoint.weights import Weights
from qllm.checkpoint.writer import new_file
from qllm.config import ModelConfig, RopeConfig
from qllm.errors import UserError
from qllm.gguf import is_gguf
from qllm.gguf.architectures import ARCHITECTURES, Architecture
from qllm.gguf.blocks import e2m1_codes
from qllm.gguf.config import read_config
from qllm.gguf.file import GGUF, GGUFTensor, Value, read_gguf
from qllm.gguf.from_config import SCALING, architecture_name, hyperparameters, rope_factors
from qllm.gguf.hyperparameters import LONG
from qllm.gguf.types import (
    BF16,
    F16,
    F32,
    MXFP4,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    WRITTEN_GROUP,
    BlockType,
)
from qllm.gguf.write import Planned, write_gguf
from qllm.models import RawConfig
from qllm.models import read_config as model_config
from qllm.models.delta_net import ALWAYS_FLOAT
from qllm.models.mlp import EXPERTS
from qllm.models.positions import RotaryPositions
from qllm.progress import Note, silent
from qllm.quant.packing import PackedWeight, group_width, unpack

FUSED = {"attention.qkv": "attn_qkv", "mlp.up": "ffn_up"}
OUTER = {ours: name for name, ours in OUTER_PARTS.items()}
# What a file does not say of a model, and what it computes does not depend on.
UNSEEN = ("family", "dtype", "init_std", "eos_token_ids")
# By their bits, types whose blocks hold a layer's integers: symmetric, and with offsets.
TYPES_OF = {4: (Q4_0, Q4_1), 5: (Q5_0, Q5_1)}
PLAIN = {torch.float16: F16, torch.bfloat16: BF16, torch.float32: F32}


def export_gguf(
    source: Path,
    target: Path,
    note: Note = silent,
    *,
    round_offsets: bool = False,
) -> int:
    """Write the file of a checkpoint; it appears when it is whole.

    Of a GGUF file, or of several that a model was split into, the tensors stay what they are.

    Args:
        round_offsets: 4 and 5 bits with zero points are Q4_1 and Q5_1 whether or not float16 has
            their offsets.

    Returns:
        its bytes.

    Raises:
        UserError: for a broken checkpoint, a model or a tokenizer that llama.cpp has not, a target
            that is there, or `round_offsets` of a GGUF file.
    """
    if round_offsets and is_gguf(source):
        reason = f"{source} is a GGUF file, whose tensors stay what they are"
        raise UserError(f"`round_offsets`: {reason}; leave it out")
    # Of small floats, those of which a type of GGUF has as many to a scale are what they are.
    checkpoint = Checkpoint(source, packed=not is_gguf(source), packed_floats=(WRITTEN_GROUP,))
    weights = Weights(checkpoint, note)
    config = weights.config
    if target.exists():
        raise UserError(f"{target} is there already; name another file with `save`")
    if target.suffix != ".gguf":
        raise UserError(f"{target}: a GGUF file's name ends with .gguf")
    metadata = {**hyperparameters(config), **tokenizer_metadata(source, config, note)}
    writer = _Tensors(weights, round_offsets)
    planned = writer.plan()
    _confirm_same(config, metadata, planned, target)
    if writer.wide:
        note(
            f"{writer.wide} matrices of 4 or 5 bits are Q8_0, without a loss; with `round_offsets` "
            "they are Q4_1 or Q5_1, of 0.6 or 0.7 of the bytes, less than 1% of a step off"
        )
    with new_file(target) as path:
        write_gguf(path, metadata, planned, writer.bytes_of(planned))
    return target.stat().st_size


def _confirm_same(
    config: ModelConfig, metadata: dict[str, Value], planned: dict[str, Planned], target: Path
) -> None:
    """Refuse a model of which llama.cpp's architecture, as the file describes it, is not the same.

    Raises:
        UserError: naming what differs.
    """
    name = architecture_name(config)
    tensors = {
        key: GGUFTensor(target, plan.shape, plan.type, 0, plan.nbytes)
        for key, plan in planned.items()
        if key not in CONSUMED
    }
    factors = rope_factors(config)
    if factors:  # whose type asks for the tensors, which are not there yet
        metadata = {key: value for key, value in metadata.items() if not key.endswith(SCALING)}
    raw = RawConfig(read_config(GGUF(target, metadata, tensors)), str(target))
    found = {**vars(model_config(raw)), **ARCHITECTURES[name].fixed}
    if factors:
        found["rope"] = config.rope
    for key, value in vars(config).items():
        if key not in UNSEEN and found[key] != value:
            differing, theirs, ours = _first_difference(key, found[key], value)
            raise UserError(
                f"llama.cpp's {name} has {differing} {reprlib.repr(theirs)}, not "
                f"{reprlib.repr(ours)} as this model: no GGUF file can be written of it"
            )


def _first_difference(key: str, theirs: object, ours: object) -> tuple[str, object, object]:
    """The name and both values of a setting, or of the first of RoPE's that differs."""
    if isinstance(theirs, RopeConfig) and isinstance(ours, RopeConfig):
        for part, value in vars(ours).items():
            if (other := getattr(theirs, part)) != value:
                return f"{key}.{part}", other, value
    return key, theirs, ours


class _Tensors:
    """The tensors of a file, each made as it is written."""

    def __init__(self, weights: Weights, round_offsets: bool) -> None:
        self.weights, self.config = weights, weights.config
        self.architecture = ARCHITECTURES[architecture_name(weights.config)]
        self._inner = _names_of(self.architecture)
        self.round_offsets = round_offsets
        self.wide = 0  # matrices of 4 or 5 bits that are Q8_0
        self._perms = row_orders(self.config, self.architecture)
        self._made: dict[str, Callable[[], Tensor]] = {}

    def plan(self) -> dict[str, Planned]:
        """Shapes and types by name."""
        source = self.weights.checkpoint.folder
        if is_gguf(source):
            return self._plan_copy(read_gguf(source))
        planned: dict[str, Planned] = {}
        for factor in rope_factors(self.config):
            factors = _factors(self.config, factor)
            planned[f"{factor}.weight"] = Planned((len(factors),), F32)
            self._made[f"{factor}.weight"] = partial(factors.view, torch.uint8)
        stacked: dict[str, list[tuple[str, range, BlockType]]] = {}
        for name, shape in self.weights.shapes.items():
            module, _, kind = name.rpartition(".")
            form = self._form(module, name, shape)
            for part, rows, perm in self._parts(module, shape[0]):
                target = f"{part}.{kind}"
                if f".{EXPERTS}" in name:
                    stacked.setdefault(target, []).append((name, rows, form))
                    continue
                inner = shape[1:]
                if module.endswith(".mlp.shared_gate"):
                    planned[target] = Planned(inner, form)
                else:
                    planned[target] = Planned((len(rows), *inner), form)
                self._made[target] = partial(self._bytes, name, rows, perm, form)
        for target, experts in stacked.items():
            planned[target] = self._plan_stack(target, experts)
        return planned

    def _plan_stack(self, target: str, experts: list[tuple[str, range, BlockType]]) -> Planned:
        """A tensor of all experts of a layer, which is of one type."""
        forms = {form for _, _, form in experts}
        form = next(iter(forms)) if len(forms) == 1 else Q8_0  # which holds what the others do
        if len(forms) > 1 and any(each.dtype is not None for each in forms):
            raise UserError(
                f"{target}: some experts of the layer are packed and others are not, and a GGUF "
                "file has one type for all of them; write the model at 16 bits"
            )
        name, rows, _ = experts[0]

        def make() -> Tensor:
            return torch.cat([self._bytes(name, rows, None, form) for name, rows, _ in experts])

        self._made[target] = make
        return Planned((len(experts), len(rows), *self.weights.shapes[name][1:]), form)

    def _plan_copy(self, found: GGUF) -> dict[str, Planned]:
        """A file's tensors as they are, whatever their types."""
        for name, tensor in found.tensors.items():
            of_tensor = slice(tensor.offset, tensor.offset + tensor.nbytes)
            self._made[name] = partial(lambda path, at: map_file(path)[at], tensor.path, of_tensor)
        return {name: Planned(tensor.shape, tensor.type) for name, tensor in found.tensors.items()}

    def bytes_of(self, planned: dict[str, Planned]) -> Iterator[Tensor]:
        """The bytes of each tensor, in order."""
        return (self._made[name]() for name in planned)

    def _form(self, module: str, name: str, shape: tuple[int, ...]) -> BlockType:
        if len(shape) < 2 or module == "positions" or module.endswith(ALWAYS_FLOAT):
            return F32
        if not name.endswith(".weight") or module not in self.weights.stored:
            return PLAIN[self.weights.dtype(name)]
        return self._packed_form(module, shape[1])

    def _packed_form(self, module: str, width: int) -> BlockType:
        """The type of a packed linear of so many inputs."""
        if isinstance(self.weights.stored[module], FP4):
            return MXFP4
        spec = self.weights.stored[module].spec
        group = group_width(width, spec.group_size)
        if width % WRITTEN_GROUP:
            raise UserError(
                f"{module} has {width} inputs, which GGUF's blocks of {WRITTEN_GROUP} do not "
                "divide; write the model at 16 bits"
            )
        if spec.kind != "weight_only" or group % WRITTEN_GROUP:
            raise UserError(
                f"{module} has {spec.bits} bits in groups of {group}, which GGUF's blocks of "
                f"{WRITTEN_GROUP} do not hold; they hold 1 to 8 bits in groups of {WRITTEN_GROUP} "
                "or a multiple of it"
            )
        packed = self._packed(module)
        if spec.bits not in TYPES_OF:
            return Q8_0
        symmetric, with_offsets = TYPES_OF[spec.bits]
        if not packed.qzeros.numel():  # but the middle, which a checkpoint's settings do not tell
            return symmetric
        offsets = _offsets(packed)
        if self.round_offsets or torch.equal(offsets.half().float(), offsets.float()):
            return with_offsets
        self.wide += 1
        return Q8_0

    def _mxfp4(self, module: str, rows: range) -> Tensor:
        """Rows of FP4 in groups of 32 as blocks: (N, bytes of a row)."""
        packed, width = self.weights.read_quantized(module, [rows]), self.weights.width(module)
        assert isinstance(packed, PackedWeight)  # of FP4
        q = unpack(packed.qweight, FP4_BITS, width).unflatten(1, (-1, WRITTEN_GROUP))
        codes = e2m1_codes(q)
        # A scale is half of a power of two, whose exponent is stored plus 127.
        exponents = packed.scales.float().frexp().exponent + 127
        values = (codes[..., :16] | codes[..., 16:] << 4).byte()
        return torch.cat([exponents[..., None].byte(), values], -1).flatten(1)

    def _packed(self, module: str, rows: Sequence[range] | None = None) -> PackedWeight:
        """A quantized matrix, or some runs of its rows.

        Raises:
            UserError: for one that no type of GGUF holds.
        """
        packed, bits = (
            self.weights.read_quantized(module, rows),
            self.weights.stored[module].spec.bits,
        )
        assert isinstance(packed, PackedWeight)  # of all with weights alone
        if packed.perm is not None or packed.scales.dtype != torch.float16:
            raise UserError(
                f"{module} has act-order, or scales in float32, which GGUF has not; "
                "export the 16-bit checkpoint, or one that was quantized with `static_groups`"
            )
        if packed.qzeros.is_floating_point() and bits not in TYPES_OF:
            raise UserError(
                f"{module} has {bits} bits and offsets, of a type of GGUF that is not written"
            )
        return packed

    def _parts(self, module: str, total: int) -> Iterator[tuple[str, range, Tensor | None]]:
        """llama.cpp's name of each part, its rows in ours, and which of these each of its is."""
        if not module.startswith("layers."):
            yield OUTER[module], range(total), None
            return
        _, index, inner = module.split(".", 2)
        if inner.startswith(EXPERTS):
            inner = f"{EXPERTS}{{}}.{inner.rpartition('.')[2]}"
        names = self._inner[inner]
        if inner in FUSED and len(self.weights.family.inner[inner]) == 1:
            names = (FUSED[inner],)
        counts = [total // len(names)] * len(names)
        config = self.config
        if len(names) == 3 or (inner == "attention.qk_norm" and config.wide_qk_norm):
            heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
            counts = [count * config.head_dim for count in heads[: len(names)]]
        begin = 0
        for name, count in zip(names, counts, strict=True):
            perm = self._perms.get(name)
            back = None if perm is None else perm.argsort()
            yield f"blk.{index}.{name}", range(begin, begin + count), back
            begin += count

    def _bytes(self, name: str, rows: range, perm: Tensor | None, form: BlockType) -> Tensor:
        """A tensor's bytes: of `rows` of ours, in an order."""
        module, _, kind = name.rpartition(".")
        if perm is None:
            perm = torch.arange(len(rows))
        if form.dtype is not None:
            numbers = self.weights.read(name, rows=[rows])[perm].to(form.dtype)
            if module.endswith("norm") and kind == "weight":
                numbers = numbers + self.architecture.norm_offset
            return numbers.contiguous().flatten().view(torch.uint8)
        if form is MXFP4:
            return self._mxfp4(module, rows)[perm].flatten()
        packed = self._packed(module, [rows])
        spec, width = self.weights.stored[module].spec, self.weights.shapes[name][1]
        group = group_width(width, spec.group_size)

        def of_blocks(numbers: Tensor) -> Tensor:
            """One of them for each block, (N, blocks, 1), of those of groups."""
            each = numbers.repeat_interleave(group // WRITTEN_GROUP, 1)
            return each[:, : width // WRITTEN_GROUP, None].contiguous()

        factors = [of_blocks(packed.scales).view(torch.uint8)]
        q = unpack(packed.qweight, spec.bits, width).unflatten(1, (-1, WRITTEN_GROUP))
        if form is not Q8_0:
            if form.offset:
                factors.append(of_blocks(_offsets(packed).half()).view(torch.uint8))
            if form.bits == 5:
                factors.append(_fifth_bits(q))
            values = (q[..., :16] & 0xF) | (q[..., 16:] << 4)
        else:
            middle = 2 ** (spec.bits - 1)
            asymmetric = packed.qzeros.numel() > 0
            values = q.short() - (of_blocks(packed.qzeros).short() if asymmetric else middle)
            if values.amin() < -128 or values.amax() > 127:
                raise UserError(
                    f"{module} has 8 bits and zero points, with which GGUF's Q8_0 would need 9; "
                    "quantize with `scheme` sym"
                )
            values = values.to(torch.int8).view(torch.uint8)
        return torch.cat([*factors, values], -1)[perm].flatten()


def _names_of(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Our names of modules, to llama.cpp's; of what is fused in its file as well, one name."""
    parts = inner_parts(architecture)
    found = {
        ours: tuple(name for name, (other, _) in parts.items() if other == ours)
        for ours, _ in parts.values()
    }
    # Its own names of what others have elsewhere.
    found |= {ours: (name,) for name, ours in architecture.parts.items()}
    return found | {
        "attention.qkv": ("attn_q", "attn_k", "attn_v"),
        "mlp.experts.{}.up": ("ffn_gate_exps", "ffn_up_exps"),
        "mlp.experts.{}.down": ("ffn_down_exps",),
    }


def _offsets(packed: PackedWeight) -> Tensor:
    """What is added to q · scale: of zero points -zero · scale, float32."""
    if packed.qzeros.is_floating_point():
        return packed.qzeros
    return -(packed.qzeros.float() * packed.scales.float())


def _fifth_bits(q: Tensor) -> Tensor:
    """The fifth bits of blocks, uint8 (..., 32), those of 8 values in a byte: (..., 4)."""
    bits = (q >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8)
    return bits.sum(-1, dtype=torch.uint8)


def _factors(config: ModelConfig, name: str) -> Tensor:
    """What divides the frequency of each pair, as a file has it: float32 (D / 2,)."""
    rope = config.rope
    assert rope is not None  # as `rope_factors` has it
    if rope.kind == "longrope":
        return torch.tensor(rope.long_factor if name == LONG else rope.short_factor)
    plain = replace(config, rope=RopeConfig(rope.theta))
    of = (RotaryPositions(each, torch.float32).frequencies(1) for each in (plain, config))
    return next(of) / next(of)
