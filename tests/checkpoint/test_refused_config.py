"""`quantization_config`: what is refused."""

from __future__ import annotations

import copy
import re

import pytest
from foreign_floats import BITS4, FP8, MODELOPT
from foreign_floats import ct as float_config
from foreign_integers import AUTO_BITNET, BITNET, hqq_config, hqq_settings
from foreign_torchao import granularity, int8, intx, torchao_config, torchao_type
from quant_configs import AUTO_ROUND, AWQ, GPTQ, LLAMA, TOKEN, W4A16, W8A8, bits, read

from qllm.checkpoint.formats import describe
from qllm.errors import UserError


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


def torchao_of(kind, **data):
    return torchao_config(torchao_type(kind, **data))


DYNAMIC, PER_TENSOR = "Int8DynamicActivationInt8WeightConfig", granularity("PerTensor")
TORCHAO = torchao_config(int8())
G0 = re.escape('quantization_config.config_groups["group_0"]')
REFUSED = [
    ([], "quantization_config is a list, expected a JSON object"),
    (None, "quantization_config is null, expected a JSON object"),
    ({}, "has quant_method null; expected a text"),
    ({"quant_method": 3}, "has quant_method 3; expected a text"),
    ({"quant_method": "aqlm"}, 'quant_method "aqlm"; QLLM reads auto-round, awq, '),
    ({"quant_method": "bitsandbytes"}, "load_in_4bit and load_in_8bit both false; one of them"),
    (BITS4 | {"load_in_8bit": True}, "load_in_4bit and load_in_8bit both true; one of them"),
    (BITS4 | {"load_in_4bit": "yes"}, 'has load_in_4bit "yes"; expected true or false'),
    (FP8 | {"weight_block_size": [128]}, "weight_block_size a list; expected two whole numbers"),
    (FP8 | {"weight_block_size": [0, 1]}, "weight_block_size a list; expected two whole numbers"),
    (FP8 | {"weight_block_size": 128}, "weight_block_size 128; expected two whole numbers"),
    (MODELOPT | {"quant_algo": "W4A16_AWQ"}, 'quant_algo "W4A16_AWQ"; QLLM reads "FP8" or'),
    ({"quant_method": "modelopt"}, "has quant_algo null; expected a text"),
    ({"quant_method": "modelopt", "quantization": 3}, r"config\.quantization is 3, expected a"),
    ({"quant_method": "auto-round"}, "has bits null; expected a whole number"),
    (AUTO_ROUND | {"bits": 9}, "has bits 9; QLLM reads 2 or 3 or 4 or 5 or 6 or 7 or 8"),
    (AUTO_ROUND | {"data_type": "mx_fp"}, 'has data_type "mx_fp"; QLLM reads "int"'),
    (AUTO_ROUND | {"act_bits": 8}, "has act_bits 8; QLLM reads 16"),
    (AUTO_ROUND | {"packing_format": "auto_round:mlx"}, 'packing_format "auto_round:mlx"; QLLM'),
    (AUTO_ROUND | {"packing_format": None, "sym": False}, "has no packing_format; QLLM reads"),
    (AUTO_ROUND | {"rotation_config": {"a": 1}}, "rotation_config an object; QLLM reads"),
    (AUTO_ROUND | {"static_kv_dtype": "fp8"}, 'static_kv_dtype "fp8"; QLLM reads checkpoints'),
    (
        AUTO_ROUND | {"packing_format": "auto_round:auto_awq", "extra_config": {"x": {"bits": 8}}},
        r'extra_config\["x"\] has bits 8; QLLM reads 4',
    ),
    (AUTO_ROUND | {"extra_config": {"(x": {"bits": 8}}}, r"'\(x' is no regular expression"),
    ({"quant_method": "x" * 999}, r'quant_method "x{56}\.\.\.; QLLM reads'),
    ({"quant_method": "mlx", "mode": "q4"}, 'has mode "q4"; QLLM reads "affine" or "mxfp4" or'),
    ({"quant_method": "metal", "mode": "mxfp4"}, 'has mode "mxfp4"; QLLM reads "affine"'),
    ({"quant_method": "mlx", **{f"m{i}": False for i in range(10_000)}}, "has 10001 entries"),
    ({"quant_method": "mlx", "bits": 7}, "has bits 7; QLLM reads 2 or 3 or 4 or 5 or 6 or 8"),
    (
        AUTO_BITNET | {"quantization_mode": "online"},
        'has quantization_mode "online"; QLLM reads "offline"',
    ),
    (BITNET | {"use_rms_norm": True}, "has use_rms_norm true; QLLM reads checkpoints without"),
    (BITNET | {"linear_class": "bit"}, 'linear_class "bit"; QLLM reads "bitlinear" or "autobit'),
    (hqq_config(hqq_settings(4, 64, axis=0)), "weight_quant_params has axis 0; QLLM reads 1"),
    (hqq_config(hqq_settings(7, 64)), "has nbits 7; QLLM reads 1 or 2 or 3 or 4 or 5 or 6 or 8"),
    (hqq_config(hqq_settings(1.58, 64)), r"has nbits 1\.58; expected a whole number"),
    (hqq_config(hqq_settings(4, 64, view_as_float=True)), "view_as_float true; QLLM reads check"),
    (hqq_config(hqq_settings(4, 64, channel_wise=False)), "channel_wise false; QLLM reads true"),
    (hqq_config({"mlp.up_proj": {}}), r'\["mlp.up_proj"\].weight_quant_params is null, expected'),
    (hqq_config([]), r"quant_config is a list, expected a JSON object"),
    (TORCHAO | {"quant_type": "int8_weight_only"}, r'quant_type is "int8_weight_only", expected'),
    (TORCHAO | {"quant_type": {"default": {}}}, r"quant_type\.default has _type null; expected"),
    (torchao_of("UIntXWeightOnlyConfig"), '_type "UIntXWeightOnlyConfig"; QLLM reads "Int8W'),
    (torchao_config(int8() | {"_version": 1}), r"default has _version 1; QLLM reads 2"),
    (torchao_config(int8("PerBlock")), 'granularity has _type "PerBlock"; QLLM reads "PerRow"'),
    (torchao_config(int8("PerRow", dim=0)), r"granularity\._data has dim 0; QLLM reads -1 or 1"),
    (torchao_config(intx(9, -1)), 'has weight_dtype "int9"; QLLM reads "int1" or'),
    (
        torchao_of("Int4WeightOnlyConfig", int4_packing_format={"_data": "TILE_PACKED_TO_4D"}),
        'int4_packing_format "tile_packed_to_4d"; QLLM reads "plain"',
    ),
    (torchao_of(DYNAMIC, reduce_range=True), "has reduce_range true; QLLM reads checkpoints w"),
    (torchao_of(DYNAMIC, act_mapping_type="ASYMMETRIC"), 'act_mapping_type "asymmetric"; QLLM'),
    (torchao_of(DYNAMIC, granularity=PER_TENSOR), 'has _type "PerTensor"; QLLM reads "PerRow"$'),
    (torchao_of(DYNAMIC, granularity=[]), "has 0 of granularity; expected one, or two"),
    (
        torchao_of("FqnToConfig", fqn_to_config={"re:(": int8()}),
        "is no regular expression",
    ),
    (
        torchao_of("FqnToConfig", fqn_to_config={"re:a": int8(), "re:b": torchao_type(DYNAMIC)}),
        "patterns with and without int8 activations in fqn_to_config; QLLM reads those of one",
    ),
    (torchao_of("FqnToConfig", fqn_to_config={"a": 3}), r'fqn_to_config\["a"\] is 3, expected a'),
    (torchao_of("FqnToConfig"), r"module_fqn_to_config is null, expected a JSON object"),
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
    (AWQ | {"group_size": 0}, "has group_size 0; expected"),
    (AWQ | {"modules_to_not_convert": {}}, "modules_to_not_convert an object; expected a list"),
    (W4A16 | {"format": "float-quantized"}, r'weights has type "int"; QLLM reads "float"'),
    (float_config("float-quantized", num_bits=4), "weights has num_bits 4; QLLM reads 8"),
    (float_config("nvfp4-pack-quantized"), "weights has num_bits 8; QLLM reads 4"),
    (float_config("mxfp6-pack-quantized", 6), 'format "mxfp6-pack-quantized"; QLLM reads "pack-q'),
    (float_config("float-quantized", symmetric=False), "weights has symmetric false; QLLM reads"),
    (W4A16 | {"format": "marlin-24"}, 'format "marlin-24"; QLLM reads'),
    (W4A16 | {"format": "mixed-precision"}, 'format "mixed-precision"; QLLM reads'),
    (W4A16 | {"format": "dense"}, 'format "dense"; QLLM reads'),
    (W4A16 | {"format": None}, "format null; QLLM reads"),
    (W4A16 | {"config_groups": {}}, "no config_groups with targets; it says of no module"),
    (W4A16 | {"config_groups": {"W4A16": ["Linear"]}}, r'\["W4A16"\] is a list, expected'),
    (W4A16 | {"config_groups": [1]}, "config_groups is a list, expected a JSON object"),
    (with_group(W4A16, targets="Linear"), f'{G0} has targets "Linear"; expected a list of texts'),
    (with_group(W4A16, targets=["re:("]), r"'\(' is no regular expression"),
    (with_group(W4A16, weights=None), rf"{G0}\.weights is null, expected a JSON object"),
    (with_group(W4A16, output_activations={"num_bits": 8}), "output_activations an object; QLLM"),
    (with_group(W4A16, input_activations=TOKEN), 'format "pack-quantized"; QLLM reads "int-quant'),
    (W4A16 | {"ignore": [3]}, "has ignore a list; expected a list of texts"),
    (W4A16 | {"kv_cache_scheme": {"num_bits": 8}}, 'kv_cache_scheme has type "int"; QLLM reads'),
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
    (with_inputs(type="nf"), r'input_activations has type "nf"; QLLM reads "int"'),
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
