"""The two ways in which a pass over the layers uses a KV cache: prefill and decode."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from qllm import ops
from qllm.models.cache import KINDS, KVCache
from qllm.models.positions import PositionEncoding
from qllm.ops.kv import Batch, Scores
from qllm.ops.recurrent import RecurrentState, StateShape


class Pass:
    """What both ways share: tensors that every layer reads, on the device of most layers.

    Attributes:
        batch: which tokens it takes.
        cos_sin: by which queries and keys are rotated, (N, D) each, of each kind of `encoding`, and
            behind them what multiplies queries, (N,), where something does; None: they are not
            rotated.
        slopes: float32 (H,), of ALiBi; None: there are none.
        qkv_of: queries, keys and values (N, heads D) of layers whose keys and values others take.
        layer_inputs: what layers take of tokens beside states, (N, layers channels).
    """

    batch: Batch
    encoding: PositionEncoding
    cos_sin: tuple[tuple[Tensor, ...] | None, ...]
    slopes: Tensor | None

    def __init__(self) -> None:
        self._elsewhere: dict[torch.device, Self] = {}
        self.qkv_of: dict[int, Tensor] = {}
        self.layer_inputs: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """int64 (N,): of each token in its sequence."""
        return self.batch.positions

    def _rotation(
        self, qkv: Tensor, heads: Sequence[int], layer: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """qkv with what multiplies its queries, and the cosines and sines of a layer."""
        kind = self.encoding.kind(layer)
        found = None if kind is None else self.cos_sin[kind]
        if found is None:
            return qkv, None
        for factors in found[2:]:
            columns = heads[0] * (qkv.shape[1] // sum(heads))
            qkv = ops.on(qkv.device.type).scale_rows(qkv, factors, columns)
        return qkv, (found[0], found[1])

    def select(self, x: Tensor) -> Tensor:
        """Of rows (N, C), those of which a layer's results are asked for."""
        return self.batch.select(x)

    def last(self) -> Self:
        """The same pass, for a layer of which each sequence's last token alone is asked for."""
        step = copy.copy(self)
        step.batch = self.batch._replace(last=self.batch.max_tokens > 1)
        return step

    def on(self, device: torch.device) -> Self:
        """The same pass, for layers on a device."""
        if device == self.positions.device:
            return self
        if device not in self._elsewhere:
            moved = self._elsewhere[device] = copy.copy(self)
            moved._elsewhere = {}  # not the one that it is in itself
            for name in ("batch", "cos_sin", "slopes"):
                setattr(moved, name, _moved(getattr(self, name), device))
        return self._elsewhere[device]


def _moved(value: object, device: torch.device) -> object:
    """Tensors, alone or in tuples, on a device."""
    if isinstance(value, Batch):
        rows, starts, positions = (part.to(device) for part in value[:3])
        return value._replace(rows=rows, starts=starts, positions=positions)
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


