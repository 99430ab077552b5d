"""The three classes that say what Neural Compressor is to do, and which values work here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qllm.errors import UserError
from qllm.quant.algorithm import GPTQOptions, QuantizeOptions

CONFIG = "PostTrainingQuantConfig"

# What an option may be: a test of the value, and what to say of those that pass.
Rule = tuple[Callable[[object], bool], str]


def _one_of(*values: object) -> Rule:
    listed = " or ".join(map(repr, values))
    return lambda given: any(type(given) is type(v) and given == v for v in values), listed


def _kind(kind: type) -> Rule:
    return lambda given: isinstance(given, kind), f"an {kind.__name__}"


def _number(low: float) -> Rule:
    def test(given: object) -> bool:
        if not isinstance(given, int | float) or isinstance(given, bool):
            return False
        return low <= given < math.inf

    return test, "a number" if low == -math.inf else f"a number from {low} on"


def _is_count(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given >= 1


def _only(*words: str) -> Rule:
    def test(given: object) -> bool:
        return isinstance(given, list | tuple) and set(map(str, given)) <= set(words)

    return test, f"a list, of {' and '.join(words)} at most" if words else "an empty list"


COUNT: Rule = (_is_count, "a whole number from 1 on")
FLAG = _one_of(True, False)
TABLE: Rule = (lambda given: isinstance(given, Mapping), "a dict")
ANYTHING: Rule = (lambda given: True, "")

# The settings of each algorithm. Those with one value, and folding, enable_full_range and n_blocks
# (how many layers are worked on at a time), change no result here.
ARGUMENTS: dict[str, dict[str, Rule]] = {
    "rtn_args": {
        "enable_mse_search": FLAG,
        "enable_full_range": FLAG,
        "group_dim": _one_of(1),
        "return_int": _one_of(False),
    },
    "gptq_args": {
        "percdamp": _number(0),
        "block_size": COUNT,
        "act_order": FLAG,
        "actorder": FLAG,
        "static_groups": FLAG,
        "true_sequential": FLAG,
        "lm_head": FLAG,
        "nsamples": COUNT,
        "pad_max_length": COUNT,
        "use_max_length": FLAG,
        "use_full_length": FLAG,
    },
    "awq_args": {
        "enable_auto_scale": _one_of(True),
        "enable_mse_search": FLAG,
        "folding": FLAG,
        "n_blocks": COUNT,
    },
}
OLD_NAMES = {"actorder": "act_order", "use_full_length": "use_max_length"}
OFF = _one_of(False)
RECIPES: dict[str, Rule] = {
    **dict.fromkeys(ARGUMENTS, TABLE),
    "last_conv_or_matmul_quantization": FLAG,
    "layer_wise_quant": FLAG,  # a layer at a time is how it is done
    "layer_wise_quant_args": _one_of({}),
    "smooth_quant": OFF,
    "smooth_quant_args": _one_of({}),
    "teq_args": _one_of({}),
    "autoround_args": _one_of({}),
    "fast_bias_correction": OFF,
    "weight_correction": OFF,
    "gemm_to_matmul": _one_of(True),
    "graph_optimization_level": _one_of(None),
    "first_conv_or_matmul_quantization": _one_of(True),
    "pre_post_process_quantization": _one_of(True),
    "add_qdq_pair_to_weight": OFF,
    "optypes_to_exclude_output_quant": _one_of([]),
    "dedicated_qdq_pair": OFF,
}


def _check(where: str, given: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    for key, value in given.items():
        if key not in rules:
            known = ", ".join(rules)
            raise UserError(f"{where}: QLLM knows no {key!r}; it knows {known}")
        test, works = rules[key]
        if not test(value):
            raise UserError(f"{where}: {key}={value!r} cannot be had here; give {works}")


@dataclass(frozen=True)
class AccuracyCriterion:
    """What a quantized model may lose of the unquantized one's score.

    Attributes:
        criterion: whether `tolerable_loss` is a share of the baseline, or a difference from it.
    """

    higher_is_better: bool = True
    criterion: str = "relative"
    tolerable_loss: float = 0.01

    def __post_init__(self) -> None:
        rules = {
            "higher_is_better": FLAG,
            "criterion": _one_of("relative", "absolute"),
            "tolerable_loss": _number(-math.inf),
        }
        _check("AccuracyCriterion", vars(self), rules)

    def goal(self, baseline: float) -> float:
        """The worst score that is good enough."""
        loss = self.tolerable_loss * (abs(baseline) if self.criterion == "relative" else 1)
        return baseline - loss if self.higher_is_better else baseline + loss

    def meets(self, score: float, baseline: float) -> bool:
        """Whether a score is good enough; one that is not a number never is."""
        goal = self.goal(baseline)
        return score >= goal if self.higher_is_better else score <= goal


@dataclass(frozen=True)
class TuningCriterion:
    """How long to look for a model that is good enough: the first one that is ends it.

    Attributes:
        timeout: no further trial starts after so many seconds; 0 sets no limit.
        max_trials: how many models are quantized at most.
    """

    strategy: str = "basic"
    strategy_kwargs: Mapping[str, Any] | None = None
    timeout: float = 0
    max_trials: int = 100
    objective: str | Sequence[str] = "performance"

    def __post_init__(self) -> None:
        rules = {
            "strategy": _one_of("basic"),
            "strategy_kwargs": _one_of(None, {}),
            "timeout": _number(0),
            "max_trials": COUNT,
            "objective": _one_of("performance", ["performance"]),
        }
        _check("TuningCriterion", vars(self), rules)


@dataclass(frozen=True)
class PostTrainingQuantConfig:
    """What to quantize, how, and what is good enough.

    Attributes:
        device: "cpu", or "gpu"; a model that is given lives where it is.
        recipes: `rtn_args`, `gptq_args` and `awq_args` hold where their algorithm is used.
        approach: "weight_only".
        calibration_sampling_size: sequences that AWQ is calibrated on; GPTQ has its `nsamples`.
        op_type_dict: regular expression over types, of which there is Linear, to
            `{"weight": {"bits": 4, "group_size": 32, "scheme": "asym", "algorithm": "RTN"}}`.
            Lists of values are tried one after the other where there is an `eval_func`; else the
            first counts.
        op_name_dict: the same by module name; `{"weight": {"dtype": "fp32"}}` leaves a module as
            it is.
        example_inputs: anything; nothing is traced.
        excluded_precisions: "bf16" and "fp16"; what is not quantized keeps its type anyway.

    Raises:
        UserError: for a value that would not be followed.
    """

    device: str = "cpu"
    backend: str = "default"
    domain: str = "auto"
    recipes: Mapping[str, Any] = field(default_factory=dict)
    quant_format: str = "default"
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    approach: str = "static"
    calibration_sampling_size: int | Sequence[int] = 100
    op_type_dict: Mapping[str, Any] | None = None
    op_name_dict: Mapping[str, Any] | None = None
    reduce_range: bool | None = None
    example_inputs: object = None
    excluded_precisions: Sequence[str] = ()
    quant_level: str | int = "auto"
    accuracy_criterion: AccuracyCriterion = AccuracyCriterion()
    tuning_criterion: TuningCriterion = TuningCriterion()
    diagnosis: bool = False
    ni_workload_name: str = "quantization"

    def __post_init__(self) -> None:
        if self.approach != "weight_only":
            raise UserError(
                f"{CONFIG}: approach={self.approach!r} is not for Python; give 'weight_only', or "
                "quantize activations too with qllm_quant.py --bitwidth 8:tc-li or 8:tc"
            )
        dictionary = (lambda given: given is None or isinstance(given, Mapping), TABLE[1])
        rules = {
            "device": _one_of("cpu", "gpu"),
            "backend": _one_of("default"),
            "domain": _one_of("auto", "nlp"),
            "recipes": TABLE,
            "quant_format": _one_of("default"),
            "inputs": _only(),
            "outputs": _only(),
            "approach": ANYTHING,
            "calibration_sampling_size": (self._is_sampling_size, "one whole number from 1 on"),
            "op_type_dict": dictionary,
            "op_name_dict": dictionary,
            "reduce_range": _one_of(None, False),
            "example_inputs": ANYTHING,
            "excluded_precisions": _only("bf16", "fp16"),
            "quant_level": _one_of("auto", 1),
            "accuracy_criterion": _kind(AccuracyCriterion),
            "tuning_criterion": _kind(TuningCriterion),
            "diagnosis": OFF,
            "ni_workload_name": _one_of("quantization"),
        }
        _check(CONFIG, {name: getattr(self, name) for name in rules}, rules)
        _check("recipes", self._recipes(), RECIPES)
        for name, known in ARGUMENTS.items():
            _check(name, self.recipes.get(name) or {}, known)

    @staticmethod
    def _is_sampling_size(given: object) -> bool:
        return _is_count(given) or (
            isinstance(given, list | tuple) and len(given) == 1 and _is_count(given[0])
        )

    def _recipes(self) -> dict[str, Any]:
        return {key: value for key, value in self.recipes.items() if value is not None}

    def arguments(self, name: str) -> dict[str, Any]:
        """The settings in `rtn_args`, `gptq_args` or `awq_args`, by their present names."""
        given = self.recipes.get(name) or {}
        return {OLD_NAMES.get(key, key): value for key, value in given.items()}

    def options(self, algorithms: set[str]) -> QuantizeOptions:
        """The settings for a model whose layers use `algorithms`.

        Raises:
            UserError: for settings that these algorithms cannot have beside each other.
        """
        gptq = self.arguments("gptq_args")
        search = {
            "rtn": self.arguments("rtn_args").get("enable_mse_search", False),
            "gptq": False,
            "awq": self.arguments("awq_args").get("enable_mse_search", True),
        }
        clips = {algorithm: search[algorithm] for algorithm in sorted(algorithms)}
        clip: bool | None = None
        if any(wanted != (algorithm == "awq") for algorithm, wanted in clips.items()):
            if len(set(clips.values())) > 1:
                raise UserError(
                    f"enable_mse_search is one for a whole model, not {clips}; leave it out, or "
                    "use one algorithm"
                )
            clip = next(iter(clips.values()))
        names = {"percdamp": "damp"} | {
            name: name for name in ("block_size", "act_order", "static_groups")
        }
        own = {ours: gptq[name] for name, ours in names.items() if name in gptq}
        sequential = gptq.get("true_sequential", QuantizeOptions().true_sequential)
        return QuantizeOptions(replace(GPTQOptions(), **own), sequential, clip)
