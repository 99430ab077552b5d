"""Checkpoints of transformers' other methods that hold integers: BitNet and HQQ."""

from __future__ import annotations

import numpy as np
import torch
from foreign import Case, Folder, Writer, Written, quantize
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


def hqq_settings(bits: int, group: int | None, **changes: object) -> dict:
    """As `HqqConfig` has them of all linears, or of one kind."""
    weights = {
        **{"nbits": bits, "group_size": group, "axis": 1, "channel_wise": True, "optimize": True},
        **{"round_zero": bits == 4, "view_as_float": False},
    }
    others = {"scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
    return {"weight_quant_params": weights | changes, **others}


def hqq_config(quant_config: dict) -> dict:
    return {"quant_method": "hqq", "quant_config": quant_config, "skip_modules": ["lm_head"]}


HQQ = hqq_config(hqq_settings(4, 32))


def hqq(bits: int = 4, group: int = 32, dtype: torch.dtype = torch.float32) -> Writer:
    """Groups are rows, of which a number holds several far apart, the first in its highest bits."""

    def write(rows: int, columns: int, random: np.random.Generator) -> Written:
        width = columns if group == -1 else group
        values = random.integers(0, 2**bits, (rows * columns // width, width))
        scale, zero = (
            torch.from_numpy(random.uniform(*limits, (len(values), 1))).to(dtype)
            for limits in ((0.3 / 2**bits, 1 / 2**bits), (0.3 * 2**bits, 0.6 * 2**bits))
        )
        count = {1: 8, 2: 4, 3: 10, 4: 2}.get(bits, 1)
        parts = np.split(np.pad(values, ((0, -len(values) % count), (0, 0))), count)
        words = sum(part << bits * (count - 1 - i) for i, part in enumerate(parts))
        tensors = {
            **{"W_q": torch.from_numpy(words.astype(np.int32 if bits == 3 else np.uint8))},
            **{"scale": scale, "zero": zero, "shape": torch.tensor([rows, columns])},
        }
        numbers = {"nbits": bits, "group_size": width, "axis": 1}
        tensors |= {key: torch.tensor(value).int() for key, value in numbers.items()}
        flags = {"view_as_float": 0, "quant_scale": 0, "quant_zero": 0, "offload_meta": 0}
        flags |= {"channel_wise": 1, "optimize": 1, "round_zero": 0}
        flags |= {"encoded_state_dict": 1, "stores_quant_config": 1}
        tensors |= {key: torch.tensor(value, dtype=torch.uint8) for key, value in flags.items()}
        texts = {"packing": f"{bits}bit_u8", "compute_dtype": str(dtype)}
        texts["unpack_view_dtype"] = "torch.uint8"
        tensors |= {key: torch.tensor(list(text.encode())).byte() for key, text in texts.items()}
        weight = (torch.from_numpy(values) - zero.double()) * scale.double()
        return tensors, weight.view(rows, columns)

    return write


def of_kinds(folder: Folder) -> None:
    """Settings are of kinds of linears, one of which has bits of its own."""
    random, own = np.random.default_rng(1), "self_attn.o_proj"
    for name in (f"model.layers.{layer}.{own}" for layer in range(2)):
        folder.state[f"{name}.weight"] = torch.empty(0)
        quantize(folder.twin, folder.state, name, hqq(3, 16), random)
    kinds = [f"self_attn.{name}_proj" for name in "qkv"]
    kinds += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    one, other = hqq_settings(4, 32), hqq_settings(3, 16)
    folder.config["quantization_config"]["quant_config"] = dict.fromkeys(kinds, one) | {own: other}


def of_other_axis(folder: Folder) -> None:
    folder.state["model.layers.1.mlp.up_proj.axis"] *= 0


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
    **{
        f"HQQ, {bits} bits": Case(hqq(bits), hqq_config(hqq_settings(bits, 32)))
        for bits in (1, 2, 3, 4, 5, 6, 8)
    },
    "HQQ, OPT": Case(hqq(3), hqq_config(hqq_settings(3, 32)), family="opt"),
    "HQQ, BLOOM": Case(hqq(2), hqq_config(hqq_settings(2, 32)), family="bloom"),
    "HQQ, Phi-3": Case(hqq(3), hqq_config(hqq_settings(3, 32)), family="phi3"),
    "HQQ, per channel": Case(hqq(group=-1), hqq_config(hqq_settings(4, None))),
    "HQQ, float16": Case(hqq(dtype=torch.float16), HQQ),
    "HQQ, bfloat16": Case(hqq(dtype=torch.bfloat16), HQQ),
    "HQQ, a linear that is not": Case(hqq(), HQQ, one_dense),
    "HQQ, kinds of several bits": Case(hqq(), HQQ, of_kinds),
    "HQQ, a linear of another axis": Case(
        hqq(), HQQ, of_other_axis, error=r"layers\.1\.mlp\.up_proj\.axis is \[0\], expected \[1\]"
    ),
    "HQQ, groups of two rows": Case(
        hqq(4, 64),
        hqq_config(hqq_settings(4, 64)),
        error=r"down_proj\.W_q has groups of 64, some of which would be of two of its rows of 96",
    ),
}
