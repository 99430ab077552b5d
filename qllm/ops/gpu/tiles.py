"""The sizes of the products' tiles, from a table by architecture, kind and number of rows; and of
the decode product "warps_per_sm" and, by the number of rows, "cuts" for each of
`cuda.SIZE_CLASSES`: panels that a warp takes and blocks that it asks for in advance; and perhaps
blocks of threads of a cluster, whether x is asked for in advance, and whether all blocks of threads
are to have room at once; and perhaps "prefetched", KB of a panel that are asked for into the L2
before the kernel in front has ended.

`python3 -m benchmarks.gpu --tune` measures them on the GPU at hand and writes `tiles.json`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("tiles.json")
DEFAULT = "default"  # the row for what has not been measured
# The numbers of rows up to which an entry of the table serves; the last one serves all beyond.
ROWS = (16, 32, 64, 256)
MAX_SPLIT_K = 16
FEW = 64  # rows up to which reading the weight is what takes time
MIN_BLOCKS = 2  # of a part of K
SMALLEST = 16  # rows or columns of a product on the matrix units


class Tile(NamedTuple):
    """Of a product's result: rows of x and of the weight; and how a program works through it."""

    rows: int
    columns: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """How a product is cut into programs (CTAs).

    Attributes:
        split_k: into how many parts K is cut, which are summed by themselves.
        parallel: a program takes one of them, and not all in turn.
    """

    tile: Tile
    split_k: int
    parallel: bool


@cache
def table() -> dict:
    """{architecture: {kind: {"ctas_per_sm": int, "tiles": {rows: Tile's fields}}}}."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def entry(architecture: str, kind: str) -> dict:
    """The table's row of a kind on an architecture, or what stands in for it."""
    family = kind.partition("-")[0]
    rows, others = table().get(architecture, {}), table()[DEFAULT]
    return rows.get(kind) or rows.get(family) or others.get(kind) or others[family]


def tile_of(kind: str, rows: int, architecture: str) -> Tile:
    """The tile of a product of so many rows."""
    size = next((n for n in ROWS if rows <= n), ROWS[-1])
    return Tile(*entry(architecture, kind)["tiles"][str(size)])


def split_k(kind: str, columns: int, blocks: int, architecture: str, num_sms: int) -> int:
    """Into how many parts K is cut, so that few rows keep every multiprocessor busy.

    It is the same for any number of rows, whose results then do not depend on it.
    """
    row = entry(architecture, kind)
    tiles = -(-columns // row["tiles"][str(ROWS[0])][1])
    wanted = -(-row["ctas_per_sm"] * num_sms // tiles)
    count = max(1, min(wanted, blocks // MIN_BLOCKS, MAX_SPLIT_K))
    return -(-blocks // -(-blocks // count))  # fewer, where the last ones would get none


def plan(kind: str, rows: int, columns: int, blocks: int, architecture: str, num_sms: int) -> Plan:
    """How to compute a product of `rows` rows of x and `columns` of the weight.

    Args:
        kind: "packed-4" and the like for 4 bits, "dense", "dense-float32" or "int8".
        blocks: of K.
    """
    tile = tile_of(kind, rows, architecture)
    count = split_k(kind, columns, blocks, architecture, num_sms)
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
    if kind == "int8" and tile.rows > FEW:
        # Its sums are exact, and may be cut as is fastest: of many rows, what programs keep for the
        # last one to add up costs more than it gains.
        count = min(count, -(-num_sms // tiles))
    return Plan(tile, count, parallel=count > 1 and tiles < num_sms * 2)


def power(count: int) -> int:
    """The power of two that is not below a count."""
    return 1 << (count - 1).bit_length()


def padded_count(count: int) -> int:
    """Rows or columns of a product on the matrix units that takes `count`."""
    return max(SMALLEST, power(count))
