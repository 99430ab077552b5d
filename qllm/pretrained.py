"""What a model's files say without its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from numbers import Integral
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from qllm import __version__, hub
from qllm.checkpoint.fingerprint import content_fingerprint
from qllm.checkpoint.reader import read_raw_config
from qllm.config import ModelConfig, QuantPlan
from qllm.errors import UserError
from qllm.generation_config import GenerationConfig, read_generation_config, read_sampling
from qllm.hub import ModelFolder
from qllm.models import read_config
from qllm.onnx import check_installed
from qllm.progress import Note, silent
from qllm.sampling import Sampling
from qllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qllm.calibration import Calibration

# A text, or token ids that a tokenizer of one's own made.
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Pretrained:
    """A model's files but for its weights: enough to check a request before loading.

    Attributes:
        onnx: the folder holds an ONNX model, which onnxruntime runs as it is.
    """

    folder: ModelFolder
    config: ModelConfig
    generation: GenerationConfig
    onnx: bool

    @classmethod
    def open(
        cls, model: str | Path | ModelFolder, *, texts: bool = True, note: Note = silent
    ) -> Self:
        """Find a model and read all but its weights.

        Args:
            model: a folder, a Hub repository, or the name of a bundled model ("opt-tiny").
            texts: False leaves the tokenizer until it is asked for: a model may have none.
            note: called with lines that a user may want to know.

        Raises:
            UserError: for a model that is not there, or broken.
        """
        folder = model if isinstance(model, ModelFolder) else hub.find(str(model), note=note)
        config = read_config(read_raw_config(folder.path))
        onnx = folder.holds_onnx
        if onnx:
            check_installed()
        found = cls(folder, config, read_generation_config(folder.path, config, note), onnx)
        if texts:
            _ = found.tokenizer
        return found

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What makes tokens of text, and text of tokens.

        Raises:
            UserError: where there is none, or it is broken.
        """
        return Tokenizer.load(self.folder.path, self.config.vocab_size)

    def encode(self, prompt: Prompt, max_length: int | None = None) -> list[int]:
        """Token ids of a prompt; a longer one loses its beginning, but no special token.

        Args:
            max_length: in tokens, of texts; ids are taken as they are.

        Raises:
            UserError: see `Tokenizer.encode`; or a length below 1.
            TypeError: for what is neither text nor a sequence of whole numbers.
        """
        if isinstance(prompt, str):
            if max_length is not None and not _is_whole(max_length, 1):
                raise UserError(f"max_prompt_length is {max_length!r}; give 1 token or more")
            return self.tokenizer.encode(prompt, max_length)
        if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Iterable):
            kind = type(prompt).__name__
            raise TypeError(f"a prompt is a text or a sequence of token ids, not {kind}")
        tokens = list(prompt)
        for token in tokens:
            if isinstance(token, bool) or not hasattr(token, "__index__"):
                raise TypeError(f"a prompt's token ids are whole numbers, not {token!r}")
        return [index(token) for token in tokens]

    def facts(
        self,
        plan: QuantPlan,
        calibration: Calibration | None,
        generation: GenerationConfig | None = None,
    ) -> dict[str, Any]:
        """What ranks that share the model have to have alike, in JSON's types.

        Args:
            generation: how they generate; None: as the checkpoint has it.
        """
        return {
            "QLLM version": __version__,
            "torch version": torch.__version__,
            "model": content_fingerprint(self.folder.path),
            "plan": [[pattern, spec.to_json()] for pattern, spec in plan.rules],
            "calibration": calibration.digest() if calibration else None,
            "generation config": asdict(generation or self.generation),
        }

    def generation_with(
        self,
        *,
        max_new_tokens: int | None = None,
        repetition_penalty: float | None = None,
        **sampling: float | None,
    ) -> GenerationConfig:
        """The checkpoint's settings, with those that are given (not None).

        Args:
            sampling: see `LLM.generate`.

        Raises:
            UserError: for values that cannot be, or that contradict each other.
            TypeError: for a name that no setting has.
        """
        known = [field.name for field in fields(Sampling)]
        for name in sampling.keys() - set(known):
            raise TypeError(
                f"there is no setting {name!r} of generation; of drawing there are "
                f"{', '.join(known)}"
            )
        changes: dict[str, Any] = {}
        if max_new_tokens is not None:
            if not _is_whole(max_new_tokens, 0):
                raise UserError(f"max_new_tokens is {max_new_tokens!r}; give a whole number")
            changes["max_new_tokens"] = int(max_new_tokens)
        if repetition_penalty is not None:
            if isinstance(repetition_penalty, str) or not repetition_penalty > 0:
                raise UserError(
                    f"repetition_penalty is {repetition_penalty!r}; give a number above 0"
                )
            changes["repetition_penalty"] = repetition_penalty
        if any(value is not None for value in sampling.values()):
            changes["sampling"] = read_sampling(self.folder.path).with_changes(**sampling)
        return replace(self.generation, **changes)


def _is_whole(value: object, least: int) -> bool:
    """Whether this is a whole number, and large enough."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
