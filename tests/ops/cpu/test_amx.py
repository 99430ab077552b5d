"""The path for AMX: its instructions are trapped where there are no tiles; what bad ones do."""

from __future__ import annotations

import ctypes
import functools
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from amx_tiles import AMX, AVX512, HAS_TILES, manual, pairs, pairs_library, started, tile_library
from covering import each, slow_but
from cpu_paths import DTYPES, INTEGERS, Weight, factored_weight, normal, same
from cpu_paths import random_weight as matrix_weight
from exact import int8_blocks
from torch import Tensor

from qllm.errors import UserError
from qllm.ops import phase
from qllm.ops.cpu import build, linear
from qllm.ops.cpu import library as native
from qllm.quant.packing import PackedWeight, packed_size

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, build.COMPILERS)),
    reason="compiles C++ on Linux",
)

# Up to 8 rows, or 3 of float32, are not for tiles, 16 fill one, 192 are a chunk.
ROWS = (1, 3, 4, 8, 9, 15, 16, 17, 31, 33, 200)
# Outputs: of 5 panels, 4 of which go together, of 3, 2 and 1. Inputs: blocks of 1 to 4 K blocks.
SHAPES = ((72, 200), (40, 300), (20, 131), (9, 257))
GROUPS = (32, 64, 96, 128, 100, 20, 16, -1)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Callable[[str], Path]:
    """The file with the path: "trapped", or as users have it, "hardware"."""
    return functools.cache(lambda kind: tile_library(tmp_path_factory, kind))


@pytest.fixture
def found(monkeypatch, built, tmp_path):
    """A function that looks for a path as a process does when it starts."""

    def find(kind: str, forced: str = "") -> ctypes.CDLL:
        # A test's own copy: what another test has loaded remembers what it found.
        copy = tmp_path / f"{kind}.so"
        if not copy.exists():
            shutil.copy(built(kind), copy)
        library = started(copy, forced)
        if not library.qllm_features() & AVX512:
            pytest.skip("this machine lacks AVX-512 VNNI")
        monkeypatch.setattr(native, "library", lambda: library)
        return library

    return find


@pytest.fixture(params=["trapped", "hardware"])
def tiles(request, found) -> ctypes.CDLL:
    library = found(request.param)
    if not library.qllm_features() & AMX:
        assert request.param == "hardware"
        pytest.skip(f"AMX is {library.qllm_amx_state().decode()} here")
    return library


def random_bytes(*shape: int, below: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + below)
    return torch.randint(below, shape, generator=generator, dtype=torch.uint8)


def random_weight(
    shape: tuple[int, int], bits: int, group_size: int, zeros: int | None
) -> PackedWeight:
    """A weight (N, K) in the kernels' layout, zeros below a number, symmetric for 0, or offsets."""
    outputs, inputs = shape
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    rows = random_bytes(outputs, packed_size(inputs, bits))
    scales = normal(outputs, groups).abs().half()
    qzeros = random_bytes(outputs, groups, below=zeros) if zeros else rows.new_empty(0)
    if zeros is None:
        qzeros = normal(outputs, groups, seed=1).half()
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
        with phase.decode():
            result = compute(part)
        return result.view(INTEGERS[result.element_size()])

    expected = on("avx512", x)
    for rows in (*(rows for rows in ROWS if rows < len(x)), len(x)):
        yield rows, on("amx", x[:rows]), expected[:rows]


PRODUCTS = (
    *((linear.weight_only_linear, bits) for bits in range(1, 9)),
    *((linear.weight_only_linear_int8, bits) for bits in (1, 4, 8)),
)


