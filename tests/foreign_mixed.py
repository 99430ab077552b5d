"""Checkpoints of AutoRound and MLX, whose modules may each have bits of their own."""

from __future__ import annotations

import torch
from foreign import Case, awq, gptq, mlx
from foreign_changes import as_mlx, auto_scheme, of_several_bits
from quant_configs import AUTO_ROUND

CASES = {
    "AutoRound": Case(gptq(sym=True), AUTO_ROUND),
    "AutoRound, OPT": Case(gptq(sym=True), AUTO_ROUND, family="opt"),
    "AutoRound, asymmetric": Case(gptq(), AUTO_ROUND | {"sym": False}),
    "AutoRound, zero points as they are": Case(
        gptq(v1=False),
        AUTO_ROUND | {"sym": False, "packing_format": "auto_round:gptqmodel"},
    ),
    "AutoRound, as AWQ": Case(
        awq(), AUTO_ROUND | {"sym": False, "packing_format": "auto_round:auto_awq"}
    ),
    **{
        f"AutoRound, {bits} bits": Case(
            gptq(bits, v1=False), AUTO_ROUND | {"bits": bits, "packing_format": "auto_round"}
        )
        for bits in (2, 5, 7)
    },
    "AutoRound, 6 bits less 1": Case(gptq(6), AUTO_ROUND | {"bits": 6}),
    "AutoRound, as it was called at first": Case(
        gptq(sym=True),
        {
            **{"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"},
            **{"bits": 4, "group_size": 32, "sym": True, "data_type": "int", "iters": 1000},
            **{"quant_block_list": None, "train_bs": 8, "amp": True},
        },
    ),
    "AutoRound, linears of other bits": Case(gptq(sym=True), AUTO_ROUND, auto_scheme),
    "AutoRound, what it does not name": Case(
        gptq(sym=True),
        AUTO_ROUND | {"extra_config": {".*o_proj.*": {"bits": 16, "data_type": "float"}}},
        error=r"lacks .*o_proj\.weight and holds .*o_proj\.qweight.*quantization_config.*leaves",
    ),
    **{
        f"MLX, {bits} bits": Case(mlx(bits), None, as_mlx(mlx(bits), bits))
        for bits in (2, 3, 4, 5, 6, 8)
    },
    "MLX, Gemma 3, tied": Case(mlx(), None, as_mlx(mlx(), 4, repeated=False), "gemma3_text"),
    "MLX, Phi-3": Case(mlx(), None, as_mlx(mlx(), 4), "phi3"),
    "MLX, bfloat16": Case(
        mlx(dtype=torch.bfloat16), None, as_mlx(mlx(dtype=torch.bfloat16), 4, repeated=False)
    ),
    "MLX, modules of several bits": Case(mlx(), None, of_several_bits),
    "Metal": Case(
        mlx(8, 32, "qbiases"),
        {"quant_method": "metal", "bits": 8, "group_size": 32, "modules_to_not_convert": ["head"]},
    ),
}
