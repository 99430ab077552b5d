"""`fit`: quantize as the user says, and, where that is not good enough, in other ways."""

from __future__ import annotations

import itertools
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.neural_compressor.config import PostTrainingQuantConfig
from qllm.neural_compressor.model import QuantizedModel, Source, read_samples
from qllm.neural_compressor.plans import WOQ_TUNE, model_plan, tuned_plan, user_plans
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from qllm.quantizer.layer import needs_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("qllm")

GPTQ_SAMPLES, GPTQ_TOKENS = 128, 2048


def fit(
    model: PreTrainedModel | str | Path,
    conf: PostTrainingQuantConfig,
    calib_dataloader: Iterable | None = None,
    calib_func: None = None,
    eval_func: Callable[[PreTrainedModel], float] | None = None,
    eval_dataloader: None = None,
    eval_metric: None = None,
) -> QuantizedModel | None:
    """Quantize a model.

    Without `eval_func`, as `conf` says. With it, the score of the unquantized model comes first;
    then what `conf` says is tried, and the rows of WOQ_TUNE one after the other, until a score
    meets `conf.accuracy_criterion` or `conf.tuning_criterion` ends it.

    Args:
        model: a transformers model (OPT, BLOOM or Llama), which stays as it is, or the folder of
            a checkpoint.
        calib_dataloader: what `read_samples` takes; GPTQ and AWQ need it.
        eval_func: the score of a transformers model that holds the dequantized weights.

    Returns:
        the model, or None where none was good enough: a warning has the table of trials.

    Raises:
        UserError: for a model, a configuration or a data loader that cannot be had here.
    """
    for name, given in (("eval_dataloader", eval_dataloader), ("eval_metric", eval_metric)):
        if given is not None:
            raise UserError(f"{name} cannot be had here; give eval_func, which returns the score")
    if calib_func is not None:
        raise UserError("calib_func cannot be had here; give calib_dataloader")
    if not isinstance(conf, PostTrainingQuantConfig):
        raise UserError(f"conf is a {type(conf).__name__}; give a PostTrainingQuantConfig")
    if eval_func is not None and not callable(eval_func):
        raise UserError(f"eval_func is a {type(eval_func).__name__}; give a function of the model")
    device = "cpu"
    if conf.device == "gpu":
        if not torch.cuda.is_available():
            raise UserError("device='gpu': there is no CUDA device here; give 'cpu'")
        device = "cuda"
    scratch = TemporaryDirectory(prefix="qllm-")
    run = _Run(conf, Source(model, device, Path(scratch.name)), calib_dataloader, scratch)
    return run.quantize() if eval_func is None else run.tune(eval_func)


@dataclass(frozen=True)
class _Trial:
    """One way to quantize the model.

    Attributes:
        specs: what each linear gets of the plan.
    """

    name: str
    plan: QuantPlan
    specs: dict[str, QuantSpec]

    @property
    def needs_samples(self) -> bool:
        return any(needs_inputs(spec) for spec in self.specs.values())

    @property
    def algorithms(self) -> set[str]:
        return {spec.algorithm for spec in self.specs.values() if spec.kind == "weight_only"}


