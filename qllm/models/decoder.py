"""The decoder of every family.

Activations are (N, C): the tokens of all prompts one after another, without padding. In prefill
N is the sum of the prompts' lengths, in decode it is the number of live rows. Every sequence has a
row of its own in the cache, which starts at position 0, so no token ever sees a pad.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from qllm.config import ModelConfig, QuantSpec
from qllm.layers import Linear, linear_class
from qllm.memory import check_fits
from qllm.models.activations import find_activation
from qllm.models.cache import KVCache
from qllm.models.embeddings import Embedding, QuantizedEmbedding, Scale, embedding_and_head
from qllm.models.layer import LayerList, layer_class, total
from qllm.models.layer_inputs import LayerInputs
from qllm.models.logits import finish_logits
from qllm.models.norms import NORMS
from qllm.models.partition import keep_shards, keep_stage
from qllm.models.passes import Decode, Prefill
from qllm.models.pickling import Picklable
from qllm.models.pieces import ends_of, pieces_of
from qllm.models.positions import POSITIONS
from qllm.ops import phase
from qllm.ops.capture import capture
from qllm.parallel.layers import (
    LinearOrShard,
    QuantizedVocabularyParallel,
    VocabularyParallel,
)
from qllm.parallel.pipeline import ParallelContext

# Bytes of a cache that are taken unseen: to ask what is free takes as long as some layers do, and
# whether so few fit is up to what others take in the same moment.
FEW = 32 << 20

Table = Embedding | QuantizedEmbedding | VocabularyParallel | QuantizedVocabularyParallel


class Decoder(Picklable):
    """A model of any family, built on the meta device and filled by `qllm.checkpoint`.

    Attributes:
        parallel: the ranks that share the model with this process.
        stage: of a pipeline, which this process is; None: there is no other.
        cache_config: the model's, with the heads of keys and values that this process has.
        kv_bits: of the keys and values that a cache holds, and that prompts see without one.
    """

    kv_bits = 16
    # An identity stands for what the model does without, or another stage of a pipeline has.
    embed: Table | nn.Identity
    embed_norm: nn.Module
    project_in: nn.Module
    final_norm: nn.Module
    project_out: nn.Module
    layer_inputs: LayerInputs | None
    lm_head: LinearOrShard | nn.Identity

    def __init__(
        self,
        config: ModelConfig,
        specs: Mapping[str, QuantSpec],
        dtype: torch.dtype,
        *,
        parallel: ParallelContext | None = None,
        halves: range | None = None,
        device_map: Mapping[range, torch.device] | None = None,
    ) -> None:
        """
        Args:
            specs: the spec of every quantized linear by name; the others are dense.
            dtype: the type of activations, norms, embeddings and dense weights.
            parallel: the ranks that share the model with this process; None: there are no others.
            halves: of layers, those that this stage of a pipeline has; layer i has 2 i, its
                attention, and 2 i + 1, its MLP.
            device_map: the devices of runs of layers, in the order in which they run; what is in
                front of the layers is with the first ones, what is behind them with the last.

        Raises:
            UserError: for an activation function that is not known, or more ranks than heads.
        """
        super().__init__()
        config = replace(config, activation=find_activation(config.activation))

        def make(name: str, in_features: int, out_features: int, bias: bool) -> Linear:
            spec = specs.get(name, QuantSpec())
            return linear_class(spec).empty(in_features, out_features, bias, spec, dtype)

        hidden, embed = config.hidden_size, config.embed_size
        norm = NORMS[config.norm]
        projected = embed != hidden
        self.config, self.dtype = config, dtype
        self.embed, head = embedding_and_head(config, specs, dtype, make)
        scaled = config.embed_scale != 1
        self.embed_scale = Scale.of_embeddings(config, dtype) if scaled else nn.Identity()
        self.embed_norm = norm(config, dtype) if config.embed_norm else nn.Identity()
        self.project_in = make("project_in", embed, hidden, False) if projected else nn.Identity()
        self.positions = POSITIONS[config.position](config, dtype)
        layer = layer_class(config)
        self.layers = LayerList(layer(config, i, dtype, make) for i in range(config.num_layers))
        self.layer_inputs = LayerInputs(config, dtype, make) if config.layer_inputs else None
        self.final_norm = norm(config, dtype) if config.final_norm else nn.Identity()
        self.project_out = make("project_out", hidden, embed, False) if projected else nn.Identity()
        self.lm_head = head
        self.cache_config = config
        self.parallel = parallel or ParallelContext()
        self.stage = self.parallel.stage
        if self.stage is not None:
            assert halves is not None
            keep_stage(self, self.stage, halves)
        if self.parallel.tp.size > 1:
            keep_shards(self, self.parallel.tp, self.parallel.mode)
        self._device_map = dict(device_map or {})
        self.eval()

    @property
    def device_map(self) -> dict[range, torch.device]:
        """The devices of runs of layers, in the order in which they run."""
        return self._device_map or {range(len(self.layers)): next(self.buffers()).device}

    @property
    def device(self) -> torch.device:
        """Where tokens go, and where logits are."""
        return next(iter(self.device_map.values()))

    def device_of_layer(self, index: int) -> torch.device:
        """Where a layer is."""
        return next(device for layers, device in self.device_map.items() if index in layers)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache for `rows` sequences of up to `capacity` tokens.

        Raises:
            UserError: it is of more than FEW bytes and does not fit, with the numbers.
        """
        sizes = self._cache_sizes(rows, capacity)
        device_map = {i: self.device_of_layer(i) for i in sizes}
        what = f"a KV cache of {rows} x {capacity} tokens"
        for device in set(device_map.values()):
            needed = sum(sizes[i] for i, other in device_map.items() if other == device)
            if needed > FEW:
                check_fits(needed, device, what, "take fewer at once, shorter ones, or `kv_bits` 8")
        shape = (rows, capacity, self.dtype, self.device, device_map)
        return KVCache(self.cache_config, *shape, self.kv_bits)

    def cache_bytes(self, rows: int, capacity: int) -> int:
        """Bytes of `new_cache`."""
        return sum(self._cache_sizes(rows, capacity).values())

    def _cache_sizes(self, rows: int, capacity: int) -> dict[int, int]:
        """Bytes of keys and values of each layer here that has any."""
        sizes = KVCache.sizes(self.cache_config, rows, capacity, self.dtype, self.kv_bits)
        here = (i for layers in self.device_map for i in layers)
        return {i: sizes[i] for i in here if self.layers[i].has_attention}

    @torch.inference_mode()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: KVCache | None = None,
        *,
        rows: Sequence[int] | None = None,
        last: bool = True,
        share: bool = True,
    ) -> Tensor | None:
        """Run prompts, or what follows on the tokens that the cache holds already.

        With a cache, long prompts go through in several passes of up to `cache.pass_tokens`; no
        bit of what comes out depends on where they are cut.

        Args:
            prompts: B lists of token ids, none of them empty.
            cache: takes the keys and values; None keeps none.
            rows: of the cache, one per prompt; None: all live ones.
            last: return the logits behind each prompt's last token only.
            share: all stages of a pipeline get the logits; else the last one does, others None.

        Returns:
            float32 logits, (B, V), or (N, V) for all N tokens.

        Raises:
            IndexError: a sequence gets longer than the cache.
            ValueError: there is not one live row per prompt.
        """
        kept = []
        for x, ends in self._passes(prompts, cache, rows, last):
            if self.stage is not None and not self.stage.last:
                self.stage.send(x)
            elif last:
                kept.append(x[torch.tensor(ends, dtype=torch.int64, device=x.device)])
            else:
                kept.append(x)
        # The head of last tokens has a step's few rows, and is run as a step's.
        with phase.decode() if last else nullcontext():
            logits = self._logits(_joined(kept)) if kept else None
        return self._shared(logits, len(prompts) if last else sum(map(len, prompts)), share)

    @torch.inference_mode()
    def hidden(
        self,
        prompts: Sequence[Sequence[int]],
        cache: KVCache | None = None,
        *,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """What this process's layers make of prompts: (N, C) for all N tokens.

        Arguments and errors are those of `prefill`.
        """
        return _joined([x for x, _ in self._passes(prompts, cache, rows)])

    def _passes(
        self,
        prompts: Sequence[Sequence[int]],
        cache: KVCache | None,
        rows: Sequence[int] | None,
        last: bool = False,
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """Hidden states (n, C) of each pass, and which of them prompts end with.

        Args:
            last: nothing else is asked for.
        """
        lengths = [len(prompt) for prompt in prompts]
        ends, limit = lengths, sum(lengths)
        if cache is not None:
            rows = list(cache.live) if rows is None else rows
            cache.reserve(rows, lengths)
            ends = [cache.lengths[row] + n for row, n in zip(rows, lengths, strict=True)]
            limit = cache.pass_tokens
        for pieces in pieces_of(lengths, limit):
            runs = (prompts[i][piece.start : piece.stop] for i, piece in pieces)
            tokens = torch.tensor([token for run in runs for token in run], device=self.device)
            x = self._embed(tokens)
            counts = [len(piece) for _, piece in pieces]
            here = None if rows is None else [rows[i] for i, _ in pieces]
            where, of_runs = (counts, cache, self.positions, x), [ends[i] for i, _ in pieces]
            step = Prefill(*where, rows=here, ends=of_runs, bits=self.kv_bits)
            if self.layer_inputs is not None:
                step.layer_inputs = self.layer_inputs(tokens, x)
            x = self._run_layers(x, step, last)
            if cache is not None and here is not None:
                cache.advance(here, counts)
            yield x, ends_of(pieces, lengths, len(x))

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Logits (M, V), in the model's type, of rows (M, C) of `hidden`: of a whole model."""
        return finish_logits(self.config, self._head(x))

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: KVCache, *, share: bool = True) -> Tensor | None:
        """Run one new token of each live row, int64 (B,): float32 logits (B, V).

        Args:
            share: as in `prefill`.

        Raises:
            IndexError: a row of the cache is full.
            ValueError: there are not as many live rows.
        """
        size = self._step_size(cache)
        if cache.step is None or cache.step.size != size:
            cache.step, cache.captured = Decode(cache, self.positions, size), None
        cache.step.begin(tokens)
        if cache.captured is None:
            step = partial(self._run_step, cache.step)
            cache.captured = capture(step, self.device, no_graph=self._no_graph)
        else:
            cache.captured.replay()
        cache.advance(cache.live, [1] * len(tokens))
        logits = cache.step.logits
        return self._shared(None if logits is None else logits[: len(tokens)], len(tokens), share)

    def _step_size(self, cache: KVCache) -> int:
        """Tokens of the next step: as many as there are live rows, or the next padded size.

        What a graph captures takes long to capture again, and few tokens more cost nothing; but a
        state must not take in a token twice.
        """
        live = len(cache.live)
        fixed = self.device.type == "cpu" or self.config.delta_net is not None
        if cache.step is None or live > cache.step.size or fixed:
            return live
        return min(cache.step.size, live if live < 3 else -(-live // 4) * 4)

    def _run_step(self, step: Decode) -> None:
        with phase.decode():
            step.logits = self._logits(self.hidden_step(step))
        step.move_on()

    def graph_break(self) -> str | None:
        """Why decode steps are not replayed from what was captured; None: they are.

        A step is run to find out, by all processes that have a part of the model.
        """
        cache = self.new_cache(1, 3)
        self.prefill([[0]], cache, share=False)
        for _ in range(2):  # a graph is captured the second time
            self.decode(torch.zeros(1, dtype=torch.int64, device=self.device), cache, share=False)
        assert cache.captured is not None
        return cache.captured.graph_break

    def only(self, index: int) -> Decoder:
        """The same model as if it had one layer, which takes what is embedded."""
        alone = copy.copy(self)
        alone._device_map = {range(index, index + 1): self.device_of_layer(index)}
        return alone

    @torch.inference_mode()
    def hidden_step(self, step: Decode) -> Tensor:
        """What the layers make of a step's tokens: (B, C)."""
        step.look_up()
        with phase.decode():
            x = self._embed(step.tokens)
            if self.layer_inputs is not None:
                step.layer_inputs = self.layer_inputs(step.tokens, x)
            return self._run_layers(x, step)

    @property
    def _no_graph(self) -> str | None:
        """Why a CUDA graph cannot hold a step; None: it can."""
        if self.config.experts is not None:
            return "which experts run is decided in each step"
        if self.config.delta_net is not None:
            return "there is no kernel of ours for delta nets"
        alone = self.stage is None and self.parallel.tp.size == 1
        if alone and len(set(self.device_map.values())) == 1:
            return None
        return "it exchanges activations with other processes or devices"

    def _embed(self, tokens: Tensor) -> Tensor:
        """What the layers take: embedded tokens (N,), or what the stage in front sends: (N, C)."""
        if self.stage is None or self.stage.first:
            return self.project_in(self.embed_norm(self.embed_scale(self.embed(tokens))))
        shape = (len(tokens), self.config.hidden_size)
        return self.stage.recv(torch.empty(shape, dtype=self.dtype, device=tokens.device))

    def _run_layers(self, x: Tensor, step: Prefill | Decode, last: bool = False) -> Tensor:
        """What the layers make of x (N, C).

        Args:
            last: of the sequences' last tokens alone, where the last layer's end is here: it does
                no more of the others than their keys and values.
        """
        if self.stage is None or self.stage.first:
            x = self.positions.embed(x, step.positions)
        last = last and (self.stage is None or self.stage.last)
        z = None  # what is still to be added to x
        for layers, device in self.device_map.items():
            x, z, here = total(x, z).to(device), None, step.on(device)
            for index in layers:
                if last and index == len(self.layers) - 1:
                    here = here.last()
                layer = self.layers[index]
                if phase.decoding():
                    x, z = layer.parts(x, z, here)
                else:  # whose hooks show what layers put out
                    x = layer(x, here)
        return total(x, z)

    def _head(self, x: Tensor) -> Tensor:
        """What stands behind the layers: x (M, C) to logits (M, V), in the model's type."""
        return self.lm_head(self.project_out(self.final_norm(x)))

    def _logits(self, x: Tensor) -> Tensor | None:
        """Logits, on the last stage of a pipeline; another one sends x (M, C) to the next."""
        if self.stage is None or self.stage.last:
            return self._head(x)
        self.stage.send(x)
        return None

    def _shared(self, logits: Tensor | None, rows: int, share: bool) -> Tensor | None:
        """Logits in float32, on all stages where they are shared."""
        if logits is not None:
            # A copy: the next pass overwrites these.
            logits = logits.to(self.device)
            logits = finish_logits(self.config, logits, torch.float32, copy=True)
        if self.stage is None or not share:
            return logits
        if logits is None:
            logits = torch.empty(rows, self.config.vocab_size, device=self.device)
        return self.stage.broadcast(logits)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
