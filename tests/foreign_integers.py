"""Checkpoints of transformers' other methods that hold integers: BitNet."""

from __future__ import annotations

import numpy as np
import torch
from foreign import Case, Folder, Writer, Written
from foreign_changes import one_dense
from oracle import layer_linears

BITNET = {"quant_method": "bitnet", "modules_to_not_convert": None}
AUTO_BITNET = BITNET | {
    **{"linear_class": "autobitlinear", "quantization_mode": "offline"},
    **{"use_rms_norm": False, "rms_norm_eps": 1e-6},
}


def bitnet(*, inverse: bool = True) -> Writer:
    """Four rows to a byte, a quarter of the matrix apart; the scale divides, or multiplies."""

    def write(rows: int, columns: int, random: np.random.Generator) -> Written:
        values = random.integers(-1, 2, (rows, columns))
        scale = torch.tensor([random.uniform(0.1, 0.3)]).bfloat16()
        scale = 1 / scale if inverse else scale
        packed = np.zeros((rows // 4, columns), np.uint8)
        for i, quarter in enumerate(np.split(values + 1, 4)):
            packed |= (quarter << 2 * i).astype(np.uint8)
        tensors = {"weight": torch.from_numpy(packed), "weight_scale": scale}
        number = scale.double()
        return tensors, torch.from_numpy(values) * (1 / number if inverse else number)

    return write


def with_a_three(folder: Folder) -> None:
    folder.state["model.layers.1.mlp.up_proj.weight"][3, 5] |= 3 << 4


def as_floats(folder: Folder) -> None:
    """Linears have their scales beside numbers that are not packed."""
    for name in layer_linears(folder.twin):
        scale = folder.state[f"{name}.weight_scale"]
        folder.state[f"{name}.weight"] = folder.twin.get_submodule(name).weight.detach() / scale


CASES = {
    "BitNet": Case(bitnet(), BITNET),
    "BitNet, OPT": Case(bitnet(), BITNET, family="opt"),
    "BitNet, BLOOM": Case(bitnet(), BITNET, family="bloom"),
    "BitNet, Phi-3": Case(bitnet(), BITNET, family="phi3"),
    "BitNet, a scale that multiplies": Case(bitnet(inverse=False), AUTO_BITNET),
    "BitNet, a linear that is not": Case(bitnet(), BITNET, one_dense),
    "BitNet, scales of numbers that are not packed": Case(
        bitnet(inverse=False),
        AUTO_BITNET,
        as_floats,
        error=r"_proj\.weight_scale, which no llama of its config\.json has",
    ),
    "BitNet, a number that is none of its three": Case(
        bitnet(), BITNET, with_a_three, error=r"layers\.1\.mlp\.up_proj\.weight holds a 3, expected"
    ),
}
