"""A model over processes: each layer over ranks (`layers`), layers over stages (`pipeline`).

`session` finds the processes that torchrun started; a `Group` of them is what the functions below
take, each of which replaces a module by this rank's shard of it.
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
from qllm.parallel.plan import Sharding, shard_rows

__all__ = [
    "Group",
    "Sharding",
    "shard_attention",
    "shard_classifier",
    "shard_embedding",
    "shard_linear",
    "shard_mlp",
    "shard_rows",
]
