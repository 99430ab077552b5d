"""Matrices of small floats: any rows are those of the whole, and broken ones are refused."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from foreign import folder_of
from foreign_floats import CASES, bitsandbytes, fp4, fp8, mlx_floats
from hypothesis import given
from hypothesis import strategies as st
from oracle import draw_prompts, load

from qllm.checkpoint.convert import convert
from qllm.checkpoint.formats.bitsandbytes import find_four_bits
from qllm.checkpoint.formats.floats import find_floats, find_mlx_floats, find_unscaled
from qllm.checkpoint.reader import Checkpoint
from qllm.checkpoint.tensors import TensorInfo
from qllm.config import QuantPlan
from qllm.errors import UserError
from qllm.hub import ModelFolder
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job

ROWS, COLUMNS = 72, 96
KINDS = {
    "FP8 in blocks": (fp8((40, 24)), partial(find_floats, block=(40, 24))),
    "FP8 in blocks of as many as there are": (fp8((24, 32), "weight_scale"), find_floats),
    "FP8 per row": (fp8((1, 0), shape=lambda rows, columns: (rows,)), find_floats),
    "FP8, one scale": (fp8((0, 0), shape=lambda rows, columns: ()), find_floats),
    "FP8, a row of scales": (fp8((0, 32)), find_floats),
    "MXFP8": (fp8((1, 32), powers=True), find_floats),
    "FP8 alone": (fp8(None), find_unscaled),
    "NVFP4": (fp4("weight_packed", "weight_global_scale", 16), find_floats),
    "MXFP4": (fp4("weight_packed", None, 32), find_floats),
    "MLX": (mlx_floats("nvfp4"), find_mlx_floats),
    "NF4": (bitsandbytes(blocksize=64), find_four_bits),
    "NF4, scales of 8 bits": (bitsandbytes(nested=True, blocksize=128), find_four_bits),
    "NF4 in float32": (bitsandbytes(storage=torch.float32, blocksize=256), find_four_bits),
}


def found_in(tensors, find):
    """The matrix that is found in tensors, and how they are read."""
    infos = {f"a.{key}": TensorInfo(tuple(t.shape), t.dtype) for key, t in tensors.items()}

    def read(name, rows):
        tensor = tensors[name.removeprefix("a.")]
        return tensor if rows is None else tensor[rows.start : rows.stop]

    return find(infos, read)["a.weight"], read


@pytest.mark.parametrize("kind", KINDS)
@given(run=st.lists(st.integers(0, ROWS), min_size=2, max_size=2, unique=True).map(sorted))
def test_rows_are_those_of_the_whole(kind, run):
    write, find = KINDS[kind]
    tensors, weight = write(ROWS, COLUMNS, np.random.default_rng(3))
    matrix, read = found_in(tensors, find)
    assert matrix.shape == (ROWS, COLUMNS)
    found = matrix.read(read, range(*run))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), weight[slice(*run)], rtol=3e-7, atol=0)


def state_with(**changes):
    """A change of the settings of 4 bits, which are JSON in a tensor."""

    def change(tensors):
        key = "weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[key].tolist())) | changes
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def put(key, value):
    return lambda tensors: tensors.update({key: value})


NF4, NESTED = "NF4", "NF4, scales of 8 bits"
BROKEN = [
    ("FP8 per row", put("weight_scale_inv", torch.ones(71)), r"scale_inv has the shape \[71\]"),
    ("FP8 per row", put("weight_scale_inv", torch.ones(0)), r"scale_inv has the shape \[0\], its"),
    ("FP8 per row", put("weight_scale_inv", torch.ones(3, 3, 3)), r"\[3, 3, 3\], its matrix \[72"),
    (
        "FP8 per row",
        put("weight_scale_inv", torch.ones(72, dtype=torch.int32)),
        "a.weight_scale_inv is int32, expected float32, bfloat16, float16, float8_e8m0fnu, uint8",
    ),
    (
        "FP8 in blocks",
        put("weight_scale_inv", torch.ones(2, 5)),
        r"expected \[2, 4\]: one for 40 x",
    ),
    ("NVFP4", lambda t: t.pop("weight_global_scale"), "is FP4, and beside it are 0 scales of all"),
    ("NVFP4", put("weight_scale_2", torch.ones(1)), "is FP4, and beside it are 2 scales of all"),
    ("NVFP4", put("weight_global_scale", torch.ones(2)), r"\[2\], expected one number"),
    ("NVFP4", put("weight_scale", torch.ones(72, 5).to(torch.float8_e4m3fn)), r"shape \[72, 5\]"),
    ("MLX", put("scales", torch.ones(72, 5, dtype=torch.uint8)), r"scales has the shape \[72, 5\]"),
    ("MLX", put("scales", torch.ones(72, 0, dtype=torch.uint8)), r"scales has the shape \[72, 0\]"),
    ("MLX", put("scales", torch.ones((), dtype=torch.uint8)), r"scales has the shape \[\], and"),
    ("MLX", put("scales", torch.ones(72, 6, 1, dtype=torch.uint8)), r"the shape \[72, 6, 1\], and"),
    ("MLX", put("scales", torch.ones(72, 6)), "a.scales is float32, expected uint8"),
    (NF4, lambda t: t.pop("weight.absmax"), "a.weight.absmax is missing"),
    (NF4, put("weight.absmax", torch.ones(5)), r"absmax has the shape \[5\], expected \[108\]"),
    (NF4, put("weight.quant_map", torch.ones(16, 1)), r"the shape \[16, 1\], expected \[16\]"),
    (NF4, put("weight.quant_map", torch.ones(16).half()), "quant_map is float16, expected float32"),
    (NF4, state_with(shape=[72, 95]), r"has the shape \[108\], expected \[107\]"),
    (NF4, state_with(shape=[72]), "nf4 has shape a list, expected two whole numbers above 0"),
    (NF4, state_with(shape=[-72, -96]), "nf4 has shape a list, expected two whole numbers above 0"),
    (NF4, state_with(blocksize=0), "nf4 has a blocksize of 0 and 0"),
    (NF4, state_with(blocksize=63), "nf4 has a blocksize of 63 and 0"),
    (NF4, state_with(blocksize="all"), 'nf4 has blocksize "all"; expected a whole number'),
    (NESTED, state_with(nested_blocksize=0), "nf4 has a blocksize of 128 and 0"),
    (NESTED, state_with(nested_offset=None), "nf4 has nested_offset null, expected a number"),
    (NESTED, put("weight.absmax", torch.ones(54)), "absmax is float32, expected uint8"),
    (
        NF4,
        put("weight.quant_state.bitsandbytes__nf4", torch.ones(5000, dtype=torch.uint8)),
        "nf4 has 5000 bytes, expected a few hundred",
    ),
    (
        NF4,
        put("weight.quant_state.bitsandbytes__nf4", torch.ones(9, dtype=torch.uint8)),
        "a.weight.quant_state.bitsandbytes__nf4 cannot be read as JSON",
    ),
]


@pytest.mark.parametrize(("kind", "change", "error"), BROKEN)
def test_what_cannot_be_is_refused(kind, change, error):
    write, find = KINDS[kind]
    tensors, _ = write(ROWS, COLUMNS, np.random.default_rng(3))
    change(tensors)
    with pytest.raises(UserError, match=error) as caught:
        found_in(tensors, find)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module", params=["FP8 in blocks that do not divide it", "NF4, OPT"])
def folder(request, tmp_path_factory):
    """A checkpoint, and transformers' model with its numbers."""
    case = CASES[request.param]
    made = folder_of(case.family, case.write, case.config)
    path = tmp_path_factory.mktemp("floats") / "model"
    made.write(path)
    return path, made.twin


