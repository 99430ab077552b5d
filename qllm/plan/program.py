"""The program of a model, its losses and its devices: what `qllm.plan.solve` is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from qllm.checkpoint.load import module_bytes, outline
from qllm.config import (
    DEFAULT_ALGORITHM,
    EMBEDDING,
    LM_HEAD,
    ModelConfig,
    QuantPlan,
    QuantSpec,
)
from qllm.errors import UserError
from qllm.layers import Linear, linear_class
from qllm.models import Decoder
from qllm.models.cache import KVCache
from qllm.plan.devices import Cluster, Device, HalfWork, Size
from qllm.plan.problem import Problem, Whole
from qllm.plan.sensitivity import Array
from qllm.quantizer.floats import FRONT


@dataclass(frozen=True)
class Workload:
    """What the model will be asked.

    Attributes:
        prompt, new: tokens of each sequence.
        batch: sequences at once.
    """

    prompt: int = 512
    new: int = 128
    batch: int = 1

    @classmethod
    def within(
        cls, window: int | None, prompt: int | None, new: int | None, batch: int
    ) -> Workload:
        """What fits into a model's window; None stands for the usual, or for less in a small one.

        Raises:
            UserError: what is asked for does not fit.
        """
        if new is None:
            new = cls.new if window is None else min(cls.new, window // 2)
        if prompt is None:
            prompt = cls.prompt if window is None else max(1, min(cls.prompt, window - new))
        if window is not None and prompt + new > window:
            raise UserError(
                f"--prompt {prompt} and --gen {new} exceed the model's window of {window}; "
                "give less"
            )
        return cls(prompt, new, batch)


@dataclass(frozen=True, eq=False)
class Shape:
    """What of a model's sizes the program needs.

    Attributes:
        modules: names of the linears that are decided on, and of the embedding.
        half_of: int (M,), their halves of layers; of an embedding the first, or, where the LM head
            is tied to it, the last, where there is a product with it.
        sizes: int (M, 2), their inputs and outputs.
        weights: (M,), elements.
        nbytes: int (M, C), as loading has them.
        bits: (M, C), per weight: integers, scales and zeros.
        fixed: int (H,), bytes of the rest of each half: dense linears, norms, and with the first
            and last half what is in front of the layers and behind them; an embedding that the LM
            head is tied to is with the last one, where there is a product with it.
        head: size and bytes of an LM head that is not decided on.
        tied: bytes of an embedding in `fixed` that the first of several stages has once more.
    """

    config: ModelConfig
    dtype: torch.dtype
    modules: tuple[str, ...]
    half_of: np.ndarray
    sizes: np.ndarray
    weights: Array
    nbytes: Array
    bits: Array
    fixed: Array
    head: tuple[Size, int] | None
    tied: int

    @classmethod
    def of(
        cls,
        folder: Path,
        modules: Sequence[str],
        candidates: Sequence[QuantSpec],
        dtype: torch.dtype | None,
    ) -> Shape:
        """Of a 16- or 32-bit checkpoint, whose files' headers alone are read."""
        plan = QuantPlan.uniform(QuantSpec())
        if LM_HEAD in modules:  # so that a tied one is a matrix of its own, as it will be
            # Of bytes alone: how the integers are chosen is for whoever quantizes.
            spec = replace(candidates[0], algorithm=DEFAULT_ALGORITHM)
            plan = plan.with_rule(f"^{LM_HEAD}$", spec)
        return cls.of_model(outline(folder, plan, dtype), modules, candidates)

    @classmethod
    def of_model(
        cls, model: Decoder, modules: Sequence[str], candidates: Sequence[QuantSpec]
    ) -> Shape:
        """Of a dense model, which may be on the meta device."""
        config = model.config
        last = 2 * config.num_layers - 1
        halves, sizes, nbytes, bits = [], [], [], []
        for name in modules:
            if name == EMBEDDING:
                halves.append(last if config.tied_head else 0)
                size, bias = (config.embed_size, config.vocab_size), False
            else:
                linear = model.get_submodule(name)
                assert isinstance(linear, Linear)
                halves.append(last if name == LM_HEAD else _half(name))
                size = (linear.in_features, linear.out_features)
                bias = getattr(linear, "bias", None) is not None
            sizes.append(size)
            held = [
                [linear_class(s).empty(*size, part, s, model.dtype).nbytes() for s in candidates]
                for part in (bias, False)
            ]
            nbytes.append(held[0])
            bits.append([8 * each / math.prod(size) for each in held[1]])
        fixed = np.zeros(last + 1)
        for name, module in model.named_modules():
            own = sum(t.nbytes for t in module.buffers(recurse=False))
            if not own or name in modules or (name == LM_HEAD and config.tied_head):
                continue
            front = name.split(".")[0] in FRONT and not (name == EMBEDDING and config.tied_head)
            fixed[_half(name) if name.startswith("layers.") else 0 if front else last] += own
        head = None
        shared = config.tied_head and EMBEDDING in modules
        if LM_HEAD not in modules and not shared:
            linear = model.lm_head
            assert isinstance(linear, Linear)  # of a whole model
            size = (linear.in_features, linear.out_features)
            head = (size, math.prod(size) * model.dtype.itemsize)
        tied = module_bytes(model.embed) if config.tied_head and not shared else 0
        return cls(
            config,
            model.dtype,
            tuple(modules),
            np.array(halves),
            np.array(sizes),
            np.array([math.prod(size) for size in sizes], dtype=np.float64),
            np.array(nbytes, dtype=np.float64),
            np.array(bits),
            fixed,
            head,
            tied,
        )

    def cache(self, work: Workload) -> Array:
        """Bytes (H,) of keys and values in each half: attention has them, the MLP none."""
        tokens = work.prompt + work.new
        layers = KVCache.sizes(self.config, work.batch, tokens, self.dtype)
        return np.array([part for each in layers for part in (each, 0)], dtype=np.float64)

    def buffers(self, work: Workload) -> float:
        """Bytes of activations at the peak of a prompt's pass: a layer's, and the logits."""
        config = self.config
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        inner = config.intermediate_size * (2 if config.gated_mlp else 1)
        tokens = work.batch * work.prompt
        layer = tokens * (3 * config.hidden_size + max(heads, inner)) * self.dtype.itemsize
        return float(layer + work.batch * config.vocab_size * (4 + self.dtype.itemsize))


