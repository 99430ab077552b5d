"""What a token costs over ranks: a calculation, to be checked against what is measured.

Of a decode step, a rank reads its share of the weights and exchanges activations with its group.
The time of an exchange is latency, of which one that gathers has one hop and all ranks send at
once, plus bytes over bandwidth. Stages of a pipeline come one after the other for each token; with
as many micro-batches as stages they work at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

from qllm.config import ModelConfig

ACTIVATION_BYTES = 2  # float16 and bfloat16
NETWORKS = (25e9, 400e9)  # bits per second
RANKS = (8, 64)


@dataclass(frozen=True)
class Network:
    """What joins the ranks.

    Attributes:
        bandwidth: of each rank, bits per second each way.
        latency: seconds from a send to the return of the receive on the other side.
        per_message: seconds that a rank's processor spends on each message, sent and received.
    """

    bandwidth: float
    latency: float = 20e-6
    per_message: float = 3e-6


@dataclass(frozen=True)
class Machine:
    """A rank by itself.

    Attributes:
        bandwidth: bytes of weights per second that decode reads.
        overhead: seconds per layer that no share of the weights makes smaller.
    """

    bandwidth: float
    overhead: float = 10e-6


@dataclass(frozen=True)
class Cost:
    """Of one decode step, per rank.

    Attributes:
        seconds: all of it.
        compute, communication: the parts that it is made of.
        bytes: sent by a rank.
        exchanges: how many there are.
    """

    compute: float
    communication: float
    bytes: int
    exchanges: int

    @property
    def seconds(self) -> float:
        return self.compute + self.communication


def exchanges(config: ModelConfig, tp: int, mode: str, rows: int) -> list[float]:
    """Bytes that a rank sends to each other one in the exchanges of a decode step, in order."""
    if tp == 1:
        return []
    hidden = config.hidden_size * rows * ACTIVATION_BYTES
    layers: list[float] = []
    for index in range(config.num_layers):
        own = config.of_layer(index)
        inner = own.intermediate_size * rows * ACTIVATION_BYTES
        heads = own.num_heads * own.head_dim * rows * ACTIVATION_BYTES
        if mode == "exact":
            layers += [heads / tp, hidden / tp, inner / tp, hidden / tp]
        else:
            layers += [hidden, hidden]
    embedding = config.embed_size * rows * ACTIVATION_BYTES
    logits = config.vocab_size * rows * ACTIVATION_BYTES / tp
    return [embedding, *layers, logits]


def exchange_seconds(nbytes: float, ranks: int, network: Network) -> float:
    """Of one exchange, in which each rank sends `nbytes` to each of the others."""
    others = ranks - 1
    sent = nbytes * others * 8 / network.bandwidth
    return network.latency + others * network.per_message + sent


def cost(
    config: ModelConfig,
    weight_bytes: int,
    machine: Machine,
    network: Network,
    *,
    tp: int = 1,
    pp: int = 1,
    mode: str = "fast",
    rows: int = 1,
) -> Cost:
    """The time of one token per row.

    Args:
        weight_bytes: of all that a token's step reads: layers and LM head.
        rows: sequences that are decoded together.
    """
    compute = weight_bytes / tp / machine.bandwidth + config.num_layers * machine.overhead
    sizes = exchanges(config, tp, mode, rows)
    seconds = sum(exchange_seconds(size, tp, network) for size in sizes)
    if pp > 1:  # each stage hands its activations on, and the last one the tokens back
        hop = config.hidden_size * rows * ACTIVATION_BYTES
        seconds += (pp - 1) * exchange_seconds(hop, 2, network)
        seconds += exchange_seconds(8 * rows, pp, network)
    sent = int(sum(sizes) * (tp - 1))
    return Cost(compute, seconds, sent, len(sizes) + (pp if pp > 1 else 0))


def table(
    config: ModelConfig, weight_bytes: int, machine: Machine, latency: float = 20e-6
) -> list[dict]:
    """Predicted decode of one sequence on 1, 8 and 64 ranks at 25 and 400 Gbit/s, in both modes.

    Returns:
        rows with `ranks`, `gbit` and `mode` (None of one rank), `ms` per token, `communication` in
        ms, `kilobytes` sent per rank and token, and `speedup` over one rank. No row has more ranks
        than the model has heads.
    """
    cases = [
        (ranks, bandwidth, mode)
        for bandwidth in NETWORKS
        for ranks in RANKS
        for mode in ("fast", "exact")
        if ranks <= config.num_heads
    ]
    alone = cost(config, weight_bytes, machine, Network(NETWORKS[0], latency))
    found = [alone]
    for ranks, bandwidth, mode in cases:
        network = Network(bandwidth, latency)
        found.append(cost(config, weight_bytes, machine, network, tp=ranks, mode=mode))
    return [
        {
            "ranks": ranks,
            "gbit": bandwidth and bandwidth / 1e9,
            "mode": mode,
            "ms": step.seconds * 1e3,
            "communication": step.communication * 1e3,
            "kilobytes": step.bytes / 1e3,
            "speedup": alone.seconds / step.seconds,
        }
        for (ranks, bandwidth, mode), step in zip([(1, None, None), *cases], found, strict=True)
    ]
