"""Attention of a layer of any family: its matrices, norms of queries and keys, and scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qllm import ops
from qllm.config import ModelConfig
from qllm.layers import Linear
from qllm.models.norms import HeadNorm, QKNorm, WideQKNorm
from qllm.models.passes import Decode, Prefill
from qllm.ops.kv import Scores
from qllm.ops.reference import Int8Rows

if TYPE_CHECKING:
    from qllm.parallel.layers import LinearOrShard

MakeLinear = Callable[[str, int, int, bool], Linear]
QKV, QK_NORM = "attention.qkv", "attention.qk_norm"
ATTENTION_LINEARS = (QKV, "attention.out")


class Sinks(nn.Module):
    """A score of each head that joins its softmax, and weighs no value: weight (H,).

    Attributes:
        ranges: runs of heads that this process has; None: all.
    """

    weight: Tensor
    ranges: tuple[range, ...] | None = None

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.empty(config.num_heads, dtype=dtype, device="meta")
        self.register_buffer("weight", weight)
        # As ops take them, which a step that is captured keeps: those of the last weight.
        self._known: tuple[Tensor, Tensor] | None = None

    def forward(self, scores: Scores) -> Scores:
        """What attention makes of products, with the sinks."""
        if self._known is None or self._known[0] is not self.weight:
            self._known = self.weight, self.weight.float()
        return scores._replace(sinks=self._known[1])


class Attention(nn.Module):
    """Grouped-query attention with one fused QKV matrix, rows [q heads; k heads; v heads]."""

    qkv: LinearOrShard
    out: LinearOrShard

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
    ) -> None:
        super().__init__()
        self.index = index
        self.heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        width = config.num_heads * config.head_dim
        rows = sum(config.qkv_parts) * config.head_dim + (width if config.attention_gate else 0)
        name = f"layers.{index}.attention"
        self.scores = scores_of_layer(config, index)
        self.sinks = Sinks(config, dtype) if config.sinks else None
        self.qkv = make(f"{name}.qkv", config.hidden_size, rows, config.attention_bias)
        self.out = make(f"{name}.out", width, config.hidden_size, config.output_bias)

    def project(self, x: Tensor | Int8Rows) -> Tensor:
        """The queries, keys and values that attention takes: (N, heads D)."""
        return self.qkv(x)

    def forward(self, x: Tensor | Int8Rows, step: Prefill | Decode) -> Tensor:
        scores = self.scores if self.sinks is None else self.sinks(self.scores)
        return self.out(step.attend(self.index, self.project(x), self.heads, scores))


def scores_of_layer(config: ModelConfig, index: int) -> Scores:
    """What a layer's attention makes of products."""
    scale = config.score_scale
    if config.scale_by_layer:
        scale = Scores(scale).factor(config.head_dim) / (index + 1)
    window = config.windows[index] if config.windows else 0
    return Scores(scale, config.score_cap or 0.0, window)


class NormedAttention(Attention):
    """Attention whose queries and keys are normed, head by head, before they are rotated."""

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
    ) -> None:
        super().__init__(config, index, dtype, make)
        self.qk_norm = QKNorm(config, dtype)

    def project(self, x: Tensor | Int8Rows) -> Tensor:
        return self.qk_norm(self.qkv(x), self.heads)


class WideNormedAttention(Attention):
    """Attention whose queries and keys are normed, of all heads together, before they are rotated.

    Of several ranks each norms the heads of all, and takes its own from there.

    Attributes:
        own: int64, the columns of QKV that this rank attends with; None: all.
    """

    own: Tensor | None = None

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
    ) -> None:
        super().__init__(config, index, dtype, make)
        self.qk_norm = WideQKNorm(config, dtype)

    def project(self, x: Tensor | Int8Rows) -> Tensor:
        qkv = self.qk_norm(self.qkv(x))
        if self.own is None:
            return qkv
        self.own = self.own.to(qkv.device)
        return ops.on(qkv.device.type).gather(qkv, self.own)


class GatedAttention(NormedAttention):
    """Normed attention whose output is multiplied by the logistic function of gates: Qwen3-Next.

    These are rows of QKV behind those of values, one for each channel of the output.

    Attributes:
        own: int64, the columns of QKV that are no gates; None: they are not known yet.
    """

    own: Tensor | None = None

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
    ) -> None:
        super().__init__(config, index, dtype, make)
        self.head_dim = config.head_dim

    def forward(self, x: Tensor | Int8Rows, step: Prefill | Decode) -> Tensor:
        every = self.qkv(x)
        device = ops.on(every.device.type)
        columns = sum(self.heads) * self.head_dim
        if self.own is None or self.own.device != every.device:
            self.own = torch.arange(columns, device=every.device)
        qkv = self.qk_norm(device.gather(every, self.own), self.heads)
        y = step.attend(self.index, qkv, self.heads, self.scores)
        return self.out(device.gate(y, step.select(every), columns, "sigmoid"))


class ValueNormedAttention(NormedAttention):
    """Attention whose values are normed, too, and may be the keys in front of their norm: Gemma 4.

    Attributes:
        columns: int64, of what `qkv` puts out, those of queries, keys and values; None: all, in
            their order.
    """

    columns: Tensor | None = None

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
    ) -> None:
        super().__init__(config, index, dtype, make)
        self.values_are_keys = config.values_are_keys
        self.shares_kv = config.shares_kv

    def project(self, x: Tensor | Int8Rows) -> Tensor:
        qkv = self.qkv(x)
        if self.values_are_keys:
            if self.columns is None or self.columns.device != qkv.device:
                queries, keys, _ = self.heads
                heads = torch.arange(qkv.shape[1], device=qkv.device).view(queries + keys, -1)
                self.columns = torch.cat([heads, heads[queries:]]).flatten()
            qkv = ops.on(qkv.device.type).gather(qkv, self.columns)
        return self.qk_norm(qkv, self.heads)

    def forward(self, x: Tensor | Int8Rows, step: Prefill | Decode) -> Tensor:
        qkv = self.project(x)
        if self.shares_kv:
            step.qkv_of[self.index] = qkv
        return self.out(step.attend(self.index, qkv, self.heads, self.scores))


class SharingAttention(Attention):
    """Attention to the keys and values that a layer in front has made: Gemma 4.

    They come through the step, and stand in the cache where that layer put them, or once more.

    Attributes:
        source: that layer.
    """

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
    ) -> None:
        super().__init__(config, index, dtype, make)
        assert config.kv_layer is not None  # as `attention_class` has it
        self.source, self.dim = config.kv_layer, config.head_dim
        self.qk_norm = HeadNorm(config.head_dim, config.norm_eps, dtype, config.norm_offset)

    def forward(self, x: Tensor | Int8Rows, step: Prefill | Decode) -> Tensor:
        q = self.qk_norm(self.qkv(x))
        columns = 2 * self.heads[1] * self.dim
        qkv = ops.on(q.device.type).join(q, step.qkv_of[self.source].to(q.device), columns)
        return self.out(step.attend(self.index, qkv, self.heads, self.scores))


def attention_class(config: ModelConfig) -> type[Attention]:
    """The attention that a model's norms ask for."""
    if config.attention_gate:
        return GatedAttention
    if config.kv_layer is not None:
        return SharingAttention
    if config.value_norm:
        return ValueNormedAttention
    if config.wide_qk_norm:
        return WideNormedAttention
    return NormedAttention if config.qk_norm else Attention
