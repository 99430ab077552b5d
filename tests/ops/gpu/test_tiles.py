"""The table of tiles, and how a product is cut by it."""

from __future__ import annotations

import itertools

import pytest

from qllm.ops.gpu import tiles
from qllm.ops.gpu.tiles import ROWS, Tile
from qllm.quant.packing import BITS

KINDS = (*(f"packed-{bits}" for bits in BITS), "dense", "int8")


@pytest.mark.parametrize("architecture", [*tiles.table(), "8.0", "12.1", "interpreter"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_tiles_for_any_number_of_rows(architecture, kind):
    row = tiles.entry(architecture, kind)
    assert row["programs"] >= 1 and list(row["tiles"]) == [str(count) for count in ROWS]
    for count, fields in row["tiles"].items():
        tile = Tile(*fields)
        assert 16 <= tile.rows <= int(count) and tile.columns >= 64
        assert tile.warps in (4, 8) and 1 <= tile.stages <= 6
    # Rows up to 16 are one tile: what decides on the slices does not depend on them.
    assert row["tiles"]["16"][0] == 16


@pytest.mark.parametrize(("columns", "blocks"), [(64, 1), (4096, 32), (12288, 32), (4096, 86)])
def test_slices_are_the_same_for_any_number_of_rows(columns, blocks):
    plans = [tiles.plan("packed-4", rows, columns, blocks, "9.0", 132) for rows in range(1, 300)]
    assert len({plan.slices for plan in plans}) == 1
    assert all(plan.slices > 1 for plan in plans if plan.split)
    assert any(plan.split for plan in plans) == (plans[0].slices > 1)


def test_few_rows_keep_every_processor_busy():
    for columns, blocks in itertools.product((4096, 5120, 8192, 11008), (32, 64, 86)):
        plan = tiles.plan("packed-4", 1, columns, blocks, "9.0", 132)
        programs = -(-columns // plan.tile.columns) * plan.slices
        assert programs >= 132


@pytest.mark.parametrize("blocks", range(1, 100))
def test_every_slice_has_blocks(blocks):
    slices = tiles.slices("packed-4", 64, blocks, "9.0", 132)
    per_slice = -(-blocks // slices)
    assert (slices - 1) * per_slice < blocks <= slices * per_slice
