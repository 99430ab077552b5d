"""What the decode products in CUDA C++ compile to, which needs no GPU."""

from __future__ import annotations

import importlib.util
import re

import pytest
from covering import slow_but

from qllm.ops.gpu import cuda, decode, decode_int8, nvrtc, tiles
from tools.disassemble import disassemble


def depth(bits: int) -> int:
    """Blocks that a warp asks for in advance."""
    return max(depth for _, depth in tiles.entry(tiles.DEFAULT, f"decode-{bits}")["cuts"]["8"])


# Constants of the kernel: each number of bits, and one of each of the others somewhere.
VARIANTS = [
    decode.Variant(bits, bits % 3 == 0, bits % 4 != 2, False, bits % 5 == 0, *sizes)
    for bits, *sizes in (
        *((bits, 128, 8, depth(bits), 1, 1, True) for bits in (1, 3, 4, 7, 8)),
        (4, 32, 8, depth(4), 4, 1, False),
        (6, 64, 4, 1, 2, 2, True),
    )
]
VARIANTS += [
    decode.Variant(bits, False, False, True, False, 32, 8, 2, 1, 1, True) for bits in (4, 5)
]
IN_CLUSTERS = [
    decode.Variant(bits, False, True, False, False, 128, 16, 1, 2, 2, True, 2, True, 2)
    for bits in (3, 4)
]


@pytest.fixture(scope="module")
def compiler():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton, whose disassembler this takes, is not installed")
    try:
        return nvrtc.library()
    except nvrtc.Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("capability", "variant"),
    [
        *slow_but(
            [*((90, VARIANTS[i]) for i in (0, 4, 5, 7)), (120, VARIANTS[2])],
            (80, 90, 120),
            VARIANTS,
        ),
        *slow_but([(90, IN_CLUSTERS[0])], (90,), IN_CLUSTERS),
    ],
    ids=str,
)
def test_it_compiles_into_what_was_meant(capability, variant, compiler):
    options = ["--std=c++17", f"--gpu-architecture=sm_{capability}", *cuda.options(variant)]
    usage, code = disassemble(nvrtc.compile(cuda.source("decode"), options, "decode"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    assert stack == 0 and not re.search(r"\b(LDL|STL)\b", code), variant
    # Two blocks of eight warps, or more, have room on a processor: 65,536 registers.
    assert registers <= (128 if variant.tiles == 1 else 200), variant
    products = len(re.findall(r"\bHMMA\.16816\.F32", code))
    assert products == 8 * variant.tiles * variant.panels * variant.depth, variant
    if variant.bits in (1, 3, 4, 7) and not variant.offsets:
        # One sum takes all that is not a pair's integers off, whatever parts their bits lie in.
        pairs = 32 * variant.panels * variant.depth
        assert len(re.findall(r"\bH(?:ADD2|FMA2)(?!\.F32)", code)) == pairs, variant
    # In front of the loop and in it; the lowest bit's part is loaded by eights of bytes.
    words = variant.depth * variant.panels * (variant.bits // 2)
    assert len(re.findall(r"\bLDG\.E\.NA\.128", code)) == 2 * words, variant
    times = 2 if variant.x_ahead else 1
    assert len(re.findall(r"\bLDG\.E\.128", code)) == 4 * variant.tiles * variant.depth * times
    check_what_is_read_early(code, capability, words)
    if capability == 90:
        check_that_nothing_waits_for_what_was_asked_for(code)


def check_what_is_read_early(code: str, capability: int, count: int) -> None:
    """Before it waits for the kernel in front, one loads so much of its weights, and no x."""
    before, wait, _ = code.partition("ACQBULK")  # griddepcontrol.wait
    assert bool(wait) == (capability >= 90)
    if wait and capability == 90:  # newer ones have the code in another order
        assert len(re.findall(r"\bLDG\.E\.NA\.128", before)) == count
        assert not re.search(r"\bLDG\.E\.128|\bST[GS]\b", before)
        assert "UBLKPF" in before  # into the L2


def check_that_nothing_waits_for_what_was_asked_for(code: str) -> None:
    """No word of a weight is moved to another register, behind it being loaded into one."""
    loop = code.partition("ACQBULK")[2] or code
    *_, last = re.finditer(r"\bHMMA|\bLDG\.E\.NA", loop)
    loop = loop[: last.start()]
    loaded = {
        f"R{int(first) + i}"
        for first in re.findall(r"\bLDG\.E\.NA\.128\S* R(\d+),", loop)
        for i in range(4)
    }
    moved = re.findall(r"\b(?:MOV|IMAD\.MOV\.U32) R\d+, (?:RZ, RZ, )?(R\d+)", loop)
    assert not loaded & set(moved)


INT8_VARIANTS = [
    decode_int8.Variant(False, False, 8, 2, 1, 1, True),
    decode_int8.Variant(True, True, 8, 1, 4, 2, False),
]


@pytest.mark.parametrize(
    ("capability", "variant"),
    slow_but([(90, INT8_VARIANTS[0])], (80, 90, 120), INT8_VARIANTS),
    ids=str,
)
def test_int8_compiles_into_what_was_meant(capability, variant, compiler):
    options = ["--std=c++17", f"--gpu-architecture=sm_{capability}", *cuda.options(variant)]
    usage, code = disassemble(nvrtc.compile(cuda.source("decode_int8"), options, "decode_int8"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    assert stack == 0 and not re.search(r"\b(LDL|STL)\b", code), variant
    assert registers <= 128, variant
    blocks = variant.panels * variant.depth
    assert len(re.findall(r"\bIMMA\.16832\.S8\.S8\b", code)) == 4 * variant.tiles * blocks
    # In front of the loop and in it; x of each eight rows.
    assert len(re.findall(r"\bLDG\.E\.NA\.128", code)) == 8 * blocks
    assert len(re.findall(r"\bLDG\.E\.128", code)) == 2 * variant.tiles * variant.depth
    check_what_is_read_early(code, capability, 4 * blocks)
    if variant.whole:  # a block's rows are all asked for in front of its products
        order = re.findall(r"\bLDG\.E\.128|\bIMMA", code)
        tiles, products = 2 * variant.tiles, 4 * variant.tiles * variant.panels
        assert order == (["LDG.E.128"] * tiles + ["IMMA"] * products) * variant.depth
    assert "FFMA" not in code, variant  # which would round once where the reference does twice
