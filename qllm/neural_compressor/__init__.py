"""Neural Compressor's Python for weight-only quantization, on QLLM's quantizer.

    from qllm import PostTrainingQuantConfig, quantization

    weight = {"bits": 4, "group_size": 32, "scheme": "asym", "algorithm": "RTN"}
    conf = PostTrainingQuantConfig(approach="weight_only", op_type_dict={".*": {"weight": weight}})
    q_model = quantization.fit(model, conf, eval_func=eval_func)
    q_model.save("saved_results")

Where its meaning differs from Neural Compressor 2.x:

- The language model head stays at 16 bits unless `op_name_dict` or `gptq_args["lm_head"]` names it.
- GPTQ's settings that are left out are QLLM's: act_order, static_groups and true_sequential are on.
- A symmetric grid has its full range, whichever way `enable_full_range` is; AWQ folds its scales
  into what is in front, and leaves a linear that nothing can take them for, as with `folding`.
- `nsamples` counts sequences, not batches.
- What would do nothing is refused, and an exception in `eval_func` is not swallowed.
"""

from qllm.neural_compressor.config import (
    AccuracyCriterion,
    PostTrainingQuantConfig,
    TuningCriterion,
)
from qllm.neural_compressor.model import QuantizedModel
from qllm.neural_compressor.tuning import fit

__all__ = [
    "AccuracyCriterion",
    "PostTrainingQuantConfig",
    "QuantizedModel",
    "TuningCriterion",
    "fit",
]
