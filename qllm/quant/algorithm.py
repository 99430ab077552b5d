"""What every algorithm is that chooses a matrix's integers, and the settings of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from torch import Tensor

from qllm.quant.inputs import InputStats
from qllm.quant.packing import PackedWeight

DEFAULT_ALPHA = 0.5  # of SmoothQuant
# Of calibration samples that a step of tuning takes together, where nobody says how many: for each
# channel, since what a few tokens say of a wide matrix is mostly noise.
TOKENS_PER_CHANNEL = 2
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
class DescentOptions:
    """How something is tuned step by step.

    Attributes:
        steps: how many.
        batch: calibration samples per step; None: as many as have `least_tokens` and
            TOKENS_PER_CHANNEL, or one.
        seed: of their choice.
        least_tokens: of a step.
    """

    least_tokens: ClassVar[int] = 1024
    steps: int
    batch: int | None = None
    seed: int = 0

    def samples(self, length: int, channels: int) -> int:
        """Of each step, where they have so many tokens, of states (channels,)."""
        tokens = max(self.least_tokens, TOKENS_PER_CHANNEL * channels)
        return self.batch or max(1, tokens // length)


@dataclass(frozen=True)
class TuneOptions(DescentOptions):
    """How the roundings of a layer are tuned together: signed gradient descent, for each layer."""

    least_tokens: ClassVar[int] = 2048
    steps: int = 200

    def __str__(self) -> str:
        size = f"{self.batch} samples"
        if self.batch is None:
            size = f"{self.least_tokens} tokens, or {TOKENS_PER_CHANNEL} per channel"
        return f"each layer tuned in {self.steps} steps of {size}"


@dataclass(frozen=True)
class DistillOptions(DescentOptions):
    """How all scales are tuned behind that, with Adam; in 0 steps they are not.

    Attributes:
        rate: of the first step, for 2 bits, and half of it with each bit more; the others' fall
            linearly.
    """

    steps: int = 100
    rate: float = 1e-2


@dataclass(frozen=True)
class QuantizeOptions:
    """How the algorithms go about it.

    Attributes:
        gptq: GPTQ's own.
        true_sequential: GPTQ sees the inputs that the layer's quantized linears in front of a
            linear give it; else those of the float layer.
        clip: search the clipping range; None is yes for AWQ, no for the others.
        smooth_alpha: SmoothQuant's share of the difficulty that moves into the weights.
        refine: tune what GPTQ made, layer by layer, as SignRound does what was rounded to nearest.
        tune: how that is done.
        distill: how all scales are tuned behind it, where any layer is.
    """

    gptq: GPTQOptions = field(default_factory=GPTQOptions)
    true_sequential: bool = True
    clip: bool | None = None
    smooth_alpha: float = DEFAULT_ALPHA
    refine: bool = False
    tune: TuneOptions = field(default_factory=TuneOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)


class TuningStart(NamedTuple):
    """What tuning starts from.

    Attributes:
        packed: a matrix (N, K) on its grids.
        weight: floating point (N, K), what was rounded to it. How near to the border of its bin a
            weight lies says how readily it is rounded otherwise.
    """

    packed: PackedWeight
    weight: Tensor


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

    def tunes(self, options: QuantizeOptions) -> bool:
        """Whether what it made is tuned, layer by layer."""
        return False

    def tuning_start(
        self, weight: Tensor, form: Form, stats: InputStats, options: QuantizeOptions
    ) -> TuningStart:
        """What tuning starts from, of an algorithm that is tuned: arguments as for `quantize`."""
        raise NotImplementedError

    def describe(self, options: QuantizeOptions) -> str | None:
        """A line on its settings for the model card."""
        return None


def yes(value: bool) -> str:
    """A setting in words."""
    return "yes" if value else "no"
