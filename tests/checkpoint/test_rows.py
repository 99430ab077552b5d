"""Some rows of a quantized matrix, as ranks read them: those of the whole, and no more is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from covering import each, slow_but
from foreign import folder_of
from foreign_cases import AWQ, CASES
from safetensors.torch import load_file, save_file
from stored_formats import awq_tensors

from qllm.checkpoint.formats import Quantized, take_rows
from qllm.checkpoint.weights import Checkpoint, Weights
from qllm.config import QuantPlan, QuantSpec
from qllm.quant.algorithm import GPTQOptions, QuantizeOptions
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = QuantSpec.parse(4, 64, "asym")


def as_awq(folder: Path, target: Path) -> Path:
    """A GPTQ checkpoint of ours as AutoAWQ would have written it."""
    weights = Weights(Checkpoint(folder))
    storage = next(iter(weights.stored.values()))
    target.mkdir()
    state = load_file(folder / "model.safetensors")
    for module in [name.removesuffix(".qweight") for name in state if name.endswith(".qweight")]:
        keys = ("qweight", "qzeros", "scales", "g_idx")
        tensors = {key: state.pop(f"{module}.{key}") for key in keys}
        columns, rows = len(tensors["g_idx"]), tensors["qweight"].shape[1]
        found = awq_tensors(storage.read(tensors, columns, rows), columns)
        state |= {f"{module}.{key}": tensor for key, tensor in found.items()}
    save_file(state, target / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = AWQ | {"group_size": 64}
    (target / "config.json").write_text(json.dumps(raw))
    return target


FORMS = {
    "gptq": {"spec": SPEC},
    "gptq, 3 bits": {"spec": QuantSpec.parse(3, 64, "sym")},
    "gptq, reordered": {"spec": replace(SPEC, algorithm="gptq"), "static_groups": False},
    "awq": {"spec": SPEC},
    "pack-quantized": {"spec": QuantSpec.parse(5, 64, "asym")},
    "int-quantized": {"spec": QuantSpec.parse("8:tc-li")},
}


@pytest.mark.parametrize(("family", "form"), slow_but(each(FAMILIES, FORMS), FAMILIES, FORMS))
def test_some_rows_are_those_of_the_whole_and_no_more_is_read(
    family, form, shallow_of, tmp_path, monkeypatch
):
    spec = FORMS[form]["spec"]
    gptq = GPTQOptions(static_groups=FORMS[form].get("static_groups", True))
    job = Job(shallow_of(family), QuantPlan.uniform(spec), options=QuantizeOptions(gptq=gptq))
    if spec.algorithm == "gptq":
        job = replace(job, samples=[list(range(5, 69))])
    quantize_checkpoint(job, tmp_path / "made")
    folder = as_awq(tmp_path / "made", tmp_path / "awq") if form == "awq" else tmp_path / "made"
    weights = Weights(Checkpoint(folder))
    sizes = []
    read = weights.checkpoint.read_any

    def watched(name, **options):
        tensor = read(name, **options)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(weights.checkpoint, "read_any", watched)
    for module in (name for name in weights.stored if name.startswith("layers.0.")):
        total = weights.shapes[f"{module}.weight"][0]
        whole = weights.read_quantized(module)
        all_bytes = sum(sizes)
        # Some begin and end inside a word.
        for runs in ([range(5, 41)], [range(total - 3, total)], [range(32, 64), range(70, 90)]):
            sizes.clear()
            found = weights.read_quantized(module, runs)
            rows = torch.cat([torch.arange(run.start, run.stop) for run in runs])
            assert_same_tensors(found, take_rows(whole, rows))
            if not weights.family.interleaved_qkv or ".qkv" not in module:
                assert sum(sizes) < 0.6 * all_bytes, (module, runs)


@pytest.mark.parametrize(
    "name",
    [
        *("BitNet", "BitNet, Phi-3", "HQQ, 3 bits", "HQQ, OPT", "HQQ, BLOOM"),
        *("torchao, int8, a scale per matrix", "torchao, int3", "torchao, Int4Tensor, Phi-3"),
    ],
)
def test_some_rows_of_a_matrix_of_others(name, tmp_path):
    """Some have rows that lie far apart in one byte, or one scale for all of them."""
    case = CASES[name]
    folder_of(case.family, case.write, case.config).write(tmp_path / "model")
    weights = Weights(Checkpoint(tmp_path / "model"))
    for module in weights.stored:
        whole = weights.read_quantized(module)
        for runs in ([range(5, 41)], [range(61, 64)], [range(32), range(33, 40)]):
            rows = torch.cat([torch.arange(run.start, run.stop) for run in runs])
            assert_same_tensors(weights.read_quantized(module, runs), take_rows(whole, rows))


def assert_same_tensors(found: Quantized, expected: Quantized) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.numel() == 0 or torch.equal(ours, theirs)