class Prefill(Pass):
    """One pass over runs of tokens, each attending to itself and to what its row holds already."""

    def __init__(
        self,
        lengths: Sequence[int],
        cache: KVCache | None,
        encoding: PositionEncoding,
        x: Tensor,
        *,
        rows: Sequence[int] | None = None,
        ends: Sequence[int] | None = None,
        bits: int = 16,
    ) -> None:
        """
        Args:
            lengths: of the runs.
            cache: takes keys and values; None: they are whole sequences, and it keeps none.
            x: of the device and type of the activations.
            rows: of the cache; None: 0, 1, …
            ends: tokens of each run's sequence once all its runs have come, where more do.
            bits: of keys and values where there is no cache, as of one.
        """
        super().__init__()
        rows = range(len(lengths)) if rows is None else rows
        pasts = [0] * len(lengths) if cache is None else [cache.lengths[row] for row in rows]
        self.cache, self.bits, self.encoding = cache, bits, encoding
        self.batch = Batch.of(lengths, x.device, rows, pasts)
        if ends is None:
            ends = [past + length for past, length in zip(pasts, lengths, strict=True)]
        of_tokens = [end for end, n in zip(ends, lengths, strict=True) for _ in range(n)]
        self.cos_sin = tuple(
            each.cos_sin(self.positions, of_tokens, x.dtype) for each in encoding.kinds
        )
        self.slopes = None if encoding.slopes is None else encoding.slopes.to(x.device)

    def attend(self, layer: int, qkv: Tensor, heads: Sequence[int], scores: Scores) -> Tensor:
        """Attention among the heads [queries, keys, values] of qkv (N, heads D): (N, H D)."""
        if self.cache is None:
            shape = (len(self.batch.rows), heads[1], self.batch.span, qkv.shape[1] // sum(heads))
            # Nothing is written to what gradients go through.
            device = torch.device("meta") if ops.is_differentiable() else qkv.device
            kv = KINDS[self.bits].empty(self.bits, *shape, qkv.dtype, device)
        else:
            kv = self.cache.layers[layer]
        attend = ops.on(qkv.device.type).prefill_attention
        qkv, cos_sin = self._rotation(qkv, heads, layer)
        return attend(qkv, kv, self.batch, cos_sin, self.slopes, scores)

    def state(self, layer: int, shape: StateShape, x: Tensor) -> RecurrentState:
        """That of a layer; without a cache a new one, as x has type and device."""
        if self.cache is not None:
            return self.cache.states[layer]
        return RecurrentState.empty(len(self.batch.rows), shape, x.dtype, x.device)


class Decode(Pass):
    """One pass over one new token of each live row, attending to the cache.

    Its tensors stay where they are from token to token, so that a pass can be captured and replayed
    (`qllm.ops.capture`).

    Attributes:
        size: tokens B that it takes; where there are fewer live rows the last one's is repeated,
            whose results are then computed several times over.
        tokens, positions: int64 (B,).
        logits: (B, V), in the model's type, of the last run; None where this process has none.
    """

    logits: Tensor | None = None

    def __init__(self, cache: KVCache, encoding: PositionEncoding, size: int) -> None:
        super().__init__()
        # A cache has its step: if each had the other, their memory would stay until garbage is
        # collected, and a text's cache beside the next one's.
        self._cache = weakref.ref(cache)
        self.encoding, self.size = encoding, size
        device = cache.device
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self._rows_and_positions = torch.zeros(2, size, dtype=torch.int64, device=device)
        rows, positions = self._rows_and_positions
        self.batch = Batch.of([1] * size, device)._replace(rows=rows, positions=positions)
        slopes = encoding.slopes
        self.slopes = None if slopes is None else slopes.to(device)
        self.cos_sin = ()
        self.tables = [each.table(cache.capacity, cache.dtype, device) for each in encoding.kinds]
        # A graph moves on to the next positions, and looks up what depends on nothing else.
        self._moves_on = device.type == "cuda"
        self._looks_up_itself = self._moves_on and None not in self.tables
        self._known: tuple[list[int], list[int]] | None = None  # rows and positions, on the device
        self._lengths: list[int] = []  # of the sequences, the new tokens included

    @property
    def cache(self) -> KVCache:
        """The one that it decodes into, which whoever runs it has."""
        cache = self._cache()
        assert cache is not None
        return cache

    def begin(self, tokens: Tensor) -> None:
        """Take the next tokens of the live rows, which come where each ends.

        Raises:
            IndexError: a row of the cache is full.
            ValueError: there are not as many live rows.
        """
        live = self.cache.live
        self.cache.reserve(live, [1] * len(tokens))
        self._elsewhere.clear()
        rows = [*live, *[live[-1]] * (self.size - len(live))]
        pasts = [self.cache.lengths[row] for row in rows]
        self._lengths = [past + 1 for past in pasts]
        self.tokens[: len(tokens)].copy_(tokens)
        if len(tokens) < self.size:
            self.tokens[len(tokens) :].copy_(tokens[-1:].expand(self.size - len(tokens)))
        if self._known != (rows, pasts):
            # Memory that is pinned is copied without waiting for what the device still does.
            pinned = self.tokens.is_cuda
            index = torch.tensor([rows, pasts], pin_memory=pinned)
            self._rows_and_positions.copy_(index, non_blocking=pinned)
        if self._moves_on:
            self._known = rows, self._lengths
        self.batch = self.batch._replace(span=max(self._lengths))
        if not self._looks_up_itself:
            self._look_up()

    def look_up(self) -> None:
        """The first part of a step that is captured."""
        if self._looks_up_itself:
            self.cos_sin = tuple(map(self._of_kind, self.encoding.kinds, self.tables))

    def move_on(self) -> None:
        """The last part of a step that is captured."""
        if self._moves_on:
            self.positions.add_(1)

    def _look_up(self) -> None:
        found = tuple(map(self._of_kind, self.encoding.kinds, self.tables))
        if not self.cos_sin:
            self.cos_sin = found
            return
        for pair, new in zip(self.cos_sin, found, strict=True):
            for kept, part in zip(pair or (), new or (), strict=True):
                kept.copy_(part)

    def _of_kind(
        self, encoding: PositionEncoding, table: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...] | None:
        """Cosines and sines of the tokens' positions."""
        if table is None:
            return encoding.cos_sin(self.positions, self._lengths, self.cache.dtype)
        return tuple(part[self.positions] for part in table)

    def attend(self, layer: int, qkv: Tensor, heads: Sequence[int], scores: Scores) -> Tensor:
        """Attention of qkv (B, heads D), whose keys and values join the cache: (B, H D)."""
        attend = ops.on(qkv.device.type).decode_attention
        qkv, cos_sin = self._rotation(qkv, heads, layer)
        return attend(qkv, self.cache.layers[layer], self.batch, cos_sin, self.slopes, scores)

    def state(self, layer: int, shape: StateShape, x: Tensor) -> RecurrentState:
        """That of a layer."""
        return self.cache.states[layer]
