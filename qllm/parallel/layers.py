"""Linear layers, attention, MLPs, embeddings and classifiers of which each rank holds a part.

Two modes. In both, the first matrix of attention and MLP is cut by output channels (whole heads),
so that a rank computes what it needs of its own; they differ in the second:

    exact   it is cut by output channels too: its inputs are gathered, and then its outputs. No sum
            is split, so all is the same to the bit as in one process
    fast    it is cut by input channels (Megatron, Shoeybi et al. 2019): each rank has a summand of
            all outputs, and one exchange adds them up; the bias is added behind it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from qllm.layers import Linear
from qllm.layers.parts import take
from qllm.parallel.group import Group
from qllm.parallel.plan import Share, attention_shares, head_shares, mlp_shares, row_share


class ColumnParallel(nn.Module):
    """Some output channels of a linear layer: x (M, K), on all ranks, to this rank's (M, n)."""

    def __init__(self, linear: Linear, group: Group, share: Share) -> None:
        super().__init__()
        self.linear, self.group, self.share = linear, group, share

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Gathered(nn.Module):
    """A linear layer with the outputs of all ranks: this rank's inputs (M, k) to (M, N).

    Attributes:
        inputs: how many input channels each rank comes with; None: all ranks have all.
    """

    def __init__(
        self, linear: Linear, group: Group, share: Share, inputs: Sequence[int] | None
    ) -> None:
        super().__init__()
        self.linear, self.group, self.share, self.inputs = linear, group, share, inputs

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            x = self.group.gather(x, self.inputs)
        return self.group.gather(self.linear(x), self.share.widths)


class RowParallel(nn.Module):
    """Some input channels of a linear layer: this rank's (M, k) to the sum over ranks (M, N)."""

    def __init__(self, linear: Linear, group: Group, bias: Tensor | None) -> None:
        super().__init__()
        self.linear, self.group = linear, group
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.group.sum(self.linear(x), self.bias)


class VocabularyParallel(nn.Module):
    """Some rows of an embedding: each token's row comes from the rank that has it.

    Buffer: weight (v, C).
    """

    def __init__(self, weight: Tensor, group: Group, share: Share) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.group, (self.rows,) = group, share.ranges[group.rank]

    def forward(self, tokens: Tensor) -> Tensor:
        out = self.weight.new_empty(len(tokens), self.weight.shape[1])
        return self.group.choose(out, lambda: self._look_up(tokens, out))

    def _look_up(self, tokens: Tensor, out: Tensor) -> None:
        """This rank's rows, and zeros for the others'."""
        index = tokens - self.rows.start
        absent = (index < 0) | (index >= len(self.rows))
        torch.index_select(self.weight, 0, index.clamp(0, len(self.rows) - 1), out=out)
        out.masked_fill_(absent[:, None], 0)


def parallel(
    linear: Linear,
    group: Group,
    share: Share,
    *,
    inputs: Sequence[int] | None = None,
    bias: Tensor | None = None,
    gather: bool = False,
) -> nn.Module:
    """What computes with this rank's part of a linear layer.

    Args:
        linear: the part, of `Linear.part`.
        inputs: of a layer behind another that is cut: how many channels each rank comes with.
        bias: of a whole layer that is cut by input channels, which its parts lack.
        gather: the outputs of all ranks are wanted.
    """
    if share.dim == 1:
        return RowParallel(linear, group, bias)
    if gather:
        return Gathered(linear, group, share, inputs)
    return ColumnParallel(linear, group, share)


def shard_linear(
    linear: Linear, group: Group, share: Share, inputs: Sequence[int] | None = None, *, gather: bool
) -> nn.Module:
    """A whole linear layer cut: what each rank keeps is a part in memory of its own."""
    part = linear.part(share.dim, *share.ranges[group.rank])
    return parallel(part, group, share, inputs=inputs, bias=linear.bias, gather=gather)


class AttentionLike(Protocol):
    """A module with `qkv` (rows: query, key, value heads), `out`, and the number of `heads`."""

    qkv: Linear
    out: Linear
    heads: list[int]


class MLPLike(Protocol):
    """A module with `up` (or gate and up, rows one behind the other) and `down`."""

    up: Linear
    down: Linear


def shard_attention(attention: AttentionLike, group: Group, mode: str = "exact") -> None:
    """Leave this rank's heads of an attention module, which then exchanges with the others.

    Its key-value cache, slopes and rotations are then those of its own heads.
    """
    count, kv_heads, _ = attention.heads
    head_dim = attention.out.in_features // count
    heads = head_shares(count, kv_heads, group.size)
    both = attention_shares(heads, head_dim, attention.out.out_features, mode)
    widths = [len(h.queries) * head_dim for h in heads]
    attention.qkv = shard_linear(attention.qkv, group, both["qkv"], gather=False)
    attention.out = shard_linear(attention.out, group, both["out"], widths, gather=mode == "exact")
    mine = heads[group.rank]
    attention.heads = [len(mine.queries), len(mine.keys), len(mine.keys)]


def shard_mlp(mlp: MLPLike, group: Group, mode: str = "exact") -> None:
    """Leave this rank's inner channels of an MLP, which then exchanges with the others."""
    inner, hidden = mlp.down.in_features, mlp.down.out_features
    gated = mlp.up.out_features == 2 * inner
    both = mlp_shares(inner, hidden, gated, group.size, mode)
    widths = [len(runs[0]) for runs in both["up"].ranges]
    mlp.up = shard_linear(mlp.up, group, both["up"], gather=False)
    mlp.down = shard_linear(mlp.down, group, both["down"], widths, gather=mode == "exact")


def shard_embedding(weight: Tensor, group: Group) -> VocabularyParallel:
    """This rank's rows of an embedding (V, C), as a module that gives all tokens theirs."""
    share = row_share(len(weight), group.size)
    return VocabularyParallel(take(weight, 0, share.ranges[group.rank]), group, share)


def shard_classifier(linear: Linear, group: Group) -> nn.Module:
    """This rank's classes of a linear layer, as a module that gives the logits of all."""
    return shard_linear(linear, group, row_share(linear.out_features, group.size), gather=True)
