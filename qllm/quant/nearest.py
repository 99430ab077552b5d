"""Round to nearest as an algorithm: no statistics, the range as it is or the best one."""

from __future__ import annotations

from torch import Tensor

from qllm.quant.algorithm import Algorithm, Form, QuantizeOptions
from qllm.quant.clip import clipped_qparams
from qllm.quant.packing import PackedWeight
from qllm.quant.rtn import minmax_qparams, quantize_rtn


class RTN(Algorithm):
    """Each weight goes to the nearest point of its group's grid."""

    name = "rtn"

    def quantize(
        self,
        weight: Tensor,
        form: Form,
        hessian: Tensor | None,
        options: QuantizeOptions,
        *,
        in_scores: bool,
    ) -> tuple[PackedWeight, float]:
        return quantize_rtn(weight, *form, clipped_qparams if options.clip else minmax_qparams), 0.0
