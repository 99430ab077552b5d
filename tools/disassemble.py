"""What a GPU's binary holds, by the tools that Triton brings, which this does not import."""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
from pathlib import Path


def disassemble(cubin: bytes) -> tuple[str, str]:
    """What a kernel takes, and its instructions."""
    (folder,) = importlib.util.find_spec("triton").submodule_search_locations
    tools = Path(folder) / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ((tools / "cuobjdump", "-res-usage"), (tools / "nvdisasm", "-c"))
        texts = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in commands
        )
        usage, code = texts
        return usage, code
