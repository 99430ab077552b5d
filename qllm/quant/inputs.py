"""What calibration knows of a linear layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of weights per product: the temporaries stay small beside a layer.
ROWS = 4096


class InputStats:
    """Statistics of the inputs x (K,) of a layer over all tokens seen.

    Attributes:
        count: how many tokens.
        total: float32 (K, K), the sum of x x^T, or None where nobody needs it.
        absolute: float32 (K,), the sum of |x|.
        largest: float32 (K,), the largest |x|.
    """

    def __init__(self, channels: int, device: torch.device | str, *, products: bool) -> None:
        self.count = 0
        self.total = torch.zeros(channels, channels, device=device) if products else None
        self.absolute = torch.zeros(channels, device=device)
        self.largest = torch.zeros(channels, device=device)

    def add(self, x: Tensor) -> None:
        """Take in inputs (M, K)."""
        x = x.float()
        if self.total is not None:
            self.total.addmm_(x.t(), x)
        size = x.abs()
        self.absolute += size.sum(dim=0)
        torch.maximum(self.largest, size.amax(dim=0), out=self.largest)
        self.count += len(x)

    def divide(self, scales: Tensor) -> None:
        """Make them those of x / scales, for scales (K,)."""
        if self.total is not None:
            self.total.div_(scales[:, None]).div_(scales)
        self.absolute /= scales
        self.largest /= scales

    @property
    def hessian(self) -> Tensor:
        """The mean of x x^T: half the second derivative of the mean squared output error."""
        return self.total / self.count

    @property
    def mean(self) -> Tensor:
        """The mean of |x|, (K,)."""
        return self.absolute / self.count


def output_error(error: Tensor, hessian: Tensor) -> float:
    """Mean squared length of E x over inputs x, for E (N, K) and their mean x x^T (K, K).

    Any multiple of the mean gives that multiple of the error.
    """
    parts = error.split(ROWS)
    return sum((part @ hessian).mul_(part).sum(dtype=torch.float64).item() for part in parts)
