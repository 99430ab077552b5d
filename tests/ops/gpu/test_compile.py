"""The kernels compile for GPUs that are not here, into what was meant."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

# Of a compute capability: bytes of shared memory that a program may have, and what multiplies.
TARGETS = {80: (163 << 10, "HMMA", "IMMA"), 90: (227 << 10, "HGMMA", "IGMMA")}


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
@pytest.mark.parametrize("capability", TARGETS)
def test_kernels_fit_into_registers_and_use_the_matrix_units(capability, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tools.compile_gpu_kernels", str(capability)],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shared, floats, integers = TARGETS[capability]
    kernels = {found["kernel"]: found for found in map(json.loads, done.stdout.splitlines())}
    assert len(kernels) == 13
    for name, found in kernels.items():
        assert found["stack"] == 0, f"{name}: registers go to memory"
        assert found["shared"] <= shared, name
        if name.startswith(("packed", "dense")):
            assert floats in found["instructions"], name
        if name.startswith("int8"):
            assert integers in found["instructions"], name
