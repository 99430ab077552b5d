"""What calibration computes over and over, in Triton."""

from __future__ import annotations

from torch import Tensor

from qllm.ops import reference
from qllm.ops.gpu import device as device_of
from qllm.ops.gpu.tiles import power

MAX_CHANNELS = 128  # whose gradients have room in a program's registers
ROWS, WARPS = 32, 4  # of a program


def descend_block(
    products: Tensor,
    values: Tensor,
    gradient: Tensor,
    scales: Tensor,
    low: Tensor,
    step_sizes: Tensor,
    qmax: int,
) -> Tensor:
    """`reference.descend_block`, to the bit; `products` may be a part of a larger matrix."""
    channels, rows = values.shape
    if channels > MAX_CHANNELS:
        return reference.descend_block(products, values, gradient, scales, low, step_sizes, qmax)
    from qllm.ops.gpu.kernels import descent

    assert products.stride(1) == 1
    given = [part.contiguous() for part in (values, gradient, scales, low, step_sizes)]
    found = values.new_empty(2, channels, rows)
    with device_of.current(values):
        descent.descend_block[(-(-rows // ROWS),)](
            products,
            *given,
            found,
            channels,
            rows,
            products.stride(0),
            float(qmax),
            CHANNELS=power(channels),
            BN=ROWS,
            num_warps=WARPS,
            enable_fp_fusion=False,  # the reference rounds each step
        )
    return found
