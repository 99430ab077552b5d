"""GGUF, llama.cpp's format: files, types of blocks, configuration and tokenizer.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What a checkpoint makes of it is in
`qllm.checkpoint.gguf`.
"""

from __future__ import annotations

from pathlib import Path

SUFFIX = ".gguf"


def is_gguf(path: Path) -> bool:
    """Whether a model's path is that of a GGUF file."""
    return path.suffix == SUFFIX and not path.is_dir()
