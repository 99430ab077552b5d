"""A model over processes: each layer over ranks (`layers`), layers over stages (`pipeline`).

`session` finds the processes that torchrun started; a `Group` of them is what the functions below
take, each of which leaves this rank's part of a module in its place.
"""

from __future__ import annotations

from qllm.parallel.group import Group
from qllm.parallel.layers import (
    shard_attention,
    shard_classifier,
    shard_embedding,
    shard_linear,
    shard_mlp,
)
from qllm.parallel.plan import Share, row_share

__all__ = [
    "Group",
    "Share",
    "row_share",
    "shard_attention",
    "shard_classifier",
    "shard_embedding",
    "shard_linear",
    "shard_mlp",
]
