"""Several checkpoints that are asked the same, their rows, and whether those can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qllm import report
from qllm.bitwidths import make_plan
from qllm.checkpoint import origin
from qllm.checkpoint.reader import is_packed, read_raw_config
from qllm.config import DEFAULT_ALGORITHM, ModelConfig
from qllm.errors import UserError
from qllm.evaluate.agreement import DecoderReference
from qllm.evaluate.evaluation import Evaluation, Progress, evaluate, no_progress
from qllm.evaluate.lambada import requests
from qllm.evaluate.perplexity import Cut, PerplexityOptions, Text, cut
from qllm.hub import ModelFolder
from qllm.layers import Linear
from qllm.llm import LLM
from qllm.models import Decoder
from qllm.pretrained import Pretrained
from qllm.progress import Meter, Note
from qllm.tokenizer import Tokenizer

# Conventions whose figures do not depend on how a text is cut into tokens.
ANY_TOKENS = ("word", "byte")
# What tells tokenizers apart where there is no text.
SENTENCE = "In 1815, M. Charles-François-Bienvenu Myriel was Bishop of D——, «really».\n\t 0.5%"


@dataclass(frozen=True)
class Candidate:
    """A checkpoint and what it is asked.

    Attributes:
        name: what tells it from the others.
        cuts: of the text, see `qllm.evaluate.perplexity.cut`.
    """

    pretrained: Pretrained
    name: str
    asked: Evaluation
    cuts: list[Cut]

    @classmethod
    def of(
        cls,
        pretrained: Pretrained,
        name: str,
        text: str | None,
        tasks: Mapping[str, Sequence[str]],
        options: PerplexityOptions,
        max_tokens: int | None,
    ) -> Candidate:
        """
        Args:
            text: whose perplexity is measured; None for none.
            tasks: the rows of each, by name.
            max_tokens: tokens of the text, its first; None for all.

        Raises:
            UserError: for a broken tokenizer, or what the model cannot take.
        """
        config, tokenizer = pretrained.config, pretrained.tokenizer
        encoded = None if text is None else Text.encode(text, tokenizer, max_tokens)
        cuts = [] if encoded is None else cut(encoded, config, options)
        found = {task: requests(rows, tokenizer, config) for task, rows in tasks.items()}
        return cls(pretrained, name, Evaluation(encoded, options, found), cuts)

    @property
    def folder(self) -> ModelFolder:
        """The checkpoint's files."""
        return self.pretrained.folder

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.pretrained.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's own."""
        return self.pretrained.tokenizer

    def row(
        self,
        llm: LLM,
        bitwidth: str,
        activation_bits: int | None,
        kv_bits: int,
        progress: Progress = no_progress,
    ) -> dict[str, Any]:
        """What this model answers in one form: a row of the table.

        Args:
            llm: the model, loaded.
            bitwidth: as it is called.
            activation_bits: of its layers; None where the nodes of an ONNX file say it.
            kv_bits: to hold keys and values in; those of an ONNX model are as they are.

        Raises:
            UserError: see `evaluate`.
        """
        model = llm.model
        about = {"model": self.name, "bitwidth": bitwidth, "activation_bits": activation_bits}
        about |= {"dtype": str(model.dtype).removeprefix("torch."), "bytes": llm.nbytes}
        if isinstance(model, Decoder):
            model.kv_bits = kv_bits
            about |= {"algorithm": algorithm_of(self.folder, model), "kv_bits": kv_bits}
            about |= {"format": report.formats(model), **report.outer_bits(model)}
        else:
            about["algorithm"] = origin.algorithm(read_raw_config(self.folder.path))
            about |= {"format": f"{bitwidth} bits, ONNX", "kv_bits": None}
            about |= dict.fromkeys(report.OUTER_BITS)  # of which its config.json says nothing
        return about | evaluate(model, self.asked, progress)


def names_of(folders: Sequence[ModelFolder], given: Sequence[str]) -> list[str]:
    """What to call each of some models: as it is called, or given where two would be called alike.

    Raises:
        UserError: for a folder that is there twice.
    """
    names = [folder.name for folder in folders]
    paths = [folder.path.resolve() for folder in folders]
    for name, path in zip(given, paths, strict=False):
        if paths.count(path) > 1:
            raise UserError(f"{name} is given more than once; a model takes one row")
    return [
        name if names.count(name) == 1 else str(Path(given[index]))
        for index, name in enumerate(names)
    ]


