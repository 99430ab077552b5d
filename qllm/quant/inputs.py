"""What calibration knows of a linear layer's inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

# Rows of weights per product: the temporaries stay small beside a layer.
ROWS = 4096
# x x^T is symmetric: of a large one, only the blocks on and below the diagonal are summed.
BLOCKS = 8
SMALLEST_BLOCK = 256


class InputStats:
    """Statistics of the inputs x (K,) of a layer over all tokens seen.

    Attributes:
        count: how many tokens.
        absolute: float32 (K,), the sum of |x|.
        largest: float32 (K,), the largest |x|.
        squares: float32 (K,), the sum of x².
    """

    def __init__(
        self,
        channels: int,
        device: torch.device | str,
        *,
        products: bool,
        multiply: Callable[[Tensor, Tensor, None], Tensor] = linear,
    ) -> None:
        """
        Args:
            products: keep x x^T as well.
            multiply: computes a @ b^T in float32.
        """
        self.multiply = multiply
        self.count = 0
        self.absolute = torch.zeros(channels, device=device)
        self.largest = torch.zeros(channels, device=device)
        self.squares = torch.zeros(channels, device=device)
        self._products = torch.zeros(channels, channels, device=device) if products else None
        self._block = max(SMALLEST_BLOCK, -(-channels // BLOCKS))
        self._mirrored = True

    def add(self, x: Tensor) -> None:
        """Take in inputs (M, K)."""
        x = x.float()
        if self._products is not None:
            channels = x.t().contiguous()
            for rows in self._rows():
                product = self.multiply(channels[rows], channels[: rows.stop], None)
                self._products[rows, : rows.stop] += product
            self._mirrored = False
        size = x.abs()
        self.absolute += size.sum(dim=0)
        torch.maximum(self.largest, size.amax(dim=0), out=self.largest)
        self.squares += size.square_().sum(dim=0)
        self.count += len(x)

    def _rows(self) -> list[slice]:
        channels = len(self.largest)
        starts = range(0, channels, self._block)
        return [slice(start, min(start + self._block, channels)) for start in starts]

    def divide(self, scales: Tensor) -> None:
        """Make them those of x / scales, for scales (K,)."""
        if self._products is not None:
            self._products.div_(scales[:, None]).div_(scales)
        self.absolute /= scales
        self.largest /= scales
        self.squares /= scales.square()

    @property
    def hessian(self) -> Tensor | None:
        """The sum of x x^T, float32 (K, K); None where nobody asked for it.

        It is, up to a factor, the second derivative of the squared output error.
        """
        if self._products is not None and not self._mirrored:
            for rows in self._rows():
                self._products[: rows.start, rows] = self._products[rows, : rows.start].t()
            self._mirrored = True
        return self._products

    @property
    def finite(self) -> bool:
        """Whether no sum has left the range of float32."""
        total = self.absolute.sum()
        if self._products is not None:  # no entry is larger than the largest of the diagonal
            total = total + self._products.diagonal().sum()
        return bool(total.isfinite())

    @property
    def mean(self) -> Tensor:
        """The mean of |x|, (K,)."""
        return self.absolute / self.count


def output_error(error: Tensor, hessian: Tensor) -> float:
    """Squared length of E x, summed over inputs x, for E (N, K) and the sum of x x^T (K, K)."""
    parts = error.split(ROWS)
    total = sum((part @ hessian).mul_(part).sum(dtype=torch.float64).item() for part in parts)
    return max(total, 0.0)  # rounding makes one that is next to nothing negative
