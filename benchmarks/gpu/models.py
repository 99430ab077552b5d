"""Whole models of published sizes, their weights drawn on the GPU."""

from __future__ import annotations

import gc
import statistics
import time

import torch

from benchmarks.gpu.layers import fill_buffers
from qllm.bench.runners import read_bytes
from qllm.config import QuantPlan
from qllm.generate import NewTokens
from qllm.models import Decoder, RawConfig, family_of
from tools.random_checkpoint import PUBLISHED

CONTEXT = 16


def random_model(
    repository: str, bitwidth: str, dtype: torch.dtype, device: torch.device
) -> Decoder:
    """A model of a repository's sizes with random weights."""
    raw = RawConfig(PUBLISHED[repository], repository)
    family = family_of(raw)
    config = family.read_config(raw)
    linears = family.layer_linears(config)
    plan = QuantPlan.parse(bitwidth)
    model = Decoder(config, plan.resolve(linears, config.num_layers), dtype)
    for module in model.modules():
        fill_buffers(module, device)
    if config.tied_head:
        model.lm_head.weight = model.embed.weight
    for layer in model.layers:
        layer.fuse_norms()
    return model


def measure(
    repository: str, bitwidth: str, batch: int, steps: int, limits: dict[str, float],
    dtype: torch.dtype, device: torch.device,
) -> dict[str, object]:  # fmt: skip
    """Time of a decode step, and the share of the bandwidth at which it reads the weights."""
    gc.collect()  # of a model that was measured before, whose graph knows it
    model = random_model(repository, bitwidth, dtype, device)
    cache = model.new_cache(batch, CONTEXT + steps + 3)
    tokens = model.prefill([list(range(CONTEXT))] * batch, cache).argmax(-1)
    for _ in range(2):  # compiled, then captured
        tokens = model.decode(tokens, cache).argmax(-1)
    times, found = [], NewTokens(tokens)
    found.tolist()
    for _ in range(steps):  # each given to the GPU before the last one's tokens are looked at
        start = time.perf_counter()
        tokens = model.decode(tokens, cache).argmax(-1)
        last, found = found, NewTokens(tokens)
        last.tolist()
        times.append(time.perf_counter() - start)
    taken = statistics.median(times)
    read = read_bytes(model)
    return {
        "model": repository,
        "bitwidth": bitwidth,
        "batch": batch,
        "milliseconds": taken * 1e3,
        "tokens_per_second": batch / taken,
        "bytes": read,
        "of_bandwidth": read / taken / limits["bandwidth"],
    }
