"""The reference: transformers' own model and greedy search, loaded through accelerate."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qllm.checkpoint.origin import auto_class, check_readable_by_transformers
from qllm.checkpoint.reader import Checkpoint, read_raw_config
from qllm.checkpoint.tensors import is_finite
from qllm.checkpoint.weights import Weights
from qllm.config import ModelConfig
from qllm.errors import UserError, first_line
from qllm.files import check_file
from qllm.hub import SMALL_FILES, TEMPLATES
from qllm.memory import check_fits
from qllm.models import read_config
from qllm.models.logits import finish_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    class CausalLM(PreTrainedModel):
        """What every causal language model of transformers is: one that generates."""

        def generate(self, input_ids: Tensor, **settings: object) -> Tensor: ...


# The quant_methods of small floats that transformers reads as numbers of 16 bits, if told to: their
# activations stay at 16 bits then, as ours do.
DEQUANTIZED = ("compressed-tensors", "fp8", "mxfp8")


@dataclass(frozen=True)
class ReferenceGeneration:
    """What transformers generates.

    Attributes:
        tokens: the new ids of each prompt, up to and with its end of text.
        texts: their text.
        bytes: of the model's weights.
        layers: how many it has.
        seconds: that generation took.
    """

    tokens: list[list[int]]
    texts: list[str]
    bytes: int
    layers: int
    seconds: float


class HuggingFaceModel:
    """transformers' model, with what scoring asks of one of ours."""

    def __init__(self, model: CausalLM, config: ModelConfig) -> None:
        self.model, self.config = model, config

    @classmethod
    def load(
        cls, folder: Path, *, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> HuggingFaceModel:
        """
        Raises:
            UserError: see `load_reference`.
        """
        model = load_reference(folder, dtype=dtype, device=device)
        # Scoring asks what follows, not what the checkpoint's settings make of it.
        model.generation_config = type(model.generation_config)()
        return cls(model, read_config(read_raw_config(folder)))

    @property
    def dtype(self) -> str:
        """The type of its weights, as --dtype names it."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return text_bytes(self.model)

    @torch.inference_mode()
    def hidden(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """What the layers make of each prompt alone: (N, C) for all N tokens."""
        decoder = self.model.get_decoder()
        rows = [torch.tensor([prompt], device=self.model.device) for prompt in map(list, prompts)]
        return torch.cat([decoder(row, use_cache=False)[0][0] for row in rows])

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Logits (M, V) of rows (M, C) of `hidden`."""
        return self.head()(x)

    def head(self) -> Callable[[Tensor], Tensor]:
        """`logits`, without the layers."""
        matrix, config = self.model.get_output_embeddings(), self.config
        return lambda x: finish_logits(config, matrix(x))

    def layers(self) -> Sequence[nn.Module]:
        """The layers, in their order."""
        lists = (m for m in self.model.get_decoder().children() if isinstance(m, nn.ModuleList))
        return list(next(lists))

    @torch.inference_mode()
    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """The `count` tokens that follow each prompt, whatever ends a text."""
        # Prompts of one length need no padding, and go together.
        lengths = {len(prompt) for prompt in prompts}
        batches = [prompts] if len(lengths) == 1 else [[prompt] for prompt in prompts]
        found: list[list[int]] = []
        for batch in batches:
            ids = torch.tensor([list(prompt) for prompt in batch], device=self.model.device)
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                max_new_tokens=count,
                repetition_penalty=1.0,
                eos_token_id=None,
                pad_token_id=0,
            )
            found += output[:, ids.shape[1] :].tolist()
        return found


