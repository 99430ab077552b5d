"""Bundled models of two layers or so, where more would do the same again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from checkpoints import copy_of, state_of
from safetensors.torch import save_file

QUANT, GEN, REF, CONVERT = "qllm_quant.py", "qllm_gen.py", "ref_gen.py", "weight_convert.py"
LAYERS = {"opt": "model.decoder.layers.", "bloom": "transformer.h.", "llama": "model.layers."}
COUNTS = {"opt": "num_hidden_layers", "bloom": "n_layer", "llama": "num_hidden_layers"}


def shallow(
    family: str, folder: Path, change: Callable[[dict], None] | None = None, layers: int = 2
) -> Path:
    """The first layers of a bundled model, with its tokenizer."""
    copy_of(family, folder, weights=False, **{COUNTS[family]: layers})
    start = LAYERS[family]
    state = {
        name: tensor
        for name, tensor in state_of(family).items()
        if not name.startswith(start) or int(name.removeprefix(start).split(".")[0]) < layers
    }
    if change is not None:
        change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def calibrated(text: Path, count: int = 4, length: int = 32) -> tuple:
    return ("--dataset", text, "--nsamples", count, "--seqlen", length)
