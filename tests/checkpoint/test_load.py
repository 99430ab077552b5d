"""Loading: strict about config.json, careful with memory, and smoothing that changes nothing."""

from __future__ import annotations

import gc
import json
import shutil
import struct
import weakref
from functools import cache

import pytest
import torch
from checkpoints import change_json, copy_of, rewritten, state_of
from conftest import FAMILIES, assert_user_error, tiny
from covering import each, slow_but
from inside import call
from oracle import our_bundled

from qllm import LLM, memory
from qllm.calibration import Calibration, calibrate
from qllm.checkpoint import materialize
from qllm.checkpoint.load import load_model, module_bytes, shard_bytes
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.layers import Linear
from qllm.layers.base import QuantizedLinear
from qllm.layers.fp16 import DenseLinear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models.equalize import can_divide

PROMPTS = [[2, 5, 6, 7, 8, 300], [2, 9, 10]]


@cache
def calibration_of(family: str, seed: int = 0) -> Calibration:
    """Statistics of some random tokens through a bundled model."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 4096, (2, 32), generator=generator).tolist()
    return calibrate(our_bundled(family), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_keeps_the_function(family, monkeypatch):
    """Channels are divided in the norm by what their weights are multiplied with.

    Every W8A8 layer is replaced by a dense one with the very weight it was to quantize, so what
    is left is the smoothing alone; it must give the logits of the model as it was.
    """
    smoothed = []

    class NotQuantized(DenseLinear):
        @classmethod
        def from_float(cls, weight, bias, spec, **_):
            smoothed.append(weight)
            return DenseLinear(weight.float(), bias, QuantSpec())

    real = materialize.linear_class
    monkeypatch.setattr(
        materialize,
        "linear_class",
        lambda spec: real(spec) if spec.kind == "dense" else NotQuantized,
    )
    expected = load_model(tiny(family), QuantPlan.parse("16"), dtype=torch.float32)
    model = load_model(
        tiny(family),
        QuantPlan.parse("8:tc-li"),
        dtype=torch.float32,
        calibration=calibration_of(family),
    )
    assert len(smoothed) == 4 * model.config.num_layers
    changed = expected.layers[1].attention_norm.weight / model.layers[1].attention_norm.weight
    assert changed.max() / changed.min() > 1.5  # there is something to keep the function of
    pair = [m.prefill(PROMPTS, last=False) for m in (expected, model)]
    torch.testing.assert_close(pair[1], pair[0], rtol=1e-4, atol=1e-4)


@pytest.mark.covering(1)
@pytest.mark.parametrize("bitwidth", ["8:tc-li", "8:tc"])
@pytest.mark.parametrize("family", FAMILIES)
def test_w8a8_with_calibration_stays_close(family, bitwidth):
    exact = our_bundled(family)
    model = load_model(
        tiny(family),
        QuantPlan.parse(bitwidth),
        dtype=torch.float32,
        calibration=calibration_of(family),
    )
    # Static ranges hold for tokens they were found on, and about for others.
    pair = [m.prefill(PROMPTS) for m in (exact, model)]
    error = (pair[1] - pair[0]).norm() / pair[0].norm()
    assert error < (0.05 if bitwidth == "8:tc-li" else 0.3)


def test_a_norm_that_is_the_residual_too_is_not_smoothed(tmp_path):
    """OPT-350m norms after attention and MLP: dividing its channels would change the model."""
    folder = copy_of("opt", tmp_path / "model", weights=False, do_layer_norm_before=False)
    state = {k: v for k, v in state_of("opt").items() if "decoder.final_layer_norm" not in k}
    rewritten_into(folder, state)
    config = load_model(folder, QuantPlan.parse("16")).config
    assert not can_divide(config, "attention.qkv")
    plain = load_model(folder, QuantPlan.parse("8:tc-li"))
    smooth = load_model(folder, QuantPlan.parse("8:tc-li"), calibration=calibration_of("opt"))
    assert torch.equal(plain.prefill(PROMPTS), smooth.prefill(PROMPTS))


def rewritten_into(folder, state) -> None:
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_static_activations_need_a_calibration():
    with pytest.raises(UserError, match=r"8:tc needs a calibration.*fake_calib_gen\.py"):
        load_model(tiny("opt"), QuantPlan.parse("8:tc"))


def test_a_calibration_of_another_model_is_refused():
    with pytest.raises(UserError, match="the calibration is of another model"):
        load_model(tiny("opt"), QuantPlan.parse("8:tc"), calibration=calibration_of("llama"))


CONFIG_CHANGES = {
    "wider": (
        {"hidden_size": 512, "word_embed_proj_dim": 512},
        r"has the shape \[.*config\.json implies",
    ),
    "more layers": ({"num_hidden_layers": 7}, r"holds 6 layers, its config.json implies 7"),
    "fewer layers": ({"num_hidden_layers": 5}, r"holds model\.decoder\.layers\.5"),
    "layers without end": ({"num_hidden_layers": 999}, r"implies 999"),
    "sizes without end": ({"hidden_size": 2**40, "ffn_dim": 2**40}, r"config\.json"),
    "numbers without end": ({"ffn_dim": 10**30}, r"config\.json"),
    "other vocabulary": ({"vocab_size": 4000}, r"embed_tokens\.weight has the shape"),
    "other window": ({"max_position_embeddings": 100}, r"embed_positions\.weight has the shape"),
    "no biases": ({"enable_bias": False}, r"holds .*bias"),
    "another family": ({"model_type": "llama"}, r"no tensor that begins with model\.layers\.0"),
    "an unknown family": ({"model_type": "t5"}, r"t5.*opt.*bloom.*llama"),
    "a family that is a number": ({"model_type": 7}, r"opt.*bloom.*llama"),
    "a size that is text": ({"hidden_size": "256"}, r"hidden_size is '256'"),
    "a size that is a fraction": ({"hidden_size": 256.5}, r"hidden_size is 256\.5"),
    "a size that is true": ({"num_hidden_layers": True}, r"num_hidden_layers is True"),
    "a size that is a list": ({"ffn_dim": [1024]}, r"ffn_dim is \[1024\]"),
    "negative": ({"num_attention_heads": -8}, r"num_attention_heads is -8"),
    "zero": ({"num_hidden_layers": 0}, r"num_hidden_layers is 0"),
    "heads that do not divide": ({"num_attention_heads": 7}, r"7 heads cannot share"),
    "unknown activation": ({"activation_function": "tan"}, r"'tan' is unknown; known: relu"),
    "a flag that is text": ({"do_layer_norm_before": "yes"}, r"do_layer_norm_before is 'yes'"),
}


@pytest.mark.parametrize(("changes", "message"), CONFIG_CHANGES.values(), ids=CONFIG_CHANGES)
def test_a_config_that_disagrees_with_the_weights(changes, message, tmp_path):
    folder = copy_of("opt", tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message):
        load_model(folder, QuantPlan.parse("4"))


@pytest.mark.parametrize("bitwidth", ["16", "4", "8:tc-li"])
def test_nan_weights_are_refused_at_every_bitwidth(bitwidth, tmp_path):
    state = state_of("opt")
    state["model.decoder.layers.4.fc2.weight"][3, 3] = float("nan")
    folder = rewritten("opt", tmp_path / "model", "safetensors", state)
    with pytest.raises(UserError, match=r"model\.safetensors.*layers\.4\.fc2\.weight holds NaN"):
        load_model(folder, QuantPlan.parse(bitwidth))


@pytest.mark.parametrize("name", ["fc1.weight", "fc1.bias", "final_layer_norm.weight"])
def test_values_beyond_float16_are_refused_there_alone(name, tmp_path):
    state = {key: value.float() for key, value in state_of("opt").items()}
    state[f"model.decoder.layers.0.{name}"].view(-1)[0] = 1e5
    folder = rewritten("opt", tmp_path / "model", "safetensors", state)
    with pytest.raises(UserError, match=r"holds values beyond torch\.float16; use `dtype`"):
        load_model(folder, QuantPlan.parse("16"), dtype=torch.float16)
    for dtype in (torch.bfloat16, torch.float32):
        load_model(folder, QuantPlan.parse("16"), dtype=dtype)


BITWIDTHS = ("16", "4", "3", "8:tc-li")


@pytest.mark.parametrize(
    ("family", "bitwidth"), slow_but(each(FAMILIES, BITWIDTHS), FAMILIES, BITWIDTHS)
)
def test_shards_hold_the_bytes_that_they_say(family, bitwidth):
    """Their sum is what the model holds, a tied head counted once."""
    whole = load_model(tiny(family), QuantPlan.parse(bitwidth))
    seen = {tensor.data_ptr(): tensor.nbytes for tensor in whole.buffers()}
    assert sum(shard_bytes(whole)) == sum(seen.values())
    for count in (2, 3, 6):
        model = load_model(tiny(family), QuantPlan.parse(bitwidth), num_shards=count)
        assert [i for layers in model.device_map for i in layers] == list(range(6))
        assert sum(shard_bytes(model)) == sum(shard_bytes(whole))


@pytest.mark.parametrize(("bitwidth", "bits"), [("4", 4), ("3", 3), ("1", 1), ("8", 8)])
def test_quantized_layers_take_the_bits_they_say(bitwidth, bits):
    """Bits per weight, and scales and zeros of 16 + 8 bits per group of 128."""
    model = load_model(tiny("opt"), QuantPlan.parse(bitwidth))
    for layer in model.layers:
        for linear in (m for m in layer.modules() if isinstance(m, Linear)):
            weights = linear.in_features * linear.out_features
            bias = linear.bias.nbytes
            assert module_bytes(linear) - bias == weights * bits // 8 + weights // 128 * 3


@pytest.mark.parametrize("bitwidth", ["4", "8:tc-li"])
def test_a_loaded_layer_lies_as_its_kernel_wants_it(bitwidth):
    """It need not be in memory twice when it is first used."""
    model = load_model(tiny("opt"), QuantPlan.parse(bitwidth))
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert layers
    for layer in layers:
        before = [tensor.data_ptr() for tensor in layer.buffers()]
        assert layer.kernel is layer.choice.kernel
        layer(torch.zeros(1, layer.in_features, dtype=model.dtype))
        assert [tensor.data_ptr() for tensor in layer.buffers()] == before


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_activations_stay_close(family):
    """As far from exact activations as a rounding to 127 steps may be, which 16 bits are not."""
    tokens = [[5, 9, 200, 31, 7, 1000, 77, 12]]
    exact = load_model(tiny(family), QuantPlan.parse("4")).prefill(tokens)
    model = load_model(tiny(family), QuantPlan.parse("4"), activation_bits=8)
    assert {layer.op for layer in model.modules() if isinstance(layer, WeightOnlyLinear)} == {
        "weight_only_linear_int8"
    }
    error = (model.prefill(tokens) - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05


def sparse_checkpoint(folder, layers: int) -> int:
    """An OPT of terabytes, of zeros that take no space on the disk; returns its bytes."""
    hidden, vocab = 16384, 50272
    inner = 4 * hidden
    config = {
        "model_type": "opt",
        "hidden_size": hidden,
        "ffn_dim": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "word_embed_proj_dim": hidden,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
    }
    shapes = {
        "embed_tokens.weight": (vocab, hidden),
        "embed_positions.weight": (2050, hidden),
        "final_layer_norm.weight": (hidden,),
        "final_layer_norm.bias": (hidden,),
    }
    for i in range(layers):
        for name, rows, columns in (
            *((f"self_attn.{part}_proj", hidden, hidden) for part in ("q", "k", "v", "out")),
            ("fc1", inner, hidden),
            ("fc2", hidden, inner),
        ):
            shapes[f"layers.{i}.{name}.weight"] = (rows, columns)
            shapes[f"layers.{i}.{name}.bias"] = (rows,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes[f"layers.{i}.{name}.weight"] = shapes[f"layers.{i}.{name}.bias"] = (hidden,)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        offsets = [start, end]
        entry = {"dtype": "F16", "shape": shape, "data_offsets": offsets}
        header[f"model.decoder.{name}"] = entry
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    data = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + end)
    return end


@pytest.mark.parametrize("bitwidth", ["16", "4"])
def test_a_model_larger_than_memory_is_refused_with_the_numbers(bitwidth, tmp_path):
    size = sparse_checkpoint(tmp_path / "huge", 300)
    assert size > 1e12
    needed = {"16": size, "4": size * 4.19 / 16}[bitwidth]
    with pytest.raises(
        UserError, match=r"^the model at bitwidth .* of memory and .* are free"
    ) as error:
        load_model(tmp_path / "huge", QuantPlan.parse(bitwidth))
    said = float(str(error.value).partition("needs ")[2].partition(" GB")[0]) * 1e9
    assert 0.98 * needed < said < 1.02 * needed


def test_the_script_refuses_it_before_it_starts(tmp_path):
    folder = tmp_path / "huge"
    sparse_checkpoint(folder, 300)
    shutil.copy(tiny("opt") / "tokenizer.json", folder)
    for script in ("qllm_gen.py", "ref_gen.py"):
        done = call(script, "--model-path", folder, "--device", "cpu")
        assert_user_error(done, "GB of memory and", "GB are free on cpu")


def test_the_cache_counts_as_well(monkeypatch):
    """What the prompts will need is part of what must fit."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 50_000_000)
    model = load_model(tiny("opt"), QuantPlan.parse("16"), cache_shape=(1, 100))
    with pytest.raises(UserError, match=r"0\.05 GB are free on cpu"):
        LLM.from_pretrained("opt-tiny", cache_shape=(100, 500), device="cpu")
    with pytest.raises(UserError, match=r"a KV cache of 100 x 500 tokens needs .* 0\.05 GB are"):
        model.new_cache(100, 500)


