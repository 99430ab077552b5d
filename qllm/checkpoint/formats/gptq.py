"""GPTQ's checkpoints, those of AutoGPTQ and GPTQModel; v1 stores zero points less 1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qllm import __version__
from qllm.checkpoint.formats.base import Format, Quantized
from qllm.checkpoint.formats.settings import Fields, QuantizationConfig, Test
from qllm.checkpoint.formats.tensors import (
    WORD,
    TensorReader,
    all_zeros,
    by_channel,
    from_words,
    in_order,
    to_words,
    without_middle,
)
from qllm.config import DEFAULT_GROUP_SIZE, LM_HEAD, QuantSpec
from qllm.quant.packing import PackedWeight, pack, unpack

# GPTQModel lays other widths out in bit planes, which 7.7 calls `gptq_p`.
BITS = (2, 3, 4, 8)

# vLLM joins these modules, and looks for a rule under the name of the joined one.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class GPTQ(Format):
    """A GPTQ module; `checkpoint_format: gptq_v2` is what QLLM writes.

    A column of qweight is a little-endian stream of b-bit values, which is what our rows are; the
    words behind the last value are left out.

        qweight  int32 (ceil(K b / 32), N)
        qzeros   int32 (G, ceil(N b / 32)), a row being such a stream too
        scales   (G, N), in the type they have
        g_idx    int32 (K,), the group of each input channel

    In a file g_idx may be missing, where groups are runs of input channels, and the words of
    qweight and qzeros may be filled up to whole blocks of 32 values.

    Attributes:
        v1: the zero points are stored less 1, as the original GPTQ does.
    """

    name = "gptq"
    tensors = ("qweight", "qzeros", "scales")
    optional = ("g_idx",)
    channels = {"qweight": (1, False), "qzeros": (1, True), "scales": (1, False)}  # noqa: RUF012

    v1: bool = False

    @staticmethod
    def holds(spec: QuantSpec) -> bool:
        return spec.kind == "weight_only" and spec.bits in BITS

    def read(
        self, tensors: Mapping[str, Tensor], in_features: int, out_features: int
    ) -> PackedWeight:
        """See `Format.read`; a g_idx whose groups are not all of group_size is refused too.

        (The last group may be smaller.)
        """
        bits = self.spec.bits
        read = TensorReader(tensors, self.spec, in_features, out_features)
        qweight = read.stream("qweight", in_features, (None, out_features))
        zeros = read.stream("qzeros", out_features, (read.groups, None))
        if self.v1:
            zeros = _add_one(zeros, bits)
        zeros = unpack(from_words(zeros, bits, out_features), bits, out_features).t()
        scales = read.scales("scales", (read.groups, out_features)).t()
        perm = read.perm("g_idx")
        packed = in_order(from_words(qweight.t(), bits, in_features), bits, in_features, perm)
        return PackedWeight(packed, scales.contiguous(), without_middle(zeros, bits), perm)

    def write(self, weight: Quantized, in_features: int) -> dict[str, Tensor]:
        assert isinstance(weight, PackedWeight)  # which is what the spec stands for
        bits = self.spec.bits
        qweight, g_idx = by_channel(weight, self.spec, in_features)
        return {
            "qweight": to_words(qweight, bits, in_features).t().contiguous(),
            "qzeros": to_words(pack(all_zeros(weight, bits).t(), bits), bits, len(qweight)),
            "scales": weight.scales.t().contiguous(),
            "g_idx": g_idx,
        }


def _add_one(words: Tensor, bits: int) -> Tensor:
    """Each b-bit value in rows of words plus 1.

    Values that divide a word are added to word by word, so that 2^b - 1 carries into the next one:
    GPTQModel writes v1 by subtracting from words, and only so does it come back where a zero point
    is 0. Others wrap.
    """
    if WORD % bits == 0:
        ones = sum(1 << shift for shift in range(0, WORD, bits))
        return words + (ones - (1 << WORD) if ones >> (WORD - 1) else ones)
    count = words.shape[1] * WORD // bits
    values = unpack(from_words(words, bits, count), bits, count)
    return to_words(pack((values + 1) & (2**bits - 1), bits), bits, count)


def parse(fields: Fields) -> QuantizationConfig:
    """https://github.com/ModelCloud/GPTQModel: `dynamic` is tried in order, "-:" rules first."""
    layout = fields.text("checkpoint_format", "format", default="gptq").lower()
    fields.one_of("checkpoint_format", layout, ("gptq", "gptq_v2"))
    fields.unset("is_marlin_format", "rotation", "activation")
    fields.one_of("pack_dtype", fields.text("pack_dtype", default="int32"), ("int32",))
    base = _spec(fields, None)
    v1 = layout == "gptq"
    skipped: list[tuple[Test, None]] = []
    rules: list[tuple[Test, Format]] = []
    if not fields.flag("lm_head", False):
        skipped.append((LM_HEAD.__eq__, None))
    for key, override in fields.objects("dynamic").items():
        pattern = fields.pattern(key.removeprefix("-:").removeprefix("+:"))
        if key.startswith("-:"):
            skipped.append((pattern, None))
        else:
            override.unset("adapter", "format", "checkpoint_format", "pack_dtype")
            rules.append((pattern, GPTQ(_spec(override, base), v1)))
    # A list of the modules in each layer that are quantized; the others are not.
    names = fields.texts("modules_in_block_to_quantize")
    if names:
        ends = tuple(f".{name}" for name in names)
        skipped.append((lambda name: name != LM_HEAD and not f".{name}".endswith(ends), None))
    return QuantizationConfig((*skipped, *rules), GPTQ(base, v1))