def _half(name: str) -> int:
    """Of a module in a layer: 2 i is the attention of layer i, 2 i + 1 its MLP."""
    _, index, inner = name.split(".", 2)
    return 2 * int(index) + inner.startswith("mlp")


def is_head(name: str) -> bool:
    """Whether a linear is the LM head, or an embedding that is it.

    A prompt asks it for its last token alone, and it is run as in a step.
    """
    return name in (LM_HEAD, EMBEDDING)


def sees_last_token(name: str, layers: int) -> bool:
    """Whether a linear is asked for each prompt's last token alone.

    Those are the head, and in the last of some layers what is behind the keys and values.
    """
    return is_head(name) or (name.startswith(f"layers.{layers - 1}.") and not name.endswith(".qkv"))


def build(
    shape: Shape,
    loss: Array,
    candidates: Sequence[QuantSpec],
    cluster: Cluster | None,
    devices: Sequence[Device],
    work: Workload,
    objective: str,
    max_loss: float | None = None,
    max_bits: float | None = None,
    allowed: np.ndarray | None = None,
) -> Problem:
    """The program for devices in this order.

    Args:
        loss: (M, C), of `Sensitivity.sums`.
        cluster: what joins them; None: there is one device, without a speed, of whose memory the
            weights alone count.
    """
    count, halves = len(devices), len(shape.fixed)
    config, rows = shape.config, work.batch
    decides_on_tied = EMBEDDING in shape.modules and config.tied_head
    micro = min(rows, count)
    rows_each = rows / micro  # of which the first have one more than others
    first_rows = math.ceil(rows_each)
    size = loss.shape
    prefill, decode = np.zeros((2, count, *size))
    fixed_prefill, fixed_decode = np.zeros((2, count, halves))
    memory = np.array([device.memory for device in devices])
    fixed = shape.fixed + shape.cache(work) if cluster else shape.fixed.copy()
    hop_prefill = hop_decode = 0.0
    passes, (stage_passes, crowding) = np.zeros((2, count)), np.zeros((2, 2, 2, count))
    contention = np.zeros(count)
    shares, processors = shared_processors(devices)
    if cluster is not None:
        # Of what a step reads: the caches of a machine are shared by the stages that are there.
        cache = shape.cache(work)
        machines = len({(each.threads and each.host) or d for d, each in enumerate(devices)})
        held = float(np.median(shape.nbytes, axis=1).sum() + cache.sum()) / machines
        if shape.head is not None:
            held += shape.head[1] / machines
        passes, stage_passes, crowding = _besides_layers(devices, first_rows, rows_each, held)
        tokens = first_rows * work.prompt
        values = config.hidden_size * tokens
        hop_prefill = cluster.hop(values * shape.dtype.itemsize)
        hop_decode = cluster.hop(config.hidden_size * rows_each * shape.dtype.itemsize)
        hop_decode += cluster.hop(8 * rows_each)  # the last stage tells every other one its tokens
        beside = [
            _beside_products(config, work, (first_rows, rows_each), each / rows) for each in cache
        ]
        for d, device in enumerate(devices):
            speed = device.speed
            for m in range(size[0]):
                if shape.modules[m] == EMBEDDING and not config.tied_head:
                    continue  # rows are looked up, which takes no time
                for c, spec in enumerate(candidates):
                    inputs, outputs = map(int, shape.sizes[m])
                    args = (spec, (inputs, outputs), int(shape.nbytes[m, c]))
                    last = sees_last_token(shape.modules[m], config.num_layers)
                    n = first_rows if last else tokens
                    as_step = is_head(shape.modules[m])
                    prefill[d, m, c] = speed.linear(*args, n, decode=as_step, model=held)
                    decode[d, m, c] = speed.linear(*args, rows_each, decode=True, model=held)
            for h, (prompt, step) in enumerate(beside):
                fixed_prefill[d, h] = speed.half(prompt, decode=False, model=held)
                fixed_decode[d, h] = speed.half(step, decode=True, model=held)
            ends = ((fixed_prefill, first_rows, False), (fixed_decode, rows_each, True))
            for table, at_once, decoding in ends:
                table[d, -1] += speed.logits(at_once * config.vocab_size, decode=decoding)
                if shape.head is not None:
                    head = QuantSpec(), *shape.head
                    table[d, -1] += speed.linear(*head, at_once, decode=True, model=held)
            if (shares[:, d] > 0).any():
                contention[d] = device.contention * speed.farness(held)
    return Problem(
        half_of=shape.half_of,
        loss=loss,
        nbytes=shape.nbytes,
        weights=shape.weights,
        bits=shape.bits,
        fixed_bytes=fixed,
        memory=memory,
        buffers=shape.buffers(work) if cluster else 0.0,
        prefill=prefill,
        decode=decode,
        fixed_prefill=fixed_prefill,
        fixed_decode=fixed_decode,
        passes=passes,
        stage_passes=stage_passes,
        crowding=crowding,
        contention=contention,
        shares=shares,
        processors=processors,
        hop_prefill=hop_prefill,
        hop_decode=hop_decode,
        micro_batches=micro,
        prompt_batches=rows / first_rows,
        steps=work.new,
        objective=objective,
        allowed=allowed,
        max_loss=max_loss,
        max_bits=max_bits,
        tied=shape.modules.index(EMBEDDING) if decides_on_tied else None,
        tied_bytes=float(shape.tied),
    )