def check_comparable(candidates: Sequence[Candidate], *, agree: bool) -> None:
    """Refuse models whose figures do not mean the same.

    Args:
        agree: all are compared with one reference, token by token.

    Raises:
        UserError: naming the first two.
    """
    first = candidates[0]
    for other in candidates[1:]:
        alike = f"{other.name} and {first.name}"
        for ours, theirs in zip(first.cuts, other.cuts, strict=True):
            if (ours.window, ours.stride) != (theirs.window, theirs.stride):
                raise UserError(
                    f"the windows of {alike} differ, {theirs.window} and {ours.window} tokens; "
                    f"give both `window` {min(theirs.window, ours.window)}"
                )
        _check_texts(first, other, alike)
        vocabularies = [each.tokenizer.encode(SENTENCE) for each in (first, other)]
        if agree and vocabularies[0] != vocabularies[1]:
            raise UserError(
                f"the tokenizers of {alike} differ: they cannot agree with one reference token by "
                "token; measure `agree` of one at a time"
            )


def _check_texts(first: Candidate, other: Candidate, alike: str) -> None:
    """Refuse perplexities per token of two texts, or of one that is cut into tokens in two ways."""
    text, their_text = first.asked.text, other.asked.text
    if text is None or their_text is None:
        return
    if text.text != their_text.text:
        raise UserError(
            f"the tokenizers of {alike} differ, and so does the text that `max_tokens` leaves; "
            "leave it out"
        )
    names = [name for part in first.cuts for name in part.names if name not in ANY_TOKENS]
    if names and not same_text(text, their_text):
        raise UserError(
            f"the tokenizers of {alike} differ ({len(their_text.ids)} and {len(text.ids)} "
            f"tokens): perplexity {names[0]} is per token, and only that of one tokenizer can "
            "be compared; take `conventions` word,byte"
        )


def find_reference(
    candidates: Sequence[Candidate],
    reference: str | None,
    note: Note,
    *,
    gguf: bool = False,
) -> ModelFolder:
    """The one 16-bit checkpoint that all are compared with; see `qllm.checkpoint.origin`.

    Raises:
        UserError: there is none, or more than one.
    """
    if reference is not None:
        return origin.find_reference(candidates[0].folder, reference, note, gguf=gguf)
    found: dict[Path, tuple[str, ModelFolder]] = {}
    notes: list[str] = []
    for candidate in candidates:
        model = origin.find_reference(candidate.folder, None, notes.append, gguf=gguf)
        found.setdefault(model.path.resolve(), (candidate.name, model))
    for said in notes[:1]:
        note(said)
    (name, model), *others = found.values()
    if others:
        other_name, other = others[0]
        raise UserError(
            f"{name} and {other_name} have two originals, {model.path} and {other.path}; name the "
            "one that both are compared with: `reference`"
        )
    return model


def load_gguf_reference(
    folder: ModelFolder,
    dtype: torch.dtype | None,
    device: str,
    meter: Meter,
    note: Note,
) -> DecoderReference:
    """A GGUF file as it is, in float32 unless told otherwise, as the reference."""
    note(f"the reference is {folder.path} as it is, run by QLLM: transformers does not")
    llm = LLM.load(
        Pretrained.open(folder, texts=False),
        make_plan(None),
        dtype=dtype or torch.float32,
        device=device,
        meter=meter,
    )
    assert isinstance(llm.model, Decoder)  # of a file that is no ONNX model
    return DecoderReference(llm.model)


def algorithm_of(folder: ModelFolder, model: Decoder) -> str:
    """How the integers of a loaded model were chosen, as far as is known; "" at 16 bits."""
    raw_config = read_raw_config(folder.path)
    linears = (m for m in model.layers.modules() if isinstance(m, Linear))
    quantized = any(linear.spec.kind != "dense" for linear in linears)
    if quantized and not is_packed(raw_config):
        return DEFAULT_ALGORITHM  # while it was loaded
    return origin.algorithm(raw_config)


def same_text(text: Text, other: Text) -> bool:
    """Whether two tokenizers made the same of a text."""
    ours, theirs = (list(each.ids) for each in (text, other))
    return ours == theirs and text.prefix_token_id == other.prefix_token_id
