"""What config.json says of families of which each has an architecture that is like no other."""

from __future__ import annotations

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


def read_glm(metadata: Metadata, found: GGUF) -> dict[str, object]:
    values = read_llama(metadata, found, same=(VALUES,))
    head_dim, rope = values["head_dim"], values["rope_parameters"]
    assert isinstance(head_dim, int) and isinstance(rope, dict)  # as `read_sizes` makes them
    rope |= read_partial(metadata, head_dim)
    biases = {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"}
    # Where nothing is said of padding, transformers has an id that the model may not have.
    return values | {"attention_bias": not biases.isdisjoint(found.tensors), "pad_token_id": None}


def read_chatglm(metadata: Metadata, found: GGUF) -> dict[str, object]:
    # llama.cpp knows no heads of another size there.
    hidden = metadata.count(metadata.own("embedding_length"))
    return read_glm(metadata, found) | {"head_dim": hidden // count_heads(metadata)}


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
