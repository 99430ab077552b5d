"""The decoder of every family.

Activations are (N, C): the tokens of all prompts one after another, without padding. In prefill
N is the sum of the prompts' lengths, in decode it is the number of prompts. Every prompt starts
at position 0 of its own row in the cache, so no token ever sees a pad.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from qllm import ops
from qllm.config import ModelConfig, QuantSpec
from qllm.errors import UserError
from qllm.layers import Linear, linear_class
from qllm.models.cache import Decode, KVCache, Prefill
from qllm.models.layer import NORMS, Embedding, Scale, layer_class
from qllm.models.positions import POSITIONS
from qllm.ops import phase
from qllm.ops.cpu.tape import record
from qllm.ops.gpu.graph import Graph
from qllm.ops.reference import ACTIVATIONS

# Names that config.json files use for the same functions.
SAME_ACTIVATION = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "swish": "silu",
}


class PipelineStage(Protocol):
    """What a decoder asks of a pipeline; see `qllm.parallel.pipeline.PipelineStage`."""

    first: bool
    last: bool

    def recv(self, x: Tensor) -> Tensor: ...
    def send(self, x: Tensor) -> None: ...
    def broadcast(self, x: Tensor) -> Tensor: ...
    def micro_batches(self, rows: int) -> list[range]: ...


class Decoder(nn.Module):
    """A model of any family, built on the meta device and filled by `qllm.checkpoint`.

    Attributes:
        shards: contiguous ranges of layers, run one after the other.
        device_map: the device of each shard; what is in front of the layers is with the first one,
            what is behind them with the last one.
        stage: of a pipeline, which this process is; None: there is no other.
        kv_heads: heads of keys and values that this process has.
        alone: no other process has a part of it.
    """

    stage: PipelineStage | None = None
    alone = True

    def __init__(
        self, config: ModelConfig, specs: Mapping[str, QuantSpec], dtype: torch.dtype
    ) -> None:
        """
        Args:
            specs: the spec of every quantized linear by name; the others are dense.
            dtype: the type of activations, norms, embeddings and dense weights.

        Raises:
            UserError: for an activation function that is not known.
        """
        super().__init__()
        config = _known_activation(config)

        def make(name: str, in_features: int, out_features: int, bias: bool) -> Linear:
            spec = specs.get(name, QuantSpec())
            return linear_class(spec).empty(in_features, out_features, bias, spec, dtype)

        hidden, embed = config.hidden_size, config.embed_size
        norm = NORMS[config.norm]
        projected = embed != hidden
        self.config, self.dtype = config, dtype
        self.embed = Embedding(config.vocab_size, embed, dtype)
        scaled = config.embed_scale != 1
        self.embed_scale = Scale(config.embed_scale, dtype) if scaled else nn.Identity()
        self.embed_norm = norm(config, dtype) if config.embed_norm else nn.Identity()
        self.project_in = make("project_in", embed, hidden, False) if projected else nn.Identity()
        self.positions = POSITIONS[config.position](config, dtype)
        layer = layer_class(config)
        self.layers = nn.ModuleList(layer(config, i, dtype, make) for i in range(config.num_layers))
        self.final_norm = norm(config, dtype) if config.final_norm else nn.Identity()
        self.project_out = make("project_out", hidden, embed, False) if projected else nn.Identity()
        self.lm_head = make("lm_head", embed, config.vocab_size, False)
        if config.tied_head and "lm_head" not in specs:
            self.lm_head.weight = self.embed.weight
        self.shards = [range(config.num_layers)]
        self.device_map: list[torch.device] | None = None
        self.kv_heads = config.num_kv_heads
        self.eval()

    @property
    def device(self) -> torch.device:
        if self.stage is None:
            return self.embed.weight.device
        return next(tensor.device for tensor in self.buffers() if not tensor.is_meta)

    @property
    def _device_map(self) -> list[torch.device]:
        return self.device_map or [self.device] * len(self.shards)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache for `rows` sequences of up to `capacity` tokens."""
        config = replace(self.config, num_kv_heads=self.kv_heads)
        device_map = {
            i: device
            for shard, device in zip(self.shards, self._device_map, strict=True)
            for i in shard
            if self.layers[i].has_attention
        }
        return KVCache(config, rows, capacity, self.dtype, self.device, device_map)

    @torch.inference_mode()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: KVCache | None = None,
        *,
        last: bool = True,
        share: bool = True,
    ) -> Tensor | None:
        """Run whole prompts.

        Args:
            prompts: B lists of token ids, none of them empty.
            cache: takes the keys and values, one row per prompt; None keeps none.
            last: return the logits behind each prompt's last token only.
            share: all stages of a pipeline get the logits; else the last one does, others None.

        Returns:
            float32 logits, (B, V), or (N, V) for all N tokens.

        Raises:
            IndexError: a prompt is longer than the cache.
            ValueError: the cache has not one row per prompt.
        """
        x = self.hidden(prompts, cache)
        lengths = [len(prompt) for prompt in prompts]
        if last and (self.stage is None or self.stage.last):
            x = x[torch.tensor(lengths, device=x.device).cumsum(0) - 1]
        return self._shared(self._logits(x), len(lengths) if last else sum(lengths), share)

    @torch.inference_mode()
    def hidden(self, prompts: Sequence[Sequence[int]], cache: KVCache | None = None) -> Tensor:
        """What this process's layers make of whole prompts: (N, C) for all N tokens.

        Arguments and errors are those of `prefill`.
        """
        lengths = [len(prompt) for prompt in prompts]
        tokens = torch.tensor([t for prompt in prompts for t in prompt], device=self.device)
        x = self._embed(tokens)
        x = self._run_layers(x, Prefill(lengths, cache, self.positions, x))
        if cache is not None:
            cache.lengths = lengths
        return x

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Logits (M, V), in the model's type, of rows (M, C) of `hidden`: of a whole model."""
        return self._capped(self._logits(x))

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: KVCache, *, share: bool = True) -> Tensor | None:
        """Run one new token per row, int64 (B,): float32 logits (B, V).

        Args:
            share: as in `prefill`.

        Raises:
            IndexError: a row of the cache is full.
        """
        if cache.step is None:
            cache.step = Decode(cache, self.positions)
        cache.step.begin(tokens)
        logits = self._decode(cache)
        cache.lengths = [n + 1 for n in cache.lengths]
        return self._shared(logits, len(tokens), share)

    def _decode(self, cache: KVCache) -> Tensor | None:
        """One pass: the first of a cache is recorded, the others play the record."""
        step, tape = cache.step, cache.tape
        if tape is not None and tape.foreign is None:
            tape.play()
        elif tape is None and self._can_capture():
            cache.tape = Graph(partial(self._run_step, step), self.device)
        else:
            with record() if tape is None else nullcontext(tape) as tape:
                self._run_step(step)
            cache.tape = tape
        return step.logits

    def _run_step(self, step: Decode) -> None:
        with phase.decode():
            step.logits = self._logits(self._run_layers(self._embed(step.tokens), step))

    def _can_capture(self) -> bool:
        """Whether a step is nothing but launches on one device."""
        return self.alone and len(set(self._device_map)) == 1 and ops.can_capture(self.device)

    def _embed(self, tokens: Tensor) -> Tensor:
        """What the layers take: embedded tokens (N,), or what the stage in front sends: (N, C)."""
        if self.stage is None or self.stage.first:
            return self.project_in(self.embed_norm(self.embed_scale(self.embed(tokens))))
        shape = (len(tokens), self.config.hidden_size)
        return self.stage.recv(torch.empty(shape, dtype=self.dtype, device=tokens.device))

    def _run_layers(self, x: Tensor, step: Prefill | Decode) -> Tensor:
        if self.stage is None or self.stage.first:
            x = self.positions.embed(x, step.positions)
        for shard, device in zip(self.shards, self._device_map, strict=True):
            x, here = x.to(device), step.on(device)
            for index in shard:
                x = self.layers[index](x, here)
        return x

    def _logits(self, x: Tensor) -> Tensor | None:
        if self.stage is None or self.stage.last:
            return self.lm_head(self.project_out(self.final_norm(x)))
        self.stage.send(x)
        return None

    def _shared(self, logits: Tensor | None, rows: int, share: bool) -> Tensor | None:
        """Logits in float32, on all stages where they are shared."""
        if logits is not None:
            # A copy: the next pass overwrites these.
            logits = self._capped(logits.to(self.device, torch.float32, copy=True))
        if self.stage is None or not share:
            return logits
        if logits is None:
            logits = torch.empty(rows, self.config.vocab_size, device=self.device)
        return self.stage.broadcast(logits)

    def _capped(self, logits: Tensor) -> Tensor:
        """Logits, softly kept below a cap where the model has one."""
        cap = self.config.logit_cap
        return logits if cap is None else (logits / cap).tanh() * cap


def _known_activation(config: ModelConfig) -> ModelConfig:
    name = SAME_ACTIVATION.get(config.activation, config.activation)
    if name not in ACTIVATIONS:
        known = ", ".join([*ACTIVATIONS, *SAME_ACTIVATION])
        raise UserError(f"activation function {config.activation!r} is unknown; known: {known}")
    return replace(config, activation=name)
