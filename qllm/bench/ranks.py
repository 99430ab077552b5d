"""What a model would take on several ranks that read memory as this machine does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qllm import report
from qllm.bench.runners import read_bytes
from qllm.bench.speed import Roofline
from qllm.checkpoint.load import outline
from qllm.config import ModelConfig, QuantPlan
from qllm.errors import UserError
from qllm.parallel.cost import Machine, table


def predict(
    folder: Path, plans: Sequence[QuantPlan], config: ModelConfig, dtype: torch.dtype | None
) -> list[dict[str, Any]]:
    """The time per token of each plan's model, from the headers of its files alone.

    Returns:
        of each, `bitwidth`, `embedding_bits`, `lm_head_bits`, `bytes` that a token reads, the
        `bandwidth` that was measured, and `rows`, see `qllm.parallel.cost.table`.

    Raises:
        UserError: without the kernels that measure memory, or for a mixture of experts, or delta
            nets; or as `outline`.
    """
    if config.experts is not None:
        raise UserError("`predict` knows no mixtures of experts, of which tokens choose")
    if config.delta_net is not None:
        raise UserError("`predict` knows no delta nets, whose heads are shared out otherwise")
    roofline = Roofline.measure("cpu")
    if roofline is None:
        raise UserError("`predict` measures memory with the compiled kernels, and there are none")
    found = []
    for plan in plans:
        model = outline(folder, plan, dtype)
        nbytes = read_bytes(model)
        about: dict[str, Any] = {
            "bitwidth": plan.text if plan.names_layers else report.bitwidth(model)
        }
        about |= {**report.outer_bits(model), "bytes": nbytes, "bandwidth": roofline.bandwidth}
        found.append(about | {"rows": table(config, nbytes, Machine(roofline.bandwidth))})
    return found
