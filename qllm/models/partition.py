"""What of a decoder one process of several keeps: its stage's layers, and its shards of them.

A decoder does this while it is on the meta device, so that loading reads and holds nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from qllm.config import DeltaNetConfig, ModelConfig
from qllm.errors import UserError
from qllm.layers import Linear
from qllm.models.attention import WideNormedAttention
from qllm.models.delta_net import GatedDeltaNet
from qllm.models.embeddings import Embedding, QuantizedEmbedding
from qllm.parallel.group import Group
from qllm.parallel.layers import (
    shard_attention,
    shard_classifier,
    shard_delta_net,
    shard_embedding,
    shard_mlp,
    shard_quantized_embedding,
)
from qllm.parallel.pipeline import PipelineStage
from qllm.parallel.plan import shard_heads

if TYPE_CHECKING:
    from qllm.models.decoder import Decoder


def keep_stage(model: Decoder, stage: PipelineStage, halves: range) -> None:
    """Leave one stage's halves of layers, and what is in front of the first or behind the last.

    Raises:
        UserError: layers take more than the states that a stage would send to the next.
    """
    if model.config.has_ties:
        raise UserError(
            f"`pp` does not know this {model.config.family}, whose layers share keys and values or "
            "have inputs of their own; give `tp` instead"
        )
    for index, layer in enumerate(model.layers):
        layer.has_attention, layer.has_mlp = 2 * index in halves, 2 * index + 1 in halves
        for name, _ in list(layer.named_children()):  # "attention…" or "mlp…"
            if not (layer.has_mlp if name.startswith("mlp") else layer.has_attention):
                setattr(layer, name, nn.Identity())
    if not stage.first:
        model.embed = model.embed_norm = model.project_in = nn.Identity()
        for name, _ in list(model.positions.named_buffers()):
            setattr(model.positions, name, None)  # the first stage alone adds them to embeddings
    if not stage.last:
        model.final_norm = model.project_out = model.lm_head = nn.Identity()


def keep_shards(model: Decoder, group: Group, mode: str) -> None:
    """Leave one rank's shards of the layers, the embedding and the LM head.

    Raises:
        UserError: there are more ranks than heads.
    """
    config = model.config
    heads = shard_heads(config.num_heads, config.num_kv_heads, group.size)[group.rank]

    def own_heads(kv_heads: int) -> int:
        return len(shard_heads(config.num_heads, kv_heads, group.size)[group.rank].keys)

    shapes = tuple(replace(s, num_kv_heads=own_heads(s.num_kv_heads)) for s in config.shapes)
    model.cache_config = replace(config, num_kv_heads=len(heads.keys), shapes=shapes)
    for layer in model.layers:
        attention = layer.attention if layer.has_attention else None
        if isinstance(attention, GatedDeltaNet):
            own_net = _keep_delta_net(attention, config, group, mode)
            model.cache_config = replace(model.cache_config, delta_net=own_net)
        elif attention is not None:
            wide, gated = isinstance(attention, WideNormedAttention), config.attention_gate
            own = shard_attention(attention, group, mode, gather=wide, gated=gated)
            if isinstance(attention, WideNormedAttention):
                attention.own = own
            if attention.sinks is not None:
                attention.sinks.ranges = (heads.queries,)
        if layer.has_mlp:
            for mlp in layer.mlp.mlps():
                shard_mlp(mlp, group, mode)
    if isinstance(model.embed, Embedding):  # and no stage without it
        model.embed = shard_embedding(model.embed.weight, group)
    elif isinstance(model.embed, QuantizedEmbedding):
        model.embed = shard_quantized_embedding(model.embed.linear, group, model.dtype)
    if isinstance(model.lm_head, Linear):
        model.lm_head = shard_classifier(model.lm_head, group)
    if model.positions.slopes is not None:
        queries = heads.queries
        model.positions.slopes = model.positions.slopes[queries.start : queries.stop].clone()


def _keep_delta_net(
    delta: GatedDeltaNet, config: ModelConfig, group: Group, mode: str
) -> DeltaNetConfig:
    """Leave one rank's shard of a delta net; returns what it is of."""
    whole = config.delta_net
    assert whole is not None  # there is one
    heads = shard_heads(whole.value_heads, whole.key_heads, group.size)
    mine, dims = heads[group.rank], (whole.key_dim, whole.value_dim)
    delta.conv.ranges = shard_delta_net(delta, heads, dims, group, mode)
    delta.log_decay.ranges = delta.decay_bias.ranges = (mine.queries,)
    own = replace(whole, key_heads=len(mine.keys), value_heads=len(mine.queries))
    delta.is_of(own)
    return own
