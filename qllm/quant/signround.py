"""SignRound as an algorithm (Cheng et al. 2023): to nearest, then layers are tuned as wholes."""

from __future__ import annotations

from torch import Tensor

from qllm.quant.algorithm import Form, QuantizeOptions, TuningStart
from qllm.quant.clip import clipped_qparams_by_channel
from qllm.quant.inputs import InputStats
from qllm.quant.nearest import RTN
from qllm.quant.rtn import quantize_rtn


class SignRound(RTN):
    """Rounded to nearest; what tunes it is `qllm.quantizer.rounding`, driven by the layer."""

    name = "signround"
    calibrates = True

    def tunes(self, options: QuantizeOptions) -> bool:
        return True

    def tuning_start(
        self, weight: Tensor, form: Form, stats: InputStats, options: QuantizeOptions
    ) -> TuningStart:
        find_qparams = clipped_qparams_by_channel(stats.squares)
        return TuningStart(quantize_rtn(weight, *form, find_qparams), weight)

    def describe(self, options: QuantizeOptions) -> str:
        return f"SignRound: {options.tune}"
