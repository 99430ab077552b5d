"""The kernels compile for GPUs that are not here, into what was meant."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

# Of a compute capability: bytes of shared memory that a program may have, and what multiplies.
TARGETS = {80: (163 << 10, "HMMA", "IMMA"), 90: (227 << 10, "HGMMA", "IGMMA")}
# Kernels of each kind: products of bits and of integers, attention, norms.
SOME = (
    *("packed-3", "int8", "layer norm", "attention of prefill"),
    "attention, heads of 64, keys and values of 8",
    "prefill attention, keys and values of 4 bits, 2",
)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
@pytest.mark.parametrize(
    ("capability", "names", "count"),
    [
        (90, SOME, 8),
        *(pytest.param(target, (), 33, marks=pytest.mark.slow) for target in TARGETS),
    ],
    ids=str,
)
def test_kernels_fit_into_registers_use_the_matrix_units_and_round_as_they_should(
    capability, names, count
):
    # Triton's own cache, named after all that goes into a kernel, keeps what has not changed.
    done = subprocess.run(
        [sys.executable, "-m", "tools.compile_gpu_kernels", str(capability), *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shared, floats, integers = TARGETS[capability]
    kernels = {found["kernel"]: found for found in map(json.loads, done.stdout.splitlines())}
    assert len(kernels) == count
    for name, found in kernels.items():
        assert found["stack"] == 0, f"{name}: registers go to memory"
        assert found["shared"] <= shared, name
        if name.startswith(("packed", "dense")):
            assert floats in found["instructions"], name
        if name.startswith("int8"):
            assert integers in found["instructions"], name
        if "int8" in name or name.startswith(
            "quantizing"
        ):  # which the reference is to be met in, to the bit
            assert found["inexact"] == [], name
        elif name.startswith(("packed", "dense")):
            assert set(found["inexact"]) <= {"fma.rn.f32"}, name
        else:  # attention's exponentials and means are off by two last digits of float32 at most
            assert set(found["inexact"]) <= {"fma.rn.f32", "ex2.approx.f32", "div.full.f32"}, name
