"""From a process's start to its first token: with nothing compiled, once more, and transformers'.

Compiled kernels and what self-tests found are kept in folders of their own, which are empty first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ("--model-name", "llama", "--model-size", "tiny", "--dtype", "bfloat16")
ONE = ("--max-gen-tokens", "1", "--json")
OURS = ("qllm_gen.py", *MODEL, "--bitwidth", "4", *ONE)
RUNS = (
    ("qllm 4, nothing compiled", OURS),
    ("qllm 4, again", OURS),
    ("transformers", ("ref_gen.py", *MODEL, *ONE)),
)


def measure(device: str) -> Iterator[dict[str, object]]:
    """Seconds of each of RUNS."""
    with tempfile.TemporaryDirectory() as folder:
        kept = {name: str(Path(folder) / name) for name in ("QLLM_CACHE", "TRITON_CACHE_DIR")}
        for name, command in RUNS:
            begin = time.perf_counter()
            run([*command, "--device", device], kept)
            yield {"name": name, "seconds": time.perf_counter() - begin}


def run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a script to its end.

    Raises:
        RuntimeError: it fails, with what it says last.
    """
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise RuntimeError(f"{command[0]}: {said[-1]}")
