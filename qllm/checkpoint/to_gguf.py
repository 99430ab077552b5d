"""A checkpoint as a GGUF file, for llama.cpp: 16 bits, or blocks that hold a layer's integers.

A packed layer with groups of a multiple of 32 has a form that loses nothing: Q4_0 of 4 bits,
symmetric, Q4_1 of 4 bits whose offsets, -zero · scale, are float16, and Q8_0 of everything else,
q - zero being an int8 with the same scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qllm.checkpoint.reader import Checkpoint
from qllm.checkpoint.weights import Weights
from qllm.checkpoint.writer import new_file
from qllm.config import LM_HEAD, ModelConfig
from qllm.errors import UserError
from qllm.files import parse_json, read_bytes
from qllm.gguf import is_gguf
from qllm.gguf.file import Value, read_gguf
from qllm.gguf.tokenizer import CONTROL, LLAMA3, QWEN2, USER_DEFINED
from qllm.gguf.types import BF16, F16, F32, PACKED_GROUP, Q4_0, Q4_1, Q8_0, BlockType
from qllm.gguf.write import Planned, write_gguf
from qllm.quant.packing import PackedWeight, group_width, unpack
from qllm.tokenizer import Tokenizer

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "bloom": "bloom"}
# Our modules in a layer, to llama.cpp's names of their parts.
INNER = {
    "attention_norm": ("attn_norm",),
    "attention.qk_norm": ("attn_q_norm", "attn_k_norm"),
    "attention.out": ("attn_output",),
    "mlp_norm": ("ffn_norm",),
    "mlp.down": ("ffn_down",),
}
OUTER = {
    "embed": "token_embd",
    "embed_norm": "token_embd_norm",
    "final_norm": "output_norm",
    LM_HEAD: "output",
}
MAX_TOKENIZER_BYTES = 256 << 20
PLAIN = {torch.float16: F16, torch.bfloat16: BF16, torch.float32: F32}


def export_gguf(
    source: Path,
    target: Path,
    note: Callable[[str], None] = lambda line: None,
    *,
    round_offsets: bool = False,
) -> int:
    """Write the file of a checkpoint; it appears when it is whole.

    Args:
        round_offsets: 4 bits with zero points are Q4_1 whether or not float16 has their offsets.

    Returns:
        its bytes.

    Raises:
        UserError: for a broken checkpoint, a model or a tokenizer that llama.cpp has not, or a
            target that is there.
    """
    weights = Weights(Checkpoint(source), note)
    config = weights.config
    if target.exists():
        raise UserError(f"{target} is there already; name another file with --save")
    if target.suffix != ".gguf":
        raise UserError(f"{target}: a GGUF file's name ends with .gguf")
    metadata = {**_metadata(config), **_tokenizer(source, config)}
    writer = _Tensors(weights, round_offsets)
    planned = writer.plan()
    if writer.wide:
        note(
            f"{writer.wide} matrices of 4 bits are Q8_0, without a loss; --round-offsets makes "
            "Q4_1 of them, of little more than half the bytes, less than 1% of a step off"
        )
    with new_file(target) as path:
        write_gguf(path, metadata, planned, writer.bytes_of(planned))
    return target.stat().st_size


def _metadata(config: ModelConfig) -> dict[str, Value]:
    """What llama.cpp is told of a model.

    Raises:
        UserError: for what its architecture does not have.
    """
    if config.family not in ARCHITECTURES or config.residual_after_norm or any(config.windows):
        raise UserError(
            f"GGUF files are written of {', '.join(ARCHITECTURES)}, without windows of attention "
            f"and residuals behind norms, not of this {config.family}"
        )
    name = ARCHITECTURES[config.family]
    values: dict[str, Value] = {
        "general.architecture": name,
        f"{name}.block_count": config.num_layers,
        f"{name}.context_length": config.trained_positions or config.max_positions or 2048,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_heads,
        f"{name}.attention.head_count_kv": config.num_kv_heads,
    }
    if config.norm == "layernorm":
        return values | {f"{name}.attention.layer_norm_epsilon": config.norm_eps}
    rope = config.rope
    assert rope is not None  # of the other architectures
    if rope.kind not in ("default", "linear") or rope.rotary_dim not in (None, config.head_dim):
        raise UserError(f"GGUF files are written of plain and linear RoPE, not of {rope.kind}")
    if rope.kind == "linear":
        values[f"{name}.rope.scaling.type"] = "linear"
        values[f"{name}.rope.scaling.factor"] = rope.factor
    return values | {
        f"{name}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{name}.attention.key_length": config.head_dim,
        f"{name}.attention.value_length": config.head_dim,
        f"{name}.rope.dimension_count": config.head_dim,
        f"{name}.rope.freq_base": rope.theta,
    }


def _tokenizer(source: Path, config: ModelConfig) -> dict[str, Value]:
    """The metadata of a checkpoint's tokenizer.

    Raises:
        UserError: for one that is no byte-level BPE with a pattern that llama.cpp knows.
    """
    if is_gguf(source):
        found = read_gguf(source).metadata
        return {key: value for key, value in found.items() if key.startswith("tokenizer.")}
    path = source / "tokenizer.json"
    try:
        values = parse_json(read_bytes(path, MAX_TOKENIZER_BYTES), str(path))
    except FileNotFoundError:
        raise UserError(f"{source} has no tokenizer.json, of which a GGUF file's is made") from None
    try:
        model, added = values["model"], {t["id"]: t for t in values.get("added_tokens") or ()}
        tokens = {i: text for text, i in model["vocab"].items()}
        tokens |= {i: token["content"] for i, token in added.items()}
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        text = json.dumps(values["pre_tokenizer"], ensure_ascii=False)
        pre = next((name for pattern, name in _pre(text) if pattern), None)
        ids = range(config.vocab_size)
        types = [_type(added.get(i), i in tokens) for i in ids]
        listed = [tokens.get(i, f"<unused{i}>") for i in ids]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path} is not whole") from None
    if pre is None or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UserError(f"{path}: GGUF files are written of byte-level BPE that llama.cpp knows")
    made: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": listed,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
    if config.eos_token_ids:
        made["tokenizer.ggml.eos_token_id"] = config.eos_token_ids[0]
    added_bos = Tokenizer.load(source, config.vocab_size).added_bos_id
    return made | _settings(source, listed, added_bos)


def _pre(text: str) -> list[tuple[bool, str]]:
    """Whether a pre_tokenizer is the one of each name."""
    own = '"ByteLevel"' in text
    patterns = ((LLAMA3, "llama-bpe"), (QWEN2, "qwen2"))
    digits = '"Digits"' in text and '"individual_digits": true' in text
    plain = own and '"Split"' not in text and '"use_regex": false' not in text
    found = [(json.dumps(p, ensure_ascii=False) in text, name) for p, name in patterns]
    return [*found, (plain and digits, "smollm"), (plain, "gpt-2")]


def _type(added: dict | None, there: bool) -> int:
    """A token's type: control, defined by a user, normal or unused."""
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    return 1 if there else 5


