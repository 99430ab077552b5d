"""What a plan decides on: linears, and those that do the same in all experts of a layer, at once.

Experts by themselves would be 12,288 decisions of Qwen3-30B-A3B, more than the program is solved
with; and what one of them loses that few tokens of a text chose is mostly chance.
"""

from __future__ import annotations

import re

from qllm.checkpoint.weights import Weights
from qllm.config import EMBEDDING, LM_HEAD, ModelConfig
from qllm.errors import UserError
from qllm.models.mlp import EXPERTS

EACH = "*"  # in a name, in the place of an expert's number


def decided_modules(weights: Weights, lm_head: bool, embedding: bool = False) -> tuple[str, ...]:
    """The names of what a plan decides on, in the order in which states meet it.

    Those of experts are like "layers.0.mlp.experts.*.up".

    Args:
        lm_head: the LM head is one of them.
        embedding: the embedding is one.

    Raises:
        UserError: for a head that would be decided on twice.
    """
    if lm_head and embedding and weights.config.tied_head:
        raise UserError(
            "this model's LM head is its embedding, and `embedding` decides on both; leave "
            "`lm_head` out"
        )
    linears = weights.family.layer_linears(weights.config)
    names = dict.fromkeys(_decided(name) for name in linears)
    return (*[EMBEDDING] * embedding, *names, *[LM_HEAD] * lm_head)


def _decided(linear: str) -> str:
    """The name of what decides on a linear in a layer."""
    layer, experts, inner = linear.partition(EXPERTS)
    return f"{layer}{experts}{EACH}.{inner.partition('.')[2]}" if experts else linear


def of_experts(name: str) -> bool:
    """Whether a name is that of several linears."""
    return EACH in name


def linears_of(name: str, config: ModelConfig) -> tuple[str, ...]:
    """The linears that a name of `decided_modules` stands for, all of one shape."""
    if not of_experts(name):
        return (name,)
    assert config.experts is not None  # else there is no such name
    return tuple(name.replace(EACH, str(index)) for index in range(config.experts.count))


def pattern_of(name: str) -> str:
    """The regular expression that is found in the names of a module's linears alone."""
    return f"^{re.escape(name)}$".replace(re.escape(EACH), r"\d+")
