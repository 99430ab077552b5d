"""Checkpoints of torchao's integers, in safetensors."""

from __future__ import annotations

import numpy as np
import torch
from foreign import Case, Folder, Writer, Written, draw, floats, quantize
from foreign_changes import one_dense
from foreign_floats import FLOATS, fp8


def torchao_type(kind: str, **data: object) -> dict:
    """torchao's settings as its own JSON has them."""
    return {"_type": kind, "_version": 2, "_data": data}


def granularity(kind: str, **data: int) -> dict:
    return {"_type": kind, "_version": 1, "_data": data}


def torchao_config(quant_type: dict) -> dict:
    return {
        **{"quant_method": "torchao", "quant_type": {"default": quant_type}},
        **{"modules_to_not_convert": None, "include_input_output_embeddings": False},
        **{"untie_embedding_weights": False},
    }


def int8(kind: str = "PerRow", **data: int) -> dict:
    given = data or ({"dim": -1} if kind == "PerRow" else {})
    settings = {"group_size": None, "set_inductor_config": True}
    return torchao_type("Int8WeightOnlyConfig", granularity=granularity(kind, **given), **settings)


def intx(bits: int, group: int) -> dict:
    groups = {"group_size": group} if group != -1 else {"axis": 0}
    return torchao_type(
        "IntxWeightOnlyConfig",
        granularity=granularity("PerAxis" if group == -1 else "PerGroup", **groups),
        weight_dtype={"_type": "torch.dtype", "_data": f"int{bits}"},
        intx_packing_format={"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
        mapping_type={"_type": "MappingType", "_data": "ASYMMETRIC"},
        intx_choose_qparams_algorithm="hqq_scale_only",
        scale_dtype=None,
    )


INT4 = torchao_type(
    "Int4WeightOnlyConfig",
    **{"group_size": 32, "set_inductor_config": True, "int4_tile_packed_ntile": 8},
    int4_packing_format={"_type": "Int4PackingFormat", "_data": "PLAIN"},
    int4_choose_qparams_algorithm={"_type": "Int4ChooseQParamsAlgorithm", "_data": "TINYGEMM"},
)


def torchao(
    bits: int = 8, group: int = -1, *, sym: bool = True, whole: bool = False, zeros: bool = True
) -> Writer:
    """One signed integer for each weight.

    Args:
        whole: one scale is that of all of the matrix.
        zeros: there are zero points, those of a symmetric grid too.
    """

    def write(rows: int, columns: int, random: np.random.Generator) -> Written:
        values, points, scales = draw(rows, columns, bits, group, sym, random)
        if whole:
            points, scales = points[:1], scales[:1]
        of, middle = np.arange(columns) // (columns if group == -1 else group), 2 ** (bits - 1)
        tensors = {
            "_weight_qdata": torch.from_numpy((values - middle).astype(np.int8)),
            "_weight_scale": torch.from_numpy(scales.astype(np.float32)),
        }
        if zeros:
            tensors["_weight_zero_point"] = torch.from_numpy((points - middle).astype(np.int8))
        return tensors, floats(values, points, scales, of)

    return write


def torchao_int4(rows: int, columns: int, random: np.random.Generator) -> Written:
    """`Int4Tensor`: signed integers, two to a byte, to which numbers are added."""
    values, zeros, scales = draw(rows, columns, 4, 32, False, random)
    scales, nibbles = torch.from_numpy(scales.T).bfloat16(), (values - 8) & 15
    added = (scales * torch.from_numpy(8.3 - zeros.T)).bfloat16()
    tensors = {
        "_weight_qdata": torch.from_numpy(
            (nibbles[:, ::2] | nibbles[:, 1::2] << 4).astype(np.uint8)
        ),
        "_weight_scale": scales,
        "_weight_zero_point": added,
    }
    tensors["_weight_qdata"] = tensors["_weight_qdata"].view(torch.int8)
    of = torch.arange(columns) // 32
    return tensors, torch.from_numpy(values - 8) * scales.t()[:, of].double() + added.t()[:, of]


def by_names(folder: Folder) -> None:
    """Linears have settings by a name, by patterns, and one of none."""
    random, twin, state = np.random.default_rng(1), folder.twin, folder.state
    down, up = (f"model.layers.1.mlp.{name}_proj" for name in ("down", "up"))
    gate, o = "model.layers.1.mlp.gate_proj", "model.layers.0.self_attn.o_proj"
    writes = {down: torchao(3, 32, sym=False), up: torchao(6, 16), gate: torchao(6, 16), o: None}
    for name, write in writes.items():
        for key in [key for key in state if key.startswith(f"{name}.")]:
            del state[key]
        state[f"{name}.weight"] = twin.get_submodule(name).weight.detach().clone()
        if write:
            quantize(twin, state, name, write, random)
    names = {
        "_default": int8(),
        f"{down}.weight": intx(3, 32),
        r"re:.*\.0\..*o_proj": None,
        r"re:.*\.1\.mlp\.(up|gate)_proj": intx(6, 16),
    }
    types = torchao_type("FqnToConfig", fqn_to_config=names, module_fqn_to_config=names)
    folder.config["quantization_config"]["quant_type"]["default"] = types | {"_version": 1}


def with_tables(folder: Folder) -> None:
    """Embedding and head are quantized as well."""
    for name in ("model.embed_tokens", "lm_head"):
        quantize(folder.twin, folder.state, name, torchao(), np.random.default_rng(1))


def scaled_first(folder: Folder) -> None:
    """What AWQ leaves: inputs are multiplied by numbers before."""
    folder.state["model.layers.0.mlp.up_proj._weight_act_pre_scale"] = torch.ones(64)


def float8(rows: int, columns: int, random: np.random.Generator) -> Written:
    tensors, weight = fp8((1, 0), "_weight_scale")(rows, columns, random)
    return {"_weight_qdata": tensors["weight"], "_weight_scale": tensors["_weight_scale"]}, weight


FLOAT8 = torchao_type(
    "Float8WeightOnlyConfig",
    granularity=granularity("PerRow", dim=-1),
    weight_dtype={"_type": "torch.dtype", "_data": "float8_e4m3fn"},
    set_inductor_config=True,
)
CASES = {
    "torchao, FP8": Case(float8, torchao_config(FLOAT8), one_dense, note=FLOATS),
    "torchao, int8": Case(torchao(), torchao_config(int8())),
    "torchao, int8, OPT": Case(torchao(), torchao_config(int8()), family="opt"),
    "torchao, int8, BLOOM": Case(torchao(), torchao_config(int8()), family="bloom"),
    "torchao, int8 without zero points": Case(torchao(zeros=False), torchao_config(int8())),
    "torchao, int8 in groups": Case(
        torchao(8, 32), torchao_config(int8("PerGroup", group_size=32)), family="phi3"
    ),
    "torchao, int8, a scale per matrix": Case(
        torchao(whole=True), torchao_config(int8("PerTensor"))
    ),
    "torchao, embedding and head": Case(torchao(), torchao_config(int8()), with_tables),
    **{
        f"torchao, int{bits}": Case(torchao(bits, 32, sym=False), torchao_config(intx(bits, 32)))
        for bits in range(1, 9)
    },
    "torchao, int1 of zero points of 0": Case(torchao(1, 32), torchao_config(intx(1, 32))),
    "torchao, int5 per channel": Case(torchao(5), torchao_config(intx(5, -1))),
    "torchao, a linear that is not": Case(torchao(), torchao_config(int8()), one_dense),
    "torchao, Int4Tensor": Case(torchao_int4, torchao_config(INT4)),
    "torchao, Int4Tensor, BLOOM": Case(torchao_int4, torchao_config(INT4), family="bloom"),
    "torchao, Int4Tensor, Phi-3": Case(torchao_int4, torchao_config(INT4), family="phi3"),
    "torchao, by names": Case(torchao(), torchao_config(int8()), by_names),
    "torchao, inputs that are scaled": Case(
        torchao_int4,
        torchao_config(INT4),
        scaled_first,
        error=r"up_proj\._weight_act_pre_scale, which no llama of its config\.json has",
    ),
}
