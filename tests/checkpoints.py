"""Copies of the bundled models in every form a checkpoint may have, whole and broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4665d5b0a5e0a2a1b0a4e7c3a4b0a5e0a2a1b0a4e7c3a4b0a5e0a2a1b0a4e7c3\n"
    b"size 250540281\n"
)


def state_of(family: str) -> dict[str, Tensor]:
    """The tensors of a bundled model."""
    return load_file(tiny(family) / "model.safetensors")


def copy_of(family: str, folder: Path, *, weights: bool = True, **config: object) -> Path:
    """A copy of a bundled model, with changes to its config.json; its weights are a link."""
    folder.mkdir(parents=True)
    for path in tiny(family).iterdir():
        if path.name == "model.safetensors":
            if weights:
                (folder / path.name).symlink_to(path)
        else:
            shutil.copyfile(path, folder / path.name)
    if config:
        change_json(folder / "config.json", **config)
    return folder


def change_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def whole_safetensors(folder: Path, state: dict[str, Tensor]) -> None:
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def whole_bin(folder: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def legacy_bin(folder: Path, state: dict[str, Tensor]) -> None:
    """The format of torch before 1.6: pickles one after the other, no zip archive."""
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def sharded(stem: str, ending: str, save: Callable) -> Callable[[Path, dict[str, Tensor]], None]:
    """A writer of three shards and their index."""

    def write(folder: Path, state: dict[str, Tensor]) -> None:
        names, weight_map = list(state), {}
        third = -(-len(names) // 3)
        for shard in range(3):
            file = f"{stem}-{shard + 1:05}-of-00003.{ending}"
            part = {name: state[name] for name in names[shard * third : (shard + 1) * third]}
            save(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))

    return write


FORMS: dict[str, Callable[[Path, dict[str, Tensor]], None]] = {
    "safetensors": whole_safetensors,
    "safetensors-sharded": sharded("model", "safetensors", save_file),
    "bin": whole_bin,
    "bin-legacy": legacy_bin,
    "bin-sharded": sharded("pytorch_model", "bin", torch.save),
}


def rewritten(family: str, folder: Path, form: str, state: dict[str, Tensor] | None = None) -> Path:
    """A bundled model in one of FORMS, with other tensors where they are given."""
    copy_of(family, folder, weights=False)
    FORMS[form](folder, state_of(family) if state is None else state)
    return folder