def _spec(fields: Fields, base: QuantSpec | None) -> QuantSpec:
    bits = fields.number("bits", default=base.bits if base else None)
    fields.one_of("bits", bits, BITS)
    default = base.group_size if base else DEFAULT_GROUP_SIZE
    group_size = fields.group_size("group_size", default=default)
    sym = fields.flag("sym", base.scheme == "sym" if base else True)
    return QuantSpec(bits, group_size, "sym" if sym else "asym", "weight_only")


def describe(
    specs: Mapping[str, QuantSpec], quantized: Mapping[str, QuantSpec], desc_act: bool
) -> dict[str, Any]:
    (base, _), *others = Counter(quantized.values()).most_common()
    dynamic: dict[str, dict[str, Any]] = {}
    dense = [name for name in specs if name not in quantized and name != LM_HEAD]
    for regex in _alternatives(dense):
        dynamic[f"-:{regex}"] = {}
    for spec, _ in others:
        differing = {
            key: value for key, value in _to_fields(spec).items() if value != _to_fields(base)[key]
        }
        for regex in _alternatives(name for name in quantized if quantized[name] == spec):
            dynamic[f"+:{regex}"] = dict(differing)
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        **_to_fields(base),
        "desc_act": desc_act,
        "lm_head": LM_HEAD in quantized,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"qllm:{__version__}"]},
    }
    if dynamic:
        config["dynamic"] = dynamic
    return config


def _to_fields(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.scheme == "sym"}


def _alternatives(names: Iterable[str]) -> list[str]:
    """Regular expressions that match just these names, one for each set of layers.

    "model.layers.0.mlp.up_proj" and "model.layers.1.mlp.up_proj" become
    "^model\\.layers\\.(?:0|1)(?:\\.mlp\\.up_proj)$".
    """
    layers: dict[tuple[str, str], list[str]] = {}
    for name in _with_fused(names):
        match = re.fullmatch(r"(.*?)(?:(?<=\.)(\d+)(?=\.)(.*))?", name)
        assert match is not None  # all of it is optional, or anything
        before, index, after = match.groups("")
        layers.setdefault((before, after), []).append(index)
    tails: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (before, after), indices in layers.items():
        tails.setdefault((before, tuple(indices)), []).append(after)
    return [
        f"^{re.escape(before)}{_either(indices)}{_either(after)}$"
        for (before, indices), after in tails.items()
    ]


def _either(parts: Iterable[str]) -> str:
    listed = "|".join(re.escape(part) for part in parts)
    return f"(?:{listed})" if listed else ""


def _with_fused(names: Iterable[str]) -> list[str]:
    """The names, and those that vLLM gives to modules joined from them."""
    known = dict.fromkeys(names)
    for name in list(known):
        parent, _, last = name.rpartition(".")
        for fused, parts in FUSED.items():
            if last == parts[0] and all(f"{parent}.{part}" in known for part in parts):
                known[f"{parent}.{fused}"] = None
    return list(known)
