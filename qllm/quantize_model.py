"""Quantize a model once and save it: from a name or a folder to another folder.

from qllm import LLM, quantize

quantize("opt-tiny", 4, algorithm="gptq", dataset="text.txt", save="out")
llm = LLM.from_pretrained("out")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from qllm import hub
from qllm.bitwidths import Bitwidth, make_plan
from qllm.checkpoint.reader import read_raw_config
from qllm.checkpoint.weights import resolve_dtype
from qllm.config import (
    DEFAULT_ALGORITHM,
    DEFAULT_GROUP_SIZE,
    DEFAULT_SCHEME,
    ModelConfig,
    QuantPlan,
    QuantSpec,
)
from qllm.data import DATASET, SAMPLES, TOKENS, CalibrationText, load_text, sample_windows
from qllm.errors import UserError
from qllm.files import readable
from qllm.folders import partial_path
from qllm.hub import ModelFolder
from qllm.memory import resolve_device
from qllm.models import read_config
from qllm.progress import Meter, Note, silent, unseen
from qllm.quant.algorithm import QuantizeOptions
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import DEFAULT_SHARD_BYTES, Job
from qllm.quantizer.layer import LinearReport, needs_inputs
from qllm.tokenizer import Tokenizer


def needs_text(plan: QuantPlan) -> bool:
    """Whether some layer of a plan cannot do without calibration."""
    return any(needs_inputs(spec) for _, spec in plan.rules)


def quantize(
    model: str | Path | ModelFolder,
    bitwidth: Bitwidth = 4,
    *,
    save: str | Path,
    algorithm: str = DEFAULT_ALGORITHM,
    group_size: int = DEFAULT_GROUP_SIZE,
    scheme: str = DEFAULT_SCHEME,
    lm_head_bits: int | str | None = None,
    embedding_bits: int | str | None = None,
    dataset: str | CalibrationText | None = None,
    options: QuantizeOptions | None = None,
    dtype: str | torch.dtype | None = None,
    device: str = "auto",
    fake: bool = False,
    compressed: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    accuracy_level: int | None = None,
    meter: Meter = unseen,
    progress: Callable[[list], Iterable] = iter,
    note: Note = silent,
) -> list[LinearReport]:
    """Quantize a 16-bit checkpoint, or an ONNX model, layer by layer.

    A run that was killed is gone on with by the same call.

    Args:
        model: a folder, a Hub repository, or the name of a bundled model ("opt-tiny").
        bitwidth: as for `LLM.from_pretrained`.
        save: the folder to make; it appears when it is whole.
        algorithm: "rtn", "gptq", "awq" or "signround", where the bitwidth is no plan that names
            one.
        dataset: the text to calibrate on, or more about it.
        options: how the algorithms go about it.
        dtype: that activations are kept in between layers; None is the checkpoint's.
        fake: save the dequantized values as a 16-bit checkpoint.
        compressed: write compressed-tensors where GPTQ would do, too.
        shard_bytes: of a file.
        accuracy_level: of an ONNX model's products; None is the default.
        meter, progress: show how many bytes of a checkpoint, and which linears of an ONNX model,
            are done.
        note: called with lines that a user may want to know.

    Returns:
        what became of each linear.

    Raises:
        UserError: for a model that is broken or quantized already, settings that do not fit it,
            or a target that is there.
    """
    folder = model if isinstance(model, ModelFolder) else hub.find(str(model), note=note)
    onnx = folder.holds_onnx
    if accuracy_level is not None and not onnx:
        raise UserError("`accuracy_level` is for ONNX models, and this is a checkpoint")
    if onnx and (fake or compressed or dtype is not None):
        raise UserError(
            f"{folder.path} holds an ONNX model, which is quantized to one file of packed layers; "
            "leave `fake`, `compressed` and `dtype` out"
        )
    default = QuantSpec(group_size=group_size, scheme=scheme, algorithm=algorithm)
    plan = make_plan(bitwidth, default, lm_head_bits, embedding_bits)
    options = options or QuantizeOptions()
    config = read_config(read_raw_config(folder.path))
    calibration = dataset if isinstance(dataset, CalibrationText) else CalibrationText(dataset)
    samples, about = _read_samples(calibration, plan, folder, config, note)
    if onnx:
        from qllm.onnx.quantize import OnnxJob, quantize_onnx

        given = {} if accuracy_level is None else {"accuracy_level": accuracy_level}
        onnx_job = OnnxJob(folder.path, plan, options, samples, file=folder.onnx, **given)
        reports = quantize_onnx(onnx_job, Path(save), progress)
    else:
        job = Job(
            folder.path,
            plan,
            options,
            samples,
            dtype=resolve_dtype(dtype),
            device=resolve_device(device),
            fake=fake,
            compressed=compressed,
            shard_bytes=shard_bytes,
            origin=folder.origin,
            about={"model": folder.name, **about},
        )
        if samples is None and any(spec.kind.startswith("w8a8") for _, spec in plan.rules):
            note("without `dataset`, int8 layers are not smoothed")
        reports = _run(job, Path(save), meter, note)
    _note_inputs(reports, options.gptq.damp, note)
    return reports


def _run(job: Job, save: Path, meter: Meter, note: Note) -> list[LinearReport]:
    """Quantize a checkpoint; where that ends early, say what is kept of it."""
    try:
        return quantize_checkpoint(job, save, meter, note)
    except (OSError, KeyboardInterrupt):
        if partial_path(save).exists():
            note(f"what is finished is kept beside {save}; the same command goes on with it")
        raise


def _read_samples(
    given: CalibrationText, plan: QuantPlan, folder: ModelFolder, config: ModelConfig, note: Note
) -> tuple[list[list[int]] | None, dict[str, str]]:
    """The calibration samples, None where none are asked for; and what to say of them."""
    dataset = given.dataset
    if dataset is None:
        if not needs_text(plan):
            return None, {}
        dataset = DATASET
    window = config.max_positions or TOKENS
    count, length = given.samples or SAMPLES, given.tokens or min(TOKENS, window)
    if config.max_positions is not None and length > window:
        raise UserError(f"`CalibrationText.tokens` {length} exceeds the model's window of {window}")
    ids = Tokenizer.load(folder.path, config.vocab_size).encode(load_text(dataset))
    if given.dataset is None:
        note(f"calibrating on {dataset}; `dataset` names another text")
    about = {
        "dataset": readable(Path(dataset).name),
        "samples": f"{count} of {length} tokens, seed {given.seed}",
    }
    return sample_windows(ids, count, length, given.seed), about


def _note_inputs(reports: list[LinearReport], damp: float, note: Note) -> None:
    """Say where calibration did not reach, and where GPTQ needed more dampening."""
    nothing = [entry.name for entry in reports if entry.dead == entry.channels]
    some = [entry for entry in reports if 0 < entry.dead < entry.channels]
    if nothing:
        note(
            f"the input of {', '.join(nothing)} was zero in all of the calibration; such a layer "
            "is rounded to nearest"
        )
    if some:
        worst = max(some, key=lambda entry: entry.dead / entry.channels)
        note(
            f"{len(some)} linears have input channels that were zero in all of the calibration "
            f"(most: {worst.dead} of {worst.channels} of {worst.name}); those are rounded to "
            "nearest"
        )
    for entry in reports:
        if entry.damp > damp:
            note(f"{entry.name}: its Hessian is singular and took dampening of {entry.damp:g}")
