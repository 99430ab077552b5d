"""Neural Compressor's configurations, and tokens to calibrate on."""

from __future__ import annotations

import torch

from qllm import PostTrainingQuantConfig

RTN = {".*": {"weight": {"bits": 4, "group_size": 32, "scheme": "asym", "algorithm": "RTN"}}}
FIRST = "the configuration"


def config(**options) -> PostTrainingQuantConfig:
    return PostTrainingQuantConfig(**{"approach": "weight_only", "op_type_dict": RTN} | options)


def weight(**options) -> dict:
    return {".*": {"weight": options}}


def token_ids() -> torch.Tensor:
    return torch.randint(4, 4000, (6, 24), generator=torch.Generator().manual_seed(0))


def scripted(*scores: float):
    """An eval_func that gives these scores, whatever the model."""
    rest = iter(scores)
    return lambda model: next(rest)
