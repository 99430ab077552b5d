"""A checkpoint -> a folder with an ONNX model of it, its configuration and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from qllm.checkpoint.convert import SOURCE_KEY, copy_small_files, own_config
from qllm.checkpoint.gguf import packed_types
from qllm.checkpoint.gguf_parts import parts_of
from qllm.checkpoint.reader import LAYOUT_KEY, QUANTIZATION_KEY, Checkpoint
from qllm.checkpoint.weights import Weights
from qllm.checkpoint.writer import new_folder
from qllm.config import EMBEDDING
from qllm.errors import UserError
from qllm.folders import check_new
from qllm.gguf import is_gguf
from qllm.gguf.file import read_gguf
from qllm.onnx import DEFAULT_ACCURACY_LEVEL
from qllm.onnx.decoder import DecoderGraph
from qllm.onnx.graph import MODEL, DataFile, Graph, save
from qllm.onnx.nbits import BITS
from qllm.progress import Note, silent

DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class ExportOptions:
    """How a model is written.

    Attributes:
        dtype: of activations and of what is not quantized: "float32" or "float16".
        accuracy_level: what MatMulNBits may round activations to; see `qllm.onnx`.
    """

    dtype: str = "float32"
    accuracy_level: int = DEFAULT_ACCURACY_LEVEL


def export(
    source: Path,
    target: Path,
    options: ExportOptions | None = None,
    progress: Callable[[list], Iterable] = iter,
    note: Note = silent,
) -> int:
    """Write the ONNX model of a checkpoint, one tensor in memory at a time.

    Args:
        target: the folder to make; it appears when it is whole.
        note: called with a line on tensors that are not used.

    Returns:
        Bytes of the model.

    Raises:
        UserError: for a broken checkpoint, layers that onnxruntime has no operator for, or a
            target that is there.
    """
    options = options or ExportOptions()
    others = _without_operator(source)
    weights = Weights(Checkpoint(source, as_numbers=(*others, EMBEDDING)), note)
    if weights.config.experts is not None:
        raise UserError(
            f"{source} is a mixture of experts, which is not written as ONNX yet; qllm_gen.py "
            "runs it"
        )
    if weights.config.shapes:
        raise UserError(
            f"{source} is a {weights.config.family}, which has layers of unlike sizes and is not "
            "written as ONNX yet; qllm_gen.py runs it"
        )
    if weights.config.attention_gate:
        raise UserError(
            f"{source} has attention with gates, which is not written as ONNX yet; qllm_gen.py "
            "runs it"
        )
    kinds = ", ".join(sorted({*others.values(), *_with_offsets(weights)}))
    if kinds:
        note(f"layers of {kinds} are written as numbers: MatMulNBits holds none of that kind")
    check_new(target)
    with new_folder(target) as folder:
        data = DataFile(folder)
        builder = DecoderGraph(weights, Graph(data), DTYPES[options.dtype], options.accuracy_level)
        model = builder.build(progress)
        data.close()
        save(model, folder)
        values = own_config(weights.checkpoint.raw_config)
        gone = (QUANTIZATION_KEY, LAYOUT_KEY, SOURCE_KEY)
        config = {key: value for key, value in values.items() if key not in gone}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_small_files(source, folder)
    return sum(path.stat().st_size for path in target.glob(f"{MODEL}*"))


def _with_offsets(weights: Weights) -> set[str]:
    """The formats of linears that MatMulNBits cannot hold."""
    return {storage.name for storage in weights.stored.values() if storage.spec.scheme == "offset"}


def _without_operator(source: Path) -> dict[str, str]:
    """The linears of a GGUF file that MatMulNBits cannot hold, whose zero points are integers.

    Returns:
        the name of each one's type.
    """
    if not is_gguf(source):
        return {}
    types = packed_types(parts_of(read_gguf(source)), (EMBEDDING,))
    return {n: kind.name for n, kind in types.items() if kind.offset or kind.bits not in BITS}
