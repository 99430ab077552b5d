"""How each matrix of a model is sharded over ranks, by the shape of the model."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from qllm.config import ModelConfig
from qllm.errors import UserError
from qllm.layers.sharding import split_evenly

UNITS = (128, 64, 32)  # channels that are better left together: groups and the kernels' panels


@dataclass(frozen=True)
class Sharding:
    """How the ranks share one matrix.

    Attributes:
        dim: 0: its output channels, 1: its input channels.
        ranges: of each rank, its runs of channels.
    """

    dim: int
    ranges: tuple[tuple[range, ...], ...]

    @property
    def widths(self) -> list[int]:
        """How many channels each rank has."""
        return [sum(map(len, runs)) for runs in self.ranges]


@dataclass(frozen=True)
class Heads:
    """The attention heads of a rank: runs of those of queries, and of keys and values."""

    queries: range
    keys: range


def shard_heads(heads: int, kv_heads: int, world: int) -> list[Heads]:
    """Whole heads for each rank, so that all key heads of a rank have as many query heads.

    Up to as many ranks as there are key heads share these, and query heads go with theirs; of more
    ranks, some hold the same key head, and share its query heads.

    Raises:
        UserError: there are more ranks than heads.
    """
    if world > heads:
        raise UserError(f"--tp {world} is more than the model's {heads} heads; give 1 to {heads}")
    each = heads // kv_heads
    if world <= kv_heads:
        runs = split_evenly(kv_heads, world)
        return [Heads(range(run.start * each, run.stop * each), run) for run in runs]
    found = []
    for key, ranks in enumerate(split_evenly(world, kv_heads)):
        for run in split_evenly(each, len(ranks)):
            queries = range(key * each + run.start, key * each + run.stop)
            found.append(Heads(queries, range(key, key + 1)))
    return found


def even(size: int, world: int) -> list[range]:
    """Channels that may be cut anywhere, in runs of about one length, of whole units if possible.

    Raises:
        ValueError: there are fewer channels than ranks.
    """
    for unit in UNITS:
        if size % (unit * world) == 0:
            return split_evenly(size, world, unit)
    smallest = UNITS[-1]
    return split_evenly(size, world, smallest if ceil(size / smallest) >= world else 1)


def attention_shardings(
    heads: list[Heads], head_dim: int, hidden: int, mode: str
) -> dict[str, Sharding]:
    """The shardings of "qkv" and "out".

    Args:
        heads: of each rank, of `shard_heads`.
    """
    kv_heads, count = heads[-1].keys.stop, heads[-1].queries.stop
    qkv = tuple(
        tuple(
            range((base + run.start) * head_dim, (base + run.stop) * head_dim)
            for base, run in ((0, h.queries), (count, h.keys), (count + kv_heads, h.keys))
        )
        for h in heads
    )
    queries = tuple(runs[:1] for runs in qkv)
    return {"qkv": Sharding(0, qkv), "out": _second(queries, hidden, mode)}


def mlp_shardings(
    inner: int, hidden: int, gated: bool, world: int, mode: str
) -> dict[str, Sharding]:
    """The shardings of "up" and "down"."""
    runs = even(inner, world)
    parts = (0, inner) if gated else (0,)
    up = tuple(tuple(range(b + run.start, b + run.stop) for b in parts) for run in runs)
    return {"up": Sharding(0, up), "down": _second(tuple((run,) for run in runs), hidden, mode)}


def _second(inputs: tuple[tuple[range, ...], ...], hidden: int, mode: str) -> Sharding:
    """The sharding of a matrix whose input channels the ranks have as they are given."""
    if mode == "fast":
        return Sharding(1, inputs)
    return shard_rows(hidden, len(inputs))


def shard_rows(size: int, world: int) -> Sharding:
    """Output channels, or rows of an embedding, in even runs."""
    return Sharding(0, tuple((run,) for run in even(size, world)))


def model_shardings(config: ModelConfig, world: int, mode: str) -> dict[str, Sharding]:
    """The sharding of each matrix by the name of its module, in a layer or outside of them."""
    heads = shard_heads(config.num_heads, config.num_kv_heads, world)
    attention = attention_shardings(heads, config.head_dim, config.hidden_size, mode)
    mlp = mlp_shardings(config.intermediate_size, config.hidden_size, config.gated_mlp, world, mode)
    vocabulary = shard_rows(config.vocab_size, world)
    return {
        **{f"attention.{name}": sharding for name, sharding in attention.items()},
        **{f"mlp.{name}": sharding for name, sharding in mlp.items()},
        "embed": vocabulary,
        "lm_head": vocabulary,
    }