class _Run:
    """One call of `fit`."""

    def __init__(
        self,
        conf: PostTrainingQuantConfig,
        source: Source,
        batches: Iterable | None,
        scratch: TemporaryDirectory[str],
    ) -> None:
        self.conf, self.source, self.batches, self.scratch = conf, source, batches, scratch
        self.folder = Path(scratch.name) / "quantized"
        self.samples: dict[tuple[int, int, bool], list[list[int]]] = {}
        config = source.weights.config
        self.modules = source.weights.family.layer_linears(config)
        # Mistakes are found before anything is worked on.
        limit = conf.tuning_criterion.max_trials
        plans = list(itertools.islice(user_plans(conf), limit))
        name = "the configuration"
        self.own = [
            self._trial(name if len(plans) == 1 else f"{name}, {i}", plan)
            for i, plan in enumerate(plans, 1)
        ]
        for trial in self.own:
            if not trial.algorithms:
                raise UserError("op_type_dict and op_name_dict leave every linear as it is")
            if trial.needs_samples and batches is None:
                needing = " and ".join(sorted(trial.algorithms - {"rtn"})).upper()
                raise UserError(f"{needing} needs calibration; pass calib_dataloader")
            conf.options(trial.algorithms)

    def _trial(self, name: str, plan: QuantPlan) -> _Trial:
        plan = model_plan(self.conf, plan, self.modules)
        num_layers = self.source.weights.config.num_layers
        return _Trial(name, plan, plan.resolve(self.modules, num_layers))

    def quantize(self) -> QuantizedModel:
        """The user's configuration; the first, where there are several."""
        if len(self.own) > 1:
            logger.info("without eval_func the first value of each list counts")
        return self._quantize(self.own[0])

    def tune(self, eval_func: Callable[[PreTrainedModel], float]) -> QuantizedModel | None:
        """The first trial that is good enough."""
        start = time.monotonic()
        criterion, limits = self.conf.accuracy_criterion, self.conf.tuning_criterion
        baseline = _score(eval_func, self.source.original())
        if not math.isfinite(baseline):
            raise UserError(f"eval_func gives {baseline} for the model before it is quantized")
        goal = criterion.goal(baseline)
        sign = ">=" if criterion.higher_is_better else "<="
        logger.info("the baseline is %.6g, the goal %s %.6g", baseline, sign, goal)
        scores: list[tuple[str, float]] = []
        ended = "all were tried"
        for trial in self._trials():
            if len(scores) == limits.max_trials:
                ended = f"max_trials is {limits.max_trials}"
                break
            if scores and limits.timeout and time.monotonic() - start > limits.timeout:
                ended = f"timeout is {limits.timeout} s"
                break
            quantized = self._quantize(trial)
            score = _score(eval_func, quantized.model)
            scores.append((trial.name, score))
            logger.info("trial %d, %s: %.6g", len(scores), trial.name, score)
            if criterion.meets(score, baseline):
                return quantized
            del quantized  # one at a time in memory, and on the disk
            shutil.rmtree(self.folder)
        table = "\n".join(f"  {name}: {score:.6g}" for name, score in scores)
        logger.warning(
            "no quantized model is good enough (%s): the baseline is %.6g, the goal %s %.6g\n%s",
            *(ended, baseline, sign, goal, table),
        )
        return None

    def _trials(self) -> Iterator[_Trial]:
        """The user's own, then the rows of WOQ_TUNE; what was tried already is not again."""
        tuned = (self._trial(name, tuned_plan(self.own[0].plan, name)) for name in WOQ_TUNE)
        tried: list[dict[str, QuantSpec]] = []
        for trial in itertools.chain(self.own, tuned):
            if trial.specs in tried:
                logger.info("%s is left out: it is what was tried before", trial.name)
            elif trial.needs_samples and self.batches is None:
                logger.info("%s is left out: it needs calib_dataloader", trial.name)
            else:
                tried.append(trial.specs)
                yield trial

    def _quantize(self, trial: _Trial) -> QuantizedModel:
        samples = self._samples(trial.algorithms) if trial.needs_samples else None
        about = {"model": self.source.name}
        if samples is not None:
            about["calibration"] = f"{len(samples)} samples of {len(samples[0])} tokens"
        job = Job(
            self.source.path,
            trial.plan,
            self.conf.options(trial.algorithms),
            samples,
            dtype=torch.float32,
            device=self.source.device,
            origin=self.source.origin,
            about=about,
        )
        quantize_checkpoint(job, self.folder)
        return QuantizedModel(self.source, self.folder, self.scratch)

    def _samples(self, algorithms: set[str]) -> list[list[int]]:
        """What calib_dataloader has for these algorithms: as many as the most demanding takes."""
        given = self.conf.arguments("gptq_args") if "gptq" in algorithms else {}
        size = self.conf.calibration_sampling_size
        counts = {
            "gptq": given.get("nsamples", GPTQ_SAMPLES),
            "awq": size if isinstance(size, int) else size[0],
        }
        config = self.source.weights.config
        length, window = given.get("pad_max_length", GPTQ_TOKENS), config.max_positions
        if window is not None and length > window:
            if "pad_max_length" in given:
                raise UserError(f"pad_max_length={length} exceeds the model's window of {window}")
            length = window
        full = bool(given.get("use_max_length", False))
        count = max(counts[algorithm] for algorithm in algorithms & set(counts))
        if (count, length, full) not in self.samples:
            batches = self.batches
            assert batches is not None  # a plan that needs them is left out without
            if iter(batches) is batches:  # a generator, which can be gone through once
                batches, self.batches = itertools.tee(batches)
            self.samples[count, length, full] = read_samples(
                batches, count, length, config.vocab_size, full=full
            )
        return self.samples[count, length, full]


def _score(eval_func: Callable[[PreTrainedModel], float], model: PreTrainedModel) -> float:
    score = eval_func(model)
    try:
        return float(score)
    except (TypeError, ValueError):
        raise UserError(
            f"eval_func returns a {type(score).__name__}; let it return one number"
        ) from None
