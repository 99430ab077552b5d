"""The product of a prompt with an int8 weight, both int8, on Hopper's matrix units, in CUDA C++.

Its sums are exact: how it is cut, and which of the kernels runs, changes no bit.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from qllm.ops import reference
from qllm.ops.gpu import cuda, driver, hopper, nvrtc
from qllm.ops.gpu import device as device_of
from qllm.ops.reference import Int8Rows

SOURCE = ("prefill_int8", "hopper.h", "ring.h")
STAGE = 128  # inputs
ALIGNED = 16  # inputs, of which a row has a multiple
MAX_STAGES = 8
PARTS, LEAST = (1, 2, 3, 4), 4  # of the inputs, which a cluster has; and stages of a part
COPYING = 32  # threads, behind those that multiply
RESERVED = 1 << 10  # bytes of shared memory that a multiprocessor keeps for each block


class Variant(NamedTuple):
    """The constants of the kernel; see prefill_int8.cu."""

    float16: bool
    wide: bool
    rows: int
    stages: int
    multiplying: int
    threads: int
    blocks: int

    @property
    def outputs(self) -> int:
        """Of a block of threads."""
        return self.multiplying // 2

    @property
    def shared_bytes(self) -> int:
        """Of a block of threads, whose stages become sums of all its rows."""
        ring = self.stages * ((self.rows + self.outputs) * STAGE + 16)
        return ring + (self.rows + 2 * self.outputs) * 4


class Cut(NamedTuple):
    """How a product is cut: what a block of threads takes.

    Attributes:
        rows: of x.
        outputs: of the weight.
        parts: of the inputs, which a cluster of blocks has.
        blocks: that a multiprocessor has at once.
    """

    rows: int
    outputs: int
    parts: int
    blocks: int = 1


# By rows and outputs of a tile, and blocks of a multiprocessor: the microseconds that an H100 took
# for a stage of the blocks that it has at once, and beside these for their tiles.
TIMES = {
    (64, 64, 1): (0.16, 5.5),
    (64, 64, 2): (0.246, 3.1),
    (128, 64, 1): (0.258, 3.3),
    (128, 128, 1): (0.36, 5.4),
    (128, 128, 2): (0.71, 4.6),
    (256, 128, 1): (0.67, 5.7),
}
PARTS_TIME = 4.0  # where there are several
BYTES_PER_MICROSECOND, LEAST_TIME = 2.4e6, 3.0  # of a weight
# What is tested: types, whether there is a bias, and cuts.
CASES = (
    (torch.bfloat16, False, (Cut(64, 64, 1), Cut(128, 128, 2), Cut(256, 128, 3))),
    (torch.float16, True, (Cut(128, 64, 4), Cut(128, 128, 1, blocks=2))),
)
TESTED = (331, 2064)  # outputs and inputs


class Arguments(ctypes.Structure):
    """The kernel's, as in prefill_int8.cu."""

    _fields_ = (
        *((name, driver.TensorMap) for name in ("x", "q")),
        *((name, ctypes.c_void_p) for name in ("x_scales", "scales", "bias", "y")),
        *((name, ctypes.c_int) for name in ("rows", "outputs", "stages", "parts")),
        ("x_scales_stride", ctypes.c_int),
        ("filled", ctypes.c_char * 12),  # up to a multiple of the alignment
    )


@device_of.once
def unsupported_reason(device: torch.device) -> str | None:
    """Why it cannot run on a device; None where it can. Where a self-test fails a note says so."""
    if reason := hopper.capability_reason(device):
        return reason
    instead = "prompts of int8 take Triton's product, a slower one"
    test = partial(_self_test, device)
    return device_of.failure("int8 prompts in CUDA C++", device, test, instead, nvrtc.version)


def about(device: torch.device) -> str:
    """How prompts are multiplied, for `--explain`."""
    if reason := unsupported_reason(device):
        return f"prompts in Triton: {reason}"
    return "prompts in CUDA C++"


def takes(rows: Int8Rows, qweight: Tensor) -> bool:
    """Whether it multiplies such rows with such a weight: as tensor maps want them."""
    aligned = all(
        part.is_contiguous() and part.data_ptr() % ALIGNED == 0 for part in (rows.values, qweight)
    )
    inputs = qweight.shape[1]
    return len(rows.values) > 0 and rows.dtype in cuda.DTYPES and inputs % ALIGNED == 0 and aligned


def variant(dtype: torch.dtype, wide: bool, cut: Cut) -> Variant:
    """The kernel's, with as many stages as shared memory holds."""
    kind = (dtype == torch.float16, wide, cut.rows)
    multiplying = cut.outputs * 2
    made = Variant(*kind, MAX_STAGES, multiplying, multiplying + COPYING, cut.blocks)
    while made.shared_bytes > (hopper.SHARED_BYTES + RESERVED) // cut.blocks - RESERVED:
        made = made._replace(stages=made.stages - 1)
    return made


