"""The product of prompts in CUDA C++: on a GPU, on one emulated lane by lane, and as code."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import re
from functools import partial
from pathlib import Path

import gpu_kernels
import pytest
import torch
from covering import slow_but
from cpu_paths import STORED_SCHEMES, normal, pattern, random_weight
from fences import run_in
from gpu_kernels import (
    emulate_hopper,
    multiply_between_fences,
    packed,
)
from product_cases import assert_close
from torch import Tensor

from qllm.ops import phase
from qllm.ops.gpu import cuda, hopper, hopper_int8, layout, linear, nvrtc, prefill
from qllm.ops.gpu import device as device_of
from qllm.ops.reference import dequantize
from qllm.quant.packing import BITS
from tools.disassemble import disassemble

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = hopper  # which `own_hopper` asks
SHAPES = ((1, 1), (13, 67), (33, 390), (140, 520))  # (N, K)
GROUPS = (-1, 16, 32, 48, 64, 100, 128, 200)
ROWS = (1, 3, 8, 65, 17)


def multiply(
    weight, x: Tensor, bias: Tensor | None = None, tile: hopper.Tile | None = None
) -> Tensor:
    return gpu_kernels.multiply(weight, x, bias, DEVICE, hopper.weight_only_linear, tile=tile)


@pytest.fixture
def parts(monkeypatch) -> list[int]:
    """Into how many parts inputs are cut: a test may say."""
    said = [2]
    monkeypatch.setattr(hopper, "parts_of", lambda tiles, blocks, num_sms: min(said[0], blocks))
    return said


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_at_most_twice_the_reference_s(bits, own_hopper, parts):
    schemes = STORED_SCHEMES if bits > 1 else ("asym", "offset")
    for i, (group_size, scheme, dtype) in enumerate(
        itertools.product(GROUPS, schemes, cuda.DTYPES)
    ):
        if DEVICE == "cpu" and i % 7 != bits % 7:  # each at some number of bits
            continue
        shape, count = SHAPES[(i + i // 4) % len(SHAPES)], ROWS[i // 2 % len(ROWS)]
        parts[0] = (1, 2, 4)[i % 3]
        wide = torch.float32 if i % 3 == 0 else torch.float16
        weight = random_weight(shape, bits, group_size, scheme, scales_dtype=wide)
        x = normal(count, shape[1] + 3, dtype=dtype)[:, : shape[1]]
        bias = normal(shape[0], dtype=dtype) if i % 8 < 4 else None
        assert_close(weight, x, bias, multiply(weight, x, bias))


@pytest.mark.parametrize("scheme", ["asym", "offset"])
@pytest.mark.parametrize("bits", BITS)
def test_weights_are_rounded_as_the_reference_s(bits, scheme, own_hopper, parts):
    kinds = itertools.product(cuda.DTYPES, (torch.float16, torch.float32))
    for i, (dtype, wide) in enumerate(kinds):
        # Emulated, either type meets either kind of scales at every other number of bits.
        if DEVICE == "cpu" and (i + i // 2 + bits + (scheme == "asym")) % 2:
            continue
        weight = random_weight((34, 256), bits, 64, scheme, scales_dtype=wide)
        asked = weight.request
        wanted = dequantize(*weight.stored[:3], bits, asked.group_size, asked.in_features, dtype)
        found = multiply(weight, torch.eye(256, dtype=dtype))
        assert torch.equal(found, wanted.t())


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_scales_that_are_no_numbers_give_what_the_reference_gives(dtype, own_hopper):
    weight = random_weight((20, 256), 4, 64, "asym")
    for place, special in enumerate((torch.inf, -torch.inf, torch.nan, 2.0**-24, 65504.0)):
        weight.stored.scales[place, 1] = special
    x = normal(3, 256, dtype=dtype)
    assert torch.equal(pattern(multiply(weight, x)), pattern(weight.reference(x)))


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_a_row_is_the_same_whatever_is_beside_it(dtype, own_hopper, parts):
    weight = random_weight((20, 390), 4, 128)
    x = normal(70, 390, dtype=dtype)
    for parts[0] in (1, 4):
        whole = multiply(weight, x, tile=hopper.Tile(64, 128))
        for tile in hopper.TILES:
            assert torch.equal(multiply(weight, x, tile=tile), whole)
        for first, count in ((3, 8), (69, 1)):
            some = slice(first, first + count)
            assert torch.equal(multiply(weight, x[some]), whole[some])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
def test_what_is_no_number_gives_what_the_reference_gives(special, own_hopper, parts):
    weight = random_weight((20, 256), 4, 128, "asym" if special > 0 else "offset")
    x = normal(3, 256, dtype=torch.bfloat16)
    x[1, 130] = special
    assert torch.equal(pattern(multiply(weight, x)), pattern(weight.reference(x)))


def run_between_fences(library: str) -> None:
    """On the emulation, all tensors fenced: those that it is given and the one that it makes."""
    emulate_hopper(ctypes.CDLL(library))
    for _ in multiply_between_fences(hopper.weight_only_linear):
        pass


def test_nothing_outside_is_touched(hopper_emulation):
    done = run_in(Path(__file__), f"run_between_fences({hopper_emulation._name!r})")
    assert done.returncode == 0, done.stderr


def test_the_self_test_finds_what_is_wrong(own_hopper, monkeypatch):
    place = torch.device(DEVICE)
    if own_hopper is not None:  # which is slow, and does one thing at a time
        monkeypatch.setattr(hopper, "TESTED", (20, 300))
        monkeypatch.setattr(device_of, "COMPILED_AT_ONCE", 1)
    assert hopper._self_test(place) is None
    if own_hopper is not None:  # it says at the first case what is wrong, of whichever tiles
        two = (hopper.Tile(64, 64), hopper.Tile(128, 128))
        monkeypatch.setattr(hopper, "CASES", [(*hopper.CASES[0][:-1], two)])
    right = hopper.weight_only_linear

    def wrong(x, *given, tile, of):
        return right(x, *given, tile=tile) * (1.01 if of(x, tile) else 1)

    for of, reason in (
        (lambda x, tile: len(x) == 1, "few rows of a prompt and many"),
        (lambda x, tile: tile.rows == 128, "in CUDA C++ here found other sums"),
    ):
        monkeypatch.setattr(hopper, "weight_only_linear", partial(wrong, of=of))
        assert reason in hopper._self_test(place)


def test_prompts_take_it_and_steps_do_not(own_hopper, gpu, monkeypatch):
    if gpu == "cpu":
        monkeypatch.setattr(prefill, "unsupported_reason", lambda device: None)
        monkeypatch.setattr(hopper, "unsupported_reason", lambda device: None)
    asked, weight = [], random_weight((20, 256), 4, 128)
    tensors = packed(weight, DEVICE)[:3]

    def noted(x, *given, run=hopper.weight_only_linear):
        asked.append(len(x))
        return run(x, *given)

    monkeypatch.setattr(hopper, "weight_only_linear", noted)
    for rows, dtype in ((3, torch.bfloat16), (2, torch.float16), (1, torch.float32)):
        given = (normal(rows, 256, dtype=dtype).to(DEVICE), *tensors, None, 20, 4, 128)
        prompt = linear.weight_only_linear(*given)
        with phase.decode():
            step = linear.weight_only_linear(*given)
        assert torch.allclose(prompt.float(), step.float(), atol=0.1, rtol=0.02)
    assert asked == [3, 2]  # float32 is Triton's
    assert not linear.weight_only_linear(given[0][:0].half(), *given[1:]).numel()


@pytest.mark.parametrize(
    ("kernels", "prompts"),
    [(hopper, "prompts"), (hopper_int8, "prompts of int8")],
    ids=("floats", "int8"),
)
def test_where_it_cannot_run_triton_s_product_does(kernels, prompts, monkeypatch, capsys):
    kernels.unsupported_reason.cache_clear()
    place = torch.device("cuda", 7)
    try:
        monkeypatch.setattr(device_of, "architecture", lambda device: ("10.0", 4))
        reason = "it is for compute capability 9.0, not for 10.0"
        assert kernels.unsupported_reason(place) == reason and not capsys.readouterr().err
        kernels.unsupported_reason.cache_clear()
        monkeypatch.setattr(device_of, "architecture", lambda device: ("9.0", 4))

        def fail() -> None:
            raise nvrtc.Unavailable("NVRTC is not installed")

        monkeypatch.setattr(nvrtc, "version", fail)
        assert kernels.unsupported_reason(place) == "NVRTC is not installed"
        assert f"{prompts} take Triton's product" in capsys.readouterr().err
        assert kernels.unsupported_reason(torch.device("cpu")) == "it is for CUDA devices"
    finally:
        kernels.unsupported_reason.cache_clear()


def test_tiles_are_those_that_were_fastest():
    """On an H100: into how many parts K is cut, and the tile for so many rows of x."""
    for (outputs, inputs), parts, rows in (
        ((4096, 11008), 2, {1: (64, 64), 64: (64, 64), 128: (128, 64), 256: (128, 128)}),
        ((4096, 11008), 2, {512: (256, 128), 768: (192, 128), 2048: (256, 128)}),
        ((8192, 8192), 2, {64: (64, 128), 128: (128, 128), 256: (256, 128), 2048: (256, 128)}),
        ((11008, 4096), 1, {64: (64, 128), 128: (128, 128), 512: (192, 128), 768: (256, 128)}),
        ((4096, 4096), 2, {64: (64, 64), 128: (128, 64)}),
        ((1024, 4096), 8, {64: (64, 128), 128: (128, 128)}),
        ((1024, 512), 1, {64: (64, 64)}),
    ):
        blocks = inputs // layout.BLOCK
        assert hopper.parts_of(-(-outputs // hopper.OUTPUTS), blocks, 132) == parts
        for count, tile in rows.items():
            assert hopper.tile_for(count, outputs, blocks, parts, 132) == tile


def variants() -> list[hopper.Variant]:
    """Each number of bits, and one of each of the other constants somewhere."""
    wide, zeros = torch.ones(1), torch.ones(1, dtype=torch.uint8)
    kinds: list[tuple] = []
    for bits, group in zip(BITS, (32, 128, 128, 128, 64, 128, 32, 128), strict=True):
        dtype = cuda.DTYPES[bits % 3 == 0]
        kinds.append(
            (bits, dtype, wide if bits == 5 else wide.half(), zeros[bits % 4 == 2 :], group)
        )
    kinds += [(4, torch.float16, wide.half(), wide.half(), 32), (8, torch.bfloat16, wide, wide, 32)]
    return [hopper.variant(*kind, tile) for kind in kinds for tile in hopper.TILES]


VARIANTS = variants()


@pytest.mark.parametrize(
    ("variant",), slow_but([(VARIANTS[i],) for i in (23, 24, 41, 59)], VARIANTS), ids=str
)
def test_it_compiles_into_what_was_meant(variant):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton, whose disassembler this takes, is not installed")
    try:
        nvrtc.library()
    except nvrtc.Unavailable as error:
        pytest.skip(str(error))
    options = ["--std=c++17", "--gpu-architecture=sm_90a", *cuda.options(variant)]
    usage, code = disassemble(nvrtc.compile(cuda.source(*hopper.SOURCE), options, hopper.SOURCE[0]))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # Three warpgroups of 168 registers fill a multiprocessor; two take what the third gives up.
    assert registers == 168 and "USETMAXREG" in code
    # NVRTC 13.0 lays a producer's number aside, once; nothing is between the products.
    begin, end = code.index("HGMMA"), code.rindex("HGMMA")
    assert stack <= 8 and not re.search(r"\b(LDL|STL)\b", code[begin:end])
    kind = "F16" if variant.float16 else "BF16"
    products = re.findall(
        rf"\bHGMMA\.64x{variant.rows}x16\.F32(?:\.BF16)? R\d+, R\d+, gdesc.*", code
    )
    assert len(products) == len(re.findall("HGMMA", code)) == 8
    assert all(("BF16" in product) == (kind == "BF16") for product in products)
    # Of two products that begin together the second ends the group, which is waited for when the
    # next one has begun. A compiler that finds something in the way waits for each by itself.
    assert sum("gsb0" in product for product in products) == 4
    assert len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1", code)) == 4
    assert len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", code)) == 1
    assert len(re.findall(r"\bUTMALDG\.2D\b", code)) == 3 + (variant.zeros or variant.offsets)
    assert variant.shared_bytes <= hopper.SHARED_BYTES and variant.w_stages >= 2
