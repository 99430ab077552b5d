"""Linear layers, attention, MLPs, embeddings and classifiers of which each rank holds a shard.

There are two modes. In both, the first matrix of attention and MLP is column-parallel: it is cut
by output channels (whole heads), so that a rank computes what it needs of its own. They differ in
the second matrix:

    exact   it is cut by output channels too: its inputs are all-gathered, and then its outputs. No
            sum is split, so every result is the same to the bit as in one process
    fast    it is row-parallel, cut by input channels (Megatron, Shoeybi et al. 2019): each rank has
            a partial sum of all outputs, which an all-reduce adds up; the bias is added behind it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from qllm.layers import Linear
from qllm.layers.sharding import Sharding, narrow_runs
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.parallel.group import Group
from qllm.parallel.plan import (
    Heads,
    attention_shardings,
    delta_shardings,
    mlp_shardings,
    shard_heads,
)


class ShardedLinear(nn.Module):
    """A linear layer of which each rank of a group holds a shard.

    Attributes:
        linear: this rank's shard, as `Linear.shard` cuts it.
        sharding: which channels each rank has.
    """

    def __init__(self, linear: Linear, group: Group, sharding: Sharding) -> None:
        super().__init__()
        self.linear, self.group, self.sharding = linear, group, sharding

    @property
    def ranges(self) -> tuple[range, ...]:
        """The runs of channels that this rank has."""
        return self.sharding.ranges[self.group.rank]


# What stands where a layer has a linear: all of it, or this rank's shard.
LinearOrShard = Linear | ShardedLinear


class ColumnParallel(ShardedLinear):
    """Some output channels of a linear layer: x (M, K), on all ranks, to this rank's (M, n)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class GatheredColumnParallel(ShardedLinear):
    """Some output channels, gathered from all ranks: this rank's inputs (M, k) to (M, N).

    Attributes:
        inputs: how many input channels each rank comes with; None: all ranks have all.
    """

    def __init__(
        self, linear: Linear, group: Group, sharding: Sharding, inputs: Sequence[int] | None
    ) -> None:
        super().__init__(linear, group, sharding)
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            x = self.group.all_gather(x, self.inputs)
        return self.group.all_gather(self.linear(x), self.sharding.widths)


class RowParallel(ShardedLinear):
    """Some input channels of a linear layer: this rank's (M, k) to the sum over ranks (M, N).

    Buffer: bias (N,) of the whole layer, or None; it is added once, to the sum.
    """

    bias: Tensor | None

    def __init__(
        self, linear: Linear, group: Group, sharding: Sharding, bias: Tensor | None
    ) -> None:
        super().__init__(linear, group, sharding)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(self.linear(x), self.bias)


class VocabularyParallel(nn.Module):
    """Some rows of an embedding: each token's row comes from the rank that has it.

    Buffer: weight (v, C).
    """

    weight: Tensor

    def __init__(self, weight: Tensor, group: Group, sharding: Sharding) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.group, self.ranges = group, sharding.ranges[group.rank]

    def forward(self, tokens: Tensor) -> Tensor:
        out = self.weight.new_empty(len(tokens), self.weight.shape[1])
        return self.group.all_reduce_or(out, lambda: self._look_up(tokens, out))

    def _look_up(self, tokens: Tensor, out: Tensor) -> None:
        """This rank's rows, and zeros for the others'."""
        index, absent = _rows_here(tokens, self.ranges)
        torch.index_select(self.weight, 0, index, out=out)
        out.masked_fill_(absent[:, None], 0)


class QuantizedVocabularyParallel(ShardedLinear):
    """The same of a packed matrix (V, C), of which each rank has some rows.

    Attributes:
        dtype: of the rows.
    """

    linear: WeightOnlyLinear

    def __init__(
        self, linear: WeightOnlyLinear, group: Group, sharding: Sharding, dtype: torch.dtype
    ) -> None:
        super().__init__(linear, group, sharding)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        shape = (len(tokens), self.linear.in_features)
        out = torch.empty(shape, dtype=self.dtype, device=tokens.device)
        return self.group.all_reduce_or(out, lambda: self._look_up(tokens, out))

    def _look_up(self, tokens: Tensor, out: Tensor) -> None:
        """This rank's rows, and zeros for the others'."""
        index, absent = _rows_here(tokens, self.ranges)
        out.copy_(self.linear.look_up(index, self.dtype)).masked_fill_(absent[:, None], 0)


def _rows_here(tokens: Tensor, ranges: Sequence[range]) -> tuple[Tensor, Tensor]:
    """The row of each token in this rank's run of them, any where it has none; and where."""
    (rows,) = ranges
    index = tokens - rows.start
    absent = (index < 0) | (index >= len(rows))
    return index.clamp(0, len(rows) - 1), absent


def shard_linear(
    linear: Linear,
    group: Group,
    sharding: Sharding,
    *,
    inputs: Sequence[int] | None = None,
    gather: bool = True,
) -> ShardedLinear:
    """This rank's shard of a whole linear layer, in memory of its own.

    Args:
        inputs: of a layer behind a column-parallel one: how many channels each rank comes with.
        gather: whether each rank gets the outputs of all.
    """
    shard = linear.shard(sharding, group.rank)
    if not any(tensor.is_meta for tensor in shard.buffers()):
        shard.process_weights_after_loading()
    if sharding.dim == 1:
        return RowParallel(shard, group, sharding, linear.bias)
    if gather:
        return GatheredColumnParallel(shard, group, sharding, inputs)
    return ColumnParallel(shard, group, sharding)


