"""The program of a model, its losses and its devices: what `qllm.plan.solve` is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qllm.config import EMBEDDING, ModelConfig, QuantSpec
from qllm.plan.devices import Cluster, Device, HalfWork
from qllm.plan.problem import Problem
from qllm.plan.products import Products
from qllm.plan.sensitivity import Array
from qllm.plan.shape import Shape, Workload


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
    shares = processor_shares(devices)
    if cluster is not None:
        # Of what a step reads: the caches of a machine are shared by the stages that are there.
        cache = shape.cache(work)
        machines = len({(each.threads and each.host) or d for d, each in enumerate(devices)})
        sequences = first_rows, rows_each
        products = Products.of(
            shape, candidates, sequences, work.prompt, float(cache.sum()), machines
        )
        held = products.held
        passes, stage_passes, crowding = _besides_layers(devices, first_rows, rows_each, held)
        values = config.hidden_size * products.tokens
        hop_prefill = cluster.hop(values * shape.dtype.itemsize)
        hop_decode = cluster.hop(config.hidden_size * rows_each * shape.dtype.itemsize)
        hop_decode += cluster.hop(8 * rows_each)  # the last stage tells every other one its tokens
        beside = [
            _beside_products(config.of_layer(half // 2), work, sequences, each / rows)
            for half, each in enumerate(cache)
        ]
        for d, device in enumerate(devices):
            speed = device.speed
            prefill[d], decode[d] = products.seconds(speed)
            fixed_prefill[d], fixed_decode[d] = products.experts(speed)
            for h, (prompt, step) in enumerate(beside):
                fixed_prefill[d, h] += speed.half(prompt, decode=False, model=held)
                fixed_decode[d, h] += speed.half(step, decode=True, model=held)
            ends = ((fixed_prefill, first_rows, False), (fixed_decode, rows_each, True))
            for table, at_once, decoding in ends:
                table[d, -1] += speed.logits(at_once * config.vocab_size, decode=decoding)
                if shape.head is not None:
                    head = QuantSpec(), *shape.head
                    table[d, -1] += speed.linear(*head, at_once, decode=True, model=held)
            if device.contention and (shares[:, d] > 0).any():
                contention[d] = _contention(products, device, decode[d])
    return Problem(
        half_of=shape.half_of,
        loss=loss,
        nbytes=shape.held(count),
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


def _contention(products: Products, device: Device, step: Array) -> float:
    """`Problem.contention` of a device whose machine others share.

    Products with more rows, for which others wait, read no more than those with one.

    Args:
        step: seconds (M, C) of its products in a step.
    """
    speed = device.speed
    of_one_row = products.of_one_row(speed, step) / float(step.sum())
    return device.contention * speed.farness(products.held) * of_one_row


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


def processor_shares(devices: Sequence[Device]) -> Array:
    """`Problem.shares`; a device is a process on its machine, with its threads."""
    hosts: dict[str, list[int]] = {}
    for d, device in enumerate(devices):
        if device.host is not None and device.threads and device.processors:
            hosts.setdefault(device.host, []).append(d)
    several = [places for places in hosts.values() if len(places) > 1]
    shares = np.zeros((len(several), len(devices)))
    for g, places in enumerate(several):
        processors = max(devices[d].processors or 1 for d in places)
        shares[g, places] = [min((devices[d].threads or 1) / processors, 1.0) for d in places]
    return shares