def _besides_layers(
    devices: Sequence[Device], prompts: int, rows: float, held: float
) -> tuple[Array, Array, Array]:
    """`Problem.passes`, `stage_passes` and `crowding`.

    Args:
        prompts: that go through the stages at once.
        rows: that do in a step.
        held: bytes that a step reads on a machine.
    """

    def seconds(device: Device, found: Mapping[str, float]) -> Array:
        decode = found["decode"] + device.speed.farness(held) * found["far_decode"]
        places = found["prefill"], found["busy_prefill"], decode, found["busy_decode"]
        return np.array(places)

    alone, stages, crowding = [], [], []
    for device in devices:
        speed = device.speed
        of_one, of_all = (
            np.array([speed.step(first, decode=False), speed.step(second, decode=True)])
            for first, second in ((1, 1), (prompts, rows))
        )
        alone.append(of_all)
        in_stages = of_all.repeat(2)  # each where the others wait, and while they work
        if device.stage_passes is not None:
            in_stages += seconds(device, device.stage_passes) - of_one.repeat(2)
        stages.append(in_stages)
        crowding.append(seconds(device, device.crowding))
    shape = 2, 2, len(devices)
    of_stages, in_crowds = (np.array(each).T.reshape(shape) for each in (stages, crowding))
    return np.array(alone).T, of_stages, in_crowds


def _beside_products(
    config: ModelConfig, work: Workload, rows: tuple[float, float], cache: float
) -> tuple[HalfWork, HalfWork]:
    """What half a layer has to do beside its linears, of prompts and in a step.

    Args:
        rows: sequences that go through it at once, of prompts and in a step, or their mean.
        cache: bytes that it has of each sequence; 0: it is an MLP's.
    """
    of_prompts, in_step = (config.hidden_size * n for n in rows)
    if not cache:
        return HalfWork(of_prompts * work.prompt), HalfWork(in_step)
    # Keys and values grow from the prompt's length on: the mean of all steps.
    mean = work.prompt + work.new / 2
    scores = config.num_heads * np.array(rows) * [work.prompt**2, mean]
    (first, second), (third, fourth) = scores, scores * config.head_dim
    read = cache * rows[1] * mean / (work.prompt + work.new)
    heads = config.num_kv_heads * rows[1]
    prompt = HalfWork(of_prompts * work.prompt, first, third)
    return prompt, HalfWork(in_step, second, fourth, read, heads)


def shared_processors(devices: Sequence[Device]) -> tuple[Array, Whole]:
    """Of each machine that several CPU devices share, the shares (G, D) and processors (G,).

    See `Problem`; a device is a process there, with its threads.
    """
    hosts: dict[str, list[int]] = {}
    for d, device in enumerate(devices):
        if device.host is not None and device.threads and device.processors:
            hosts.setdefault(device.host, []).append(d)
    several = [places for places in hosts.values() if len(places) > 1]
    shares = np.zeros((len(several), len(devices)))
    processors = np.zeros(len(several), dtype=np.int64)
    for g, places in enumerate(several):
        processors[g] = max(devices[d].processors or 1 for d in places)
        shares[g, places] = [min((devices[d].threads or 1) / processors[g], 1.0) for d in places]
    return shares, processors
