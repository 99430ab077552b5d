"""The reference: transformers' own model and greedy search, loaded through accelerate."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from qllm.checkpoint.reader import Checkpoint, read_raw_config
from qllm.checkpoint.weights import Weights, check_readable_by_transformers
from qllm.errors import UserError, first_line
from qllm.memory import check_fits


@dataclass(frozen=True)
class Reference:
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


def reference_generate(
    folder: Path,
    prompts: list[str],
    *,
    max_prompt_length: int,
    max_new_tokens: int,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Reference:
    """Generate greedily with transformers, all prompts in one left-padded batch.

    Args:
        prompts: texts; one that is longer than max_prompt_length tokens loses its beginning.
        dtype: None is the checkpoint's.

    Raises:
        UserError: for a broken checkpoint, or one that transformers cannot read.
    """
    check_readable_by_transformers(read_raw_config(folder))
    weights = Weights(Checkpoint(folder))
    dtype = dtype or weights.dtype()
    elements = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    check_fits(elements * dtype.itemsize, device, f"the reference of {folder.name}")
    del weights

    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not os.isatty(2):
        logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map="auto" if device == "cuda" else {"": device}
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"transformers cannot load {folder}: {first_line(error)}") from None
    for name, weight in model.named_parameters():
        if weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
            raise UserError(f"{folder}: {name} holds NaN or infinite values; get it again")
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(
        prompts,
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=max_prompt_length,
    ).to(model.device)
    config: GenerationConfig = model.generation_config
    start = time.perf_counter()
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    seconds = time.perf_counter() - start
    eos = config.eos_token_id
    eos = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    padded = batch["input_ids"].shape[1]
    tokens, texts = [], []
    for row, mask in zip(output, batch["attention_mask"], strict=True):
        new = row[padded:].tolist()
        end = next((i + 1 for i, token in enumerate(new) if token in eos), len(new))
        prompt = row[:padded][mask.bool()].tolist()
        tokens.append(new[:end])
        before = tokenizer.decode(prompt, skip_special_tokens=True)
        whole = tokenizer.decode(prompt + new[:end], skip_special_tokens=True)
        texts.append(whole[len(before) :])
    return Reference(
        tokens, texts, model.get_memory_footprint(), model.config.num_hidden_layers, seconds
    )
