"""What was compiled for a GPU, and that its self-tests passed: kept for the next process.

It lies in `QLLM_CACHE`, like the CPU's kernels, under a hash of all that it depends on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from qllm import folders
from qllm.temporary import Temporary

DIGEST_BYTES = hashlib.sha256().digest_size
PACKAGE = Path(__file__).parents[2]
# What self-tests depend on: the kernels, those that call them, and what they are compared with.
SOURCES = ("ops", "quant/packing.py")
DRIVER = Path("/proc/driver/nvidia/version")


def key_of(*facts: object) -> str:
    """A hash of what something depends on, for its name."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def read(name: str) -> bytes | None:
    """What was written under a name; None where nothing was, or it was cut short."""
    for folder in folders.search_path(folders.CACHE):
        with suppress(OSError):
            folders.check_private(folder)
            content = (folder / name).read_bytes()
            made, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
            if hashlib.sha256(made).digest() == digest:
                return made
    return None


def write(name: str, made: bytes) -> None:
    """Keep something under a name, in the first folder that takes it."""
    for folder in folders.search_path(folders.CACHE):
        with suppress(OSError):
            folders.make(folder)
            folders.check_private(folder)
            temporary = Temporary(folder / name)
            try:
                temporary.path.write_bytes(made + hashlib.sha256(made).digest())
                temporary.path.replace(folder / name)
            finally:
                temporary.remove()
                temporary.close()
            return


def test_name(name: str, device: torch.device) -> str:
    """Under which it is kept that a self-test has passed.

    It names the GPU and its driver, the compilers, and this package's own sources.
    """
    return f"gpu-passed-{key_of(name, *_about(device), *_compilers())}"


def _about(device: torch.device) -> tuple[object, ...]:
    properties = torch.cuda.get_device_properties(device)
    return (properties.name, str(getattr(properties, "uuid", "")), properties.multi_processor_count)


@cache
def _compilers() -> tuple[object, ...]:
    driver = ""
    with suppress(OSError):
        driver = DRIVER.read_text(encoding="utf-8", errors="replace")
    return (driver, torch.__version__, torch.version.cuda, _triton(), sources())


def _triton() -> str:
    """The version of Triton, which is not imported for it."""
    for name in ("triton", "pytorch-triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


@cache
def sources() -> str:
    """A hash of the sources of self-tests and of what they test."""
    digest = hashlib.sha256()
    for place in SOURCES:
        root = PACKAGE / place
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.suffix in (".py", ".cu", ".h", ".json"):
                digest.update(path.read_bytes())
    return digest.hexdigest()
