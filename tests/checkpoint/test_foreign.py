"""Whole checkpoints as others write them, through the loader: the model is the one they hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny
from safetensors.torch import load_file, save_file
from test_formats import awq_tensors

from qllm.checkpoint.load import load_model
from qllm.checkpoint.stored import Quantized, read_linear, take_rows
from qllm.checkpoint.weights import Checkpoint, Weights
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.models import Decoder
from qllm.quant.gptq import GPTQOptions
from qllm.quantize.checkpoint import Job, quantize_checkpoint
from qllm.quantize.layer import QuantizeOptions

SPEC = QuantSpec.parse(4, 64, "asym")
DENSE = QuantPlan.uniform(QuantSpec())


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory) -> tuple[Path, Decoder]:
    """A GPTQ v2 checkpoint of a bundled model, and the model that rounding on the fly gives."""
    folder = tmp_path_factory.mktemp("foreign") / request.param
    quantize_checkpoint(Job(tiny(request.param), QuantPlan.uniform(SPEC)), folder)
    return folder, load_model(tiny(request.param), QuantPlan.uniform(SPEC))


def rewrite(folder: Path, target: Path, change, **config: object) -> Path:
    """A copy of a checkpoint whose quantized modules' tensors went through `change`."""
    target.mkdir()
    for path in folder.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    modules = {name.removesuffix(".qweight") for name in state if name.endswith(".qweight")}
    for module in modules:
        keys = ("qweight", "qzeros", "scales", "g_idx")
        tensors = {key: state.pop(f"{module}.{key}") for key in keys}
        state |= {f"{module}.{key}": tensor for key, tensor in change(module, tensors).items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, target / "model.safetensors"
    )
    raw = json.loads((target / "config.json").read_text())
    raw["quantization_config"] = config
    (target / "config.json").write_text(json.dumps(raw))
    return target


def assert_same_model(found: Decoder, expected: Decoder) -> None:
    for (name, ours), (other, theirs) in zip(
        found.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs), name


def as_v1(module: str, tensors: dict) -> dict:
    """Zero points less 1, taken from the words as GPTQModel takes them."""
    return tensors | {"qzeros": tensors["qzeros"] - 0x11111111}


V1 = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}


def test_gptq_v2(made):
    folder, expected = made
    assert_same_model(load_model(folder, DENSE), expected)


def test_gptq_v1(made, tmp_path):
    folder, expected = made
    assert_same_model(load_model(rewrite(folder, tmp_path / "v1", as_v1, **V1), DENSE), expected)


def test_gptq_v1_with_its_settings_in_a_file_of_their_own(made, tmp_path):
    folder, expected = made
    target = rewrite(folder, tmp_path / "old", as_v1)
    raw = json.loads((target / "config.json").read_text())
    del raw["quantization_config"]
    (target / "config.json").write_text(json.dumps(raw))
    settings = {key: value for key, value in V1.items() if key != "quant_method"}
    (target / "quantize_config.json").write_text(json.dumps(settings))
    assert_same_model(load_model(target, DENSE), expected)


def as_awq(folder: Path, target: Path) -> Path:
    """A GPTQ checkpoint as AutoAWQ would have written it."""
    weights = Weights(Checkpoint(folder))
    storage = next(iter(weights.stored.values()))

    def change(module: str, tensors: dict) -> dict:
        columns, rows = len(tensors["g_idx"]), tensors["qweight"].shape[1]
        return awq_tensors(read_linear(storage, tensors, columns, rows), columns)

    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    return rewrite(folder, target, change, zero_point=True, **config)


def test_awq(made, tmp_path):
    folder, expected = made
    assert_same_model(load_model(as_awq(folder, tmp_path / "awq"), DENSE), expected)


FORMS = {
    "gptq": {"spec": SPEC},
    "gptq, 3 bits": {"spec": QuantSpec.parse(3, 64, "sym")},
    "gptq, reordered": {"spec": replace(SPEC, algorithm="gptq"), "static_groups": False},
    "awq": {"spec": SPEC},
    "pack-quantized": {"spec": QuantSpec.parse(5, 64, "asym")},
    "int-quantized": {"spec": QuantSpec.parse("8:tc-li")},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_some_rows_are_those_of_the_whole_and_no_more_is_read(family, form, tmp_path, monkeypatch):
    spec = FORMS[form]["spec"]
    gptq = GPTQOptions(static_groups=FORMS[form].get("static_groups", True))
    job = Job(tiny(family), QuantPlan.uniform(spec), options=QuantizeOptions(gptq=gptq))
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
    for module in weights.family.layer_linears(1):
        total = weights.shapes[f"{module}.weight"][0]
        whole = weights.read_quantized(module)
        most = sum(sizes)
        # Some begin and end inside a word.
        for runs in ([range(5, 41)], [range(total - 3, total)], [range(32, 64), range(70, 90)]):
            sizes.clear()
            found = weights.read_quantized(module, runs)
            rows = torch.cat([torch.arange(run.start, run.stop) for run in runs])
            assert_same_tensors(found, take_rows(whole, rows))
            if not weights.family.interleaved_qkv or ".qkv" not in module:
                assert sum(sizes) < 0.6 * most, (module, runs)


def assert_same_tensors(found: Quantized, expected: Quantized) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.numel() == 0 or torch.equal(ours, theirs)


def test_what_the_file_holds_at_16_bits_is_so_whatever_config_json_says(made, tmp_path):
    folder, _ = made
    weights = Weights(Checkpoint(folder))
    storage = next(iter(weights.stored.values()))
    float_state = load_file(tiny(folder.name) / "model.safetensors")
    dense = next(
        name
        for name in sorted(float_state)
        if ".1." in name
        and "weight" in name
        and ("o_proj" in name or "out_proj" in name or "self_attention.dense" in name)
    )
    module = dense.removesuffix(".weight")

    def change(name: str, tensors: dict) -> dict:
        return {"weight": float_state[dense]} if name == module else tensors

    target = rewrite(folder, tmp_path / "part", change, **V1, checkpoint_format="gptq_v2")
    model = load_model(target, DENSE)
    assert model.layers[1].attention.out.spec.kind == "dense"
    assert model.layers[0].attention.out.spec == storage.spec


def test_parts_with_other_orders_of_channels_are_refused(tmp_path_factory, tmp_path):
    folder = tmp_path_factory.mktemp("orders") / "llama"
    quantize_checkpoint(Job(tiny("llama"), QuantPlan.uniform(SPEC)), folder)

    def change(module: str, tensors: dict) -> dict:
        return tensors | ({"g_idx": tensors["g_idx"].flip(0)} if "k_proj" in module else {})

    target = rewrite(folder, tmp_path / "orders", change, **V1, checkpoint_format="gptq_v2")
    with pytest.raises(UserError, match="g_idx differ"):
        load_model(target, DENSE)
