"""The table of tiles, and how a product is cut by it."""

from __future__ import annotations

import itertools

import pytest

from qllm.ops.gpu import tiles
from qllm.ops.gpu.tiles import ROWS, Tile
from qllm.quant.packing import BITS

KINDS = (*(f"packed-{bits}" for bits in BITS), "dense", "dense-float32", "int8")


@pytest.mark.parametrize("architecture", [*tiles.table(), "8.0", "12.1", "interpreter"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_tiles_for_any_number_of_rows(architecture, kind):
    row = tiles.entry(architecture, kind)
    assert row["ctas_per_sm"] >= 1 and list(row["tiles"]) == [str(count) for count in ROWS]
    for count, fields in row["tiles"].items():
        tile = Tile(*fields)
        assert 16 <= tile.rows <= int(count) and tile.columns >= 64
        assert tile.warps in (4, 8) and 1 <= tile.stages <= 6
    # Rows up to 16 are one tile: what decides on split_k does not depend on them.
    assert row["tiles"]["16"][0] == 16


@pytest.mark.parametrize(("columns", "blocks"), [(64, 1), (4096, 32), (12288, 32), (4096, 86)])
def test_split_k_is_the_same_for_any_number_of_rows(columns, blocks):
    plans = [tiles.plan("packed-4", rows, columns, blocks, "9.0", 132) for rows in range(1, 300)]
    assert len({plan.split_k for plan in plans}) == 1
    assert all(plan.split_k > 1 for plan in plans if plan.parallel)
    assert any(plan.parallel for plan in plans) == (plans[0].split_k > 1)


def test_int8_of_many_rows_is_cut_as_much_as_keeps_multiprocessors_busy():
    for rows, columns, count in ((64, 4096, 9), (128, 4096, 5), (512, 4096, 2), (1024, 4096, 1)):
        plan = tiles.plan("int8", rows, columns, 86, "9.0", 132)
        assert plan.split_k == count and plan.parallel == (count > 1)


def test_few_rows_keep_every_multiprocessor_busy():
    for columns, blocks in itertools.product((4096, 5120, 8192, 11008), (32, 64, 86)):
        plan = tiles.plan("packed-4", 1, columns, blocks, "9.0", 132)
        ctas = -(-columns // plan.tile.columns) * plan.split_k
        assert ctas >= 132


@pytest.mark.covering(2)
@pytest.mark.parametrize("blocks", range(1, 100))
def test_every_part_of_k_has_blocks(blocks):
    split_k = tiles.split_k("packed-4", 64, blocks, "9.0", 132)
    per_split = -(-blocks // split_k)
    assert (split_k - 1) * per_split < blocks <= split_k * per_split