@lru_cache(maxsize=1 << 12)
def cut_of(rows: int, outputs: int, stages: int, num_sms: int) -> Cut:
    """The cut with which a product is done first.

    Args:
        stages: of the inputs.
    """
    reading = outputs * stages * STAGE / BYTES_PER_MICROSECOND + LEAST_TIME

    def times(cut: Cut) -> tuple[float, float]:
        tiles = -(-rows // cut.rows) * -(-outputs // cut.outputs) * cut.parts
        stage, tile = TIMES[cut.rows, cut.outputs, cut.blocks]
        waves = -(-tiles // at_once(cut, num_sms))
        multiplying = waves * (stages / cut.parts * stage + tile)
        if cut.parts == 1:
            return max(multiplying, reading), multiplying
        fits = waves == 1 and stages >= LEAST * cut.parts
        return max(multiplying, reading) + PARTS_TIME if fits else math.inf, multiplying

    fewest = 64 if rows <= 64 else 128  # of a tile: weights are to be read few times
    cuts = [
        Cut(of_x, of_weight, parts, blocks)
        for of_x, of_weight, blocks in TIMES
        for parts in (PARTS if blocks == 1 else PARTS[:1])
        if fewest <= of_x < 2 * max(rows, fewest)
    ]
    return min(cuts, key=times)


def at_once(cut: Cut, num_sms: int) -> int:
    """Blocks that run at once: clusters of more than two leave multiprocessors over."""
    return cut.blocks * (num_sms if cut.parts <= 2 else num_sms * 7 // 8)


def int8_linear(
    rows: Int8Rows,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    *,
    cut: Cut | None = None,
) -> Tensor:
    """`reference.int8_linear` for what it `takes`."""
    x, x_scales, dtype = rows
    (count, inputs), outputs = x.shape, len(qweight)
    y = x.new_empty(count, outputs, dtype=dtype)
    stages = -(-inputs // STAGE)
    cut = cut or cut_of(count, outputs, stages, device_of.architecture(x.device)[1])
    constants = variant(dtype, scales.dtype == torch.float32, cut)
    x_scales, scales = x_scales.contiguous(), scales.contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    with device_of.current(x):
        arguments = Arguments(
            _map(x.data_ptr(), count, inputs, cut.rows, x.device),
            _map(qweight.data_ptr(), outputs, inputs, cut.outputs, x.device),
            x_scales.data_ptr(),
            scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            count,
            outputs,
            stages,
            cut.parts,
            int(x_scales.dim() > 0),
        )
        driver.launch(
            hopper.kernel(SOURCE, constants, constants.shared_bytes, x.device),
            (cut.parts * -(-count // cut.rows), -(-outputs // cut.outputs)),
            constants.threads,
            arguments,
            x.device,
            early=False,
            cluster=cut.parts,
            shared_bytes=constants.shared_bytes,
        )
    return y


@lru_cache(maxsize=1 << 14)
def _map(
    address: int, count: int, inputs: int, rows: int, device: torch.device
) -> driver.TensorMap:
    """The tensor map of rows of integers, in tiles of some of them."""
    shape, tile = (count, inputs), (rows, STAGE)
    return driver.tensor_map(address, 1, shape, inputs, tile, device, swizzle=True)


def _self_test(device: torch.device) -> str | None:
    """Products of what is exact and what has to be rounded, beside the reference's, in each tile.

    What no emulation shows is here: how the matrix units read shared memory, and that they, the
    copies and the threads wait for each other.
    """
    outputs, inputs, most = *TESTED, 259
    q = (torch.arange(outputs * inputs) * 2654435761 % 256 - 128).view(outputs, inputs)
    scales = (torch.arange(outputs).remainder(7) + 1).div(999).half()
    x = (torch.arange(most * inputs) * 40503 % 65536 - 32768).view(most, inputs) / 999
    for dtype, bias, cuts in CASES:
        added = scales - 0.003 if bias else None
        rows = reference.quantize_rows(x.to(dtype), None)
        wanted = reference.int8_linear(rows, q.to(torch.int8), scales, added, None, outputs)
        weight, by_output = q.to(device, torch.int8), scales.to(device)
        there = Int8Rows(rows.values.to(device), rows.scales.to(device), dtype)

        to_add = None if added is None else added.to(device)
        multiply = partial(int8_linear, there, weight, by_output, to_add)
        found = [
            each.cpu() for each in device_of.together([partial(multiply, cut=cut) for cut in cuts])
        ]
        if not all(torch.equal(each, wanted) for each in found):
            return "the self-test of int8 prompts in CUDA C++ here found other sums"
    return None
