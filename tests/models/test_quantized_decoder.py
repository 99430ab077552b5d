"""The decoder at every bitwidth against transformers with the same weights, and in shards."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from conftest import FAMILIES, tiny
from covering import each, slow_but
from oracle import (
    assert_same_model,
    bundled,
    draw_prompts,
    layer_linears,
    load,
    our_bundled,
    prefill_logits,
    random_model,
    save,
    spread,
)
from quantizing import MODELS
from torch import Tensor, nn
from transformers import BloomConfig, LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedModel

from qllm.calibration import calibrate
from qllm.config import BITWIDTHS, DEFAULT_GROUP_SIZE, QuantPlan, QuantSpec
from qllm.generate import generate
from qllm.generation_config import GenerationConfig
from qllm.models import FAMILIES as MODEL_FAMILIES
from qllm.models import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")

# 40 and 70 inputs are no multiple of the groups of 16.
SMALL = {
    "opt": OPTConfig(
        vocab_size=90,
        hidden_size=40,
        num_hidden_layers=4,
        ffn_dim=70,
        num_attention_heads=4,
        max_position_embeddings=40,
    ),
    "bloom": BloomConfig(vocab_size=90, hidden_size=40, n_head=5, n_layer=4),
    "llama": LlamaConfig(
        vocab_size=90,
        hidden_size=40,
        num_hidden_layers=4,
        intermediate_size=70,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def small(request, tmp_path_factory):
    """The config and the folder of a family's small random model."""
    folder = tmp_path_factory.mktemp(request.param)
    random_model(SMALL[request.param]).save_pretrained(folder)
    return SMALL[request.param], folder


def fake_quantized(weight: Tensor, bits: int, group: int, scheme: str = "asym") -> Tensor:
    """The weights that a quantized layer stands for, by the design's formulas."""
    top = 2**bits - 1
    result = torch.empty_like(weight)
    for start in range(0, weight.shape[1], group):
        w = weight[:, start : start + group]
        if scheme == "sym":
            scale = (2 * w.abs().amax(1, keepdim=True) / top).half().float()
            zero = 2 ** (bits - 1)
        else:
            low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
            scale = ((high - low) / top).half().float()
            zero = torch.round(-low / scale).clamp(0, top)
        q = (torch.round(w / scale) + zero).clamp(0, top)
        result[:, start : start + group] = (q - zero) * scale
    return result


def fake_quantize(model: PreTrainedModel, bits: int, group: int, scheme: str = "asym") -> None:
    """Give a transformers model the weights that our quantized layers stand for."""
    with torch.no_grad():
        for linear in layer_linears(model).values():
            linear.weight.copy_(fake_quantized(linear.weight, bits, group, scheme))


WEIGHT_ONLY = (FAMILIES, range(1, 9), ("asym", "sym"))


@pytest.mark.parametrize(
    ("small", "bits", "scheme"), slow_but(each(*WEIGHT_ONLY), *WEIGHT_ONLY), indirect=["small"]
)
def test_weight_only_equals_transformers_with_the_same_weights(small, bits, scheme):
    config, folder = small
    theirs = random_model(config)
    fake_quantize(theirs, bits, 16, scheme)
    plan = QuantPlan.uniform(QuantSpec.parse(bits, 16, scheme))
    assert_same_model(load(folder, plan=plan), theirs, draw_prompts([5, 1, 12], 90), 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bundled_model_at_4_bits_equals_transformers_with_the_same_weights(family):
    theirs = bundled.__wrapped__(family)  # one of its own, to be changed
    fake_quantize(theirs, 4, DEFAULT_GROUP_SIZE)
    prompts = draw_prompts([5, 1, 33, 12, 2], 4096, seed=7)
    assert_same_model(our_bundled(family, "4"), theirs, prompts, 8)


class Int8Linear(nn.Module):
    """A linear whose inputs and weights are rounded to int8, summed in float64.

    Args:
        input_range: the largest |input| of a static scale, None for one scale per token.
    """

    def __init__(self, linear: nn.Linear, input_range: float | None = None) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scales = (2 * weight.abs().amax(1) / 255).half().float()
        self.q = torch.round(weight / self.scales[:, None]).clamp(-128, 127).double()
        self.bias, self.input_range = linear.bias, input_range

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True) if self.input_range is None else self.input_range
        scale = largest * 2 / 255
        q = torch.round(x / scale).clamp(-128, 127).double()
        y = q @ self.q.T * scale * self.scales
        return (y if self.bias is None else y + self.bias).float()


SHORT = draw_prompts([1, 2, 3, 4] * 4, 90)


def assert_int8_equal(ours: Decoder, theirs: PreTrainedModel, exact: PreTrainedModel) -> None:
    """Most tokens' logits agree, and the rest are nearer to the oracle's than int8 is to float32.

    The last bit of an input may round it to the next integer, which shows from there on.
    """
    got, want = ours.prefill(SHORT, last=False), prefill_logits(theirs, SHORT)
    distance = (got - want).abs().amax(1) / spread(want)
    assert distance.median() < 1e-6
    error = (want - prefill_logits(exact, SHORT)).square().mean()
    assert (got - want).square().mean() < 0.5**2 * error


def int8_model(config: PretrainedConfig, ranges: dict[str, float]) -> PreTrainedModel:
    """A small random model of transformers with int8 linears, static where ranges has them."""
    model = random_model(config)
    for name, linear in layer_linears(model).items():
        model.set_submodule(name, Int8Linear(linear, ranges.get(name)))
    return model


def test_8_tc_li_equals_transformers_with_int8_linears(small):
    config, folder = small
    ours, theirs = load(folder, "8:tc-li"), int8_model(config, {})
    assert_int8_equal(ours, theirs, exact=random_model(config))


def test_8_tc_equals_transformers_with_int8_linears(tmp_path):
    """On OPT-350m, where no norm can take smoothing, so that its ranges are the calibration's."""
    config = deepcopy(MODELS["opt-350m"])
    theirs = random_model(config)
    dense = save(theirs, tmp_path)
    calibration = calibrate(dense, draw_prompts([20, 15], 90, seed=8))
    ranges = {
        part: float(calibration.inputs[name].max())
        for name, parts in MODEL_FAMILIES["opt"].layer_linears(dense.config).items()
        for part in parts
    }
    ours = load(tmp_path, "8:tc", calibration=calibration)
    assert_int8_equal(ours, int8_model(config, ranges), exact=theirs)


@pytest.mark.parametrize(
    ("small", "bitwidth"),
    slow_but(each(FAMILIES, BITWIDTHS), FAMILIES, BITWIDTHS),
    indirect=["small"],
)
def test_shards_change_nothing(small, bitwidth):
    config, folder = small
    prompts = draw_prompts([6, 1, 11], 90)
    options = {}
    if bitwidth == "8:tc":
        options["calibration"] = calibrate(load(folder), prompts)
    results = []
    for shards in (1, 3, config.num_hidden_layers):
        model = load(folder, bitwidth, num_shards=shards, **options)
        assert len(model.device_map) == shards
        assert [i for layers in model.device_map for i in layers] == list(range(4))
        results.append(generate(model, prompts, GenerationConfig(max_new_tokens=6)))
        assert results[-1] == results[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_of_the_bundled_models_change_nothing(family):
    prompts = draw_prompts([6, 1, 11], 4096)
    want = our_bundled(family, "3").prefill(prompts)
    for shards in (2, 4, 6):  # of like sizes, of unlike ones, and of a layer each
        got = load(tiny(family), "3", num_shards=shards).prefill(prompts)
        assert torch.equal(got, want)
