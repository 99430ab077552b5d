"""Whether two folders hold the same checkpoint, told without reading all of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qllm.checkpoint.reader import read_raw_config, weight_files
from qllm.files import open_file

PIECES, PIECE = 64, 4096  # of each file: how many places are looked at, and bytes of each


def fingerprint(folder: Path) -> str:
    """A digest of config.json, and of the sizes and samples of the weights' files."""
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
