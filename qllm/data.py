"""Text for calibration and evaluation: files, and the data sets people name."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qllm.errors import UserError, first_line
from qllm.files import parse_json
from qllm.text import read_text, surrogate

JSON_LINES = (".jsonl", ".json")
# What calibration takes where nothing is named.
DATASET, SAMPLES, TOKENS = "wikitext2", 128, 2048


@dataclass(frozen=True)
class CalibrationText:
    """The text that a model is calibrated on; what is None is at its default.

    Attributes:
        dataset: a text or JSON-lines file, or one of DATASETS. None: DATASET where a layer cannot
            do without calibration, and else no text.
        samples, tokens: how many windows of it, and how long each is.
        seed: decides where they begin.
    """

    dataset: str | None = None
    samples: int | None = None
    tokens: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class HubDataset:
    """Where a named data set is on the Hub.

    Attributes:
        separator: joins the rows into one text, as the published perplexities do.
        judged: rows that are taken to judge by, from the first on; None is all of them.
    """

    repository: str
    config: str | None
    column: str
    separator: str
    splits: tuple[str, str]
    files: dict[str, str] | None = None
    judged: int | None = None


C4_FILES = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}
DATASETS = {
    "wikitext2": HubDataset(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "text", "\n\n", ("train", "test")
    ),
    "c4": HubDataset("allenai/c4", None, "text", " ", ("train", "validation"), C4_FILES, 1100),
    "ptb": HubDataset("ptb-text-only/ptb_text_only", None, "sentence", " ", ("train", "test")),
    "pile-10k": HubDataset("NeelNanda/pile-10k", None, "text", "\n\n", ("train", "train")),
}
TASKS = {
    "lambada_openai": HubDataset(
        "EleutherAI/lambada_openai", "default", "text", "\n\n", ("test", "test")
    ),
}


def load_text(name: str, split: str = "calibration") -> str:
    """The text of a file (plain, or JSON lines with "text"), or of a data set by name.

    Args:
        split: "calibration" or "evaluation", which take different parts of a named data set.

    Raises:
        UserError: for a name that is neither, and a file without text.
    """
    path = Path(name)
    if path.is_file():
        text = _read_file(path)
    elif name in DATASETS:
        dataset = DATASETS[name]
        text = dataset.separator.join(_read_hub("`dataset`", name, dataset, split))
    else:
        raise UserError(f"`dataset` {name!r} is neither a file nor one of {', '.join(DATASETS)}")
    if not text.strip():
        raise UserError(f"`dataset` {name}: there is no text in it")
    return text


def load_rows(name: str) -> list[str]:
    """The rows of a task: of a JSON-lines file with "text", or of a data set by name.

    Raises:
        UserError: for a name that is neither, and a file without rows.
    """
    path = Path(name)
    if path.is_file():
        rows = json_rows(path, read_text(path))
    elif name in TASKS:
        rows = _read_hub("`tasks`", name, TASKS[name], "evaluation")
    else:
        raise UserError(
            f"`tasks` {name!r} is neither a file nor one of {', '.join(TASKS)}; tasks of "
            f"lm-evaluation-harness (pip install lm_eval) run with python3 -m qllm.harness --tasks "
            f"{name}"
        )
    if not rows:
        raise UserError(f"`tasks` {name}: there are no rows in it")
    return rows


def _read_file(path: Path) -> str:
    text = read_text(path)
    return "\n\n".join(json_rows(path, text)) if path.suffix in JSON_LINES else text


def json_rows(path: Path, text: str, keys: Sequence[str] = ("text",)) -> list[str]:
    """What the objects of a JSON-lines file hold at the first of some keys that they have.

    Raises:
        UserError: for a line that holds none, or no Unicode.
    """
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = parse_json(line, "it")
            row = found[next(key for key in keys if key in found)]
        except (UserError, StopIteration, TypeError):
            row = None
        if not isinstance(row, str):
            raise UserError(
                f'{path}: each line of a JSON-lines file is {{"{keys[0]}": "…"}}; line {number} '
                "is not"
            )
        if (half := surrogate(row)) is not None:
            raise UserError(f"{path}: line {number} holds {half}, half a surrogate pair")
        rows.append(row)
    return rows


def _read_hub(option: str, name: str, dataset: HubDataset, split: str) -> list[str]:
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants

    part = dataset.splits[split == "evaluation"]
    files = {part: dataset.files[part]} if dataset.files else None
    is_offline = constants.HF_HUB_OFFLINE
    reason = "HF_HUB_OFFLINE is set"
    try:
        if not is_offline:
            try:
                HfApi().dataset_info(dataset.repository, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except Exception as error:  # the Hub's clients raise whatever their transport does
                # Out of reach, load_dataset asks again for half a minute before its cache.
                constants.HF_HUB_OFFLINE = True
                reason = first_line(error)
        rows = load_dataset(dataset.repository, dataset.config, data_files=files, split=part)
        return rows[dataset.column][: dataset.judged if split == "evaluation" else None]
    except Exception as error:  # and datasets whatever its readers do
        reason = reason if constants.HF_HUB_OFFLINE else first_line(error)
        raise UserError(f"{option} {name}: cannot be had ({reason}); give a file instead") from None
    finally:
        constants.HF_HUB_OFFLINE = is_offline  # a model may still be asked for


def sample_windows(ids: list[int], count: int, length: int, seed: int) -> list[list[int]]:
    """Draw `count` runs of `length` consecutive tokens.

    Raises:
        UserError: for a text that is shorter than one.
    """
    if len(ids) < length:
        raise UserError(
            f"the text has {len(ids)} tokens, one sample takes {length}; "
            "give a longer text or a lower `CalibrationText.tokens`"
        )
    draw = random.Random(seed)
    starts = [draw.randint(0, len(ids) - length) for _ in range(count)]
    return [ids[start : start + length] for start in starts]
