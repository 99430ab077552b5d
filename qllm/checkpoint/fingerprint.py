"""Whether a folder holds the checkpoint it held before, or another one the same, unread."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qllm.checkpoint.reader import read_raw_config, weight_files
from qllm.files import open_file, read_bytes
from qllm.gguf import is_gguf

PIECES, PIECE = 64, 4096  # of each file: how many samples are taken, and bytes of each


def state_fingerprint(folder: Path) -> str:
    """What tells one state of a folder from another: config.json, and files' sizes and times."""
    config = b"" if is_gguf(folder) else read_bytes(folder / "config.json")
    digest = hashlib.sha256(config)
    for path in weight_files(folder):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def content_fingerprint(folder: Path) -> str:
    """What two machines compare: config.json, and the sizes and samples of the weights' files."""
    config = json.dumps(dict(read_raw_config(folder).values), sort_keys=True)
    digest = hashlib.sha256(config.encode())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open_file(path) as file:
            for piece in range(PIECES):
                file.seek(size * piece // PIECES)
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]
