"""The algorithms by name; their names are those of `qllm.config.ALGORITHMS`."""

from __future__ import annotations

from qllm.quant.algorithm import Algorithm
from qllm.quant.awq import AWQ
from qllm.quant.gptq import GPTQ
from qllm.quant.nearest import RTN
from qllm.quant.signround import SignRound
from qllm.quant.smooth import SmoothQuant

ALGORITHMS: dict[str, Algorithm] = {each.name: each for each in (RTN(), GPTQ(), AWQ(), SignRound())}
# In front of layers whose activations are int8.
SMOOTHQUANT = SmoothQuant()