def text_bytes(model: CausalLM) -> int:
    """Bytes of the weights that a text takes: those of a vision tower do not count."""
    if not hasattr(model.config, "vision_config"):
        return model.get_memory_footprint()
    parts = (model.get_decoder(), model.get_output_embeddings())
    tensors = {id(t): t for part in parts for t in (*part.parameters(), *part.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def load_reference(
    folder: Path, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> CausalLM:
    """transformers' model of a checkpoint.

    Args:
        dtype: None is the checkpoint's.

    Raises:
        UserError: for a broken checkpoint, one that transformers cannot read, or too little memory.
    """
    raw_config = read_raw_config(folder)
    check_readable_by_transformers(raw_config)
    for pattern in (*SMALL_FILES, TEMPLATES):  # transformers opens what is there
        for path in folder.glob(pattern):
            if path.exists() and not path.is_dir():
                check_file(path)
    weights = Weights(checkpoint := Checkpoint(folder))
    dtype = dtype or weights.default_dtype()
    elements = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    elements += checkpoint.file_names.elements_left_out  # transformers has the vision tower, too
    check_fits(elements * dtype.itemsize, device, f"the reference of {folder.name}")
    # In transformers 5.17, fused attention leaves caps of scores out without a word; not in 5.23.
    attention = "eager" if weights.config.score_cap else None
    del weights, checkpoint

    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not os.isatty(2):
        logging.disable_progress_bar()
    with _errors(folder, "load"):
        config = AutoConfig.from_pretrained(folder)
        settings: Any = getattr(config, "quantization_config", None)
        if settings is None:
            settings = getattr(config.get_text_config(), "quantization_config", None)
        floats = isinstance(settings, dict) and settings.get("quant_method") in DEQUANTIZED
        if floats:
            settings["dequantize"] = True
        model = (
            auto_class(raw_config)
            .from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map="auto" if device == "cuda" else {"": device},
                attn_implementation=attention,
            )
            .eval()
        )
        if floats:  # some of which it leaves in another type
            model = model.to(dtype)
    for name, weight in model.named_parameters():
        # Small floats have no such operation.
        if weight.element_size() > 1 and not is_finite(weight):
            raise UserError(f"{folder}: {name} holds NaN or infinite values; get it again")
    return model


def _padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts in one batch, and where its tokens are: both (B, T), filled up on the left."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


@contextmanager
def _errors(folder: Path, what: str) -> Iterator[None]:
    """What transformers refuses, in one line: it raises what the first wrong value happens to."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"transformers cannot {what} {folder}: {first_line(error)}") from None


def reference_generate(
    folder: Path,
    prompts: list[str],
    *,
    max_prompt_length: int,
    max_new_tokens: int,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> ReferenceGeneration:
    """Generate greedily with transformers, all prompts in one left-padded batch.

    Args:
        prompts: texts; one that is longer than max_prompt_length tokens loses its beginning.
        dtype: None is the checkpoint's.

    Raises:
        UserError: for a broken checkpoint, or one that transformers cannot read.
    """
    model = load_reference(folder, dtype=dtype, device=device)

    from transformers import AutoTokenizer, GenerationConfig

    with _errors(folder, "read the tokenizer of"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.truncation_side = "left"
        rows = tokenizer(prompts, truncation=True, max_length=max_prompt_length)["input_ids"]
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((token for token in pads if token is not None), 0)
    # An added pad token may lie beyond the model's vocabulary; any other fills as well.
    text_config = model.config.get_text_config()
    pad = pad if pad < text_config.vocab_size else 0
    ids, attention_mask = (tensor.to(model.device) for tensor in _padded(rows, pad))
    config: GenerationConfig = model.generation_config
    start = time.perf_counter()
    with _errors(folder, "generate with the settings of"):
        output = model.generate(
            input_ids=ids,
            attention_mask=attention_mask,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            return_dict_in_generate=False,
        )
    seconds = time.perf_counter() - start
    ends = config.eos_token_id
    eos = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    padded = ids.shape[1]
    tokens: list[list[int]] = []
    texts: list[str] = []
    for row, mask in zip(output, attention_mask, strict=True):
        new = row[padded:].tolist()
        end = next((i + 1 for i, token in enumerate(new) if token in eos), len(new))
        prompt = row[:padded][mask.bool()].tolist()
        tokens.append(new[:end])
        before, whole = (
            str(tokenizer.decode(ids, skip_special_tokens=True))  # a list alone for several rows
            for ids in (prompt, prompt + new[:end])
        )
        texts.append(whole[len(before) :])
    return ReferenceGeneration(
        tokens, texts, text_bytes(model), text_config.num_hidden_layers, seconds
    )
