"""The path for AMX: on software tiles where there are no others, and what becomes of bad ones."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import exact
import pytest
import torch
from cpu_paths import DTYPES, INTEGERS, normal
from torch import Tensor

from qllm.errors import UserError
from qllm.ops.cpu import build, linear
from qllm.ops.cpu import library as native
from qllm.quant.packing import PackedWeight, packed_size

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, build.COMPILERS)),
    reason="compiles C++ on Linux",
)

AVX512, AMX = 4, 8  # of dispatch.cpp
# Up to 8 rows are not for tiles, 16 fill one, 192 are a chunk.
ROWS = (1, 8, 9, 15, 16, 17, 31, 33, 200)
# Outputs: of 5 panels, 4 of which go together, of 3, 2 and 1. Inputs: blocks of 1 to 4 slabs.
SHAPES = ((72, 200), (40, 300), (20, 131), (9, 257))
GROUPS = (32, 64, 96, 128, 100, 20, -1)
# What tiles have to do with, quick to compile: the products of avx512, and no other path.
AVX512_SOURCE = """
#include "isa_avx512.h"
#undef FEW_STREAMS
#include "tile.h"
#include "linear.h"
#include "elements.h"
#include "dense_tile.h"
#include "dense.h"
const qllm::Path qllm::avx512_path = {
    "avx512", linear, pack, unpack, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, dense};
"""
OTHER_SOURCE = '#include "kernels.h"\nconst qllm::Path qllm::%s_path = {"%s"};\n'


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> dict[str, Path]:
    """Files with the path: on software tiles, and as users have it."""
    folder, cache = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("cache")
    for pattern in ("*.h", "dispatch.cpp", "amx.cpp"):
        for path in build.SOURCE.glob(pattern):
            shutil.copy(path, folder)
    (folder / "avx512.cpp").write_text(AVX512_SOURCE)
    for name in ("avx512bf16", "avxvnni", "avx2", "scalar"):
        (folder / f"{name}.cpp").write_text(OTHER_SOURCE % (name, name))
    with pytest.MonkeyPatch.context() as patch:
        for kind, flags in (("emulated", "-DQLLM_EMULATE_AMX"), ("hardware", "")):
            patch.setenv("QLLM_CXXFLAGS", flags)
            patch.setenv("QLLM_CACHE", str(cache / kind))
            build.load.__wrapped__(folder)
    return {path.parent.name: path for path in cache.glob("*/*.so")}


@pytest.fixture
def found(monkeypatch, libraries, tmp_path):
    """A function that looks for a path as a process does when it starts."""
    look = native.library.__wrapped__

    def find(kind: str, forced: str = "") -> ctypes.CDLL:
        monkeypatch.setenv("QLLM_CPU_PATH", forced)
        # A test's own copy: what another test has loaded remembers what it found.
        copy = tmp_path / f"{kind}.so"
        if not copy.exists():
            shutil.copy(libraries[kind], copy)
        monkeypatch.setattr(build, "load", lambda: ctypes.CDLL(str(copy)))
        library = look()
        if not library.qllm_features() & AVX512:
            pytest.skip("this machine lacks AVX-512 VNNI")
        monkeypatch.setattr(native, "library", lambda: library)
        return library

    return find


@pytest.fixture(params=["emulated", "hardware"])
def tiles(request, found) -> ctypes.CDLL:
    library = found(request.param)
    if not library.qllm_features() & AMX:
        assert request.param == "hardware"
        pytest.skip(f"AMX is {library.qllm_amx_state().decode()} here")
    return library


def random_bytes(*shape: int, below: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + below)
    return torch.randint(below, shape, generator=generator, dtype=torch.uint8)


def random_weight(shape: tuple[int, int], bits: int, group_size: int, zeros: int) -> PackedWeight:
    """A weight (N, K) in the kernels' layout, zeros below a number or symmetric for 0."""
    outputs, inputs = shape
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    rows = random_bytes(outputs, packed_size(inputs, bits))
    scales = normal(outputs, groups).abs().half()
    qzeros = random_bytes(outputs, groups, below=zeros) if zeros else rows.new_empty(0)
    return linear.pack(PackedWeight(rows, scales, qzeros), bits, group_size, inputs)


