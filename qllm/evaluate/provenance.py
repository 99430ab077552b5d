"""What two runs have to have in common for their figures to be comparable."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qllm import __version__, tokenizer
from qllm.checkpoint.reader import weight_files
from qllm.files import open_file
from qllm.gguf import is_gguf

PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy"),
    "onnxruntime",
)


def of_text(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def of_files(paths: Iterable[Path]) -> str:
    """SHA-256 of files: of their names and contents, in the order of their names."""
    whole = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with open_file(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name}\0{digest}\n".encode())
    return whole.hexdigest()


def of_model(folder: Path) -> str:
    """Of a checkpoint: its configuration and all of its weights."""
    return of_files([*([] if is_gguf(folder) else [folder / "config.json"]), *weight_files(folder)])


def of_tokenizer(folder: Path) -> str:
    """Of the files that a tokenizer is made from."""
    if is_gguf(folder):
        return of_files([folder])
    return of_files(path for name in tokenizer.FILES if (path := folder / name).exists())


def versions() -> dict[str, str]:
    """Of QLLM, of Python, and of what is installed of the packages it stands on."""
    found = {"qllm": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What computes."""
    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def cpu_name() -> str:
    """What the processor calls itself, else its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(\S.*?)\s*$", text, re.MULTILINE)
    return found[1] if found else platform.machine()
