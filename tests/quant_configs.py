"""Configs of quantized checkpoints: others' as they are found, and how they are read."""

from __future__ import annotations

import copy
import json

import torch
from compressed_tensors.quantization import QuantizationConfig as TheirConfig
from compressed_tensors.utils.match import is_match, match_targets

from qllm.checkpoint.formats import Format, parse
from qllm.config import QuantSpec

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
# As AutoRound 0.16.1 writes it.
AUTO_ROUND = {
    "amp": False,
    "autoround_version": "0.16.1",
    "bits": 4,
    "block_name_to_quantize": "model.layers",
    "data_type": "int",
    "enable_quanted_input": False,
    "group_size": 32,
    "packing_format": "auto_round:auto_gptq",
    "quant_method": "auto-round",
    "sym": True,
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
