"""Experts are quantized with what reaches them, and those that nothing reaches are not lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import load
from quantizer_cases import plan_of, quantize, tensors_of
from quantizing import samples

from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.models.mlp import MixtureOfExperts
from qllm.quant.algorithm import QuantizeOptions
from qllm.quantizer import layer as layer_module
from qllm.quantizer.layer import LinearReport, observed_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = [[3, 5, 8]]  # as many tokens as leave an expert of four without any


def unseen(reports: list[LinearReport]) -> set[str]:
    return {report.name for report in reports if report.unseen}


def reached(folder: Path, texts: list[list[int]]) -> set[str]:
    """Names of the experts' linears that some token of texts goes through."""
    model, found = load(folder), set()
    for index, layer in enumerate(model.layers):
        assert isinstance(layer.mlp, MixtureOfExperts)
        for name, module in layer.mlp.named_modules():
            if name.endswith((".up", ".down")):

                def see(module: object, inputs: object, full: str = f"layers.{index}.mlp.{name}"):
                    found.add(full)

                module.register_forward_pre_hook(see)
    for text in texts:
        model.prefill([text], last=False)
    return found


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_an_expert_that_no_token_reaches_is_rounded_to_nearest(algorithm, sources, tmp_path):
    source = sources("qwen2_moe")
    reports = quantize(source, tmp_path / "out", plan_of(3, algorithm=algorithm), samples=SHORT)
    nearest = quantize(source, tmp_path / "rtn", plan_of(3))
    lost = unseen(reports)
    assert lost and not unseen(nearest)
    assert lost < {report.name for report in reports}
    ours, rtn = load(tmp_path / "out"), load(tmp_path / "rtn")
    errors = {report.name: report.error for report in nearest}
    for report in reports:
        if report.name in lost:
            assert not report.of_output and report.dead == 0
            assert report.error == errors[report.name]
            assert "no token of the calibration reached it" in str(report)
            mine, other = (m.get_submodule(report.name).dequantize() for m in (ours, rtn))
            assert torch.equal(mine, other)
        else:
            assert report.of_output


def test_what_is_said_to_be_reached_is(sources, tmp_path):
    """In the float model, whose routers choose otherwise only where quantized layers move them."""
    source = sources("qwen2_moe")
    reports = quantize(source, tmp_path / "out", plan_of(8, algorithm="gptq"), samples=SHORT)
    experts = {report.name for report in reports if ".mlp." in report.name}
    assert experts - unseen(reports) == reached(tmp_path / "out", SHORT)


def test_how_many_are_observed_at_once_changes_nothing(sources, monkeypatch, tmp_path):
    for folder, limit in (("together", layer_module.OBSERVED_BYTES), ("apart", 1)):
        monkeypatch.setattr(layer_module, "OBSERVED_BYTES", limit)
        plan = plan_of(4, algorithm="gptq")
        quantize(sources("qwen2_moe"), tmp_path / folder, plan, samples=samples())
    first, second = (tensors_of(tmp_path / folder) for folder in ("together", "apart"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_static_ranges_are_not_made_up(sources, tmp_path):
    with pytest.raises(UserError, match=r"no token .* reaches layers\.0\.mlp\.experts\.\d\.up, so"):
        quantize(sources("qwen2_moe"), tmp_path / "out", plan_of("8:tc"), samples=SHORT)


def test_routers_stay_as_they_are(sources, tmp_path):
    """And what else reads the checkpoint is told so."""
    source = sources("qwen2_moe")
    quantize(source, tmp_path / "out", plan_of(6))
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for name in ("gate.weight", "shared_expert_gate.weight"):
        whole = f"model.layers.1.mlp.{name}"
        assert torch.equal(after[whole], before[whole])
        assert f'"{whole.removesuffix(".weight")}"' in (tmp_path / "out/config.json").read_text()
    card = (tmp_path / "out/README.md").read_text()
    assert "loads in QLLM; not in transformers: it has all experts" in card


def test_what_is_to_fit_are_the_sums_that_are_kept_together(sources, monkeypatch):
    """With AWQ those of a whole layer, with GPTQ as many as may be."""
    layer = load(sources("qwen2_moe")).layers[0]
    wide, narrow, shared = (4 * channels**2 for channels in (48, 36, 44))  # what linears take
    whole = 7 * wide + 4 * narrow + shared
    expected = {"together": 5 * wide, "apart": 3 * narrow}
    for case, limit in (("together", layer_module.OBSERVED_BYTES), ("apart", 3 * narrow)):
        monkeypatch.setattr(layer_module, "OBSERVED_BYTES", limit)
        for algorithm, bytes_kept in (("awq", whole), ("gptq", expected[case]), ("rtn", 0)):
            spec = replace(QuantSpec.parse("4"), algorithm=algorithm)
            specs = dict.fromkeys((name for _, names in layer.blocks() for name in names), spec)
            assert observed_bytes(layer, specs, QuantizeOptions()) == bytes_kept