@pytest.mark.parametrize("number", [0, 7])
def test_shards_that_cannot_be(number):
    with pytest.raises(UserError, match=f"{number} shards cannot share 6 layers; give 1 to 6"):
        load_model(tiny("opt"), QuantPlan.parse("16"), num_shards=number)


def test_buffers_of_older_files_are_ignored(tmp_path):
    """Llama checkpoints of 2023 hold inv_freq, BLOOM ones masks; neither is a weight."""
    for family, name in (
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("bloom", "transformer.h.0.attn.masked_bias"),
    ):
        state = state_of(family)
        state[name] = torch.full((16,), -1e4)
        folder = rewritten(family, tmp_path / family, "safetensors", state)
        pair = [
            load_model(f, QuantPlan.parse("16")).prefill(PROMPTS) for f in (folder, tiny(family))
        ]
        assert torch.equal(*pair)


def test_names_without_the_prefix(tmp_path):
    """facebook/opt-* has files with "decoder.", BLOOM's lack "transformer."."""
    for family, prefix, other in (
        ("opt", "model.decoder.", "decoder."),
        ("opt", "model.decoder.", ""),
        ("bloom", "transformer.", ""),
        ("llama", "model.", ""),
    ):
        state = {}
        for name, tensor in state_of(family).items():
            state[other + name.removeprefix(prefix) if name.startswith(prefix) else name] = tensor
        folder = tmp_path / f"{family}-{other}"
        rewritten(family, folder, "safetensors", state)
        pair = [
            load_model(f, QuantPlan.parse("16")).prefill(PROMPTS) for f in (folder, tiny(family))
        ]
        assert torch.equal(*pair)


