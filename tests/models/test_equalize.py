"""Dividing a linear's input changes nothing, and is said to work just where it does."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_logits_close, draw_prompts, load
from quantizing import MODELS, VOCAB, saved

from qllm.models import Decoder
from qllm.models.attention import ATTENTION_LINEARS
from qllm.models.equalize import can_divide, divide_input, shared_channels
from qllm.models.mlp import mlp_linears

pytestmark = pytest.mark.usefixtures("one_thread")

QKV, OUT, UP, DOWN = LINEARS = (*ATTENTION_LINEARS, "mlp.up", "mlp.down")
DIVIDED = {
    "opt": LINEARS,
    "opt untied": LINEARS,
    # Norms that stand behind attention and MLP, or have no weights; a GELU in front of `down`.
    "opt-350m": (OUT, DOWN),
    "galactica": (OUT,),
    "bloom": (QKV, OUT, UP),
    "bloom with normed residuals": (OUT,),
    "llama": LINEARS,
    "llama with all heads": LINEARS,
    "llama with one key-value head": LINEARS,
    "qwen3": LINEARS,
    "gemma2": LINEARS,
    "gemma3_text": LINEARS,
    # Values are normed in front of `out`.
    "gemma4_text with inputs of layers": (QKV, UP, DOWN),
    "gemma4_text": (
        QKV,
        *(f"mlp.experts.{i}.down" for i in range(4)),
        "mlp.shared.down",
    ),
    "ministral3": LINEARS,
    "phi3": LINEARS,
    "phi": (OUT,),  # as Cohere's, and a GELU in front of `down`
    "gpt_neox": (QKV, OUT, UP),
    "glm4": LINEARS,
    "cohere2": (OUT, DOWN),  # attention and MLP take what one norm gives
    "granite": LINEARS,
    # The router and all experts take what one norm gives.
    "qwen2_moe": (QKV, OUT, *(f"mlp.experts.{i}.down" for i in range(4)), "mlp.shared.down"),
    # What stands behind a norm of heads, and the gates of a delta net that stand beside QKV.
    "qwen3_5": (UP, DOWN),
    "qwen3_next": (*(f"mlp.experts.{i}.down" for i in range(3)), "mlp.shared.down"),
    # No norms in front of attention and MLP.
    "olmo2": (OUT, DOWN),
    "gpt2": (QKV, OUT, UP),
}
PROMPTS = draw_prompts([7, 1, 12], VOCAB)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """A name of MODELS, its folder, and its logits."""
    folder = saved(request.param, tmp_path_factory.mktemp("model"))
    return request.param, folder, load(folder).prefill(PROMPTS, last=False)


def drawn_scales(model: Decoder, index: int, linear: str) -> torch.Tensor:
    """From 0.1 to 10, equal where they have to be."""
    columns = model.layers[index].get_submodule(linear).in_features
    generator = torch.Generator().manual_seed(index)
    scales = 10 ** (2 * torch.rand(columns, generator=generator) - 1)
    return shared_channels(model.config, linear, scales)


def test_every_model_is_in_the_table():
    assert DIVIDED.keys() == MODELS.keys()


def test_what_can_be_divided(model):
    name, folder, _ = model
    config = load(folder).config
    linears = (*ATTENTION_LINEARS, *mlp_linears(config, 0))
    assert tuple(linear for linear in linears if can_divide(config, linear)) == DIVIDED[name]


def test_the_model_is_the_same(model):
    """For each linear alone, in each layer, and then for all of them."""
    name, folder, expected = model
    both = load(folder)
    for linear in DIVIDED[name]:
        ours = load(folder)
        for decoder in (ours, both):
            for index, layer in enumerate(decoder.layers):
                weight = layer.get_submodule(linear).weight.clone()
                scales = drawn_scales(decoder, index, linear)
                divide_input(layer, decoder.config, linear, scales)
                assert torch.equal(layer.get_submodule(linear).weight, weight * scales)
        assert_logits_close(ours.prefill(PROMPTS, last=False), expected)
    assert_logits_close(both.prefill(PROMPTS, last=False), expected)


def first_input(model: Decoder, linear: str) -> torch.Tensor:
    """What a linear of the first layer sees of PROMPTS."""
    seen: list[torch.Tensor] = []
    module = model.layers[0].get_submodule(linear)
    hook = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.prefill(PROMPTS)
    hook.remove()
    return seen[0]


def test_the_input_is_what_is_divided(model):
    name, folder, _ = model
    for linear in DIVIDED[name]:
        ours = load(folder)
        before = first_input(ours, linear)
        scales = drawn_scales(ours, 0, linear)
        divide_input(ours.layers[0], ours.config, linear, scales)
        after = first_input(ours, linear)
        assert torch.allclose(after * scales, before, rtol=1e-4, atol=1e-5 * before.abs().max())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Values 0 … of 6 heads; those of the heads that share a value head take the largest.
        ("llama", [20, 21, 22, 23, 24, 25, 26, 27, 28, 29] * 3 + [*range(50, 60)] * 3),
        ("llama with all heads", [*range(48)]),
        ("llama with one key-value head", [*range(40, 48)] * 6),
        ("opt", [*range(40)]),
    ],
)
def test_heads_that_share_values_share_scales(name, expected, tmp_path):
    config = load(saved(name, tmp_path)).config
    values = torch.arange(config.num_heads * config.head_dim)
    assert shared_channels(config, OUT, values).tolist() == expected
    for linear in (QKV, UP, DOWN):
        assert shared_channels(config, linear, values) is values
