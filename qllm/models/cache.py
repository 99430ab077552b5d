"""The KV cache, and the two ways a pass over the layers uses it: prefill and decode."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from qllm import ops
from qllm.config import ModelConfig
from qllm.models.positions import PositionEncoding
from qllm.ops.cpu.tape import Tape
from qllm.ops.gpu.graph import Graph


class KVCache:
    """Keys and values of every token so far, allocated once.

    Attributes:
        keys, values: one (B, H_kv, capacity, D) per layer, an empty one where it is not here.
        lengths: tokens held for each of the B rows.
        step, tape: what decodes into it and the calls that takes, once something has.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        device_map: Mapping[int, torch.device | str] | None = None,
    ) -> None:
        """
        Args:
            device: of what goes into it.
            device_map: of the layers that have a cache here, the device; None: all, on `device`.
        """
        if device_map is None:
            device_map = dict.fromkeys(range(config.num_layers), device)
        shape = (rows, config.num_kv_heads, capacity, config.head_dim)
        none = torch.empty(0, dtype=dtype, device=device)
        both = dict.fromkeys(range(config.num_layers), (none, none))
        for each in set(device_map.values()):
            layers = [i for i in device_map if device_map[i] == each]
            # Zeros: a shorter row's unused places are masked, but 0 * NaN would still be NaN.
            keys, values = torch.zeros((2, len(layers), *shape), dtype=dtype, device=each)
            both |= zip(layers, zip(keys, values, strict=True), strict=True)
        self.keys, self.values = zip(*both.values(), strict=True)
        self.capacity, self.dtype, self.device = capacity, dtype, none.device
        self.lengths = [0] * rows
        self.step: Decode | None = None
        self.tape: Tape | Graph | None = None

    def check(self, lengths: Sequence[int]) -> None:
        """Refuse what rows of these lengths would write outside the cache.

        Raises:
            IndexError: a row is longer than the cache.
            ValueError: there are not as many rows.
        """
        rows = len(self.lengths)
        if len(lengths) != rows:
            raise ValueError(f"{len(lengths)} prompts for a cache of {rows} rows")
        if max(lengths) > self.capacity:
            raise IndexError(f"{max(lengths)} tokens in a cache for {self.capacity}")

    @staticmethod
    def size(config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype) -> int:
        """Bytes of a cache."""
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
        return rows * capacity * per_token


class Pass:
    """What both ways share: tensors that every layer reads, on the device of most layers.

    Attributes:
        together: what attention of all prompts at once takes besides; None where there is none.
    """

    positions: Tensor
    angles: object
    slopes: Tensor | None
    together: tuple | None = None

    def __init__(self) -> None:
        self._elsewhere: dict[torch.device, Self] = {}

    def on(self, device: torch.device) -> Self:
        """The same pass, for layers on a device."""
        if device == self.positions.device:
            return self
        if device not in self._elsewhere:
            moved = self._elsewhere[device] = copy.copy(self)
            for name in ("positions", "angles", "slopes", "together"):
                setattr(moved, name, _moved(getattr(self, name), device))
        return self._elsewhere[device]


def _moved(value: object, device: torch.device) -> object:
    """Tensors, alone or in sequences, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return value if value is None else [_moved(part, device) for part in value]


class Prefill(Pass):
    """One pass over whole prompts, each attending to itself."""

    def __init__(
        self, lengths: Sequence[int], cache: KVCache | None, encoding: PositionEncoding, x: Tensor
    ) -> None:
        super().__init__()
        if cache is not None:
            cache.check(lengths)
        self.lengths, self.cache = lengths, cache
        self.positions = torch.cat([torch.arange(n, device=x.device) for n in lengths])
        angles = encoding.angles(self.positions, max(lengths), x.dtype)
        parts = [part.split(lengths) for part in angles or ()]
        self.angles = list(zip(*parts, strict=True)) or [None] * len(lengths)
        self.slopes = None if encoding.slopes is None else encoding.slopes.to(x.device)
        if ops.on(x.device.type).prompts_attention:
            counts = torch.tensor([0, *lengths])
            rows = torch.arange(len(lengths)).repeat_interleave(counts[1:])
            starts = counts.cumsum(0).to(torch.int32)
            self.together = (angles, rows.to(x.device), starts.to(x.device))

    def attend(self, layer: int, qkv: Tensor, heads: Sequence[int]) -> Tensor:
        """Attention among the heads [queries, keys, values] of qkv (N, heads D): (N, H D)."""
        kv_heads, dim = heads[1], qkv.shape[1] // sum(heads)
        at_once = ops.on(qkv.device.type).prompts_attention
        if at_once and self.together:
            if self.cache is None:
                shape = (2, len(self.lengths), kv_heads, max(self.lengths), dim)
                keys, values = qkv.new_empty(shape)
            else:
                keys, values = self.cache.keys[layer], self.cache.values[layer]
            angles, rows, starts = self.together
            place = (rows, self.positions, starts, max(self.lengths))
            return at_once(qkv, keys, values, *place, angles, self.slopes)
        outputs = []
        for row, (part, angles) in enumerate(
            zip(qkv.split(self.lengths), self.angles, strict=True)
        ):
            if self.cache is None:
                keys, values = part.new_empty(2, kv_heads, len(part), dim)
            else:
                keys, values = self.cache.keys[layer][row], self.cache.values[layer][row]
            attend = ops.on(qkv.device.type).prompt_attention
            outputs.append(attend(part, keys, values, angles, self.slopes))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class Decode(Pass):
    """One pass over one new token per row, attending to the cache.

    Its tensors keep their places from token to token, so that the calls of a pass can be kept and
    made again (`qllm.ops.cpu.tape`, `qllm.ops.gpu.graph`).

    Attributes:
        tokens, positions: int64 (B,).
        angles: (B, D) each, or None.
    """

    def __init__(self, cache: KVCache, encoding: PositionEncoding) -> None:
        super().__init__()
        self.cache, self.encoding = cache, encoding
        device = cache.device
        self.tokens = torch.zeros(len(cache.lengths), dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.tokens)
        slopes = encoding.slopes
        self.slopes = None if slopes is None else slopes.to(device)
        self.angles: tuple[Tensor, Tensor] | None = None
        self.table = encoding.table(cache.capacity, cache.dtype, device)

    def begin(self, tokens: Tensor) -> None:
        """Take the next tokens (B,), which come where the cache ends.

        Raises:
            IndexError: a row of the cache is full.
        """
        self.cache.check([n + 1 for n in self.cache.lengths])
        self._elsewhere.clear()
        self.tokens.copy_(tokens)
        self.positions.copy_(torch.tensor(self.cache.lengths))
        self.span = max(self.cache.lengths) + 1
        if self.table is None:
            angles = self.encoding.angles(self.positions, self.span, self.cache.dtype)
        else:
            angles = tuple(part[self.positions] for part in self.table)
        if self.angles is None:
            self.angles = angles
        else:
            for kept, new in zip(self.angles, angles, strict=True):
                kept.copy_(new)

    def attend(self, layer: int, qkv: Tensor, heads: Sequence[int]) -> Tensor:
        """Attention of qkv (B, heads D), whose keys and values join the cache: (B, H D)."""
        return ops.on(qkv.device.type).decode_attention(
            qkv,
            self.cache.keys[layer],
            self.cache.values[layer],
            self.positions,
            self.span,
            self.angles,
            self.slopes,
        )
