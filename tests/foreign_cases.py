"""Checkpoints as others write them, and what is to become of each.

What is packed is packed in numpy from the formats' descriptions, or by the library that writes the
format (see tests/foreign.py).
"""

from __future__ import annotations

import json

from foreign import Case, awq, compressed, gptq, quanto
from foreign_changes import (
    configured,
    head_quantized,
    indexed,
    moved,
    named,
    one_dense,
    other_order,
    some_quantized,
    tables_quantized,
    three_heads,
    with_tensors,
    without,
)
from foreign_floats import CASES as FLOATS
from foreign_integers import CASES as INTEGERS
from foreign_mixed import CASES as MIXED
from foreign_torchao import CASES as TORCHAO

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}


def ct(bits: int, group: int | None, *, sym: bool, layout: str = "pack-quantized") -> dict:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        # Of versions that came later, or may come.
        "scale_dtype": None,
        "zp_dtype": "torch.int8",
        "observer": "memoryless_minmax",
        "brand_new": True,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "version": "0.99.0",
    }


LEFTOVERS = (
    "v_head.summary.weight",
    "score.weight",
    "model.layers.0.self_attn.k_scale",
    "model.layers.1.self_attn.attn.v_scale",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.q_proj.lora_A.default.weight",
    "model.layers.1.mlp.down_proj.bias",
    "lm_head.bias",
    "model.norm.bias",
)
O_BIAS = "model.layers.0.self_attn.o_proj.bias"
CASES = {
    **MIXED,
    **FLOATS,
    **INTEGERS,
    **TORCHAO,
    "GPTQ v1": Case(gptq(), GPTQ),
    "GPTQ v1, OPT": Case(gptq(), GPTQ, family="opt"),
    "GPTQ v1, GLM": Case(gptq(), GPTQ, family="glm"),
    "GPTQ v1, BLOOM": Case(gptq(), GPTQ, family="bloom"),
    "GPTQ v2": Case(gptq(v1=False), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "GPTQ v2 by its other name": Case(gptq(v1=False), GPTQ | {"format": "gptq_v2"}),
    "GPTQ, 2 bits": Case(gptq(2), GPTQ | {"bits": 2}),
    "GPTQ, 3 bits": Case(gptq(3), GPTQ | {"bits": 3}),
    "GPTQ, 8 bits, symmetric": Case(gptq(8, sym=True), GPTQ | {"bits": 8, "sym": True}),
    "GPTQ, act-order": Case(gptq(shuffled=True), GPTQ | {"desc_act": True}),
    "GPTQ, per channel": Case(gptq(group=-1), GPTQ | {"group_size": -1}),
    "GPTQ, a null for a group size": Case(gptq(group=-1), GPTQ | {"group_size": None}),
    "GPTQ, numbers as texts": Case(gptq(), GPTQ | {"bits": "4", "group_size": "32"}),
    "GPTQ, keys of newer versions": Case(
        gptq(),
        GPTQ
        | {
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "is_marlin_format": False,
            "hyb_act": False,
            "act_group_aware": True,
            "dynamic": None,
            "meta": {"quantizer": ["gptqmodel:99.0"]},
            "brand_new": {"a": [1]},
        },
    ),
    "GPTQ, biases of zeros": Case(gptq(bias=0.0), GPTQ, note=r"_proj\.bias and 13 more"),
    "GPTQ, biases of ones": Case(
        gptq(bias=1.0), GPTQ, error=r"_proj\.bias, which is not 0, and no llama of its config"
    ),
    "GPTQ, settings in their own file": Case(
        gptq(), GPTQ, lambda f: moved(f, "quantize_config.json", quant_method=None)
    ),
    "GPTQ, AutoGPTQ's names": Case(
        gptq(),
        GPTQ,
        lambda f: (moved(f, "quantize_config.json"), named(f, "gptq_model-4bit-32g.safetensors")),
    ),
    "GPTQ, AutoGPTQ's torch file": Case(
        gptq(), GPTQ, lambda f: named(f, "gptq_model-4bit-32g.bin")
    ),
    "GPTQ, one file of any name": Case(gptq(), GPTQ, lambda f: named(f, "model-4bit.safetensors")),
    "one shard without an index": Case(
        change=lambda f: named(f, "model-00001-of-00001.safetensors")
    ),
    "two shards without an index": Case(
        change=lambda f: named(f, *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)))
    ),
    "a shard of two": Case(
        change=lambda f: named(f, "model-00001-of-00002.safetensors"),
        error=r"holds model-00001-of-00002\.safetensors: neither one file, nor all of",
    ),
    "GPTQ, MLPs alone": Case(
        None,
        GPTQ,
        some_quantized("gate_proj", "up_proj", config=[["mlp.gate_proj"], ["mlp.up_proj"]]),
    ),
    "GPTQ, a list that is too short": Case(
        None,
        GPTQ,
        some_quantized("down_proj", "o_proj", config=["mlp.down_proj"]),
        error=r"lacks .*o_proj\.weight and holds .*o_proj\.qweight.*quantization_config.*leaves",
    ),
    "GPTQ, parts of one matrix": Case(
        None,
        GPTQ,
        some_quantized("q_proj", config=["self_attn.q_proj"]),
        error="are one matrix here, and are not all quantized in the same way",
    ),
    "GPTQ, nothing in config.json": Case(
        gptq(),
        error=r"holds model\.layers\.0\.self_attn\.q_proj\.qweight.*config\.json has no "
        r"quantization_config, and beside it there is no quantize_config\.json or quant_config",
    ),
    "GPTQ, another format than config.json says": Case(
        gptq(),
        ct(4, 32, sym=False),
        error=r"lacks .*q_proj\.weight_packed, which .* implies; it holds .*q_proj\.qweight",
    ),
    "GPTQ, a quantized head": Case(gptq(), GPTQ, head_quantized),
    "GPTQ, a linear that is not": Case(gptq(), GPTQ, one_dense),
    "GPTQ, orders that differ": Case(gptq(), GPTQ, other_order, error="g_idx differ"),
    "AWQ": Case(awq(), AWQ),
    "AWQ, OPT": Case(awq(), AWQ, family="opt"),
    "AWQ, GLM": Case(awq(), AWQ, family="glm"),
    "AWQ, BLOOM": Case(awq(), AWQ, family="bloom"),
    "AWQ, symmetric, GPTQModel's": Case(
        awq(sym=True),
        {
            "bits": 4,
            "checkpoint_format": "gemm",
            "desc_act": False,
            "format": "gemm",
            "group_size": 32,
            "lm_head": False,
            "method": "awq",
            "pack_dtype": "int32",
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": False,
        },
    ),
    "AWQ, biases of zeros": Case(awq(bias=0.0), AWQ, note=r"_proj\.bias and 13 more"),
    "AWQ, biases of ones": Case(awq(bias=1.0), AWQ, error="which is not 0"),
    "AWQ, settings in their own file": Case(
        awq(),
        AWQ,
        lambda f: (
            f.beside.update(
                {
                    "quant_config.json": {
                        "zero_point": True,
                        "q_group_size": 32,
                        "w_bit": 4,
                        "version": "GEMM",
                        "modules_to_not_convert": None,
                    }
                }
            )
            or f.config.pop("quantization_config")
        ),
    ),
    "AWQ, no group size": Case(
        awq(128), AWQ, lambda f: f.config["quantization_config"].pop("group_size")
    ),
    "compressed-tensors, 4 bits": Case(compressed(4, 32, sym=False), ct(4, 32, sym=False)),
    "compressed-tensors, OPT": Case(
        compressed(4, 32, sym=False), ct(4, 32, sym=False), family="opt"
    ),
    "compressed-tensors, GLM": Case(
        compressed(8, -1, sym=True), ct(8, None, sym=True), family="glm"
    ),
    "compressed-tensors, BLOOM": Case(
        compressed(8, -1, sym=True), ct(8, None, sym=True), family="bloom"
    ),
    "compressed-tensors, 5 bits per channel": Case(
        compressed(5, -1, sym=False), ct(5, None, sym=False)
    ),
    "compressed-tensors, int-quantized": Case(
        compressed(8, 32, sym=False, packed=False), ct(8, 32, sym=False, layout="int-quantized")
    ),
    "compressed-tensors, embeddings of their own head": Case(
        compressed(4, 32, sym=False),
        ct(4, 32, sym=False),
        tables_quantized(compressed(4, 32, sym=False), "Linear", "Embedding"),
    ),
    "compressed-tensors, embeddings alone": Case(
        None,
        ct(5, None, sym=True),
        tables_quantized(compressed(5, -1, sym=True), "re:.*word_embeddings$"),
        family="bloom",
    ),
    "compressed-tensors, learned positions, too": Case(
        compressed(3, -1, sym=False),
        ct(3, None, sym=False),
        tables_quantized(compressed(3, -1, sym=False), "Linear", "Embedding"),
        family="opt",
    ),
    "compressed-tensors, int-quantized embeddings": Case(
        compressed(8, 32, sym=False, packed=False),
        ct(8, 32, sym=False, layout="int-quantized"),
        tables_quantized(compressed(8, 32, sym=False, packed=False), "Linear", "Embedding"),
        family="opt",
    ),
    "compressed-tensors, a head beside the embedding that it was tied to": Case(
        None,
        ct(4, 32, sym=True),
        tables_quantized(compressed(4, 32, sym=True), "Embedding", head=True),
        family="bloom",
    ),
    "compressed-tensors, an embedding with activations": Case(
        None,
        ct(8, None, sym=True, layout="int-quantized"),
        tables_quantized(
            compressed(8, -1, sym=True, packed=False),
            "Embedding",
            input_activations={"num_bits": 8, "strategy": "token", "dynamic": True},
        ),
        error=r"model\.embed_tokens is an embedding, and has no input_activations to quantize",
    ),
    "compressed-tensors, a null for what is ignored": Case(
        compressed(4, 32, sym=True), ct(4, 32, sym=True), configured(ignore=None)
    ),
    "compressed-tensors, its older key": Case(
        compressed(4, 32, sym=True),
        ct(4, 32, sym=True),
        lambda f: f.config.update(compression_config=f.config.pop("quantization_config")),
    ),
    "compressed-tensors, its oldest key": Case(
        compressed(4, 32, sym=True),
        ct(4, 32, sym=True),
        lambda f: f.config.update(
            compression_config={"quantization_config": f.config.pop("quantization_config")}
        ),
    ),
    "quanto": Case(
        quanto,
        error=r"q_proj\.weight and holds .*q_proj\.weight\._data.* in its place, a format",
    ),
    "an index that leaves out what nobody needs": Case(change=indexed),
    "an index that leaves tensors out": Case(
        change=lambda f: indexed(f, left_out=1), error=r"lacks model\.embed_tokens\.weight"
    ),
    "tensors that change nothing": Case(
        change=lambda f: with_tensors(f, 0.0, *LEFTOVERS), note=f" and {len(LEFTOVERS) - 2} more"
    ),
    "a bias that changes something": Case(
        change=lambda f: with_tensors(f, 0.1, O_BIAS), error=f"{O_BIAS}, which is not 0"
    ),
    "a norm that llama has not": Case(
        change=lambda f: with_tensors(f, 1.0, "model.layers.0.self_attn.q_norm.weight"),
        error=r"q_norm\.weight, which no llama of its config\.json has",
    ),
    "one layer more": Case(
        change=lambda f: f.config.update(num_hidden_layers=1),
        error=r"layers\.1\..*, which no llama of its config\.json has",
    ),
    "float64": Case(
        change=lambda f: f.state.update({name: t.double() for name, t in f.state.items()})
    ),
    "heads that do not divide": Case(change=three_heads),
    "no head, and nothing says that it is tied": Case(
        change=without("tie_word_embeddings", "lm_head.weight"),
        error="has no tie_word_embeddings, which is false for llama: transformers would draw",
    ),
    "no head, and it is not tied": Case(
        change=lambda f: f.state.pop("lm_head.weight"),
        error=r"lacks lm_head\.weight, and tie_word_embeddings is false in its config\.json",
    ),
    "no head, and OPT's are tied": Case(change=without("tie_word_embeddings"), family="opt"),
    "a byte-order mark": Case(
        gptq(),
        GPTQ,
        lambda f: (
            moved(f, "quantize_config.json"),
            f.beside.update(
                {
                    name: b"\xef\xbb\xbf" + json.dumps(value).encode()
                    for name, value in {"config.json": f.config, **f.beside}.items()
                }
            ),
        ),
    ),
    "weights of another name": Case(
        change=lambda f: f.config.update(transformers_weights="other.safetensors"),
        error="transformers_weights is 'other.safetensors'",
    ),
}
