"""Experts lie in GGUF files in several ways: all are read, and what cannot be is one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import write_model
from gguf_models import FAMILIES

from qllm import LLM
from qllm.checkpoint.tensors import map_file
from qllm.errors import UserError
from qllm.gguf.file import read_gguf
from qllm.gguf.write import Planned, write_gguf

PROMPT = [[5, 17, 200, 3, 88, 42]]


def rewritten(path: Path, target: Path, change: Callable[[dict], None]) -> Path:
    """A file with other tensors: name to shape, type and bytes."""
    found = read_gguf(path)
    tensors = {
        name: (t.shape, t.type, map_file(t.path)[t.offset : t.offset + t.nbytes].clone())
        for name, t in found.tensors.items()
    }
    change(tensors)
    planned = {name: Planned(shape, kind) for name, (shape, kind, _) in tensors.items()}
    write_gguf(target, found.metadata, planned, (data for _, _, data in tensors.values()))
    return target


def apart(tensors: dict) -> None:
    """Each expert's matrices are tensors, as in the first files of Mixtral."""
    for name in [name for name in tensors if "_exps." in name]:
        shape, kind, data = tensors.pop(name)
        for expert, part in enumerate(data.chunk(shape[0])):
            tensors[name.replace("_exps.", f".{expert}.")] = (shape[1:], kind, part)


def fused(tensors: dict) -> None:
    """Gate and up are one matrix of each expert, as in llama.cpp's newest files."""
    for name in [name for name in tensors if "ffn_gate_exps." in name]:
        (count, rows, columns), kind, gate = tensors.pop(name)
        _, _, up = tensors.pop(name.replace("gate", "up"))
        both = torch.cat([gate.view(count, -1), up.view(count, -1)], dim=1).flatten()
        tensors[name.replace("gate", "gate_up")] = ((count, 2 * rows, columns), kind, both)


@pytest.mark.parametrize("change", [apart, fused])
def test_experts_lie_in_a_file_in_several_ways(tmp_path, change):
    path = write_model(tmp_path / "model.gguf", FAMILIES["mixtral"](), "Q5_0")
    other = rewritten(path, tmp_path / "other.gguf", change)
    (want,), (found,) = (
        LLM.from_pretrained(each, dtype="float32").logits(PROMPT) for each in (path, other)
    )
    assert torch.equal(found, want)


def flat(tensors: dict) -> None:
    name = "blk.1.ffn_down_exps.weight"
    (count, rows, columns), kind, data = tensors[name]
    tensors[name] = ((count * rows, columns), kind, data)


def fewer(tensors: dict) -> None:
    name = "blk.1.ffn_down_exps.weight"
    (count, *shape), kind, data = tensors[name]
    tensors[name] = ((count - 1, *shape), kind, data[: len(data) // count * (count - 1)])


def twice(tensors: dict) -> None:
    shape, kind, data = tensors["blk.1.ffn_up_exps.weight"]
    tensors["blk.1.ffn_up.0.weight"] = (shape[1:], kind, data[: len(data) // shape[0]])


WRONG_EXPERTS = {
    flat: r"ffn_down_exps\.weight has the shape \[256, 96\]; it is to have a matrix for each of",
    fewer: r"lacks layers\.1\.mlp\.experts\.3\.down\.",
    twice: "and another tensor are the same part",
}


@pytest.mark.parametrize("change", WRONG_EXPERTS)
def test_experts_that_cannot_be_are_one_line(tmp_path, change):
    path = write_model(tmp_path / "model.gguf", FAMILIES["mixtral"](), "Q5_0")
    other = rewritten(path, tmp_path / "other.gguf", change)
    with pytest.raises(UserError, match=WRONG_EXPERTS[change]):
        LLM.from_pretrained(other)
