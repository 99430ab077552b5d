"""The kernels compile for GPUs that are not here, into what was meant."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os

import processes
import pytest
from conftest import ROOT

# Of a compute capability: bytes of shared memory that a program may have, what multiplies, and how
# many kernels there are.
TARGETS = {
    80: (163 << 10, "HMMA", "IMMA", 47),
    90: (227 << 10, "HGMMA", "IGMMA", 57),
    120: (99 << 10, "HMMA", "IMMA", 57),
}
# Instructions that do not round as IEEE 754 says, or not after each step, by the beginnings of the
# names of kernels that may have them. No other may: those meet the reference to the bit, in their
# integers, or in weights that are rounded, in which few rows of a prompt meet many.
MAY = {
    # A group's sum is scaled and added: the bound is on the error, which this makes smaller.
    "packed": {"fma.rn.f32"},
    # Two products and their sum, which are rounded to 16 bits behind it.
    "writing heads": {"fma.rn.f32"},
    # What remains of a division, exactly.
    "long rows": {"fma.rn.f32"},
    # Exponentials and means, off by two last digits of float32, where 16 bits are kept.
    "attention": {"fma.rn.f32", "ex2.approx.ftz.f32", "ex2.approx.f32", "div.full.f32"},
    "activation": {"fma.rn.f32", "ex2.approx.f32"},
    "float32": {"fma.rn.f32", "ex2.approx.ftz.f32", "ex2.approx.f32", "div.full.f32"},
}
# Bytes of registers that may go to memory: of a version of Triton, a compute capability and a
# kernel.
MAY_SPILL = {
    ("3.6", 90, "packed-3, 256 rows"): 32,
    ("3.6", 90, "float32, attention, heads of 256"): 24,
}
# Kernels of each kind: products of bits and of integers, attention, norms.
SOME = (
    *("packed-3, 16", "int8, 16", "layer norm", "attention of prefill", "activation"),
    *("prompts-4, 256", "prompts, 256", "attention, heads of 64, keys and values of 8"),
    *("attention to runs", "float32", "descent"),
)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
@pytest.mark.parametrize(
    ("capability", "names"),
    [(90, SOME), *(pytest.param(target, (), marks=pytest.mark.slow) for target in TARGETS)],
    ids=str,
)
def test_kernels_fit_into_registers_use_the_matrix_units_and_round_as_they_should(
    capability, names
):
    # Triton's own cache, named after all that goes into a kernel, keeps what has not changed.
    program = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from tools import compile_gpu_kernels"
    program += "; compile_gpu_kernels.main()"
    done = processes.run(["-c", program, str(capability), *names], env=os.environ.copy())
    assert done.returncode == 0, done.stderr
    shared, floats, integers, count = TARGETS[capability]
    kernels = {found["kernel"]: found for found in map(json.loads, done.stdout.splitlines())}
    # Of activations there are two, and in float32 eight.
    assert len(kernels) == (len(names) + 8 if names else count)
    version = ".".join(importlib.metadata.version("triton").split(".")[:2])
    for name, found in kernels.items():
        spilled = MAY_SPILL.get((version, capability, name), 0)
        assert found["stack"] <= spilled, f"{name}: registers go to memory"
        assert found["shared"] <= shared, name
        if name.startswith(("packed", "offsets", "dense", "prompts")):
            assert floats in found["instructions"], name
        if name.startswith("int8"):
            assert integers in found["instructions"], name
        (allowed,) = [may for start, may in MAY.items() if name.startswith(start)] or [set()]
        assert set(found["inexact"]) <= allowed, name
        if "to int8" in name or name.startswith(("long rows", "quantizing")):
            add, less = found["nearest"]  # of int8, the lowest byte is what is taken
            assert add > 0 and less == (add if name.startswith("quantizing") else 0), name
        if name == "descent":
            assert found["nearest"][0] == found["nearest"][1] > 0
        if found["waits"]:  # for what the kernel in front writes
            assert capability >= 90 and found["before"] == 0, name
        if "norm" in name or name.startswith(("activation", "attention, heads")):
            assert found["waits"] == (capability >= 90), name
        if name.startswith(("attention of", "attention in", "attention to")) and capability == 90:
            assert "UTMALDG" in found["instructions"] and not found["one_by_one"], name
        if name.startswith("prompts, "):
            assert "UTMALDG" in found["instructions"], name
        if name.startswith("prompts-") and capability == 90:
            # A weight goes from registers to the matrix units; what is stored is the result.
            assert found["of_registers"] == 8 and found["stores"] <= 8, name
