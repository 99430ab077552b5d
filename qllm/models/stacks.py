"""Tensors of all experts of a layer, one behind the other, as some files have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# MLX's tensors of a linear, and those of the numbers that gpt-oss's own files have.
MLX_KINDS = ("weight", "scales", "biases", "bias")
PLAIN, MXFP4 = ("", "_bias"), ("_blocks", "_scales")
KIND_OF_ENDING = {"": "weight", "_bias": "bias", "_blocks": "blocks", "_scales": "scales"}
UP, DOWN = "mlp.experts.{}.up", "mlp.experts.{}.down"


@dataclass(frozen=True)
class Stack:
    """What a tensor of all experts of a layer, one behind the other, holds of each (E, …).

    Attributes:
        parts: the checkpoint's names of linears, with {} for the number of an expert, whose output
            channels lie one behind the other.
        kind: which of their tensors it is.
        turned: it is (E, inputs, outputs); None: it may be, and the hidden size says whether.
        outer: which dimension of (outputs, inputs) has the hidden size.
        interleaved: the output channels of the parts come in turn.
    """

    parts: tuple[str, ...]
    kind: str = "weight"
    turned: bool | None = False
    outer: int = 1
    interleaved: bool = False


Stacks = Mapping[str, Stack]


def gpt_oss_stacks(inner: Mapping[str, tuple[str, ...]]) -> dict[str, Stack]:
    """Those of gpt-oss, whose gate and up come channel by channel, and of MLX's copies of it."""
    found = {}
    for ending in (*PLAIN, *MXFP4):
        kind, turned = KIND_OF_ENDING[ending], not ending
        gate_up = Stack(inner[UP], kind, turned, interleaved=True)
        found[f"mlp.experts.gate_up_proj{ending}"] = gate_up
        found[f"mlp.experts.down_proj{ending}"] = Stack(inner[DOWN], kind, turned, outer=0)
    return found | mlx_stacks(inner, "mlp.experts.")


def stacks_of(inner: Mapping[str, tuple[str, ...]], block: str) -> dict[str, Stack]:
    """Those of transformers 5, in either orientation, and of MLX.

    Args:
        inner: a family's names of parts.
        block: what its name of the mixture in a layer is, "mlp.".
    """
    return {
        f"{block}experts.gate_up_proj": Stack(inner[UP], turned=None),
        f"{block}experts.down_proj": Stack(inner[DOWN], turned=None, outer=0),
        **mlx_stacks(inner, f"{block}switch_mlp."),
    }


def mlx_stacks(inner: Mapping[str, tuple[str, ...]], block: str) -> dict[str, Stack]:
    """Those of MLX, which has a stack of each linear."""
    names = ("gate_proj", "up_proj", "down_proj")
    return {
        f"{block}{name}.{kind}": Stack((part,), kind)
        for name, part in zip(names, (*inner[UP], *inner[DOWN]), strict=True)
        for kind in MLX_KINDS
    }