def _settings(source: Path, tokens: list[str], added_bos: int | None) -> dict[str, Value]:
    """What tokenizer_config.json says besides; `added_bos` is what stands in front of each text."""
    path = source / "tokenizer_config.json"
    values = parse_json(read_bytes(path), str(path)) if path.exists() else {}
    values = values if isinstance(values, dict) else {}
    found: dict[str, Value] = {}
    named = values.get("bos_token")
    named = named.get("content") if isinstance(named, dict) else named
    if added_bos is None and isinstance(named, str) and named in tokens:
        found["tokenizer.ggml.bos_token_id"] = tokens.index(named)
    elif added_bos is not None:
        found["tokenizer.ggml.bos_token_id"] = added_bos
    found["tokenizer.ggml.add_bos_token"] = added_bos is not None
    if isinstance(values.get("chat_template"), str):
        found["tokenizer.chat_template"] = values["chat_template"]
    return found


class _Tensors:
    """The tensors of a file, each made as it is written."""

    def __init__(self, weights: Weights, round_offsets: bool) -> None:
        self.weights, self.config = weights, weights.config
        self.round_offsets = round_offsets
        self.wide = 0  # matrices of 4 bits that are Q8_0
        self._made: dict[str, Callable[[], Tensor]] = {}

    def plan(self) -> dict[str, Planned]:
        """Shapes and types by name."""
        planned: dict[str, Planned] = {}
        for name, shape in self.weights.shapes.items():
            module, _, kind = name.rpartition(".")
            form = self._form(module, name, shape)
            for part, rows, order in self._parts(module, shape[0]):
                target = f"{part}.{kind}"
                inner = shape[1:]
                planned[target] = Planned((len(rows), *inner), form)
                self._made[target] = partial(self._bytes, name, rows, order, form)
        return planned

    def bytes_of(self, planned: dict[str, Planned]) -> Iterator[Tensor]:
        """The bytes of each tensor, in order."""
        return (self._made[name]() for name in planned)

    def _form(self, module: str, name: str, shape: tuple[int, ...]) -> BlockType:
        if len(shape) < 2 or "norm" in module:
            return F32
        if not name.endswith(".weight") or module not in self.weights.stored:
            return PLAIN[self.weights.dtype(name)]
        spec, width = self.weights.stored[module].spec, shape[1]
        group = group_width(width, spec.group_size)
        if spec.kind != "weight_only" or group % PACKED_GROUP or width % PACKED_GROUP:
            raise UserError(
                f"{module} has {spec.bits} bits in groups of {group}, which GGUF's blocks of "
                f"{PACKED_GROUP} do not hold"
            )
        packed = self._packed(module)
        if spec.bits != 4:
            return Q8_0
        if not packed.qzeros.numel():  # but the middle, which a checkpoint's settings do not tell
            return Q4_0
        offsets = _offsets(packed)
        if self.round_offsets or torch.equal(offsets.half().float(), offsets.float()):
            return Q4_1
        self.wide += 1
        return Q8_0

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
            raise UserError(f"{module} has act-order or scales beyond float16, which GGUF has not")
        if packed.qzeros.is_floating_point() and bits != 4:
            raise UserError(
                f"{module} has {bits} bits and offsets, of a type of GGUF that is not written"
            )
        return packed

    def _parts(self, module: str, total: int) -> Iterator[tuple[str, range, int]]:
        """llama.cpp's name of each part, its rows in ours, and the heads that are rotated."""
        if not module.startswith("layers."):
            yield OUTER[module], range(total), 0
            return
        _, index, inner = module.split(".", 2)
        config, layer = self.config, f"blk.{index}"
        names: tuple[str, ...]
        if inner == "attention.qkv" and config.family != "bloom":
            names = ("attn_q", "attn_k", "attn_v")
            many = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
            counts = [count * config.head_dim for count in many]
        else:
            if inner == "attention.qkv":
                names = ("attn_qkv",)
            elif inner == "mlp.up":
                names = ("ffn_gate", "ffn_up") if config.gated_mlp else ("ffn_up",)
            else:
                names = INNER[inner]
            counts = [total // len(names)] * len(names)
        begin = 0
        for name, count in zip(names, counts, strict=True):
            heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name, 0)
            rotated = heads if config.family == "llama" else 0
            yield f"{layer}.{name}", range(begin, begin + count), rotated
            begin += count

    def _bytes(self, name: str, rows: range, heads: int, form: BlockType) -> Tensor:
        module = name.rpartition(".")[0]
        order = torch.arange(len(rows))
        if heads:  # pairs that are turned together side by side
            order = order.view(heads, 2, -1).transpose(1, 2).flatten()
        if form.dtype is not None:
            numbers = self.weights.read(name, rows=[rows])[order].to(form.dtype).contiguous()
            return numbers.flatten().view(torch.uint8)
        packed = self._packed(module, [rows])
        spec, width = self.weights.stored[module].spec, self.weights.shapes[name][1]
        group = group_width(width, spec.group_size)

        def of_blocks(numbers: Tensor) -> Tensor:
            """One of them for each block, (N, blocks, 1), of those of groups."""
            each = numbers.repeat_interleave(group // PACKED_GROUP, 1)
            return each[:, : width // PACKED_GROUP, None].contiguous()

        factors = [of_blocks(packed.scales).view(torch.uint8)]
        q = unpack(packed.qweight, spec.bits, width).unflatten(1, (-1, PACKED_GROUP))
        if form in (Q4_0, Q4_1):
            values = q[..., :16] | (q[..., 16:] << 4)
            if form is Q4_1:
                factors.append(of_blocks(_offsets(packed).half()).view(torch.uint8))
        else:
            middle = 2 ** (spec.bits - 1)
            asymmetric = packed.qzeros.numel() > 0
            values = q.short() - (of_blocks(packed.qzeros).short() if asymmetric else middle)
            if values.amin() < -128 or values.amax() > 127:
                raise UserError(f"{module} has zero points with which it needs 9 bits")
            values = values.to(torch.int8).view(torch.uint8)
        return torch.cat([*factors, values], -1)[order].flatten()


def _offsets(packed: PackedWeight) -> Tensor:
    """What is added to q · scale: of zero points -zero · scale, float32."""
    if packed.qzeros.is_floating_point():
        return packed.qzeros
    return -(packed.qzeros.float() * packed.scales.float())