def test_a_plan_reaches_each_layer(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"attention": 8, r"mlp\.up": {"bits": 3, "group_size": 64}}))
    model = load_model(tiny("llama"), QuantPlan.parse(str(plan)))
    for layer in model.layers:
        assert layer.attention.qkv.spec.bits == layer.attention.out.spec.bits == 8
        assert (layer.mlp.up.spec.bits, layer.mlp.up.spec.group_size) == (3, 64)
        assert layer.mlp.down.spec.bits == 16
    change_json(plan, attention={"bits": "8:tc-li"})
    model = load_model(tiny("llama"), QuantPlan.parse(str(plan)))
    assert model.layers[0].attention.qkv.spec.kind == "w8a8_dynamic"


@pytest.mark.parametrize("bitwidth", ["16", "4"])
def test_a_model_that_is_let_go_is_gone_at_once(bitwidth):
    """Scripts put off Python's search for cycles, in which models would outlive their rows."""
    gc.disable()
    try:
        llm = LLM.from_pretrained("opt-tiny", bitwidth=bitwidth)
        llm.generate(["The sea was"], max_new_tokens=3)
        held = [weakref.ref(module) for module in llm.model.modules()]
        del llm
        assert not [each() for each in held if each() is not None]
    finally:
        gc.enable()
