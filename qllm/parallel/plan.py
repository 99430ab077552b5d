"""How each matrix of a model is sharded over ranks, by the shape of the model."""

from __future__ import annotations

from dataclasses import dataclass

from qllm.errors import UserError
from qllm.layers.sharding import Sharding, split_evenly


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
        raise UserError(f"`tp` {world} is more than the model's {heads} heads; give 1 to {heads}")
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


def attention_shardings(
    heads: list[Heads],
    head_dim: int,
    hidden: int,
    mode: str,
    parts: int = 3,
    *,
    gated: bool = False,
) -> dict[str, Sharding]:
    """The shardings of "qkv" and "out".

    Args:
        heads: of each rank, of `shard_heads`.
        parts: how many of queries, keys and values "qkv" puts out.
        gated: behind all of them are gates of the heads of queries.
    """
    kv_heads, count = heads[-1].keys.stop, heads[-1].queries.stop
    bases = (0, count, count + kv_heads, count + 2 * kv_heads)
    qkv = tuple(
        tuple(
            range((base + run.start) * head_dim, (base + run.stop) * head_dim)
            for base, run in zip(bases, (h.queries, h.keys, h.keys, h.queries), strict=True)
        )[: parts + gated]
        for h in heads
    )
    queries = tuple(runs[:1] for runs in qkv)
    return {"qkv": Sharding(0, qkv), "out": _second(queries, hidden, mode)}


def delta_shardings(
    heads: list[Heads], key_dim: int, value_dim: int, hidden: int, mode: str
) -> dict[str, Sharding]:
    """The shardings of a delta net's "qkv", "gates", "out", and of the channels of its "conv".

    Args:
        heads: of each rank, of `shard_heads`, the heads of values being those of queries there.
    """
    keys, count = heads[-1].keys.stop * key_dim, heads[-1].queries.stop
    values = count * value_dim
    found: dict[str, list[tuple[range, ...]]] = {name: [] for name in ("qkv", "gates", "values")}
    for h in heads:
        key = range(h.keys.start * key_dim, h.keys.stop * key_dim)
        value = range(h.queries.start * value_dim, h.queries.stop * value_dim)
        parts = ((0, key), (keys, key), (2 * keys, value), (2 * keys + values, value))
        found["qkv"].append(tuple(range(b + run.start, b + run.stop) for b, run in parts))
        both = (range(b + h.queries.start, b + h.queries.stop) for b in (0, count))
        found["gates"].append(tuple(both))
        found["values"].append((value,))
    return {
        "qkv": Sharding(0, tuple(found["qkv"])),
        "gates": Sharding(0, tuple(found["gates"])),
        "conv": Sharding(0, tuple(runs[:3] for runs in found["qkv"])),
        "out": _second(tuple(found["values"]), hidden, mode),
    }


def mlp_shardings(
    inner: int, hidden: int, gated: bool, world: int, mode: str
) -> dict[str, Sharding]:
    """The shardings of "up" and "down"."""
    runs = [run for (run,) in Sharding.evenly(0, inner, world).ranges]
    parts = (0, inner) if gated else (0,)
    up = tuple(tuple(range(b + run.start, b + run.stop) for b in parts) for run in runs)
    return {"up": Sharding(0, up), "down": _second(tuple((run,) for run in runs), hidden, mode)}


def _second(inputs: tuple[tuple[range, ...], ...], hidden: int, mode: str) -> Sharding:
    """The sharding of a matrix whose input channels the ranks have as they are given."""
    if mode == "fast":
        return Sharding(1, inputs)
    return Sharding.evenly(0, hidden, len(inputs))