@pytest.mark.parametrize("rows", [None, range(7, 50)])
@pytest.mark.parametrize("columns", [None, range(5, 33)])
def test_a_part_is_that_of_the_whole(rows, columns, folder):
    path, twin = folder
    ours = Checkpoint(path, dtype=torch.float16)
    name = next(iter(ours.floats.found))
    whole = twin.get_parameter(name).half()
    assert ours.tensors[name] == TensorInfo(tuple(whole.shape), torch.float16)
    cut = (slice(None) if run is None else slice(run.start, run.stop) for run in (rows, columns))
    assert torch.equal(ours.read(name, rows=rows, columns=columns), whole[tuple(cut)])


def test_it_is_converted_and_quantized_as_its_numbers(folder, tmp_path):
    path, twin = folder
    convert(ModelFolder(path, "floats"), tmp_path / "converted", overwrite=False)
    twin.save_pretrained(tmp_path / "16 bits")
    for source in (path, tmp_path / "converted", tmp_path / "16 bits"):
        job = Job(source, QuantPlan.parse("4"))
        quantize_checkpoint(job, tmp_path / f"{source.name} at 4")
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert "quantization_config" not in config
    ids = draw_prompts((9, 3), 96)
    want = load(tmp_path / "16 bits at 4").prefill(ids)
    for source in (path.name, "converted"):
        assert torch.equal(load(tmp_path / f"{source} at 4").prefill(ids), want)
    assert torch.equal(load(path, "4").prefill(ids), load(tmp_path / "16 bits", "4").prefill(ids))