class AttentionLike(Protocol):
    """A module with `qkv` (rows: query, key, value heads), `out`, and the number of `heads`."""

    qkv: LinearOrShard
    out: LinearOrShard
    heads: list[int]


class DeltaNetLike(Protocol):
    """A module with `qkv` (rows: query, key, value heads, gates of those), `gates` and `out`."""

    qkv: LinearOrShard
    gates: LinearOrShard
    out: LinearOrShard


class MLPLike(Protocol):
    """A module with `up` (or gate and up, rows one behind the other) and `down`."""

    up: LinearOrShard
    down: LinearOrShard


def shard_attention(
    attention: AttentionLike,
    group: Group,
    mode: str = "exact",
    *,
    gather: bool = False,
    gated: bool = False,
) -> Tensor:
    """Shard an attention module: this rank keeps its heads, and exchanges with the others.

    Its key-value cache, slopes and rotations are then those of its own heads.

    Args:
        gather: `qkv` puts out the heads of all ranks, for what goes by all of them.
        gated: see `attention_shardings`.

    Returns:
        the columns of all heads that are this rank's, int64.
    """
    count, kv_heads, _ = attention.heads
    qkv, out = attention.qkv, attention.out
    assert isinstance(qkv, Linear)  # nothing is sharded twice
    assert isinstance(out, Linear)
    head_dim = out.in_features // count
    heads = shard_heads(count, kv_heads, group.size)
    # Behind values may stand gates; a layer without them may lack keys, or values.
    parts = 3 if gated else 1 + -(-(qkv.out_features // head_dim - count) // kv_heads)
    both = attention_shardings(heads, head_dim, out.out_features, mode, parts, gated=gated)
    widths = [len(h.queries) * head_dim for h in heads]
    even = Sharding.evenly(0, qkv.out_features, group.size)
    attention.qkv = shard_linear(qkv, group, even if gather else both["qkv"], gather=gather)
    attention.out = shard_linear(out, group, both["out"], inputs=widths)
    mine = heads[group.rank]
    attention.heads = [len(mine.queries), len(mine.keys), len(mine.keys)]
    runs = both["qkv"].ranges[group.rank]
    return torch.cat([torch.arange(run.start, run.stop, device="cpu") for run in runs])


def shard_delta_net(
    delta: DeltaNetLike, heads: list[Heads], dims: tuple[int, int], group: Group, mode: str
) -> Sequence[range]:
    """Shard a delta net: this rank keeps its heads, and exchanges with the others.

    Args:
        heads: of each rank, of keys and of values.
        dims: channels of a head's key, and of its value.

    Returns:
        the channels of the convolution that are this rank's.
    """
    qkv, gates, out = delta.qkv, delta.gates, delta.out
    assert isinstance(qkv, Linear)  # nothing is sharded twice
    assert isinstance(gates, Linear)
    assert isinstance(out, Linear)
    every = delta_shardings(heads, *dims, out.out_features, mode)
    delta.qkv = shard_linear(qkv, group, every["qkv"], gather=False)
    delta.gates = shard_linear(gates, group, every["gates"], gather=False)
    widths = [len(h.queries) * dims[1] for h in heads]
    delta.out = shard_linear(out, group, every["out"], inputs=widths)
    return every["conv"].ranges[group.rank]


def shard_mlp(mlp: MLPLike, group: Group, mode: str = "exact") -> None:
    """Shard an MLP: this rank keeps its inner channels, and exchanges with the others."""
    up, down = mlp.up, mlp.down
    assert isinstance(up, Linear)  # nothing is sharded twice
    assert isinstance(down, Linear)
    inner, hidden = down.in_features, down.out_features
    gated = up.out_features == 2 * inner
    both = mlp_shardings(inner, hidden, gated, group.size, mode)
    widths = [len(runs[0]) for runs in both["up"].ranges]
    mlp.up = shard_linear(up, group, both["up"], gather=False)
    mlp.down = shard_linear(down, group, both["down"], inputs=widths)


def shard_embedding(weight: Tensor, group: Group) -> VocabularyParallel:
    """This rank's rows of an embedding (V, C), as a module that gives all tokens theirs."""
    sharding = Sharding.evenly(0, len(weight), group.size)
    return VocabularyParallel(narrow_runs(weight, 0, sharding.ranges[group.rank]), group, sharding)


def shard_quantized_embedding(
    linear: WeightOnlyLinear, group: Group, dtype: torch.dtype
) -> QuantizedVocabularyParallel:
    """`shard_embedding` of a packed matrix, whose rows become numbers of a type."""
    sharding = Sharding.evenly(0, linear.out_features, group.size)
    shard = linear.narrow(0, *sharding.ranges[group.rank])
    return QuantizedVocabularyParallel(shard, group, sharding, dtype)


def shard_classifier(linear: Linear, group: Group) -> ShardedLinear:
    """This rank's classes of a linear layer, as a module that gives the logits of all."""
    return shard_linear(linear, group, Sharding.evenly(0, linear.out_features, group.size))
