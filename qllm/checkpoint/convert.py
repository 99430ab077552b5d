"""A Hugging Face checkpoint -> QLLM's layout: fused, in one safetensors file, mappable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qllm import folders
from qllm.checkpoint.fingerprint import state_fingerprint
from qllm.checkpoint.origin import record
from qllm.checkpoint.reader import (
    LAYOUT,
    LAYOUT_KEY,
    QUANTIZATION_KEY,
    Checkpoint,
    is_packed,
    read_json,
    read_raw_config,
)
from qllm.checkpoint.tensors import TensorInfo
from qllm.checkpoint.weights import Weights, config_dtype
from qllm.checkpoint.writer import SafetensorsWriter, new_folder
from qllm.errors import UserError
from qllm.files import copy_file
from qllm.gguf import is_gguf
from qllm.gguf.tokenizer import tokenizer_files
from qllm.hub import TEMPLATES, ModelFolder
from qllm.models.family import RawConfig
from qllm.progress import Meter, Note, silent, unseen

SOURCE_KEY = "qllm_source"
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def stored_name(model: ModelFolder) -> str:
    """What the converted copy of a model is called in QLLM's own folder (`qllm.folders`)."""
    return f"converted/{model.key}"


def find_source(model: ModelFolder, note: Note) -> Path:
    """The folder to load a model from: its converted copy, where there is one of its present state.

    Args:
        note: called with a line that says which it is.
    """
    raw_config = read_raw_config(model.path)
    if LAYOUT_KEY in raw_config.values or is_packed(raw_config):
        return model.path
    copy = folders.find(stored_name(model))
    if copy is None or not (copy / "config.json").exists():
        note("converting the checkpoint on the fly; weight_convert.py keeps a converted copy")
        return model.path
    state = read_json(copy / "config.json")
    if (state.get(LAYOUT_KEY), state.get(SOURCE_KEY)) != (LAYOUT, state_fingerprint(model.path)):
        note(f"{copy} is of an older state of {model.name}; converting on the fly instead")
        return model.path
    note(f"reading the converted copy {copy}")
    return copy


def small_files(source: Path) -> list[str]:
    """The names of what stands beside a checkpoint's weights, but for config.json."""
    templates = sorted(f"{path.parent.name}/{path.name}" for path in source.glob(TEMPLATES))
    return [name for name in (*COPIED, *templates) if (source / name).exists()]


def copy_small_files(source: Path, folder: Path) -> None:
    """Copy what stands beside a checkpoint's weights; of a GGUF file, write its tokenizer."""
    if is_gguf(source):
        for name, text in tokenizer_files(source).items():
            (folder / name).write_text(text, encoding="utf-8")
        return
    for name in small_files(source):
        (folder / name).parent.mkdir(exist_ok=True)
        copy_file(source / name, folder / name)


def own_config(raw_config: RawConfig) -> dict[str, Any]:
    """The config.json of a model of its own, where the one it is made of may be part of more."""
    config = dict(raw_config.values)
    if raw_config.outer is not None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
    return config


def convert(
    model: ModelFolder,
    target: Path,
    *,
    overwrite: bool,
    meter: Meter = unseen,
    note: Note = silent,
) -> int:
    """Write a checkpoint in QLLM's layout, one tensor in memory at a time.

    Args:
        target: the folder to make; it appears when it is whole.
        overwrite: replace a folder that is there.
        meter: counts the bytes of the weights.
        note: called with a line on tensors that are not used.

    Returns:
        Bytes of the weights.

    Raises:
        UserError: for a broken checkpoint, one that is converted already, or a target that is
            there.
    """
    if is_gguf(model.path):
        raise UserError(f"{model.path} is a GGUF file, which is mapped as it is: run it")
    dtype = config_dtype(read_raw_config(model.path)) or torch.float32
    weights = Weights(Checkpoint(model.path, dtype=dtype), note)
    if weights.stored:
        raise UserError(f"{model.path} is quantized; conversion takes 16-bit checkpoints")
    if weights.converted:
        raise UserError(f"{model.path} is in QLLM's layout already")
    if not overwrite:
        folders.check_new(target)
    tensors = {
        name: TensorInfo(shape, weights.dtype(name)) for name, shape in weights.shapes.items()
    }
    config = own_config(weights.checkpoint.raw_config)
    config.pop(QUANTIZATION_KEY, None)  # of small floats, which are numbers now
    config |= {
        LAYOUT_KEY: LAYOUT,
        SOURCE_KEY: state_fingerprint(model.path),
        **record(model.origin, ()),
        "tie_word_embeddings": weights.config.tied_head,
    }
    sizes = [i.dtype.itemsize * torch.Size(i.shape).numel() for i in tensors.values()]
    folders.check_free_space(target, sum(sizes))
    with new_folder(target) as folder, meter(sum(sizes), 0) as add:
        writer = SafetensorsWriter(folder / "model.safetensors", tensors, {"format": "pt"})
        for name, size in zip(tensors, sizes, strict=True):
            writer.write(name, weights.read(name))
            add(size)
        writer.close()
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_small_files(model.path, folder)
    return (target / "model.safetensors").stat().st_size
