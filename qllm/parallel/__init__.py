"""A model over processes: each layer over ranks (`layers`), layers over stages (`pipeline`).

`session` finds the processes that torchrun started. The functions below take a `Group` of them and
make of a module this rank's shard of it. A `Decoder` that is constructed with a `ParallelContext`
shards itself with them while it is on the meta device, and loading it reads those shards alone.
"""

from __future__ import annotations

from qllm.layers.sharding import Sharding
from qllm.parallel.group import Group
from qllm.parallel.layers import (
    shard_attention,
    shard_classifier,
    shard_embedding,
    shard_linear,
    shard_mlp,
)
from qllm.parallel.pipeline import ParallelContext

__all__ = [
    "Group",
    "ParallelContext",
    "Sharding",
    "shard_attention",
    "shard_classifier",
    "shard_embedding",
    "shard_linear",
    "shard_mlp",
]
