"""QLLM: language models with their linear layers held at 1 to 8 bits, or 16."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# What `from qllm import …` gives besides, imported when it is asked for: torch takes a second.
_FRONT = {
    "Completion": "qllm.llm",
    "LLM": "qllm.llm",
    "UserError": "qllm.errors",
    "quantize": "qllm.quantize_model",
    "CalibrationText": "qllm.data",
    "QuantizeOptions": "qllm.quant.algorithm",
    "GPTQOptions": "qllm.quant.algorithm",
    # Neural Compressor's names; `quantization` is the module itself.
    "AccuracyCriterion": "qllm.neural_compressor",
    "PostTrainingQuantConfig": "qllm.neural_compressor",
    "TuningCriterion": "qllm.neural_compressor",
    "quantization": "qllm.neural_compressor",
}


def __getattr__(name: str) -> object:
    if name not in _FRONT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_FRONT[name])
    return module if name == "quantization" else getattr(module, name)
