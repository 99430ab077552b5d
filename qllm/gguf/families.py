"""What config.json says of families of which each has an architecture that is like no other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qllm.errors import UserError
from qllm.gguf.file import GGUF
from qllm.gguf.hyperparameters import (
    VALUES,
    count_heads,
    read_layer_types,
    read_llama,
    read_partial,
    read_sizes,
)
from qllm.gguf.metadata import Metadata

OLMO_EPS = 1e-5


def read_glm(metadata: Metadata, found: GGUF) -> dict[str, object]:
    values = read_llama(metadata, found, same=(VALUES,))
    _add_share(metadata, values)
    biases = {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"}
    # Where nothing is said of padding, transformers has an id that the model may not have.
    return values | {"attention_bias": not biases.isdisjoint(found.tensors), "pad_token_id": None}


def _add_share(metadata: Metadata, values: dict[str, object]) -> None:
    """Add the share of a head that RoPE rotates to what `read_sizes` found."""
    head_dim, rope = values["head_dim"], values["rope_parameters"]
    assert isinstance(head_dim, int) and isinstance(rope, dict)  # as it makes them
    rope |= read_partial(metadata, head_dim)


def read_chatglm(metadata: Metadata, found: GGUF) -> dict[str, object]:
    return read_glm(metadata, found) | _shared_out(metadata)


def _shared_out(metadata: Metadata) -> dict[str, object]:
    """Heads that share out the hidden size, where llama.cpp knows no others."""
    hidden = metadata.count(metadata.own("embedding_length"))
    return {"head_dim": hidden // count_heads(metadata)}


def read_exaone4(metadata: Metadata, found: GGUF) -> dict[str, object]:
    # llama.cpp knows the size that has windows by its layers.
    layers, own = metadata.count(metadata.own("block_count")), metadata.own
    values = read_llama(metadata, found) | _shared_out(metadata)
    if layers != 64:
        return values | {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    window = metadata.count(own("attention.sliding_window"), 4096)
    return values | {"sliding_window": window, "layer_types": read_layer_types(metadata, layers, 4)}


def read_ernie4_5(metadata: Metadata, found: GGUF) -> dict[str, object]:
    bias = "blk.0.attn_output.bias" in found.tensors
    return read_llama(metadata, found) | {"use_bias": bias, "pad_token_id": None}


def read_stablelm(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    values = read_sizes(metadata, found, same=(VALUES,))
    _add_share(metadata, values)
    return values | {
        "layer_norm_eps": metadata.number(own("attention.layer_norm_epsilon")),
        "use_qkv_bias": "blk.0.attn_q.bias" in found.tensors,
        # By which llama.cpp knows it, whatever a key says.
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in found.tensors,
    }


def read_phi(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    values = read_sizes(metadata, found, same=(VALUES,))
    _add_share(metadata, values)
    return values | {"layer_norm_eps": metadata.number(own("attention.layer_norm_epsilon"))}


def read_olmo(metadata: Metadata, found: GGUF) -> dict[str, object]:
    key = metadata.own("attention.layer_norm_epsilon")
    if abs(metadata.number(key) - OLMO_EPS) > 1e-8:
        raise UserError(f"{found.path}: {key} is {metadata.values[key]}, not OLMo's {OLMO_EPS}")
    return read_sizes(metadata, found) | {"pad_token_id": None}


def read_seed_oss(metadata: Metadata, found: GGUF) -> dict[str, object]:
    bias = "blk.0.attn_q.bias" in found.tensors
    output_bias = "blk.0.attn_output.bias" in found.tensors
    return read_llama(metadata, found) | {
        "attention_bias": bias,
        "attention_out_bias": output_bias,
        "pad_token_id": None,
    }


def read_cohere(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    return read_sizes(metadata, found) | {
        "layer_norm_eps": metadata.number(own("attention.layer_norm_epsilon")),
        "logit_scale": metadata.number(own("logit_scale")),
        "pad_token_id": None,
    }


def read_cohere2(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    return read_cohere(metadata, found) | {
        "sliding_window": metadata.count(own("attention.sliding_window"), 4096),
        "layer_types": read_layer_types(metadata, metadata.count(own("block_count")), every=4),
    }


# Of both kinds of Qwen3.5: what stands behind attention is the norm in front of the MLP.
QWEN3_5: Mapping[str, Any] = {
    "norm_offset": 1.0,
    "parts": {"post_attention_norm": "mlp_norm"},
    "predicts": True,
    "written": False,
}


def read_qwen3_5(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    values = read_llama(metadata, found, same=(VALUES,))
    _add_share(metadata, values)
    layers, heads = values["num_hidden_layers"], metadata.count(own("ssm.time_step_rank"))
    assert isinstance(layers, int)  # as `read_sizes` counts them
    dim, width = (metadata.count(own(f"ssm.{key}")) for key in ("state_size", "inner_size"))
    if width != heads * dim:
        raise UserError(
            f"{found.path}: {own('ssm.inner_size')} is {width}, {heads} heads of {dim} channels "
            f"have {heads * dim}"
        )
    return values | {
        # Layers behind the last one say what comes after the next token.
        "num_hidden_layers": layers - metadata.count(own("nextn_predict_layers"), 0),
        "full_attention_interval": metadata.count(own("full_attention_interval"), 4),
        "linear_num_key_heads": metadata.count(own("ssm.group_count")),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": dim,
        "linear_value_head_dim": dim,
        "linear_conv_kernel_dim": metadata.count(own("ssm.conv_kernel")),
        "pad_token_id": None,
    }
