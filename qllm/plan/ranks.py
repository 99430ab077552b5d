"""Processes of this machine that work as ranks, started as torchrun would.

But each with threads of its own: devices may be unlike, and torchrun tells all of its processes the
same.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from qllm.errors import UserError

PATIENCE = 600.0  # seconds in which all have to be done
ROOT = Path(__file__).resolve().parents[2]


def run_ranks(module: str, told: Mapping[str, object], threads: Sequence[int], what: str) -> str:
    """Run a module in a process for each of `threads`.

    Args:
        module: its name; it reads its first argument as JSON.
        told: that argument.
        threads: of each process.
        what: they are, for an error.

    Returns:
        what the first one printed.

    Raises:
        UserError: a process failed.
    """
    command = [sys.executable, "-m", module, json.dumps(told)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    world: dict[str, object] = {"WORLD_SIZE": len(threads), "LOCAL_WORLD_SIZE": len(threads)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": path}
    # A torchrun that started this process keeps no store for these, and hears nothing of them.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
    with tempfile.TemporaryFile("w+") as said:
        processes: list[subprocess.Popen[str]] = []
        try:
            for rank, count in enumerate(threads):
                own = world | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": count}
                environment = outside | {key: str(value) for key, value in own.items()}
                out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
                processes.append(
                    subprocess.Popen(command, stdout=out, stderr=said, env=environment, text=True)
                )
            answer, _ = processes[0].communicate(timeout=PATIENCE)
            failed = any(process.wait(timeout=PATIENCE) for process in processes)
        except subprocess.TimeoutExpired:
            failed, answer = True, ""
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
        if failed:
            said.seek(0)
            lines = said.read().strip().splitlines() or ["they did not end in time"]
            raise UserError(f"{what} could not be run here: {lines[-1]}")
    return answer
