"""What stands between a head's matrix and logits."""

from __future__ import annotations

import torch
from torch import Tensor

from qllm.config import ModelConfig


def finish_logits(
    config: ModelConfig, logits: Tensor, dtype: torch.dtype | None = None, *, copy: bool = False
) -> Tensor:
    """What a head puts out as logits: scaled, in a type, and softly kept below a cap.

    What is scaled is rounded to the type that it has, as in transformers.

    Args:
        logits: (…, V).
        dtype: None: the type that they have.
        copy: the result is memory of its own in any case.
    """
    if config.logit_divisor != 1:
        logits, copy = logits / config.logit_divisor, False
    if config.logit_factor != 1:
        logits, copy = logits * config.logit_factor, False
    logits = logits.to(dtype or logits.dtype, copy=copy)
    cap = config.logit_cap
    return logits if cap is None else (logits / cap).tanh() * cap
