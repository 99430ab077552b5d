"""Libraries with the path for AMX, and what the manual says that a product of tiles is."""

from __future__ import annotations

import ctypes
import math
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from qllm.ops.cpu import build, paths
from qllm.ops.cpu import library as native

AVX512, AMX = 4, 8  # of dispatch.cpp
HARDWARE = "hardware.so"
LOOK = native.library.__wrapped__  # tests put others in the place of `library`
# What tiles have to do with, quick to compile: the products of avx512, and no other path.
AVX512_SOURCE = """
#include "isa.h"
#undef GEMV_OPERANDS
#include "dense.h"
#include "linear.h"
namespace qllm {
constexpr Path path() {
    Path path = {"avx512"};
    path.linear = linear;
    path.pack = pack;
    path.unpack = unpack;
    path.dense = dense;
    return path;
}
}
const qllm::Path qllm::avx512_path = path();
"""
# Carries out the instructions that this machine refuses. One that has tiles may refuse some alone,
# which cannot be told apart.
HAS_TILES = "amx" in paths.available()
TRAP = Path(__file__).with_name("trapped_tiles.cpp")
# One product of whole tiles.
PAIRS_SOURCE = """
#include "isa_avx512.h"
#include "amx_instructions.h"
extern "C" __attribute__((visibility("default")))
void pairs(float *sums, const uint16_t *x, const uint16_t *w) {
    using namespace qllm;
    TileShapes shapes = {};
    shapes.palette = 1;
    for (int t = 0; t < 8; t++) {
        shapes.rows[t] = 16;
        shapes.bytes[t] = 64;
    }
    load_shapes(shapes);
    load_tile<0>(sums, 64);
    load_tile<1>(x, 64);
    load_tile<2>(w, 64);
    add_pairs<0, 1, 2>();
    store_tile<0>(sums, 64);
    release_tiles();
}
"""


def compiled(factory: pytest.TempPathFactory, sources: dict[str, str], flags: str) -> Path:
    """The library of some sources and all headers, from the cache that keeps the users' own.

    Tiles stand on vectors of AVX-512, which nothing carries out where there are none.
    """
    if "avx512" not in paths.available():
        pytest.skip("this machine lacks AVX-512 VNNI")
    folder = factory.mktemp("src")
    for path in build.SOURCE.glob("*.h"):
        shutil.copy(path, folder)
    for name, text in sources.items():
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLLM_CXXFLAGS", flags)
        return Path(build.load.__wrapped__(folder)._name)


def tile_library(factory: pytest.TempPathFactory, kind: str) -> Path:
    """A library with the path for AMX: of "hardware" the users' own, or "trapped".

    That one is what users have, on machines without AMX: its instructions are carried out by TRAP.
    """
    if kind == "hardware":
        copy = factory.mktemp("library") / HARDWARE
        copy.write_bytes(Path(native.library()._name).read_bytes())
        return copy
    if HAS_TILES:
        pytest.skip("this machine has tiles of its own")
    sources = {
        name: (build.SOURCE / name).read_text(encoding="utf-8")
        for name in ("dispatch.cpp", "threads.cpp", "amx.cpp")
    }
    sources |= {"avx512.cpp": AVX512_SOURCE, TRAP.name: TRAP.read_text(encoding="utf-8")}
    return compiled(factory, sources, paths.TRAPPED)


def started(path: Path, forced: str = "") -> ctypes.CDLL:
    """A library, on the best path or one that is forced, as a process has it that starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLLM_CPU_PATH", forced)
        patch.setattr(build, "load", lambda omitted: ctypes.CDLL(str(path)))
        if path.name != HARDWARE:
            patch.setattr(paths, "available", lambda: tuple(paths.PATHS))
        return LOOK()


def pairs_library(factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """What `pairs` calls."""
    sources = {"amx.cpp": PAIRS_SOURCE, TRAP.name: TRAP.read_text(encoding="utf-8")}
    return ctypes.CDLL(str(compiled(factory, sources, "")))


def pairs(library: ctypes.CDLL, sums: np.ndarray, x: np.ndarray, w: np.ndarray):
    """What tiles make of float32 sums (16, 16) and of bfloat16, as uint16, x and w (16, 16, 2)."""
    out, x, w = sums.copy(), np.ascontiguousarray(x), np.ascontiguousarray(w)
    library.pairs(*(part.ctypes.data_as(ctypes.c_void_p) for part in (out, x, w)))
    return out


SMALLEST, BITS = 2.0**-126, 24  # of the normal numbers of float32


def fused(a: float, b: float, c: float) -> float:
    """a b + c, rounded once to float32; what is subnormal counts as zero, and becomes it."""
    a, b, c = (math.copysign(0, v) if abs(v) < SMALLEST else v for v in (a, b, c))
    near = a * b + c  # of float64, which holds the product: the sign of zeros, infinities, NaN
    if not near or not math.isfinite(near):
        return near
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    step = Fraction(2) ** (exponent + 1 - BITS)
    value = float(round(exact / step) * step)  # halves go to even
    if abs(value) < SMALLEST:
        return math.copysign(0, value)
    return math.copysign(math.inf, value) if abs(value) >= 2.0**128 else value


def manual(total: float, x: np.ndarray, w: np.ndarray) -> float:
    """TDPBF16PS: one sum, and pairs (16, 2) of a row of x and a column of w, as float64."""
    halves = [0.0, 0.0]  # of even and of odd inputs
    for one, other in zip(x.tolist(), w.tolist(), strict=True):
        halves = [fused(*values) for values in zip(one, other, halves, strict=True)]
    return fused(1, total, fused(1, *halves))
