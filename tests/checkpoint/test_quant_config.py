"""`quantization_config`: others' as they are found."""

from __future__ import annotations

import pytest
from foreign_integers import hqq_config, hqq_settings
from foreign_torchao import granularity, int8, intx, torchao_config, torchao_type
from quant_configs import (
    AUTO_ROUND,
    AWQ,
    DYNAMIC,
    GPTQ,
    LLAMA,
    MIXED,
    STATIC,
    W4A16,
    W8A8,
    assert_described,
    bits,
    compressed,
    read,
    their_answer,
)
from transformers import AwqConfig, GPTQConfig

from qllm.checkpoint.formats import FORMATS, describe


@pytest.mark.parametrize(
    ("config", "storage"),
    [
        (GPTQ, FORMATS["gptq"](bits(4, scheme="sym"), v1=True)),
        (GPTQ | {"checkpoint_format": "gptq"}, FORMATS["gptq"](bits(4, scheme="sym"), v1=True)),
        (
            GPTQ | {"checkpoint_format": "gptq_v2", "sym": False, "bits": 3, "group_size": -1},
            FORMATS["gptq"](bits(3, -1)),
        ),
        (GPTQ | {"format": "gptq_v2", "desc_act": True}, FORMATS["gptq"](bits(4, scheme="sym"))),
        (AWQ, FORMATS["awq"](bits(4))),
        (
            {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"},
            FORMATS["awq"](bits(4, 64)),
        ),
        (W4A16, FORMATS["pack-quantized"](bits(4, scheme="sym"))),
        (W8A8, FORMATS["int-quantized"](DYNAMIC)),
    ],
)
def test_whole_models_as_others_write_them(config, storage):
    found = read(config)
    assert found.find("model.layers.0.self_attn.q_proj") == storage
    assert found.find("model.decoder.layers.11.fc2") == storage
    assert found.find("lm_head") is None


def test_the_configs_are_those_transformers_reads():
    assert GPTQConfig.from_dict(GPTQ).format == "gptq"
    assert AwqConfig.from_dict(AWQ).format == "gemm"
    ours = describe(dict.fromkeys(LLAMA, bits(4)))
    found = GPTQConfig.from_dict(ours)
    assert (found.bits, found.group_size, found.sym, found.format) == (4, 128, False, "gptq_v2")


def test_auto_round_and_mlx():
    """A module's own settings, by its name before an expression, which may be found anywhere."""
    own = {r"mlp\.up": {"bits": 8}, "model.layers.1.mlp.up_proj": {"bits": 16}, "lm_head": {}}
    config = read(AUTO_ROUND | {"extra_config": own})
    up = "model.layers.{}.mlp.up_proj"
    assert config.find(up.format(0)) == FORMATS["gptq"](bits(8, 32, "sym"), v1=True)
    assert config.find(up.format(1)) is None
    assert config.find("lm_head").spec == config.find("model.layers.1.mlp.down_proj").spec
    assert read(AUTO_ROUND).find("lm_head") is None
    # Their offsets are numbers, which take more bytes than zero points.
    own = {up.format(0): {"bits": 3}, up.format(1): False}
    config = read({"quant_method": "mlx", "bits": 6, "group_size": 32} | own)
    assert config.find("lm_head") == FORMATS["mlx"](bits(6, 32, "offset"))
    assert config.find(up.format(0)) == FORMATS["mlx"](bits(3, 64, "offset"))
    assert config.find(up.format(1)) is None


def test_hqq_kinds():
    """HQQ's names of linears are without what they have in front, and without numbers."""
    kinds = {"mlp.up_proj": hqq_settings(3, 64), "fc1": hqq_settings(2, None)}
    config = read(hqq_config(kinds))
    assert config.find("model.layers.11.mlp.up_proj") == FORMATS["hqq"](bits(3, 64, "offset"))
    assert config.find("model.decoder.layers.0.fc1") == FORMATS["hqq"](bits(2, -1, "offset"))
    for other in ("model.layers.0.mlp.down_proj", "model.layers.0.xmlp.up_proj", "lm_head"):
        assert config.find(other) is None
    assert read(hqq_config(hqq_settings(4, 64))).find("model.layers.0.self_attn.q_proj")


def test_torchao_names():
    """Names of modules or weights, patterns that match whole names, and all others."""
    both = [granularity("PerRow", dim=-1), granularity("PerTensor")]
    dynamic = torchao_type("Int8DynamicActivationInt8WeightConfig", granularity=both)
    up = "model.layers.0.mlp.up_proj"
    names = {
        "_default": dynamic,
        "re:.*up_proj": intx(3, 64),
        f"{up}.weight": None,
        r"re:model\.layers\..": int8(),
    }
    for key in ("fqn_to_config", "module_fqn_to_config"):
        config = read(torchao_config(torchao_type("FqnToConfig", **{key: names})))
        assert config.find(up) is None
        assert config.find(up.replace("0", "1")) == FORMATS["torchao"](bits(3, 64))
        assert config.find("model.layers.1") == FORMATS["torchao"](bits(8, -1))
        assert config.find("model.layers.1.mlp.gate_proj") == FORMATS["torchao"](DYNAMIC)


def test_gptq_head():
    assert read(GPTQ | {"lm_head": True}).find("lm_head").spec == bits(4, scheme="sym")
    assert read(GPTQ | {"lm_head": False}).find("lm_head") is None
    dynamic = {"+:^lm_head$": {"bits": 8}}
    assert read(GPTQ | {"lm_head": True, "dynamic": dynamic}).find("lm_head").spec.bits == 8
    assert read(GPTQ | {"dynamic": dynamic}).find("lm_head") is None


def test_gptq_dynamic():
    """The first rule that matches from a name's start; what it leaves out is as for all."""
    dynamic = {
        r"+:.*\.(?:1[0-5])\..*": {"bits": 8},
        r".*\.(?:1[5-9])\..*": {"bits": 2, "group_size": 64, "sym": False, "mse": 2.4},
        r"+:layers": {"bits": 3},
        r"-:.*\.mlp\..*": {},
    }
    config = read(GPTQ | {"dynamic": dynamic})
    q = "model.layers.{}.self_attn.q_proj"
    assert config.find(q.format(9)).spec == bits(4, 128, "sym")
    assert config.find(q.format(10)).spec == bits(8, 128, "sym")
    assert config.find(q.format(15)).spec == bits(8, 128, "sym")
    assert config.find(q.format(16)) == FORMATS["gptq"](bits(2, 64, "asym"), v1=True)
    # GPTQModel tries "-:" first, wherever it stands.
    assert config.find("model.layers.10.mlp.up_proj") is None
    for nothing in (None, {}, False):
        assert read(GPTQ | {"dynamic": nothing}).find("model.layers.0.fc1").spec.bits == 4


@pytest.mark.parametrize("names", [["self_attn.q_proj", "fc1"], [["self_attn.q_proj"], ["fc1"]]])
def test_gptq_of_some_modules(names):
    config = read(GPTQ | {"modules_in_block_to_quantize": names, "lm_head": True})
    assert config.find("model.decoder.layers.0.self_attn.q_proj")
    assert config.find("model.decoder.layers.0.fc1")
    assert config.find("lm_head")
    for other in ("model.decoder.layers.0.fc2", "model.decoder.project_in", "xfc1", "fc1x"):
        assert config.find(other) is None


def test_awq_modules_left_out():
    config = read(AWQ | {"modules_to_not_convert": ["layers.1.", "v_proj"]})
    assert config.find("model.layers.0.self_attn.q_proj")
    assert config.find("model.layers.11.self_attn.q_proj")
    assert config.find("model.layers.1.self_attn.q_proj") is None
    assert config.find("model.layers.0.self_attn.v_proj") is None


@pytest.mark.parametrize(
    "module", [*LLAMA, "lm_head", "model.layers.1.other", "transformer.h.1.mlp.fc"]
)
def test_compressed_tensors_finds_the_same_group(module):
    """A name before a pattern, patterns in their order, the class last, and before all: ignore."""
    found, theirs = read(MIXED).find(module), their_answer(MIXED, module)
    assert (found is None) == (theirs is None)
    if found is not None:
        assert_described(found, theirs)


def test_strategies_that_follow_from_the_group_size():
    """As compressed-tensors takes them where the file is silent."""
    for size, expected in ((-1, bits(8, -1, "sym")), (64, bits(8, 64, "sym"))):
        weights = {"num_bits": 8, "group_size": size}
        one = {"targets": ["Linear"], "weights": weights}
        found = read(compressed(one, layout="int-quantized")).find("fc1")
        assert found == FORMATS["int-quantized"](expected)
    one = {"targets": ["Linear"], "weights": {}, "input_activations": {}}
    assert read(compressed(one, layout="int-quantized")).find("fc1").spec == STATIC
