"""The product of int8 prompts in CUDA C++: on a GPU, on one emulated lane by lane, and as code."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from cpu_paths import normal
from fences import fenced, mappings, run_in
from gpu_kernels import assert_same, emulate_hopper
from torch import Tensor

from qllm.ops import reference
from qllm.ops.gpu import cuda, hopper, hopper_int8, linear, nvrtc
from qllm.ops.gpu import device as device_of
from qllm.ops.gpu.hopper_int8 import Cut
from qllm.ops.reference import Int8Rows
from tools.disassemble import disassemble

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = hopper_int8  # which `own_hopper` asks
slow = partial(pytest.param, marks=pytest.mark.slow)
# (N, K), rows, and how they are cut: each kind of tile, and of parts.
CASES = (
    ((67, 144), 5, Cut(64, 64, 1)),
    ((130, 528), 70, Cut(64, 64, 2)),
    ((33, 528), 130, Cut(128, 64, 3)),
    ((129, 144), 100, Cut(128, 128, 1, blocks=2)),
    ((1, 1040), 3, Cut(128, 128, 4)),
    ((260, 400), 300, Cut(256, 128, 2)),
)


def there(rows: Int8Rows, *tensors: Tensor | None) -> list:
    """Rows, and a weight, its scales and a bias, where the kernel runs."""
    moved = Int8Rows(rows.values.to(DEVICE), rows.scales.to(DEVICE), rows.dtype)
    return [moved, *(None if each is None else each.to(DEVICE) for each in tensors)]


@pytest.mark.covering(1)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_it_is_the_reference_to_the_bit(dtype, static, own_hopper):
    for i, ((outputs, inputs), count, cut) in enumerate(CASES):
        x = normal(count, inputs, dtype=dtype)
        x[0] *= 100
        rows = reference.quantize_rows(x, torch.tensor(0.03) if static else None)
        q = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
        scales = normal(outputs).abs().to(torch.float16 if (i + static) % 2 else torch.float32)
        bias = normal(outputs, dtype=dtype) if i % 3 else None
        assert hopper_int8.takes(rows, q)
        got = hopper_int8.int8_linear(*there(rows, q, scales, bias), cut=cut).cpu()
        wanted = reference.int8_linear(rows, q, scales, bias, None, outputs)
        assert_same(got, wanted)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_scales_that_are_no_numbers_give_what_the_reference_gives(own_hopper):
    q = torch.randint(-128, 128, (20, 128), dtype=torch.int8)
    scales = torch.ones(20)
    scales[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38])
    rows = reference.quantize_rows(normal(70, 128, dtype=torch.float16), None)
    got = hopper_int8.int8_linear(*there(rows, q, scales, None)).cpu()
    wanted = reference.int8_linear(rows, q, scales, None, None, 20)
    assert_same(got, wanted)


def run_between_fences(library: str) -> None:
    """On the emulation, all tensors fenced: those that it is given and the one that it makes."""
    emulate_hopper(ctypes.CDLL(library))
    for at_end, (shape, count, cut) in itertools.product((True, False), CASES[:3]):
        fence = partial(fenced, at_end=at_end)

        def new_empty(x, *shape, dtype, fence=fence):
            return fence(torch.zeros(*shape, dtype=dtype))

        torch.Tensor.new_empty = new_empty
        q, x = (fence(torch.ones(size, shape[1], dtype=torch.int8)) for size in (shape[0], count))
        scales, bias = (fence(torch.ones(shape[0], dtype=torch.float16)) for _ in range(2))
        for x_scales in (torch.ones(count, 1), torch.ones(())):
            rows = Int8Rows(x, fence(x_scales), torch.float16)
            hopper_int8.int8_linear(rows, q, scales, bias, cut=cut)
        mappings.clear()


def test_nothing_outside_is_touched(hopper_emulation):
    done = run_in(Path(__file__), f"run_between_fences({hopper_emulation._name!r})")
    assert done.returncode == 0, done.stderr


def test_what_it_does_not_take():
    q = torch.ones(4, 32, dtype=torch.int8)

    def rows(count: int, inputs: int = 32, dtype: torch.dtype = torch.bfloat16) -> Int8Rows:
        return Int8Rows(torch.ones(count, inputs, dtype=torch.int8), torch.ones(count, 1), dtype)

    assert hopper_int8.takes(rows(1), q) and hopper_int8.takes(rows(300), q)
    assert not hopper_int8.takes(rows(0), q)
    assert not hopper_int8.takes(rows(1, dtype=torch.float32), q)
    assert not hopper_int8.takes(rows(1, 24), q[:, :24].contiguous())
    assert not hopper_int8.takes(rows(1, 16), q[:, :16])
    assert not hopper_int8.takes(rows(1, 16), q.view(-1)[8:72].view(4, 16))
    shared = rows(2)._replace(values=torch.ones(2, 64, dtype=torch.int8)[:, :32])
    assert not hopper_int8.takes(shared, q)


def test_the_self_test_finds_what_is_wrong(own_hopper, monkeypatch):
    if own_hopper is not None:  # which is slow, and does one thing at a time
        monkeypatch.setattr(hopper_int8, "TESTED", (20, 2064))
        monkeypatch.setattr(device_of, "COMPILED_AT_ONCE", 1)
    place, right = torch.device(DEVICE), hopper_int8.int8_linear
    assert hopper_int8._self_test(place) is None
    tested = [(*of, cut) for *of, cuts in hopper_int8.CASES for cut in cuts]
    for tile in {tile[:2] for tile in hopper_int8.TIMES}:
        # The first that takes such a tile: that there is none fails, too.
        *of, cut = next(case for case in tested if case[-1][:2] == tile)
        monkeypatch.setattr(hopper_int8, "CASES", [(*of, (cut,))])

        def wrong(*given, cut, tile=tile):
            found = right(*given, cut=cut)
            return -found if cut[:2] == tile else found

        monkeypatch.setattr(hopper_int8, "int8_linear", wrong)
        assert "found other sums" in hopper_int8._self_test(place)


def test_prompts_take_it_where_it_takes_them(own_hopper, gpu, monkeypatch):
    if gpu == "cpu":
        monkeypatch.setattr(hopper_int8, "unsupported_reason", lambda device: None)
    asked = []

    def noted(rows, *given, run=hopper_int8.int8_linear):
        asked.append(tuple(rows.values.shape))
        return run(rows, *given)

    monkeypatch.setattr(hopper_int8, "int8_linear", noted)
    for count, inputs in ((40, 144), (3, 144), (40, 150)):
        q = torch.randint(-128, 128, (20, inputs), dtype=torch.int8)
        rows = reference.quantize_rows(normal(count, inputs, dtype=torch.bfloat16), None)
        given = (rows, q, torch.ones(20), None)
        got = linear.int8_linear(*there(*given), None, 20).cpu()
        assert torch.equal(got, reference.int8_linear(*given, None, 20))
    assert (40, 144) in asked and (40, 150) not in asked


def test_cuts_are_those_that_were_fastest():
    """On an H100, or nearly so: rows and outputs of a tile, parts, and blocks at once."""
    for (outputs, inputs), cuts in (
        ((4096, 11008), {64: (64, 64, 1, 1), 256: (128, 64, 1, 1), 512: (128, 128, 1, 1)}),
        ((8192, 8192), {128: (128, 64, 1, 1), 256: (128, 128, 1, 1), 2048: (256, 128, 1, 1)}),
        ((22016, 4096), {64: (64, 64, 1, 2), 128: (128, 128, 1, 2), 512: (256, 128, 1, 1)}),
        ((5120, 13824), {1024: (128, 128, 1, 1)}),
        ((768, 3072), {1: (64, 64, 1, 2), 256: (128, 64, 4, 1)}),
    ):
        for rows, cut in cuts.items():
            stages = -(-inputs // hopper_int8.STAGE)
            assert hopper_int8.cut_of(rows, outputs, stages, 132) == cut


def test_explain_says_why_prompts_take_triton_s_product(monkeypatch):
    monkeypatch.setattr(hopper_int8, "unsupported_reason", lambda device: "there is no NVRTC")
    place = torch.device("cuda", 7)
    assert hopper_int8.about(place) == "prompts in Triton: there is no NVRTC"


@pytest.mark.parametrize(
    ("rows", "outputs", "blocks"),
    # Each number of rows, of outputs and of blocks.
    [
        tile if tile in ((64, 64, 2), (128, 128, 2), (256, 128, 1)) else slow(*tile)
        for tile in hopper_int8.TIMES
    ],
)
def test_it_compiles_into_what_was_meant(rows, outputs, blocks):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton, whose disassembler this takes, is not installed")
    try:
        nvrtc.library()
    except nvrtc.Unavailable as error:
        pytest.skip(str(error))
    variant = hopper_int8.variant(cuda.DTYPES[rows > 64], rows > 128, Cut(rows, outputs, 1, blocks))
    options = ["--std=c++17", "--gpu-architecture=sm_90a", *cuda.options(variant)]
    usage, code = disassemble(
        nvrtc.compile(cuda.source(*hopper_int8.SOURCE), options, hopper_int8.SOURCE[0])
    )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    assert registers * variant.threads * variant.blocks <= 1 << 16
    assert stack == 0 and not re.search(r"\b(LDL|STL)\b", code)
    product = rf"\bIGMMA\.64x{rows}x32\.S8\.S8 R\d+, gdesc.*"
    products = re.findall(product, code)
    # Four products begin together, and are waited for when the next four have begun. A compiler
    # that finds something in the way waits for each by itself.
    assert len(products) == len(re.findall("IGMMA", code)) == 4
    assert sum("gsb0" in product for product in products) == 1
    assert len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1", code)) == 1
    assert len(re.findall(r"\bUTMALDG\.2D\b", code)) == 2
    assert variant.shared_bytes * blocks <= hopper.SHARED_BYTES
    # Sums take the place of stages, and leave barriers and scales what they are.
    assert rows * (outputs + 4) * 4 <= variant.stages * (rows + outputs) * hopper_int8.STAGE
