"""Small models that tests of generation share."""

from __future__ import annotations

from transformers import (
    BloomConfig,
    LlamaConfig,
    OPTConfig,
)

VOCAB = 60
SMALL = {
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=36, n_head=6, n_layer=2),
    "llama": LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
}