def activations(rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """Of all sizes, and some rows of what is no number, large, tiny or zero."""
    x = normal(rows, inputs) * 2.0 ** normal(rows, 1, seed=1).mul(3).round()
    for row, value in enumerate((0, torch.inf, torch.nan, 1e-40, 65504, -1)):
        x[row % rows, row % inputs :] = value
    return x.to(dtype)


def on_both(library: ctypes.CDLL, x: Tensor, compute) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For several numbers of rows: the bits of what tiles give, and of what vectors do."""

    def on(path: str, part: Tensor) -> Tensor:
        assert library.qllm_use(path.encode(), ctypes.c_int64(library.qllm_features()))
        result = compute(part)
        return result.view(INTEGERS[result.element_size()])

    expected = on("avx512", x)
    for rows in (*(rows for rows in ROWS if rows < len(x)), len(x)):
        yield rows, on("amx", x[:rows]), expected[:rows]


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(
    ("run", "bits"),
    [
        *((linear.weight_only_linear, bits) for bits in range(1, 9)),
        *((linear.weight_only_linear_int8, bits) for bits in (1, 4, 8)),
    ],
)
def test_products_are_those_of_vectors(tiles, run, bits, group_size):
    # Zeros are below 2^bits in what is quantized here; other bytes are no reason to differ.
    for (i, zeros), dtype in itertools.product(enumerate((0, 2**bits, 256)), DTYPES):
        shape = SHAPES[(bits + i + DTYPES.index(dtype)) % len(SHAPES)]
        weight = random_weight(shape, bits, group_size, zeros)
        x, bias = activations(200, shape[1], dtype), normal(shape[0]).to(dtype)
        for rows, ours, expected in on_both(
            tiles,
            x,
            lambda x, w=weight, b=bias: run(x, *w[:3], b, len(b), bits, group_size),
        ):
            assert torch.equal(ours, expected), (rows, shape, zeros, dtype)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("inputs", [1, 31, 64, 200, 300, 513])
def test_int8_products_are_those_of_vectors(tiles, inputs, static):
    scale = torch.tensor([0.02]) if static else None
    for dtype, outputs in itertools.product(DTYPES, (9, 20, 40, 72)):
        weight = random_weight((outputs, inputs), 8, -1, 0)
        x, bias = activations(200, inputs, dtype), normal(outputs).to(dtype)
        for rows, ours, expected in on_both(
            tiles,
            x,
            lambda x, w=weight, b=bias: linear.int8_linear(x, *w[:2], b, scale, len(b)),
        ):
            assert torch.equal(ours, expected), (rows, outputs, dtype)


def test_more_rows_than_are_held_at_once(tiles):
    weight = random_weight((20, 40), 4, 32, 16)
    x = activations(1537, 40, torch.float16)
    for _, ours, expected in on_both(
        tiles, x, lambda x: linear.weight_only_linear(x, *weight[:3], None, 20, 4, 32)
    ):
        assert torch.equal(ours, expected)


def test_extreme_products_do_not_saturate(tiles):
    # 128 products of the largest bytes, with zeros at the other end.
    stored = PackedWeight(
        torch.tensor([[255], [0]], dtype=torch.uint8).expand(2, 128),
        torch.ones(2, 1),
        torch.tensor([[0], [255]], dtype=torch.uint8),
    )
    weight = linear.pack(stored, 8, 128, 128)
    x = torch.ones(64, 128) * torch.tensor([1.0, -1.0]).repeat(32)[:, None]
    y = linear.weight_only_linear(x, *weight[:3], None, 2, 8, 128)
    assert torch.equal(y, x[:, :1] * torch.tensor([255.0, -255.0]) * 128)


# 16 rows fill a tile, 32 two, 384 are held at once; inputs in blocks of 256, tiles of 32.
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, 1), (31, 16), (32, 17), (70, 40), (256, 64), (300, 81), (530, 100)]
)
def test_dense_products_are_those_of_bfloat16(tiles, inputs, outputs):
    x, weight = (normal(n, inputs, dtype=torch.bfloat16) for n in (400, outputs))
    bias = normal(outputs, dtype=torch.bfloat16)
    for b in (bias, None):
        whole = linear.dense_linear(x, weight, b)
        want, size = exact.numpy(x) @ exact.numpy(weight).T, exact.numpy(x.abs() @ weight.abs().t())
        if b is not None:
            want, size = want + exact.numpy(b), size + exact.numpy(b.abs())
        exact.assert_rounded_once(whole, want, size)
        for rows in (*ROWS[:-1], 32, 48, 383, 384, 385):
            for part in (slice(rows), slice(-rows, None)):
                assert torch.equal(linear.dense_linear(x[part], weight, b), whole[part])


def test_a_row_of_dense_tiles_is_not_its_neighbours_(tiles):
    x, weight = (normal(n, 70, dtype=torch.bfloat16) for n in (40, 20))
    clean = linear.dense_linear(x, weight, None)
    x[3, 69], x[20, 0] = torch.nan, torch.inf
    got = linear.dense_linear(x, weight, None)
    assert got[3].isnan().all() and not got[20].isfinite().any()
    rest = [row for row in range(40) if row not in (3, 20)]
    assert torch.equal(got[rest], clean[rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dense_products_are_those_of_vectors(tiles, dtype):
    x, weight = normal(40, 70, dtype=dtype), normal(20, 70, dtype=dtype)
    for _, ours, expected in on_both(tiles, x, lambda x: linear.dense_linear(x, weight, None)):
        assert torch.equal(ours, expected)


def test_the_rate_is_that_of_tiles(tiles):
    rounds = 1000
    tiles.qllm_multiply_all.restype = ctypes.c_int64
    operations = tiles.qllm_multiply_all(ctypes.c_int64(rounds))
    assert operations % (rounds * 4 * 2 * 16 * 16 * 64) == 0  # threads times tiles


def test_tiles_are_the_best_there_is(tiles):
    assert tiles.path == "amx"
    assert native.about() == "AMX int8 and bfloat16"
    assert tiles.qllm_amx_state() == b"used"


def test_another_path_can_be_forced(found):
    assert found("emulated", "avx512").path == "avx512"
    assert native.about() == "AVX-512 VNNI"


@pytest.mark.parametrize("fault", ["wrong", "crash", "hang"])
def test_tiles_that_fail_their_test_are_not_used(found, monkeypatch, capfd, fault):
    monkeypatch.setenv("QLLM_EMULATED_FAULT", fault)
    library = found("emulated")
    assert library.path in ("avx512", "avx512bf16")
    assert native.about() == f"{native.PATHS[library.path]} (AMX: self-test failed)"
    with pytest.raises(UserError, match="choose avx512"):
        found("emulated", "amx")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ChildProcessError):  # none is left
        os.waitpid(-1, os.WNOHANG)


def test_a_machine_without_tiles(found):
    library = found("hardware")
    if library.qllm_features() & AMX:
        pytest.skip("this machine has AMX")
    assert library.path in ("avx512", "avx512bf16")
    assert library.qllm_amx_state() in (b"absent", b"no permission", b"self-test failed")
    with pytest.raises(UserError) as caught:
        found("hardware", "amx")
    assert str(caught.value).startswith("QLLM_CPU_PATH='amx' cannot run here; choose avx512")
    assert "\n" not in str(caught.value)
