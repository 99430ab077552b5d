"""The formats of quantized checkpoints, and the `quantization_config` that names one per module.

Read are GPTQ (v1 and v2), AWQ, AutoRound's, compressed-tensors, MLX's, BitNet's, HQQ's, and the
integers of bitsandbytes and torchao; and the small floats of several tools, those of 4 bits as
integers, others as numbers. Written is
GPTQ v2 where that holds every module, and compressed-tensors otherwise: nobody's GPTQ knows int8
activations, or all widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qllm.checkpoint.formats import (
    auto_round,
    bitnet,
    bitsandbytes,
    compressed_tensors,
    floats,
    gptq,
    hqq,
    mlx,
    torchao,
)
from qllm.checkpoint.formats.awq import AWQ
from qllm.checkpoint.formats.awq import parse as parse_awq
from qllm.checkpoint.formats.base import (
    FloatMatrix,
    Format,
    Int8Weight,
    Quantized,
    join_rows,
    take_rows,
)
from qllm.checkpoint.formats.floats import find_unscaled
from qllm.checkpoint.formats.fp4 import FP4
from qllm.checkpoint.formats.gguf import GGUFBlocks, GGUFMixed
from qllm.checkpoint.formats.gguf import parse as parse_gguf
from qllm.checkpoint.formats.settings import Fields, QuantizationConfig, short
from qllm.checkpoint.formats.tensors import WORD
from qllm.config import QuantSpec

_FORMATS: tuple[type[Format], ...] = (
    *(gptq.GPTQ, AWQ, GGUFBlocks, GGUFMixed, mlx.MLX, mlx.Metal, bitsandbytes.Int8),
    FP4,
    *(bitnet.BitNet, hqq.HQQ, torchao.TorchAO, torchao.TorchAOInt4),
    *compressed_tensors.FORMATS.values(),
)
FORMATS: dict[str, type[Format]] = {format.name: format for format in _FORMATS}
# What reads the settings of each quant_method.
METHODS: dict[str, Callable[[Fields], QuantizationConfig]] = {
    "gptq": gptq.parse,
    "awq": parse_awq,
    "auto-round": auto_round.parse,
    "intel/auto-round": auto_round.parse,  # as it was called at first
    "compressed-tensors": compressed_tensors.parse,
    "gguf": parse_gguf,
    "mlx": mlx.parse,  # as the reader calls it: MLX's own settings do not say
    "metal": mlx.parse_metal,
    "bitsandbytes": bitsandbytes.parse,
    "bitnet": bitnet.parse,
    "hqq": hqq.parse,
    "torchao": torchao.parse,
    "mxfp4": floats.parse_mxfp4,
    "fp8": floats.parse_fp8,
    "mxfp8": floats.parse_fp8,
    "fbgemm_fp8": floats.parse_fp8,
    "modelopt": floats.parse_modelopt,
    "modelopt_fp4": floats.parse_modelopt,
}


def parse(value: Any, where: str) -> QuantizationConfig:
    """Read a `quantization_config`.

    Args:
        value: the JSON object.
        where: the file it is from, for messages.

    Raises:
        UserError: for one that is not whole, or that QLLM cannot compute what it says.
    """
    if isinstance(value, dict) and isinstance(value.get("quantization_config"), dict):
        # Older compressed-tensors nested it so.
        value = {"quant_method": "compressed-tensors", **value["quantization_config"]}
    fields = Fields(value, f"{where}: quantization_config")
    method = fields.text("quant_method")
    if method.lower() not in METHODS:
        found = f"quant_method {short(method)}"
        raise fields.error(found, f"QLLM reads {', '.join(sorted(METHODS))}")
    return METHODS[method.lower()](fields)


def describe(
    specs: Mapping[str, QuantSpec], *, desc_act: bool = False, compressed: bool = False
) -> dict[str, Any]:
    """The `quantization_config` of a model, such that `parse` finds each module's spec in it.

    Args:
        specs: Hugging Face module name to spec, 16-bit ones included. At least one is quantized.
        desc_act: input channels are grouped by importance (their groups are in `g_idx`).
        compressed: compressed-tensors where GPTQ would hold every module, too; it alone holds
            embeddings.
    """
    specs = {name: _plain(spec) for name, spec in specs.items()}
    quantized = {name: spec for name, spec in specs.items() if spec.kind != "dense"}
    if not quantized:
        raise ValueError("every module is at 16 bits; there is no quantization to describe")
    if all(map(gptq.GPTQ.holds, quantized.values())) and not compressed:
        return gptq.describe(specs, quantized, desc_act)
    return compressed_tensors.describe(specs, quantized, desc_act)


def _plain(spec: QuantSpec) -> QuantSpec:
    """What of a spec a checkpoint is told: not how the integers were chosen."""
    if spec.kind == "dense":
        return QuantSpec()
    return QuantSpec(spec.bits, spec.group_size, spec.scheme, spec.kind)


__all__ = [
    "FORMATS",
    "FP4",
    "WORD",
    "FloatMatrix",
    "Format",
    "Int8Weight",
    "QuantizationConfig",
    "Quantized",
    "describe",
    "find_unscaled",
    "join_rows",
    "parse",
    "take_rows",
]
