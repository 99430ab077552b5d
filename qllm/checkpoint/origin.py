"""What a checkpoint records of how it was made: from which 16-bit one, with which algorithm."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qllm import hub
from qllm.checkpoint.reader import LAYOUT_KEY, QUANTIZATION_KEY, is_packed, read_raw_config
from qllm.config import ModelConfig
from qllm.errors import UserError
from qllm.files import read_bytes
from qllm.gguf import is_gguf
from qllm.hub import ModelFolder
from qllm.models import read_config
from qllm.models.family import RawConfig
from qllm.progress import Note, silent
from qllm.text import surrogate

BASE_MODEL_KEY, ALGORITHM_KEY = "qllm_base_model", "qllm_algorithm"
KEYS = (BASE_MODEL_KEY, ALGORITHM_KEY)
# What the Hub's model cards say at their head, in YAML; a list of one is written in two ways.
CARD_BASE_MODEL = re.compile(r"^base_model:\s*(?:-\s+|\[\s*)?[\"']?([\w./-]+)", re.MULTILINE)
# Of these the method that config.json names is the algorithm, too.
METHODS = ("gptq", "awq")
LONGEST = 4096  # characters of what names a model, as of a path


def record(base_model: str | None, algorithms: Iterable[str]) -> dict[str, str]:
    """What config.json says of how a checkpoint was made.

    Args:
        base_model: finds the 16-bit checkpoint again, see `ModelFolder.origin`; None: nothing does.
        algorithms: of its linears; none of one that is not quantized.
    """
    known = isinstance(base_model, str) and surrogate(base_model) is None  # which JSON cannot say
    found = {BASE_MODEL_KEY: base_model if known else None}
    found[ALGORITHM_KEY] = "; ".join(sorted(set(algorithms))) or None
    return {key: value for key, value in found.items() if value is not None}


def base_model(folder: Path) -> str | None:
    """What a checkpoint's config.json, or the head of its model card, says it was made from."""
    found = read_raw_config(folder).values.get(BASE_MODEL_KEY)
    if found is None:
        try:
            card = read_bytes(folder / "README.md").decode("utf-8", "replace")
        except (FileNotFoundError, UserError):
            return None
        head = card.split("\n---", 1)[0] if card.startswith("---") else ""
        match = CARD_BASE_MODEL.search(head)
        found = match[1] if match else None
    return found if isinstance(found, str) and 0 < len(found) <= LONGEST else None


def algorithm(raw_config: RawConfig) -> str:
    """How the integers of a checkpoint were chosen, as far as config.json says, else ""."""
    found = raw_config.values.get(ALGORITHM_KEY)
    if isinstance(found, str):
        return found[:LONGEST]
    quantization = raw_config.values.get(QUANTIZATION_KEY)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if method in METHODS else ""


def find_reference(
    model: ModelFolder,
    reference: str | None = None,
    note: Note = silent,
    *,
    gguf: bool = False,
) -> ModelFolder:
    """The 16-bit checkpoint that a model is compared with.

    Args:
        reference: a folder, a bundled model or a repository, whatever the model records.
        note: called with a line on what the model was made from.
        gguf: it may be a GGUF file, which transformers does not run.

    Returns:
        the one it was made from where it records that, else the model itself.

    Raises:
        UserError: it cannot be found, or is none that transformers reads.
    """
    where, base = model.path, base_model(model.path) if reference is None else None
    if reference is not None:
        model = hub.find(reference, note=note)
    elif base is not None:
        try:
            model = hub.find(base, note=note)
        except (UserError, OSError) as error:
            raise UserError(
                f"{where} was made from {base}, which is not to be had here ({error}); name "
                "the 16-bit checkpoint with `reference`"
            ) from None
        if is_gguf(model.path) and not gguf:
            raise UserError(
                f"{where} was made from {base}, a GGUF file, which transformers does not run; name "
                "the 16-bit checkpoint with `reference`"
            )
        note(f"the reference is {base}, which {where} was made from")
    if not (gguf and is_gguf(model.path)):
        check_readable_by_transformers(read_raw_config(model.path))
    return model


def check_reference(reference: ModelFolder, model: ModelFolder, config: ModelConfig) -> None:
    """Refuse a reference that is another model than the one it is compared with.

    Args:
        config: of that model.

    Raises:
        UserError: they differ in family or size.
    """
    theirs = read_config(read_raw_config(reference.path))
    keys = ["family", "vocab_size", "hidden_size", "num_layers"]
    if is_gguf(reference.path) or is_gguf(model.path):
        keys.remove("family")  # llama.cpp has one name for Llama and Mistral
    for key in keys:
        found, wanted = getattr(theirs, key), getattr(config, key)
        if found != wanted:
            raise UserError(
                f"the reference {reference.name} of {model.name} is another model: its {key} is "
                f"{found}, not {wanted}; name another with `reference`"
            )


def auto_class(raw_config: RawConfig) -> Any:
    """transformers' class that loads a checkpoint as the model that writes text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if raw_config.outer is None else AutoModelForImageTextToText


def check_readable_by_transformers(raw_config: RawConfig) -> None:
    """Refuse the reference what it cannot read.

    Raises:
        UserError: for a checkpoint in QLLM's layout, a quantized one, or a GGUF file.
    """
    if is_gguf(Path(raw_config.where)):
        raise UserError(
            f"{raw_config.where}: the reference is a checkpoint in Hugging Face's layout, and this "
            "is a GGUF file; name the checkpoint it was made from (`reference`, or `model` of "
            "ref_gen.py)"
        )
    if is_packed(raw_config):
        raise UserError(
            f"{raw_config.where}: this checkpoint is quantized, the reference is the 16-bit one; "
            "name that, which it was made from (`reference`, or `model` of ref_gen.py)"
        )
    if LAYOUT_KEY in raw_config.values:
        raise UserError(
            f"{raw_config.where}: this checkpoint is in QLLM's layout, the reference reads "
            "Hugging Face's; name the one it was converted from (`reference`, or `model` of "
            "ref_gen.py)"
        )
