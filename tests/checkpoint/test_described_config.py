"""`quantization_config`: what we write, and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quant_configs import (
    BLOOM,
    DENSE,
    DYNAMIC,
    LLAMA,
    OPT,
    STATIC,
    TENSOR,
    assert_described,
    bits,
    read,
    spec_of,
    their_answer,
)

from qllm import __version__
from qllm.checkpoint.formats import FORMATS, describe


def test_gptq_text():
    specs = dict.fromkeys(LLAMA, bits(4)) | {"lm_head": DENSE}
    assert describe(specs) == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": 4,
        "group_size": 128,
        "sym": False,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"qllm:{__version__}"]},
    }
    for name in LLAMA[:7]:
        specs[name] = bits(8)
    specs[LLAMA[7]] = DENSE
    specs["lm_head"] = bits(8, 64, "sym")
    config = describe(specs, desc_act=True)
    assert config["desc_act"] is True
    assert config["lm_head"] is True
    parts = [
        r"\.self_attn\.q_proj", r"\.self_attn\.k_proj", r"\.self_attn\.v_proj",
        r"\.self_attn\.o_proj", r"\.mlp\.gate_proj", r"\.mlp\.up_proj", r"\.mlp\.down_proj",
        r"\.self_attn\.qkv_proj", r"\.mlp\.gate_up_proj",
    ]  # fmt: skip
    assert config["dynamic"] == {
        r"-:^model\.layers\.(?:1)(?:\.self_attn\.q_proj)$": {},
        rf"+:^model\.layers\.(?:0)(?:{'|'.join(parts)})$": {"bits": 8},
        r"+:^lm_head$": {"bits": 8, "group_size": 64, "sym": True},
    }


def test_compressed_text():
    specs = dict.fromkeys(LLAMA, STATIC)
    specs[LLAMA[0]] = bits(4, 32, "sym")
    specs[LLAMA[1]] = DENSE
    config = describe(specs, desc_act=True)
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel",
                    "group_size": None,
                    "dynamic": False,
                },
                "input_activations": TENSOR,
                "output_activations": None,
                "format": "int-quantized",
            },
            "group_1": {
                "targets": [LLAMA[0]],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                    "actorder": "group",
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            },
        },
        "ignore": [LLAMA[1], "lm_head"],
    }


def test_a_quantized_head_is_named():
    """To vLLM it is no "Linear"."""
    config = describe({"model.decoder.layers.0.fc1": DYNAMIC, "lm_head": DYNAMIC})
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert config["ignore"] == []


@pytest.mark.parametrize(
    ("spec", "method", "layout"),
    [
        *((bits(n), "gptq", "gptq") for n in (2, 3, 4, 8)),
        *((bits(n), "compressed-tensors", "pack-quantized") for n in (1, 5, 6, 7)),
        (DYNAMIC, "compressed-tensors", "int-quantized"),
        (STATIC, "compressed-tensors", "int-quantized"),
    ],
)
def test_which_format_a_model_of_one_spec_gets(spec, method, layout):
    config = describe(dict.fromkeys([*OPT, "lm_head"], spec))
    assert config["quant_method"] == method
    assert config.get("format", "gptq") == layout
    assert {read(config).find(name) for name in [*OPT, "lm_head"]} == {FORMATS[layout](spec)}


def test_one_odd_module_decides_for_all():
    """A file has one quant_method: the 4-bit modules are then written as pack-quantized."""
    specs = dict.fromkeys(OPT, bits(4)) | {OPT[0]: bits(5)}
    assert {read(describe(specs)).find(name).name for name in specs} == {"pack-quantized"}


WEIGHT_ONLY = st.builds(
    bits,
    st.integers(1, 8),
    st.sampled_from([-1, 1, 32, 77, 128]),
    st.sampled_from(["sym", "asym"]),
)
GPTQ_ONLY = WEIGHT_ONLY.filter(lambda spec: spec.bits in (2, 3, 4, 8))
ANY = st.one_of(WEIGHT_ONLY, st.just(DYNAMIC), st.just(STATIC))


@given(st.data())
def test_every_module_gets_its_spec_back(data):
    names = data.draw(st.sampled_from([LLAMA, OPT, BLOOM, [*OPT, "project_out"], ["a-b.0.c+d"]]))
    names = [*names, "lm_head"] if data.draw(st.booleans(), "head") else names
    some = data.draw(st.lists(data.draw(st.sampled_from([GPTQ_ONLY, ANY])), min_size=1, max_size=3))
    choice = st.sampled_from([*some, DENSE])
    specs = {name: data.draw(choice) for name in names}
    if all(spec == DENSE for spec in specs.values()):
        specs[names[0]] = some[0]
    config = describe(specs, desc_act=data.draw(st.booleans(), "desc_act"))
    found = read(config)
    assert {name: spec_of(found, name) for name in names} == specs
    assert found.find("lm_head") is None or specs.get("lm_head", DENSE) != DENSE


@given(st.lists(st.sampled_from([bits(4, 32), bits(6, -1, "sym"), DYNAMIC, STATIC, DENSE])))
def test_compressed_tensors_reads_what_we_describe(drawn):
    specs = dict(zip(LLAMA, drawn, strict=False)) | {"x.fc": DYNAMIC, "lm_head": DENSE}
    config = describe(specs)
    for name in [*list(specs)[:20], "lm_head"]:
        theirs, ours = their_answer(config, name), read(config).find(name)
        assert (theirs is None) == (specs[name] == DENSE)
        if theirs is not None:
            assert_described(ours, theirs)


def test_how_the_integers_were_chosen_is_not_told():
    """Specs that differ in it alone are one to a reader of the file."""
    specs = dict.fromkeys(OPT, bits(4))
    assert describe(specs | {OPT[0]: replace(bits(4), algorithm="gptq")}) == describe(specs)


def test_a_model_at_16_bits_is_not_described():
    with pytest.raises(ValueError, match="every module is at 16 bits"):
        describe(dict.fromkeys(OPT, DENSE))
