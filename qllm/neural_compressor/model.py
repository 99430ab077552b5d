"""The model that is quantized, what it is calibrated on, and what it becomes."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qllm.checkpoint.convert import COPIED, small_files
from qllm.checkpoint.load import load_model
from qllm.checkpoint.origin import auto_class, check_readable_by_transformers
from qllm.checkpoint.reader import Checkpoint
from qllm.checkpoint.weights import Weights
from qllm.checkpoint.writer import new_folder
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError, first_line
from qllm.folders import check_new
from qllm.hub import ModelFolder
from qllm.layers import Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("qllm")


class Source:
    """A 16- or 32-bit model: a folder, or one in memory, which is written to a folder.

    Attributes:
        path: of its checkpoint.
        name: for the model card.
        device: where it is quantized and evaluated.
        given: the model in memory, None for a folder.
        origin: see `ModelFolder.origin`; None for a model in memory, whose weights may be its own.
    """

    def __init__(self, model: PreTrainedModel | str | Path, device: str, scratch: Path) -> None:
        """
        Args:
            device: for a folder; a model stays where it is.
            scratch: an empty folder to write in.

        Raises:
            UserError: for what is neither, or no model that QLLM quantizes.
        """
        self.device = device
        self.given: PreTrainedModel | None = None
        self.origin: str | None = None
        if isinstance(model, str | Path):
            self.path = Path(model)
            self.origin = ModelFolder(self.path, self.path.resolve().name).origin
            self.name = self.path.resolve().name
            if not self.path.is_dir():
                raise UserError(f"{model} is no folder; give a checkpoint's, or a model")
        else:
            self.path = scratch / "source"
            self.name = self._adopt(model)
        self.weights = Weights(Checkpoint(self.path))
        if self.weights.stored:
            raise UserError(
                f"{self.name} is quantized already; give the 16-bit model it was made from"
            )

    def _adopt(self, model: PreTrainedModel) -> str:
        """Write a model to `path`, and leave it as it is; returns its name."""
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            raise UserError(
                f"model is a {type(model).__name__}; give a model of transformers, or a folder"
            )
        self.given, self.device = model, str(model.device)
        origin = str(getattr(model.config, "_name_or_path", ""))
        shadow = copy.copy(model)  # to save a model writes to its configurations
        shadow.config = copy.deepcopy(model.config)
        if getattr(model, "generation_config", None) is not None:
            shadow.generation_config = copy.deepcopy(model.generation_config)
        shadow.save_pretrained(self.path)
        names = small_files(Path(origin)) if Path(origin).is_dir() else COPIED
        for name in names:
            found = _file_of(origin, name)
            if found is not None and not (self.path / name).exists():
                (self.path / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(found, self.path / name)
        return Path(origin).name if Path(origin).is_dir() else origin or type(model).__name__

    def original(self) -> PreTrainedModel:
        """The unquantized model: the very one that was given, or the folder's.

        Raises:
            UserError: for a folder that transformers cannot read.
        """
        if self.given is not None:
            return self.given
        check_readable_by_transformers(self.weights.checkpoint.raw_config)
        auto = auto_class(self.weights.checkpoint.raw_config)
        try:
            model = auto.from_pretrained(self.path, dtype=self.weights.default_dtype())
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"transformers cannot load {self.path}: {first_line(error)}") from None
        return model.to(self.device)

    @torch.no_grad()
    def dequantized(self, folder: Path) -> PreTrainedModel:
        """A model of its own with what a quantized checkpoint of this model stands for."""
        model = self.original()
        if model is self.given:
            model = copy.deepcopy(model)
        weights = Weights(Checkpoint(folder))
        parameters = dict(model.named_parameters())
        names = self.weights.checkpoint.file_names
        for name in weights.checkpoint.tensors:
            theirs = names.in_transformers(name)
            if theirs in parameters:  # norms and biases may have taken AWQ's scales
                parameters[theirs].copy_(weights.checkpoint.read(name))
        decoder = load_model(folder, QuantPlan.uniform(QuantSpec()))
        for name in weights.stored:
            quantized = decoder.get_submodule(name)
            assert isinstance(quantized, Linear)
            whole = quantized.dequantize()
            for part, rows in weights.names.rows_of_parts(name).items():
                linear = model.get_submodule(names.in_transformers(part))
                weight = linear.get_parameter("weight")
                value = whole[rows].to(weight.device, weight.dtype)
                if weights.family.is_transposed(f"{name}.weight"):
                    value = value.t().contiguous()
                # A new one, as a head's may be tied to the embedding, which stays as it is.
                linear.weight = nn.Parameter(value, requires_grad=weight.requires_grad)
        model.config.tie_word_embeddings = weights.config.tied_head
        return model


def _file_of(origin: str, name: str) -> Path | None:
    """A file of the folder, or of the cached repository, that a model came from."""
    if Path(origin).is_dir():
        path = Path(origin) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(origin, name)
    except HFValidationError:  # no repository's name
        return None
    return Path(found) if isinstance(found, str) else None


class QuantizedModel:
    """A quantized model, which behaves as the transformers model in `model` does."""

    def __init__(self, source: Source, folder: Path, scratch: TemporaryDirectory[str]) -> None:
        """
        Args:
            folder: the quantized checkpoint.
            scratch: what it lies in, which is removed with this object.
        """
        self._source, self._folder, self._scratch = source, folder, scratch

    @cached_property
    def model(self) -> PreTrainedModel:
        """The transformers model, with dequantized weights in its own type."""
        return self._source.dequantized(self._folder)

    def save(self, folder: str | Path) -> None:
        """Write the quantized checkpoint: packed integers, with the tokenizer where there was one.

        Raises:
            UserError: for a folder that is there and not empty.
        """
        target = Path(folder)
        check_new(target)
        with new_folder(target) as temporary:
            shutil.copytree(self._folder, temporary, dirs_exist_ok=True)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or name in ("model", "_source", "_folder", "_scratch"):
            raise AttributeError(name)
        return getattr(self.model, name)


def read_samples(
    batches: Iterable, count: int, length: int, vocab_size: int, *, full: bool
) -> list[list[int]]:
    """Calibration samples of one length, from what a data loader yields.

    Samples are cut to `length`. Where some are shorter, the length is the one that keeps the most
    tokens: samples that do not reach it are left out, others are cut.

    Args:
        batches: of token ids (B, T) or (T,); or dicts that have them as `input_ids`, and may have
            an `attention_mask`, whose padding is left out; or pairs of either and a label.
        count: how many samples are taken, the first ones.
        full: take samples of `length` or more only.

    Raises:
        UserError: for batches that are something else, and where there is no sample.
    """
    taken = []
    for row in _rows(batches):
        if len(row) >= (length if full else 1):
            taken.append(row[:length])
            if len(taken) == count:
                break
    if not taken:
        what = f" of {length} tokens" if full else ""
        raise UserError(f"calib_dataloader yields no sample{what}; give one that does")
    lengths = [len(row) for row in taken]
    best = max(set(lengths), key=lambda n: (n * sum(other >= n for other in lengths), n))
    samples = [row[:best] for row in taken if len(row) >= best]
    kept = best * len(samples)
    if kept < sum(lengths):
        logger.info(
            "calibration samples have %d to %d tokens: %d of %d are used, at %d tokens each",
            *(min(lengths), max(lengths), len(samples), len(taken), best),
        )
    largest, smallest = max(map(max, samples)), min(map(min, samples))
    if smallest < 0 or largest >= vocab_size:
        wrong = smallest if smallest < 0 else largest
        raise UserError(
            f"calib_dataloader yields token id {wrong}, the model has {vocab_size} tokens"
        )
    return samples


def _rows(batches: Iterable) -> Iterator[list[int]]:
    for batch in batches:
        inputs = batch[0] if isinstance(batch, list | tuple) and batch else batch
        tokens, mask = inputs, None
        if isinstance(inputs, Mapping):
            tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        try:
            ids = _matrix(tokens)
            keep = torch.ones_like(ids) if mask is None else _matrix(mask)
            rows = [row[kept.bool()].tolist() for row, kept in zip(ids, keep, strict=True)]
        except (ValueError, TypeError, RuntimeError, IndexError):
            raise UserError(
                f"calib_dataloader yields a {type(batch).__name__} without token ids; give "
                'tensors (B, T), dicts with such "input_ids", or pairs of either and a label'
            ) from None
        yield from rows


def _matrix(value: object) -> Tensor:
    """Integers (B, T).

    Raises:
        ValueError, TypeError, RuntimeError: for something else.
    """
    if isinstance(value, list | tuple) and any(isinstance(row, Tensor) for row in value):
        raise ValueError("columns, or samples of several lengths")  # which of both is not known
    tensor = torch.as_tensor(value)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dim() not in (1, 2):
        raise ValueError("no integers (B, T)")
    return torch.atleast_2d(tensor)
