"""What `interpreter.make_quicker` makes of Triton's interpreter finds what that finds as it is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import processes
import pytest
import torch
from conftest import ROOT
from cpu_paths import DTYPES, normal, random_weight
from gpu_kernels import multiply, packed

from qllm.ops.gpu import layout, rows

TESTS = Path(__file__).parents[2]
# `conftest` makes the interpreter quicker, unless there is nothing that does.
AS_IT_IS = f"""
import os, sys, types
os.environ["TRITON_INTERPRET"] = "1"
sys.modules["interpreter"] = types.SimpleNamespace(make_quicker=lambda: None)
sys.path[:0] = {[str(ROOT), str(TESTS), str(Path(__file__).parent)]}
import test_interpreter
from triton.language import core
assert core.tensor.__init__.__module__ == core.__name__
print(test_interpreter.found())
"""


def found() -> str:
    """A digest of what kernels find: products, rows that are looked up, and norms of rows.

    Numbers of all types, broadcasts, masks, reductions and loops are among them.
    """
    digest = hashlib.sha256()
    for i, dtype in enumerate(DTYPES):
        weight = random_weight((20, 70), (3, 4, 8)[i], (-1, 32, 16)[i], "asym")
        x, bias = normal(3, 70, dtype=dtype), normal(20, dtype=dtype)
        shape = (weight.request.bits, weight.request.group_size, 70)
        looked_up = layout.look_up(
            torch.tensor([3, 0, 19]), packed(weight, "cpu"), *shape, 20, dtype
        )
        normalized = rows.rms_norm(x, normal(70, dtype=dtype), 1e-5)
        for tensor in (multiply(weight, x, bias, "cpu"), looked_up, normalized):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")
def test_what_takes_less_time_finds_the_same(gpu):
    done = processes.run(["-c", AS_IT_IS], os.environ.copy())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [found()]
