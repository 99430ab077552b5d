"""The KV cache, and the states of layers that have one in the place of keys and values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from qllm.config import DeltaNetConfig, ModelConfig
from qllm.ops.capture import CapturedStep
from qllm.ops.cpu import library
from qllm.ops.kv import KV, RUN, ring_capacity
from qllm.ops.quantized_kv import QuantizedKV
from qllm.ops.recurrent import RecurrentState, StateShape

if TYPE_CHECKING:
    from qllm.models.passes import Decode

# How keys and values are held, by bits.
KINDS: dict[int, type[KV | QuantizedKV]] = {16: KV, 8: QuantizedKV, 4: QuantizedKV}

# Tokens that a pass of prefill takes at the most, where a cache lets a long prompt come in pieces:
# its activations are bounded, and more of them at once would be no faster.
PREFILL_TOKENS = 2048


class KVCache:
    """Keys and values of sequences, each in a row that begins, goes on and ends by itself.

    A layer whose tokens see no further back than a window holds those of the window and of a pass.

    Attributes:
        layers: a `KV` for each layer, with nothing in it where the layer has none here.
        states: of the layers here that have one in the place of keys and values.
        pass_tokens: that a pass of prefill takes at the most.
        lengths: tokens of each of the R rows.
        written: the length that each row has had at the most, since it began.
        ends: where the last pass over each row ended, or would have, had it not been interrupted.
        live: the rows in use, in the order in which a decode step takes their tokens.
        step, captured: what decodes into it and how that is replayed, once something has.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        device_map: Mapping[int, torch.device | str] | None = None,
        bits: int = 16,
    ) -> None:
        """
        Args:
            rows: sequences that it has memory for; all of them begin at once.
            capacity: tokens that a row may have.
            device: of what goes into it.
            device_map: of the layers that have a cache here, the device; None: all, on `device`.
            bits: one of KINDS; 16 is `dtype`, whatever that is.
        """
        if device_map is None:
            device_map = dict.fromkeys(range(config.num_layers), device)
        states = _state_shapes(config)
        self.states = {
            i: RecurrentState.empty(rows, shape, dtype, device_map[i])
            for i, shape in states.items()
            if i in device_map
        }
        layers: list[KV | QuantizedKV] = []
        for i, shape in enumerate(_shapes(config, capacity)):
            source, place = _source(config, i, bits), device_map.get(i, device)
            if source is not None and device_map.get(source, device) == place:
                layers.append(layers[source])
                continue
            count = rows if i in device_map and i not in states else 0
            layers.append(KINDS[bits].empty(bits, count, *shape, dtype, place))
        self.layers = tuple(layers)
        self.capacity, self.dtype, self.device = capacity, dtype, torch.device(device)
        self.pass_tokens, self.windows, self.bits = PREFILL_TOKENS, config.windows, bits
        self.lengths, self.written, self.ends = ([0] * rows for _ in range(3))
        self.live = list(range(rows))
        self.step: Decode | None = None
        self.captured: CapturedStep | None = None

    def start(self, count: int = 1) -> list[int]:
        """Take rows into use that are not, empty.

        Raises:
            IndexError: there are not as many.
        """
        free = [row for row in range(len(self.lengths)) if row not in self.live][:count]
        if len(free) < count:
            raise IndexError(f"{count} more sequences for a cache of {len(self.lengths)} rows")
        self.live += free
        return free

    def keep(self, indices: Sequence[int]) -> None:
        """Let all live rows go but those at these places among them.

        Decode steps do without the others. Other sequences may have their memory; until one has, a
        CPU's is given back to the system.
        """
        for row in set(self.live) - {self.live[i] for i in indices}:
            self.lengths[row] = self.written[row] = self.ends[row] = 0
            for part in itertools.chain.from_iterable((*self.layers, *self.states.values())):
                if part.device.type == "cpu" and len(part):
                    library.release(part[row])
        self.live = [self.live[i] for i in indices]

    def reset(self) -> None:
        """Let all rows begin anew, empty."""
        self.lengths, self.written, self.ends = ([0] * len(self.lengths) for _ in range(3))
        self.live = list(range(len(self.lengths)))

    def rewind(self, row: int, length: int) -> int:
        """Let a row's last tokens go, so that others can follow on its first ones.

        What is left may be less than `length`: where not all that the next token sees is held any
        more, and where a state has taken in what is to go. A pass that was interrupted has written
        some of its tokens, and has to be followed by this.

        Returns:
            Tokens that are left.
        """
        length = min(length, self.lengths[row])
        if self.states and length != self.ends[row]:
            length = 0
        if self.bits != 16 and length // RUN < (self.ends[row] - 1) // RUN:
            length -= length % RUN  # a later run's tokens took the place of the others as they came
        for kv, window in zip(self.layers, self.windows, strict=False):
            # Of runs: the first that the next token sees, and how many gave their memory to others.
            first_seen = max(0, length + 1 - window) // RUN
            lost = -(-self.written[row] // RUN) - kv.capacity // RUN
            if kv.capacity < self.capacity and first_seen < lost:
                length = 0
        self.lengths[row] = length
        if not length:
            self.written[row] = self.ends[row] = 0
        return length

    def reserve(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Make sure that `lengths` more tokens of live rows can be written, which may begin.

        Raises:
            IndexError: a row gets longer than the cache.
            ValueError: there are not as many rows, or they are not in use.
        """
        if len(lengths) != len(rows):
            raise ValueError(f"{len(lengths)} prompts for a cache of {len(rows)} rows")
        if ended := set(rows) - set(self.live):
            raise ValueError(f"row {min(ended)} of the cache is not in use")
        ends = [self.lengths[row] + n for row, n in zip(rows, lengths, strict=True)]
        if max(ends) > self.capacity:
            raise IndexError(f"{max(ends)} tokens in a cache for {self.capacity}")
        for row, end in zip(rows, ends, strict=True):
            self.written[row] = max(self.written[row], end)
            self.ends[row] = end

    def advance(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Count tokens that a pass has written."""
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] += length

    @staticmethod
    def sizes(
        config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype, bits: int = 16
    ) -> list[int]:
        """Bytes of each layer of a cache."""
        sizes = [
            0
            if _source(config, i, bits) is not None
            else rows * KINDS[bits].row_bytes(bits, *shape, dtype)
            for i, shape in enumerate(_shapes(config, capacity))
        ]
        for i, state in _state_shapes(config).items():
            sizes[i] = rows * state.row_bytes(dtype)
        return sizes


def state_shape(delta: DeltaNetConfig) -> StateShape:
    """What a layer with a delta net keeps of a sequence."""
    heads = (delta.value_heads, delta.key_dim, delta.value_dim)
    return StateShape(delta.kernel - 1, delta.channels, *heads)


def _state_shapes(config: ModelConfig) -> dict[int, StateShape]:
    """Of the layers that have a state in the place of keys and values."""
    delta = config.delta_net
    if delta is None:
        return {}
    return {i: state_shape(delta) for i, has_it in enumerate(delta.layers) if has_it}


def _source(config: ModelConfig, index: int, bits: int) -> int | None:
    """The layer whose keys and values are a layer's, which writes them there once more.

    Integers are made of tokens of which a pass of prefill leaves the last ones alone: each layer
    has its own.
    """
    return config.of_layer(index).kv_layer if bits == 16 else None


def _shapes(config: ModelConfig, capacity: int) -> list[tuple[int, int, int]]:
    """Heads, tokens and channels that each layer holds of a row of up to `capacity` tokens."""
    found = []
    for index, window in enumerate(config.windows or (0,) * config.num_layers):
        tokens = min(capacity, ring_capacity(window, PREFILL_TOKENS)) if window else capacity
        own = config.of_layer(index)
        found.append((own.num_kv_heads, tokens, own.head_dim))
    return found
