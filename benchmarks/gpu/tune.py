"""The search for the tiles that are fastest on the GPU at hand."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton

from benchmarks.gpu.layers import Bench, ours
from benchmarks.gpu.ways import taking
from qllm.ops import phase
from qllm.ops.gpu import cuda, decode, decode_int8, prefill, tiles
from qllm.ops.gpu import device as device_of
from qllm.ops.gpu.layout import BLOCK, PANEL
from qllm.ops.gpu.limits import seconds
from qllm.ops.gpu.tiles import ROWS, Tile

CTAS_PER_SM = (1, 2, 3, 4, 6, 8)
DECODE_WARPS, DECODE_DEPTHS, DECODE_PANELS = (16, 32), (1, 2, 3, 4), (1, 2, 4)
# Of many rows on GPUs that have clusters: depths, parts, whether rows are asked for in advance, and
# whether all blocks of threads are to have room at once.
DECODE_OTHERS = (1, 2), (1, 2), (False, True), (True,)
PREFETCHED = (0, 16, 32, 64, 128)  # KB of a panel, where kernels may begin early
COLUMNS, WARPS, STAGES = (64, 128), (4, 8), (2, 3, 4, 5)
MANY = 2048  # rows for which the last tile of a kind is chosen
# Rows of a prompt for which the last tile is, whose weights become numbers in registers; and those
# from which on they may do so in memory.
FEW, FROM = 512, (256, 384, 512, 768, 1024, 1536)


def kinds(bitwidths: Iterable[str]) -> dict[str, str]:
    """Of each bitwidth, the kind of product that it is in the table."""
    return {
        bitwidth: {"16": "dense", "8:tc-li": "int8"}.get(bitwidth, f"packed-{bitwidth}")
        for bitwidth in bitwidths
    }


def candidates(rows: int) -> list[Tile]:
    """Tiles for up to so many rows."""
    heights = (64, 128) if rows == ROWS[-1] else (rows,)
    return [Tile(*fields) for fields in itertools.product(heights, COLUMNS, WARPS, STAGES)]


@dataclass
class Search:
    """The search for one kind's row of the table, which lies in it while it is tried.

    Attributes:
        shapes: (K, N) of layers.
        benches: them, in the same order.
        max_candidates: candidates that are tried; None: all.
    """

    kind: str
    row: dict
    shapes: Sequence[tuple[int, int]]
    benches: Sequence[Bench]
    device: torch.device
    repeats: int
    max_candidates: int | None
    say: Callable[[str], None]

    def run(self) -> None:
        """Leave in the row what took the least time."""
        self._tiles(MANY)
        tried = {count: self._with_ctas(count) for count in CTAS_PER_SM[: self.max_candidates]}
        self.row["ctas_per_sm"] = min(tried, key=tried.get)

    def prompts(self) -> None:
        """The same for the row of "prefill"."""
        self.row["many_rows"] = MANY
        self._tiles(FEW)
        for rows in FROM[: self.max_candidates]:
            self.row["many_rows"] = rows + 1
            in_registers = self._cost(rows)
            self.row["many_rows"] = rows
            if self._cost(rows) <= in_registers:
                break
        self.say(f"{self.kind}: weights are dequantized in memory from {rows} rows on")

    def _tiles(self, many: int) -> None:
        for max_rows in ROWS:
            rows = many if max_rows == ROWS[-1] else max_rows
            options = candidates(max_rows)[: self.max_candidates]
            costs = {tile: self._with_tile(max_rows, tile, rows) for tile in options}
            best = min(costs, key=costs.get)
            self.row["tiles"][str(max_rows)] = list(best)
            self.say(f"{self.kind}, {max_rows} rows: {best}")

    def decode(self, row: dict) -> None:
        """Leave in a row of the decode product's what took the least time.

        How many warps share a panel, which decides on sums, is found for one row of x; then, for
        some, panels and depths, those of each size class; at last how much is asked for into the
        L2, where that may be before the kernel in front has ended. What no shape tells stays as it
        is.
        """
        few, kept = str(8 * cuda.TILES[0]), json.loads(json.dumps(row["cuts"]))
        costs = {
            (warps, depth): sum(self._step(row, warps, few, [1, depth]))
            for warps, depth in itertools.product(DECODE_WARPS, DECODE_DEPTHS)
        }
        row["warps_per_sm"], _ = min(costs, key=costs.get)
        classes = [self._size_class(row["warps_per_sm"], shape) for shape in self.shapes]
        for rows, of_rows in kept.items():
            of_rows.extend(of_rows[: len(cuda.WARPS)][len(of_rows) - cuda.SIZE_CLASSES :])
            cuts = list(itertools.product(DECODE_PANELS, DECODE_DEPTHS))
            if self._takes_clusters(int(rows)):
                cuts += itertools.product(DECODE_PANELS, *DECODE_OTHERS)
            found = {cut: self._step(row, row["warps_per_sm"], rows, list(cut)) for cut in cuts}
            for size_class in set(classes):
                of_class = [own == size_class for own in classes]
                best = min(found, key=lambda cut: sum(itertools.compress(found[cut], of_class)))
                of_rows[size_class] = list(best)
            row["cuts"][rows] = of_rows
        if cuda.late_reason(self.device) is None:
            row["prefetched"] = self._best_prefetched(row)
        self.say(f"{self.kind}, decode: {row}")

    def _best_prefetched(self, row: dict) -> int:
        """KB of a panel that are best asked for into the L2."""
        costs = {}
        for row["prefetched"] in PREFETCHED[: self.max_candidates]:
            with phase.decode():
                costs[row["prefetched"]] = sum(self._cost(int(rows)) for rows in row["cuts"])
        return min(costs, key=costs.get)

    def _takes_clusters(self, rows: int) -> bool:
        late = cuda.late_reason(self.device)
        return rows > 8 * cuda.TILES[0] and self.kind != "int8" and late is None

    def _size_class(self, wanted: int, shape: tuple[int, int]) -> int:
        inputs, outputs = shape
        panels, (_, num_sms) = -(-outputs // PANEL), device_of.architecture(self.device)
        blocks = -(-inputs // BLOCK)
        warps = cuda.warps(wanted, panels, blocks, num_sms)
        return cuda.size_class(warps, panels, blocks, num_sms)

    def _step(self, row: dict, warps: int, rows: str, cut: list[int]) -> list[float]:
        row["warps_per_sm"], row["cuts"][rows] = warps, [cut] * cuda.SIZE_CLASSES
        with phase.decode():
            return self._costs(int(rows))

    def _with_tile(self, max_rows: int, tile: Tile, rows: int) -> float:
        self.row["tiles"][str(max_rows)] = list(tile)
        return self._cost(rows)

    def _with_ctas(self, count: int) -> float:
        self.row["ctas_per_sm"] = count
        return self._cost(1)

    def _cost(self, rows: int) -> float:
        return sum(self._costs(rows))

    def _costs(self, rows: int) -> list[float]:
        """Seconds of a product, relative to the size of the layer, of each of them."""
        found = []
        for bench, (inputs, outputs) in zip(self.benches, self.shapes, strict=True):
            x = torch.randn(rows, inputs, device=self.device).to(torch.bfloat16)
            calls = [partial(run, x) for run in bench.runs]
            try:
                with torch.inference_mode():
                    taken = seconds(calls, self.device, self.repeats)
                found.append(taken / (inputs * outputs))
            except triton.runtime.errors.OutOfResources as error:
                self.say(f"{self.kind}, {rows} rows: {error}")
                found.append(math.inf)
        return found


def search(
    bitwidths: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    cache: int,
    say: Callable[[str], None],
    repeats: int = 3,
    max_candidates: int | None = None,
) -> dict:
    """The table's rows for an architecture; see `Search`."""
    architecture, _ = device_of.architecture(device)
    found = {}
    for bitwidth, kind in kinds(bitwidths).items():
        packed = kind.startswith("packed")
        rounded = packed and not prefill.unsupported_reason(device)
        of = "prefill" if rounded else kind  # one row for all numbers of bits
        row = json.loads(json.dumps(tiles.entry(architecture, of)))
        tiles.table().setdefault(architecture, {})[of] = found[of] = row
        options = (torch.bfloat16, device, cache)
        benches = [next(ours(bitwidth, *shape, *options)) for shape in shapes]
        search = Search(of, row, shapes, benches, device, repeats, max_candidates, say)
        with taking("Triton"):  # whose tiles they are
            (search.prompts if rounded else search.run)()
        if packed:
            step, reason = kind.replace("packed", "decode"), decode.unsupported_reason(device)
        elif kind == "int8":
            step, reason = f"decode-{kind}", decode_int8.unsupported_reason(device)
        else:
            continue
        if not reason:
            row = json.loads(json.dumps(tiles.entry(architecture, step)))
            tiles.table()[architecture][step] = found[step] = row
            search.decode(row)
    return found


def save(architecture: str, found: dict, path: Path = tiles.TABLE) -> None:
    """Put rows into the table's file, a kind to a line."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    table.setdefault(architecture, {}).update(found)
    blocks = (
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"    {json.dumps(kind)}: {json.dumps(row)}" for kind, row in rows.items())
        + "\n  }"
        for name, rows in table.items()
    )
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
