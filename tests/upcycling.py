"""Mixtures of experts made of the bundled Llama, whose experts are variations of its MLPs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from checkpoints import copy_of, state_of
from safetensors.torch import save_file
from torch import Tensor

CHANNELS, INNER = 704, 96  # of an MLP, and of an expert
NOISE = 0.3  # by which an expert's weights differ from an MLP's, of their size
MLP = ("gate_proj", "up_proj", "down_proj")
# A family, to the names of its router and of an expert's matrices.
NAMES = {
    "mixtral": (
        "block_sparse_moe.gate",
        [f"block_sparse_moe.experts.{{}}.{part}" for part in ("w1", "w3", "w2")],
    ),
    "qwen2_moe": ("mlp.gate", [f"mlp.experts.{{}}.{part}" for part in MLP]),
}


def upcycled(
    family: str,
    folder: Path,
    *,
    experts: int = 4,
    top_k: int = 2,
    layers: int = 2,
    dense: Iterable[int] = (),
) -> Path:
    """A mixture, with the bundled Llama's tokenizer.

    Each of Mixtral's experts has some of an MLP's channels; of Qwen2-MoE's all have the same, and
    the shared one the others.

    Args:
        dense: layers that keep the MLP, of Qwen2-MoE.
    """
    draw = torch.Generator().manual_seed(0)
    changes = {"model_type": family, "num_hidden_layers": layers, "num_experts_per_tok": top_k}
    if family == "mixtral":
        changes |= {"num_local_experts": experts, "intermediate_size": INNER}
    else:
        changes |= {"num_experts": experts, "moe_intermediate_size": INNER, "norm_topk_prob": True}
        changes |= {"shared_expert_intermediate_size": CHANNELS - INNER, "qkv_bias": False}
        changes |= {"mlp_only_layers": list(dense)}
    copy_of("llama", folder, weights=False, **changes, sliding_window=None)
    state = state_of("llama")
    for layer in range(layers, 6):
        state = {n: t for n, t in state.items() if not n.startswith(f"model.layers.{layer}.")}
    for layer in set(range(layers)) - set(dense):
        start = f"model.layers.{layer}."
        mlp = [state.pop(f"{start}mlp.{part}.weight") for part in MLP]
        router, parts = NAMES[family]
        state[f"{start}{router}.weight"] = 0.1 * torch.randn(experts, 256, generator=draw).half()
        for expert in range(experts):
            channels = torch.arange(INNER)
            if family == "mixtral":
                channels = torch.randperm(CHANNELS, generator=draw)[:INNER]
            for part, matrix in zip(parts, channels_of(mlp, channels), strict=True):
                noise = torch.randn(matrix.shape, generator=draw)
                varied = matrix * (1 + NOISE * noise)
                state[f"{start}{part.format(expert)}.weight"] = varied.half()
        if family == "qwen2_moe":
            shared = f"{start}mlp.shared_expert"
            gate, up, down = channels_of(mlp, torch.arange(INNER, CHANNELS))
            down = 2 * down  # half of it is added
            for part, matrix in zip(MLP, (gate, up, down), strict=True):
                state[f"{shared}.{part}.weight"] = matrix
            state[f"{shared}_gate.weight"] = torch.zeros(1, 256).half()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def channels_of(mlp: list[Tensor], channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gate, up and down of some of an MLP's inner channels."""
    gate, up, down = mlp
    return gate[channels], up[channels], down[:, channels].contiguous()
