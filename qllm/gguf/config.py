"""A file's hyperparameters as the config.json that transformers would have for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from qllm.errors import UserError
from qllm.gguf.architectures import ARCHITECTURES, Architecture
from qllm.gguf.file import GGUF
from qllm.gguf.hyperparameters import TEMPERATURE
from qllm.gguf.metadata import Metadata

# Tokens that end a text whatever a file calls its EOS, of whatever type, as in llama.cpp.
ENDS = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
        *("<|end_of_text|>", "<EOT>", "_<EOT>", "<end_of_utterance>", "<eos>"),
        *("<|return|>", "<|call|>"),
    )
)
# Of a vocabulary with both of these (gpt-oss), that ends a part of an answer, and not the answer.
HARMONY, HARMONY_PART = {"<|return|>", "<|call|>"}, "<|end|>"
CONTROL_ENDS = ("</s>",)  # those that are of that type
END_KINDS = ("eos", "eot", "eom")  # of tokenizer.ggml.*_token_id: ends of a text, a turn, a message
CONTROL = 3  # of tokenizer.ggml.token_type
# Present with another value, each of these makes another model.
NEUTRAL = {
    "expert_count": 0,
    "expert_gating_func": 1,  # a softmax
    "leading_dense_block_count": 0,
    "attention.sliding_window": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "attention.max_alibi_bias": 8.0,
    "attention.clamp_kqv": 0.0,
    TEMPERATURE: 0.0,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
}


def architecture_of(metadata: Metadata) -> Architecture:
    """The row of a file's architecture.

    Raises:
        UserError: for one that QLLM does not run.
    """
    if metadata.architecture not in ARCHITECTURES:
        raise UserError(
            f"{metadata.where}: its architecture is {metadata.architecture!r}; QLLM runs "
            f"{', '.join(ARCHITECTURES)} from GGUF files"
        )
    return ARCHITECTURES[metadata.architecture]


@lru_cache(maxsize=4)
def read_config(found: GGUF) -> Mapping[str, object]:
    """The config.json of a model, which a run asks for as often as for its header.

    Raises:
        UserError: for an architecture that QLLM does not run, or hyperparameters that are missing
            or cannot be.
    """
    metadata = Metadata(found)
    architecture = architecture_of(metadata)
    for key, neutral in NEUTRAL.items():
        value = metadata.values.get(metadata.own(key), neutral)
        if value != neutral and key not in architecture.reads:
            raise UserError(
                f"{found.path}: {metadata.own(key)} is {value!r}; QLLM's {architecture.model_type} "
                f"has none"
            )
    layers = metadata.count(metadata.own("block_count"))
    if layers > len(found.tensors):
        raise UserError(
            f"{found.path}: {metadata.own('block_count')} is {layers}, more than its "
            f"{len(found.tensors)} tensors"
        )
    embed = found.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise UserError(f"{found.path} has no matrix token_embd.weight")
    return {
        "model_type": architecture.model_type,
        "vocab_size": embed.shape[0],
        "tie_word_embeddings": "output.weight" not in found.tensors,
        "eos_token_id": _ends(metadata),
        "dtype": _dtype(found),
        **architecture.config(metadata, found),
    }


def _ends(metadata: Metadata) -> list[int]:
    """Ids of the tokens that end a text."""
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in END_KINDS]
    found = {metadata.count(key) for key in keys if key in metadata.values}
    tokens = metadata.texts("tokenizer.ggml.tokens", [])
    types = metadata.numbers("tokenizer.ggml.token_type", [])
    if len(types) == len(tokens):
        found |= named_ends(tokens, types)
    return sorted(found)


def named_ends(tokens: Sequence[str], types: Sequence[float]) -> set[int]:
    """Ids of the tokens of a vocabulary that end a text by what they are called."""
    control = {i for i, t in enumerate(tokens) if t in CONTROL_ENDS and types[i] == CONTROL}
    found = {text: i for i, text in enumerate(tokens) if text in ENDS}
    if found.keys() >= HARMONY:
        found.pop(HARMONY_PART, None)
    return control.union(found.values())


def _dtype(found: GGUF) -> str:
    """What a model is computed in: its own plain type, float16 where it has none but float32's."""
    names = {tensor.type.name for tensor in found.tensors.values() if len(tensor.shape) > 1}
    if names == {"F32"}:
        return "float32"
    return "bfloat16" if "BF16" in names else "float16"
