"""`quantization_config`: others' as they are found, ours both ways, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig as TheirConfig
from compressed_tensors.utils.match import is_match, match_targets
from hypothesis import given
from hypothesis import strategies as st
from transformers import AwqConfig, GPTQConfig

from qllm import __version__
from qllm.checkpoint.formats import FORMATS, Format, describe, parse
from qllm.config import QuantSpec
from qllm.errors import UserError

DENSE = QuantSpec()
DYNAMIC, STATIC = QuantSpec.parse("8:tc-li"), QuantSpec.parse("8:tc")
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LLAMA = [f"model.layers.{i}.{name}" for i in range(12) for name in ATTENTION + MLP]
OPT = [
    f"model.decoder.layers.{i}.{name}"
    for i in range(3)
    for name in ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")
]
BLOOM = [f"transformer.h.{i}.self_attention.query_key_value" for i in range(3)]


def bits(number: int, group_size: int = 128, scheme: str = "asym") -> QuantSpec:
    return QuantSpec(number, group_size, scheme, "weight_only")


def read(config: object) -> object:
    """As from a file: nothing but what JSON holds."""
    return parse(json.loads(json.dumps(config)), "config.json")


def spec_of(config: object, module: str) -> QuantSpec:
    storage = config.find(module)
    return storage.spec if storage else DENSE


GPTQ = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
    "quant_method": "gptq",
}
AWQ = {
    "quant_method": "awq",
    "zero_point": True,
    "group_size": 128,
    "bits": 4,
    "version": "gemm",
    "modules_to_not_convert": None,
    "backend": "autoawq",
    "do_fuse": False,
}
W4A16 = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": "weight",
                "block_structure": None,
                "dynamic": False,
                "group_size": 128,
                "num_bits": 4,
                "observer": "mse",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "global_compression_ratio": 1.8,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
}
W8A8 = copy.deepcopy(W4A16) | {"format": "int-quantized"}
W8A8["config_groups"]["group_0"]["weights"] |= {
    "num_bits": 8,
    "group_size": None,
    "strategy": "channel",
}
W8A8["config_groups"]["group_0"]["input_activations"] = {
    "actorder": None,
    "dynamic": True,
    "group_size": None,
    "num_bits": 8,
    "observer": None,
    "strategy": "token",
    "symmetric": True,
    "type": "int",
}


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


def group(targets, layout=None, inputs=None, **weights):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"} | weights
    found = {"targets": targets, "weights": weights, "input_activations": inputs}
    return found | ({"format": layout} if layout else {})


def compressed(*groups, layout="mixed-precision", ignore=()):
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {f"group_{i}": one for i, one in enumerate(groups)},
        "ignore": list(ignore),
    }


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
TENSOR = TOKEN | {"strategy": "tensor", "dynamic": False}
MIXED = compressed(
    group(["Linear"], "pack-quantized", symmetric=False, strategy="group", group_size=32),
    group(["re:.*layers.1\\..*", "re:.*mlp.*"], "int-quantized", TOKEN, num_bits=8),
    group(["model.layers.0.mlp.up_proj"], "int-quantized", TENSOR, num_bits=8),
    group(["re:.*layers.2\\..*"], "int-quantized", num_bits=8),
    group(["transformer.h.1.mlp.fc"], "pack-quantized", num_bits=2),
    ignore=["lm_head", "re:.*down_proj", "model.layers.2.mlp.gate_proj", "model.layers.5.mlp"],
)


def their_answer(config: dict, module: str):
    """The scheme that compressed-tensors gives a linear layer, None for none."""
    config = TheirConfig.model_validate(config)
    linear = torch.nn.Linear(1, 1, device="meta")
    schemes = {t: s for one in config.config_groups.values() for t, s in [*zip_targets(one)]}
    if is_match(module, linear, config.ignore):
        return None
    targets = match_targets(module, linear, schemes)
    return schemes[targets[0]] if targets else None


def zip_targets(scheme):
    return ((target, scheme) for target in scheme.targets)


@pytest.mark.parametrize(
    "module", [*LLAMA, "lm_head", "model.layers.1.other", "transformer.h.1.mlp.fc"]
)
def test_compressed_tensors_finds_the_same_group(module):
    """A name before a pattern, patterns in their order, the class last, and before all: ignore."""
    found, theirs = read(MIXED).find(module), their_answer(MIXED, module)
    assert (found is None) == (theirs is None)
    if found is not None:
        assert_described(found, theirs)


def assert_described(storage: Format, scheme) -> None:
    weights, inputs, spec = scheme.weights, scheme.input_activations, storage.spec
    assert storage.name == scheme.format
    assert spec.bits == weights.num_bits
    assert (spec.scheme == "sym") == weights.symmetric
    assert weights.strategy == ("channel" if spec.group_size == -1 else "group")
    assert (weights.group_size or -1) == spec.group_size
    kinds = {None: "weight_only", "token": "w8a8_dynamic", "tensor": "w8a8_static"}
    assert spec.kind == kinds[inputs and inputs.strategy]
    assert inputs is None or inputs.dynamic == (spec.kind == "w8a8_dynamic")


def test_strategies_that_follow_from_the_group_size():
    """As compressed-tensors takes them where the file is silent."""
    for size, expected in ((-1, bits(8, -1, "sym")), (64, bits(8, 64, "sym"))):
        weights = {"num_bits": 8, "group_size": size}
        one = {"targets": ["Linear"], "weights": weights}
        found = read(compressed(one, layout="int-quantized")).find("fc1")
        assert found == FORMATS["int-quantized"](expected)
    one = {"targets": ["Linear"], "weights": {}, "input_activations": {}}
    assert read(compressed(one, layout="int-quantized")).find("fc1").spec == STATIC


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


def test_names_joined_by_vllm():
    """It asks for qkv_proj and gate_up_proj, which no file has: whole sets get a rule for them."""
    specs = dict.fromkeys(LLAMA, bits(4))
    specs |= {name: bits(8) for name in LLAMA if name.startswith("model.layers.3.")}
    specs["model.layers.5.mlp.up_proj"] = bits(8)
    config = read(describe(specs))
    assert config.find("model.layers.3.self_attn.qkv_proj").spec.bits == 8
    assert config.find("model.layers.3.mlp.gate_up_proj").spec.bits == 8
    assert config.find("model.layers.5.mlp.gate_up_proj").spec.bits == 4
    assert config.find("model.layers.4.self_attn.qkv_proj").spec.bits == 4


def with_weights(config, **weights):
    config = copy.deepcopy(config)
    config["config_groups"]["group_0"]["weights"] |= weights
    return config


def with_group(config, **values):
    config = copy.deepcopy(config)
    config["config_groups"]["group_0"] |= values
    return config


def with_inputs(**values):
    inputs = W8A8["config_groups"]["group_0"]["input_activations"] | values
    return with_group(W8A8, input_activations=inputs)


G0 = re.escape('quantization_config.config_groups["group_0"]')
REFUSED = [
    ([], "quantization_config is a list, expected a JSON object"),
    (None, "quantization_config is null, expected a JSON object"),
    ({}, "has quant_method null; expected a text"),
    ({"quant_method": 3}, "has quant_method 3; expected a text"),
    ({"quant_method": "fp8"}, 'quant_method "fp8"; QLLM reads gptq, awq and compressed-tensors'),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 'quant_method "bitsandbytes"; QLLM'),
    ({"quant_method": "auto-round"}, 'quant_method "auto-round"; QLLM reads'),
    ({"quant_method": "x" * 999}, r'quant_method "x{56}\.\.\.; QLLM reads'),
    (GPTQ | {"bits": 5}, "has bits 5; QLLM reads 2 or 3 or 4 or 8"),
    (GPTQ | {"bits": 4.0}, r"has bits 4\.0; expected a whole number"),
    (GPTQ | {"bits": True}, "has bits true; expected a whole number"),
    (GPTQ | {"bits": None}, "has bits null; expected a whole number"),
    (GPTQ | {"group_size": 0}, "has group_size 0; expected 1 or more, or -1"),
    (GPTQ | {"group_size": -2}, "has group_size -2; expected 1 or more, or -1"),
    (GPTQ | {"group_size": "all"}, 'has group_size "all"; expected a whole number'),
    (GPTQ | {"sym": "yes"}, 'has sym "yes"; expected true or false'),
    (GPTQ | {"lm_head": 1}, "has lm_head 1; expected true or false"),
    (GPTQ | {"checkpoint_format": "marlin"}, 'checkpoint_format "marlin"; QLLM reads "gptq" or'),
    (GPTQ | {"checkpoint_format": "gptq_p"}, 'checkpoint_format "gptq_p"; QLLM reads "gptq" or'),
    (GPTQ | {"format": "bitblas"}, 'has checkpoint_format "bitblas"; QLLM reads'),
    (GPTQ | {"is_marlin_format": True}, "is_marlin_format true; QLLM reads checkpoints without"),
    (GPTQ | {"rotation": "hadamard"}, 'rotation "hadamard"; QLLM reads checkpoints without'),
    (GPTQ | {"pack_dtype": "int16"}, 'pack_dtype "int16"; QLLM reads "int32"'),
    (GPTQ | {"dynamic": [1]}, r"quantization_config\.dynamic is a list, expected a JSON object"),
    (GPTQ | {"dynamic": {"+:x": 8}}, r'dynamic\["\+:x"\] is 8, expected a JSON object'),
    (GPTQ | {"dynamic": {"+:x": {"bits": 6}}}, r'dynamic\["\+:x"\] has bits 6; QLLM reads'),
    (GPTQ | {"dynamic": {"+:x": {"format": "marlin"}}}, 'has format "marlin"; QLLM reads'),
    (GPTQ | {"dynamic": {"-:(": {}}}, r"'\(' is no regular expression"),
    (GPTQ | {"modules_in_block_to_quantize": "fc1"}, '"fc1"; expected a list of texts'),
    (GPTQ | {"modules_in_block_to_quantize": [[1]]}, "a list; expected a list of texts"),
    (AWQ | {"version": "gemv"}, 'has version "gemv"; QLLM reads "gemm"'),
    (AWQ | {"version": "gemv_fast"}, 'has version "gemv_fast"; QLLM reads "gemm"'),
    (AWQ | {"version": "marlin"}, 'has version "marlin"; QLLM reads "gemm"'),
    (AWQ | {"backend": "llm-awq"}, 'has backend "llm-awq"; QLLM reads what AutoAWQ wrote'),
    (AWQ | {"bits": 8}, "has bits 8; QLLM reads 4"),
    (AWQ | {"zero_point": False}, "has zero_point false; QLLM reads true"),
    (AWQ | {"group_size": 0}, "has group_size 0; expected"),
    (AWQ | {"modules_to_not_convert": {}}, "modules_to_not_convert an object; expected a list"),
    (W4A16 | {"format": "float-quantized"}, 'format "float-quantized"; QLLM reads "pack-quant'),
    (W4A16 | {"format": "marlin-24"}, 'format "marlin-24"; QLLM reads'),
    (W4A16 | {"format": "mixed-precision"}, 'format "mixed-precision"; QLLM reads'),
    (W4A16 | {"format": "dense"}, 'format "dense"; QLLM reads'),
    (W4A16 | {"format": None}, "format null; QLLM reads"),
    (with_group(W4A16, format="nvfp4-pack-quantized"), 'format "nvfp4-pack-quantized"; QLLM'),
    (W4A16 | {"config_groups": {}}, "no config_groups with targets; it says of no module"),
    (W4A16 | {"config_groups": {"W4A16": ["Linear"]}}, r'\["W4A16"\] is a list, expected'),
    (W4A16 | {"config_groups": [1]}, "config_groups is a list, expected a JSON object"),
    (with_group(W4A16, targets="Linear"), f'{G0} has targets "Linear"; expected a list of texts'),
    (with_group(W4A16, targets=["re:("]), r"'\(' is no regular expression"),
    (with_group(W4A16, weights=None), rf"{G0}\.weights is null, expected a JSON object"),
    (with_group(W4A16, output_activations={"num_bits": 8}), "output_activations an object; QLLM"),
    (with_group(W4A16, input_activations=TOKEN), 'format "pack-quantized"; QLLM reads "int-quant'),
    (W4A16 | {"ignore": [3]}, "has ignore a list; expected a list of texts"),
    (W4A16 | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme an object; QLLM reads check"),
    (W4A16 | {"transform_config": {"config_groups": {}}}, "transform_config an object; QLLM reads"),
    (
        W4A16 | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        r'sparsity_config has format "sparse-24-bitmask"; QLLM reads "dense"',
    ),
    (with_weights(W4A16, type="float"), rf'{G0}\.weights has type "float"; QLLM reads "int"'),
    (with_weights(W4A16, num_bits=16), "num_bits 16; QLLM reads 1 or 2 or"),
    (with_weights(W4A16, num_bits=0), "num_bits 0; QLLM reads 1 or 2 or"),
    (with_weights(W4A16, strategy="block"), 'strategy "block"; QLLM reads "channel" or "group"'),
    (with_weights(W4A16, strategy="tensor"), 'strategy "tensor"; QLLM reads "channel" or "group"'),
    (with_weights(W4A16, group_size=None), "group_size null; expected a whole number"),
    (with_weights(W4A16, dynamic=True), "dynamic true; QLLM reads checkpoints without dynamic"),
    (with_weights(W8A8, num_bits=4), "num_bits 4; QLLM reads 8"),
    (with_weights(W8A8, symmetric=False), "symmetric false; QLLM reads true"),
    (
        with_weights(W8A8, strategy="group", group_size=64),
        'strategy "group"; QLLM reads "channel" or "tensor"',
    ),
    (with_inputs(type="float"), r'input_activations has type "float"; QLLM reads "int"'),
    (with_inputs(symmetric=False), r"input_activations has symmetric false; QLLM reads true"),
    (with_inputs(num_bits=4), r"input_activations has num_bits 4; QLLM reads 8"),
    (with_inputs(strategy="tensor"), 'strategy "tensor" and dynamic true; QLLM reads "token"'),
    (with_inputs(dynamic=False), 'strategy "token" and dynamic false; QLLM reads "token"'),
    (with_inputs(strategy="group"), 'strategy "group" and dynamic true; QLLM reads "token"'),
    (with_inputs(dynamic="local"), 'has dynamic "local"; expected true or false'),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_is_refused(config, message):
    with pytest.raises(UserError, match=message) as caught:
        read(config)
    text = str(caught.value)
    assert text.startswith("config.json: quantization_config")
    assert "\n" not in text
    assert len(text) < 300
