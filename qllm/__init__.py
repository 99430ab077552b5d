"""QLLM: OPT, BLOOM and Llama with their linear layers held at 1 to 8 bits, or 16."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Neural Compressor's names, imported when they are asked for: `quantization` is the module itself.
_NEURAL_COMPRESSOR = (
    "AccuracyCriterion",
    "PostTrainingQuantConfig",
    "TuningCriterion",
    "quantization",
)


def __getattr__(name: str) -> object:
    if name not in _NEURAL_COMPRESSOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module("qllm.neural_compressor")
    return module if name == "quantization" else getattr(module, name)
