"""What every algorithm is that chooses a matrix's integers, and the settings of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from qllm.quant.inputs import InputStats
from qllm.quant.packing import PackedWeight

DEFAULT_ALPHA = 0.5  # of SmoothQuant
# Bits, group size and scheme.
Form = tuple[int, int, str]


@dataclass(frozen=True)
class GPTQOptions:
    """The settings of the paper and of its implementations.

    Attributes:
        damp: share of the mean diagonal of H that is added to it.
        block_size: columns per panel, behind which errors are handed on as one product.
        act_order: columns with the largest inputs first.
        static_groups: scales from the weights as they were, before any error was handed on, so
            that act_order leaves groups runs of channels.
    """

    damp: float = 0.01
    block_size: int = 128
    act_order: bool = True
    static_groups: bool = True


@dataclass(frozen=True)
class QuantizeOptions:
    """How the algorithms go about it.

    Attributes:
        gptq: GPTQ's own.
        true_sequential: GPTQ sees the inputs that the layer's quantized linears in front of a
            linear give it; else those of the float layer.
        clip: search the clipping range; None is yes for AWQ, no for the others.
        smooth_alpha: SmoothQuant's share of the difficulty that moves into the weights.
    """

    gptq: GPTQOptions = field(default_factory=GPTQOptions)
    true_sequential: bool = True
    clip: bool | None = None
    smooth_alpha: float = DEFAULT_ALPHA


class Algorithm(ABC):
    """Weights (N, K) to integers: what it has to know of the inputs, and what it does.

    Attributes:
        name: as `QuantSpec.algorithm` has it.
        settings: names of the fields of `QuantizeOptions`, and of `GPTQOptions`, that are for it.
        calibrates: it cannot do without statistics of the inputs.
        products: it takes the sum of x x^T among them.
        divides_inputs: it scales input channels, which what stands in front of a linear takes on.
        own_clipping: how it clips is its own matter, and not the least error of the weights.
    """

    name: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    calibrates: ClassVar[bool] = False
    products: ClassVar[bool] = False
    divides_inputs: ClassVar[bool] = False
    own_clipping: ClassVar[bool] = False

    def sequential(self, options: QuantizeOptions) -> bool:
        """Whether it is to see what the quantized linears of the same layer put out."""
        return False

    def input_scales(
        self,
        weight: Tensor,
        stats: InputStats,
        form: Form,
        options: QuantizeOptions,
        share: Callable[[Tensor], Tensor],
    ) -> Tensor | None:
        """By what input channels are to be divided, and columns multiplied: (K,); None: nothing.

        Args:
            share: makes values (K,) of input channels equal where their scales have to be.
        """
        return None

    @abstractmethod
    def quantize(
        self,
        weight: Tensor,
        form: Form,
        hessian: Tensor | None,
        options: QuantizeOptions,
        *,
        in_scores: bool,
    ) -> tuple[PackedWeight, float]:
        """The integers of a matrix (N, K), and the damping that it took.

        Args:
            hessian: the sum of x x^T over inputs x, float32 (K, K), where `products` asks for it.
            in_scores: the product goes into the scores of attention, which are not linear in it.
        """

    def describe(self, options: QuantizeOptions) -> str | None:
        """A line on its settings for the model card."""
        return None


def yes(value: bool) -> str:
    """A setting in words."""
    return "yes" if value else "no"
