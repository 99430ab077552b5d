"""Fetch the texts that the documentation's commands name: WikiText-2 (raw) and LAMBADA.

    python3 -m tools.fetch_texts --save .

Writes wiki.valid.raw, wiki.test.raw and lambada_test.jsonl, which come from the Hugging Face Hub:
the texts that published perplexities, and lm-evaluation-harness's lambada_openai, are about.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qllm import cli
from qllm.data import DATASETS, TASKS, HubDataset
from qllm.errors import UserError, first_line


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--save", type=Path, default=Path(), metavar="DIR", help="(.)")
    return parser.parse_args()


def rows(dataset: HubDataset, split: str) -> list[str]:
    """A part of a data set, in its order.

    Raises:
        UserError: where it cannot be had.
    """
    from datasets import load_dataset

    try:
        return load_dataset(dataset.repository, dataset.config, split=split)[dataset.column]
    except Exception as error:  # the Hub's clients raise whatever their transport does
        raise UserError(f"{dataset.repository} cannot be had ({first_line(error)})") from None


def main() -> None:
    args = parse_args()
    args.save.mkdir(parents=True, exist_ok=True)
    wikitext, lambada = DATASETS["wikitext2"], TASKS["lambada_openai"]
    texts = {
        # Each row ends with its own line break, so that the rows in a row are the original file.
        "wiki.valid.raw": "".join(rows(wikitext, "validation")),
        "wiki.test.raw": "".join(rows(wikitext, "test")),
        "lambada_test.jsonl": "".join(
            json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows(lambada, "test")
        ),
    }
    for name, text in texts.items():
        (args.save / name).write_text(text, encoding="utf-8")
        print(args.save / name)


if __name__ == "__main__":
    cli.run(main)