@pytest.mark.parametrize(
    ("product", "group_size"),
    slow_but(
        [*each(PRODUCTS, GROUPS), *each(PRODUCTS, GROUPS[1:]), *each(PRODUCTS, GROUPS[3:])],
        PRODUCTS,
        GROUPS,
    ),
)
def test_products_are_those_of_vectors(tiles, product, group_size):
    run, bits = product
    # Zeros are below 2^bits in what is quantized here; other bytes are no reason to differ.
    for (i, zeros), dtype in each(enumerate((0, 2**bits, 256, None)), DTYPES):
        shape = SHAPES[(bits + i + DTYPES.index(dtype)) % len(SHAPES)]
        weight = random_weight(shape, bits, group_size, zeros)
        # More than a chunk once: where instructions are trapped, rows are what takes time.
        count = ROWS[-1] if i == bits % 4 else ROWS[-2]
        x, bias = activations(count, shape[1], dtype), normal(shape[0]).to(dtype)
        for rows, ours, expected in on_both(
            tiles,
            x,
            lambda x, w=weight, b=bias: run(x, *w[:3], b, len(b), bits, group_size),
        ):
            assert torch.equal(ours, expected), (rows, shape, zeros, dtype)


def prefill(
    weight: Weight, x: Tensor, bias: Tensor | None = None, run=linear.weight_only_linear
) -> Tensor:
    """The product of a prefill."""
    request = weight.request
    form = (request.out_features, request.bits, request.group_size)
    packed = linear.pack(weight.stored, *form[1:], request.in_features)
    return run(x, *packed[:3], bias, *form)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_prefill_is_as_exact_as_a_product_of_bfloat16(tiles, bits):
    # Blocks are of 512 inputs and 32 outputs; an odd panel is left over, and half a K block.
    weights = (
        matrix_weight((40, 1120), bits, 32),
        matrix_weight((70, 576), bits, 64, "sym" if bits > 1 else "asym"),
        matrix_weight((20, 544), bits, 96, scales_dtype=torch.float32),
        matrix_weight((72, 1045), bits, -1),
        matrix_weight((40, 553), bits, 16, "offset"),
        factored_weight((20, 800), bits, 32, "offset"),
        factored_weight((40, 560), bits, 16, "asym"),
    )
    for i, weight in enumerate(weights):
        # Either type meets each shape, at every other number of bits.
        dtype = (torch.bfloat16, torch.float16)[(i + i // 2 + bits) % 2]
        shape = tuple(weight.matrix.shape)
        x, bias = normal(40, shape[1], dtype=dtype), normal(shape[0], dtype=dtype)
        exact = weight.exact(x, bias)
        theirs = torch.nn.functional.linear(*(t.bfloat16() for t in (x, weight.matrix, bias)))
        whole = prefill(weight, x, bias)
        error, allowed = ((y.double() - exact).norm() for y in (whole, theirs))
        assert error <= 1.02 * allowed, (shape, dtype)
        for rows in (1, 9, 16, 17, 33):
            assert same(prefill(weight, x[:rows], bias), whole[:rows])
            assert same(prefill(weight, x[-rows:], bias), whole[-rows:])


@pytest.mark.parametrize("group_size", (32, 96, 128, 16, -1))
def test_a_prefill_with_int8_activations_multiplies_what_they_stand_for(tiles, group_size):
    for dtype, inputs in ((torch.bfloat16, 600), (torch.float16, 577)):
        weight = matrix_weight((40, inputs), 4, group_size)
        x = normal(40, inputs, dtype=dtype)
        x[5] = 0
        stood_for = torch.from_numpy(int8_blocks(x, group_size)).to(dtype)
        whole = prefill(weight, x, run=linear.weight_only_linear_int8)
        assert same(whole, prefill(weight, stood_for))
        for rows in (1, 17):
            assert same(
                prefill(weight, x[-rows:], run=linear.weight_only_linear_int8), whole[-rows:]
            )
        assert not same(whole, prefill(weight, x))


def test_a_prefill_is_the_same_however_many_panels_go_together(tiles):
    weight = matrix_weight((810, 288), 4, 32)
    x, bias = normal(40, 288, dtype=torch.bfloat16), normal(810, dtype=torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 8):  # 8 panels each, and 2
            torch.set_num_threads(threads)
            results.append(prefill(weight, x, bias))
    finally:
        torch.set_num_threads(before)
    assert same(*results)
    x[3, 5] = torch.inf  # a row of float arithmetic, over all of the panels
    assert not prefill(weight, x, bias)[3].isfinite().any()


def test_a_prefill_of_more_rows_than_are_held_at_once(tiles):
    weight = matrix_weight((20, 64), 4, 32)
    x = normal(800, 64, dtype=torch.bfloat16)
    whole = prefill(weight, x)
    for first in (0, 490, 512, 790):
        assert same(prefill(weight, x[first : first + 40]), whole[first : first + 40])


def test_activations_that_are_more_than_a_cache_holds(tiles):
    # 1.3 MB: they are asked for ahead, and meet more panels at once; of few rows it is otherwise.
    weight = matrix_weight((70, 2080), 4, 32)
    x = normal(300, 2080, dtype=torch.bfloat16)
    whole = prefill(weight, x)
    for first in (0, 270):
        assert same(prefill(weight, x[first : first + 30]), whole[first : first + 30])
    exact = weight.exact(x[:30])
    assert (whole[:30].double() - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_a_prefill_is_that_of_decode(tiles, dtype):
    # Rows with what integers cannot stand for; float32; groups with gaps.
    x = normal(20, 200, dtype=dtype)
    x[0, 7], x[1, 9], x[2, 5] = torch.inf, torch.nan, 3e38 if dtype.itemsize == 4 else torch.inf
    for group_size in (16, 32, 100, 20):
        weight = matrix_weight((40, 200), 4, group_size)
        ours = prefill(weight, x)
        with phase.decode():
            expected = prefill(weight, x)
        integers = dtype == torch.float32 or group_size in (100, 20)
        rows = slice(None) if integers else slice(3)
        assert same(ours[rows], expected[rows])
        assert integers or not same(ours, expected)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("inputs", [1, 31, 64, 200, 300, 513, 1090])
def test_int8_products_are_those_of_vectors(tiles, inputs, static):
    scale = torch.tensor([0.02]) if static else None
    for dtype, outputs in each(DTYPES, (9, 20, 40, 72)):
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


# Bits of bfloat16 that products find hard: zeros and subnormal numbers; the root of the smallest
# normal one and its half; roots of the little below that which is rounded to it, or is zero.
SUBNORMAL = (0x0001, 0x007F, 0x8040)
TINY = (0, 0, 0, 0, 0x8000, *SUBNORMAL, 0x0080, 0x2000, 0xA000, 0x1F80, 0x1A00, 0x9A00, 0x1980)
# 1, its neighbours, numbers of other sizes; the largest, and roots of what is beyond it.
USUAL = (0x3F80, 0xBF80, 0x3F81, 0xBF7F, 0x4049, 0xB3FF, 0x2F55, 0xCBAA, 0x0000)
HUGE = (0x7F7F, 0xFF7F, 0x5F80, 0xDF80, 0x5F00, 0x3F80, 0xBF80, 0x0080, *SUBNORMAL, 0x0000)
INFINITE = (0x7F80, 0xFF80)
NAN = (0x7FC0, 0x7F81, 0xFFC1)
OPERANDS = {
    "usual": (USUAL, ()),
    "any": (range(0x10000), ()),
    "tiny": (TINY, ()),
    "huge": (HUGE, ()),
    "infinite": ((*USUAL, *TINY), INFINITE),
    "nan": ((*USUAL, *HUGE), (*INFINITE, *NAN)),
}


@pytest.fixture(scope="module")
def products(tmp_path_factory) -> ctypes.CDLL:
    return pairs_library(tmp_path_factory)


@pytest.mark.parametrize("operands", OPERANDS)
def test_pairs_are_added_as_the_manual_says(found, products, operands):
    """By real tiles where there are some, which are asked for here, and by what traps others."""
    if HAS_TILES and not found("hardware").qllm_features() & AMX:
        pytest.skip("this machine's tiles may not be used")
    often, seldom = OPERANDS[operands]
    random = np.random.default_rng(0)
    x, w = (random.choice(often, (16, 16, 2)).astype(np.uint16) for _ in range(2))
    sums = random.choice(often, (16, 16)).astype(np.uint32) << 16
    sums |= random.integers(0, 0x10000, sums.shape, dtype=np.uint32)
    for part, shift in ((x, 0), (w, 0), (sums, 16)):
        for value in seldom:  # a few: one in a row of x decides all of the row
            part[tuple(random.integers(0, part.shape, (2, part.ndim)).T)] = value << shift
    values = [torch.from_numpy(part).view(torch.bfloat16).double().numpy() for part in (x, w)]
    sums = sums.view(np.float32)
    got = pairs(products, sums, x, w)
    for row, lane in np.ndindex(sums.shape):
        with np.errstate(over="ignore"):
            want = np.float32(manual(float(sums[row, lane]), values[0][row], values[1][:, lane]))
        one = got[row, lane]
        same = one.tobytes() == want.tobytes() or (np.isnan(one) and np.isnan(want))
        pair = f"{sums[row, lane]} + {x[row].tolist()} times {w[:, lane].tolist()}"
        assert same, f"tiles make {one} of {pair}, not {want}"


# Inputs: fewer than a tile has, whole tiles, a bit more, odd ones. Outputs: fewer than a panel has,
# panels of which two and four go together, and some that are left over.
FEW_SHAPES = ((1, 1), (31, 16), (32, 64), (33, 17), (64, 100), (95, 131), (300, 70))


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("numbers", ["usual", "nan"])
def test_few_rows_of_bfloat16_have_the_bits_of_many(tiles, numbers, decode):
    """The weight is the first operand of theirs, and the second of more rows than tiles take."""
    often, seldom = OPERANDS[numbers]
    random = np.random.default_rng(0)
    for inputs, outputs in FEW_SHAPES:
        # Some are no numbers, with which a channel may begin behind the last inputs of another.
        parts = [random.choice(often, (n, inputs)).astype(np.uint16) for n in (40, outputs)]
        for value in seldom:
            for part in parts:
                part[tuple(random.integers(0, part.shape, (1, 2)).T)] = value
        x, weight = (torch.from_numpy(part.view(np.int16)).view(torch.bfloat16) for part in parts)
        bias = normal(outputs, dtype=torch.bfloat16) if outputs % 2 else None
        with phase.decode() if decode else nullcontext():
            whole = linear.dense_linear(x, weight, bias)
            for rows in range(1, 34):
                some = slice(rows) if rows % 2 else slice(-rows, None)
                ours = linear.dense_linear(x[some], weight, bias)
                assert same(ours, whole[some]), (rows, inputs, outputs)


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
    assert found("trapped", "avx512").path == "avx512"
    assert native.about() == "AVX-512 VNNI"


def children() -> set[str]:
    """Processes that this one started and has not waited for."""
    found = Path("/proc/self/task").glob("*/children")
    return {number for path in found for number in path.read_text(encoding="ascii").split()}


# What goes wrong, and what is said of it. The system may refuse a pipe or a process, or to wait for
# the answer of tiles that hang.
STATES = {
    "wrong": "self-test failed",
    "crash": "self-test failed",
    "hang": "self-test failed",
    "pipe": "no pipe for the self-test",
    "fork": "no process for the self-test",
    "answer": "self-test failed",
}


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=pytest.mark.slow) if f == "hang" else f for f in STATES]
)
def test_tiles_that_fail_their_test_are_not_used(built, found, monkeypatch, capfd, fault):
    built("trapped")
    capfd.readouterr()  # where it was compiled
    monkeypatch.setenv("QLLM_TRAPPED_FAULT", fault)
    before = children()
    library = found("trapped")
    assert library.path in ("avx512", "avx512bf16")
    assert native.about() == f"{native.PATHS[library.path].about} (AMX: {STATES[fault]})"
    with pytest.raises(UserError, match="choose avx512"):
        found("trapped", "amx")
    assert capfd.readouterr() == ("", "")
    assert children() == before  # none is left


def test_a_machine_without_tiles(found):
    library = found("hardware")
    if library.qllm_features() & AMX:
        pytest.skip("this machine has AMX")
    assert library.path in ("avx512", "avx512bf16")
    states = ("absent", "no permission", "a thread's signal stack is too small", *STATES.values())
    assert library.qllm_amx_state().decode() in states
    with pytest.raises(UserError) as caught:
        found("hardware", "amx")
    assert str(caught.value).startswith("QLLM_CPU_PATH='amx' cannot run here; choose avx512")
    assert "\n" not in str(caught.value)
