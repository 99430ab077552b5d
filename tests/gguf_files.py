"""Small models, written as GGUF files by the `gguf` package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import copytree
from types import MappingProxyType
from unittest.mock import patch

import gguf
import numpy as np
import torch
from conftest import tiny
from gguf import GGMLQuantizationType, GGUFWriter, quants
from gguf_models import FAMILIES, VOCAB, llama
from torch import nn

from qllm.tokenizer import Tokenizer

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")


# llama.cpp's name of an architecture, where it is another one.
ARCHITECTURES = {
    **{"gemma3_text": "gemma3", "gpt_neox": "gptneox", "olmo3": "olmo2"},
    **{"ministral3": "mistral3", "glm": "chatglm", "cohere": "command-r"},
    **{"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"},
    **{"gpt_oss": "gpt-oss", "phi": "phi2"},
    **{"qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe"},
}
# The package's names of those, where they are others.
PACKAGE = {"gpt-oss": "GPT_OSS", "granitemoe": "GRANITE_MOE", "command-r": "COMMAND_R"}
# Matrices that stay float32: what chooses experts, and convolutions.
STAY_FLOATS = ("mlp.gate.weight", "shared_expert_gate.weight", "router.weight")
STAY_FLOATS += ("router.layer.weight", "conv1d.weight")

# Those whose heads have a size of their own.
HEADED = ("qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "mistral3", "gpt-oss", "glm4")
HEADED += ("ernie4_5", "seed_oss", "qwen35", "qwen35moe")

# Those of which llama.cpp rotates pairs that are side by side.
PAIRED = ("llama", "granite", "granitemoe", "smollm3", "mistral3", "olmo", "arcee")


def checkpoint_of(
    family: str, folder: Path, *, long: bool = False, all_experts: bool = False
) -> Path:
    """A bundled model, or one of random weights with a bundled tokenizer.

    Args:
        long: Phi-3's has LongRoPE.
        all_experts: each token takes all there are, so that rounding changes no choice.
    """
    if family in ("llama", "bloom"):
        return tiny(family)
    options = {"long": long} if family == "phi3" else {}
    model = FAMILIES[family](**options)
    model.resize_token_embeddings(4096)
    if all_experts and hasattr(model.config, "num_experts_per_tok"):
        model.config.num_experts_per_tok = experts_of(model.config)
    model.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((tiny("llama") / name).read_text())
    return folder


def stretch_rope(path: Path, scaled: str) -> None:
    """Change the RoPE of a model of Llama's kind, by its config.json."""
    values = json.loads(path.read_text())
    rope = {"rope_type": scaled, "rope_theta": 5e3, "factor": 4.0}
    if scaled != "linear":
        # llama.cpp has long factors where the cache is longer, of 256 tokens at the least.
        rope["original_max_position_embeddings"] = 256 if scaled == "longrope" else 64
    if scaled == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if scaled == "longrope":
        short = [
            1.0 + i for i in range(values["hidden_size"] // values["num_attention_heads"] // 2)
        ]
        rope |= {"short_factor": short, "long_factor": [2 + each for each in short]}
    path.write_text(json.dumps(values | {"rope_parameters": rope}))


def read_whole(path: Path) -> gguf.GGUFReader:
    """The package's reader, of a file in memory: slices of one that is mapped take much longer."""

    def read(path: Path, mode: str) -> np.ndarray:
        return np.fromfile(path, dtype=np.uint8)

    with patch.object(np, "memmap", read):
        return gguf.GGUFReader(path)


def dequantized(model: nn.Module, kind: str) -> nn.Module:
    """The model with the numbers that a file of this type holds."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "wpe" not in name and not name.endswith(STAY_FLOATS):
            transposed = _transposed(name)
            matrix = (weight.t() if transposed else weight).contiguous().numpy()
            type_ = GGMLQuantizationType[kind]
            numbers = quants.dequantize(quants.quantize(matrix, type_), type_)
            numbers = torch.from_numpy(np.ascontiguousarray(numbers)).view(matrix.shape)
            weight.copy_(numbers.t() if transposed else numbers)
    return model


def _transposed(name: str) -> bool:
    """Whether GPT-2 has a matrix as (inputs, outputs)."""
    return ".h." in name and ".c_" in name and name.endswith("weight")


def write_model(
    path: Path,
    model: nn.Module,
    kind: str,
    *,
    split: int = 1,
    begins: bool = False,
    kinds: Mapping[str, str] = MappingProxyType({}),
    predicting: int = 0,
) -> Path:
    """The file of a model, its matrices of one type; the first of several.

    Args:
        kinds: other types of some matrices, by the last part of their names in the file.
        predicting: of the layers, how many the file says to be of no use for the next token.
    """
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    limit = {"split_max_tensors": -(-len(list(model.parameters())) // split)} if split > 1 else {}
    writer = GGUFWriter(path, architecture, **limit)
    add_sizes(writer, architecture, config)
    add_tokenizer(writer)
    writer.add_add_bos_token(begins)
    if predicting:
        writer.add_nextn_predict_layers(predicting)
    kind_of_model = gguf.MODEL_ARCH[PACKAGE.get(architecture, architecture.upper())]
    names = gguf.get_tensor_name_map(kind_of_model, config.num_hidden_layers)
    for name, weight in named_weights(model):
        if (name == "lm_head.weight" and config.tie_word_embeddings) or "rotary_emb" in name:
            continue
        stem, _, end = name.rpartition(".")
        target = names.get_name(stem) or names.get_name(stem.removeprefix("transformer."))
        target = f"{target}.{end}"
        matrix = weight.t() if _transposed(name) and weight.dim() > 1 else weight
        if architecture in PAIRED and (".q_proj" in name or ".k_proj" in name):
            heads = config.num_attention_heads if ".q_" in name else config.num_key_value_heads
            matrix = matrix.view(heads, 2, -1, matrix.shape[-1]).transpose(1, 2).flatten(0, 2)
        centered = name.endswith("norm.weight") and "linear_attn" not in name
        if centered and ("gemma" in architecture or "qwen35" in architecture):
            matrix = matrix + 1
        if "linear_attn" in name:
            matrix = with_tiled_heads(name, matrix, config)
            target = target.replace("ssm_a.weight", "ssm_a")
        if "query_key_value" in name:
            parts = matrix.view(config.num_attention_heads, 3, -1, *matrix.shape[1:])
            matrix = parts.transpose(0, 1).flatten(0, 2)
        type_ = GGMLQuantizationType[kinds.get(target.split(".")[-2], kind)]
        vector = matrix.dim() < 2 or end == "bias"
        if vector or "position_embd" in target or name.endswith(STAY_FLOATS):
            type_ = GGMLQuantizationType.F32
        data = blocks_of(matrix.contiguous().numpy(), type_)
        writer.add_tensor(target, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if split == 1 else next(iter(sorted(path.parent.glob(f"{path.stem}-00001-*"))))


def with_tiled_heads(name: str, tensor: torch.Tensor, config: object) -> torch.Tensor:
    """A tensor of a delta net as llama.cpp has it: heads of values by their place in a group."""
    keys, dim = config.linear_num_key_heads, config.linear_value_head_dim
    each = config.linear_num_value_heads // keys
    tensor = -tensor.exp() if "A_log" in name else tensor
    if name.endswith("linear_attn.norm.weight"):
        return tensor
    if name.endswith("out_proj.weight"):
        return tensor.view(-1, keys, each, dim).transpose(1, 2).flatten(1)
    tensor = tensor.squeeze(1) if "conv1d" in name else tensor
    first = 2 * keys * config.linear_key_head_dim
    first = first if name.endswith(("in_proj_qkv.weight", "conv1d.weight")) else 0
    values = tensor[first:].unflatten(0, (keys, each, -1)).transpose(0, 1).flatten(0, 2)
    return torch.cat([tensor[:first], values])


def experts_of(config: object) -> int:
    """How many experts a layer has."""
    return getattr(config, "num_local_experts", None) or config.num_experts


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's weights, those of experts and of what all take as files have them."""
    interleaved = model.config.model_type == "gpt_oss"  # whose matrices are transposed as well
    for own, weight in model.state_dict().items():
        name = own.replace("block_sparse_moe.experts", "mlp.experts")
        name = name.replace("moe.router.weight", "moe.router.layer.weight")
        kind = "bias" if name.endswith("_bias") else "weight"
        if "experts.gate_up_proj" in name:
            turned = weight.mT if interleaved and kind == "weight" else weight
            halves = turned.chunk(2, dim=1)
            if interleaved:
                halves = (turned[:, ::2], turned[:, 1::2])
            stem = name.removesuffix("gate_up_proj_bias").removesuffix("gate_up_proj")
            for part, half in zip(("gate_proj", "up_proj"), halves, strict=True):
                yield f"{stem}{part}.{kind}", half
        elif "experts.down_proj" in name:
            turned = weight.mT if interleaved and kind == "weight" else weight
            yield f"{name.removesuffix('_bias')}.{kind}", turned
        elif name.endswith("linear_attn.dt_bias"):  # a bias there
            yield name.replace("dt_bias", "dt_proj.bias"), weight
        elif name.endswith((".sinks", ".A_log")):
            yield f"{name}.weight", weight
        else:
            yield name, weight[0] if name.endswith("shared_expert_gate.weight") else weight


def blocks_of(matrix: np.ndarray, type_: GGMLQuantizationType) -> np.ndarray:
    """A matrix as the package writes it; types that it only reads, with random values."""
    random = np.random.default_rng(0)
    if type_ == GGMLQuantizationType.IQ4_NL:
        blocks = random.integers(0, 256, (len(matrix), matrix.shape[1] // 32, 18), dtype=np.uint8)
        blocks[..., :2] = np.array([0.001], dtype=np.float16).view(np.uint8)
        return blocks.reshape(len(matrix), -1)
    if type_ != GGMLQuantizationType.NVFP4:
        return quants.quantize(matrix, type_)
    blocks = random.integers(0, 256, (len(matrix), matrix.shape[1] // 64, 36), dtype=np.uint8)
    blocks[..., :4] = random.integers(16, 40, blocks[..., :4].shape)  # scales of 2^-6 to 2^-3
    return blocks.reshape(len(matrix), -1)


def add_sizes(writer: GGUFWriter, architecture: str, config: object) -> None:
    """A model's hyperparameters."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if architecture in ("bloom", "gpt2"):
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_context_length(64)
    elif architecture == "gptneox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_context_length(64)
        writer.add_parallel_residual(True)
        writer.add_rope_dimension_count(4)
    else:
        if architecture == "starcoder2":
            writer.add_layer_norm_eps(config.norm_epsilon)
        elif hasattr(config, "layer_norm_eps") or architecture == "olmo":
            writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", 1e-5))
        else:
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_head_count_kv(config.num_key_value_heads)
        add_settings(writer, architecture, config)


def add_yarn(writer: GGUFWriter, yarn: Mapping[str, object]) -> None:
    """Those of YaRN, and of Ministral 3's queries."""
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn["factor"])
    writer.add_rope_scaling_orig_ctx_len(yarn["original_max_position_embeddings"])
    if "llama_4_scaling_beta" in yarn:
        writer.add_rope_scaling_yarn_log_mul(yarn["mscale_all_dim"])
        writer.add_rope_scaling_yarn_beta_fast(yarn["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(yarn["beta_slow"])
        writer.add_attn_temperature_scale(yarn["llama_4_scaling_beta"])


def add_settings(writer: GGUFWriter, architecture: str, config: object) -> None:
    """Those of RoPE and of windows, for the families that come from Llama."""
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture in HEADED:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        writer.add_sliding_window(config.sliding_window)
    if "qwen35" in architecture:
        add_delta_net(writer, config)
    if hasattr(config, "num_experts_per_tok"):
        add_experts(writer, architecture, config)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    if config.model_type in ("olmo3", "ministral3"):
        add_yarn(writer, rope.get("full_attention", rope))
    if hasattr(config, "logit_scale"):
        writer.add_logit_scale(config.logit_scale)
    if architecture in ("granite", "granitemoe"):
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if "partial_rotary_factor" in rope:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(size * rope["partial_rotary_factor"]))
    if architecture == "phi3" and rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_rope_scaling_attn_factors((1 + np.log(2) / np.log(32)) ** 0.5)
        for length in ("short", "long"):
            factors = np.array(rope[f"{length}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)


def add_delta_net(writer: GGUFWriter, config: object) -> None:
    """Those of delta nets."""
    heads, dim = config.linear_num_value_heads, config.linear_value_head_dim
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(heads * dim)
    writer.add_full_attention_interval(2)
    writer.add_rope_dimension_sections([2, 1, 1, 0])


def add_experts(writer: GGUFWriter, architecture: str, config: object) -> None:
    """Those of mixtures of experts."""
    writer.add_expert_count(experts_of(config))
    writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture in ("qwen2moe", "qwen3moe", "qwen35moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if architecture in ("qwen2moe", "qwen35moe"):
        size = config.shared_expert_intermediate_size
        writer.add_expert_shared_feed_forward_length(size)


def add_tokenizer(writer: GGUFWriter) -> None:
    """Bytes, some merges, and two control tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = list(bytes_to_unicode().values())
    merges = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a"]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|begin|>", "<|im_end|>"]
    types = [1] * (len(tokens) - 2) + [3, 3]
    tokens += [f"<unused{i}>" for i in range(VOCAB - len(tokens))]
    types += [5] * (VOCAB - len(types))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index("<|begin|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))


TEXTS = (
    "the cat sat on the mat and the dog sat on the log",
    "a man, a plan: in the inn 1 2 3",
    "one  two   three",
)


def trained_sentencepiece(prefix: Path) -> object:
    """A small tokenizer of SentencePiece's; its file is `prefix` with .model behind it."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_prefix=str(prefix),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def write_sentencepiece(path: Path, own: object) -> Path:
    """A file with a tokenizer of SentencePiece's, and hardly a model."""
    writer = GGUFWriter(path, "llama")
    size = own.vocab_size()
    kinds = ((own.is_unknown, 2), (own.is_control, 3), (own.is_byte, 6))
    types = [next((n for test, n in kinds if test(i)), 1) for i in range(size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([own.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([own.get_score(i) for i in range(size)])
    writer.add_token_types(types)
    writer.add_bos_token_id(own.bos_id())
    writer.add_eos_token_id(own.eos_id())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# What config.json and generation_config.json say of the bundled Llama's end, and what ends a text.
ENDS = (
    ({"eos_token_id": None}, {}, [2]),  # as its tokenizer names it
    ({"eos_token_id": [5, 2]}, {}, [2, 5]),
    ({"eos_token_id": 2}, {"eos_token_id": [7, 2, 5]}, [2, 5, 7]),
)


def ending(folder: Path, config: dict, generation: dict) -> Path:
    """The bundled Llama with other ends of a text."""
    copytree(tiny("llama"), folder)
    for name, changed in (("config.json", config), ("generation_config.json", generation)):
        values = json.loads((folder / name).read_text())
        values.pop("eos_token_id")
        (folder / name).write_text(json.dumps(values | changed))
    return folder


PHI3_TEXTS = ("<|user|>\nthe cat<|end|>\n\n<|user|> ", "the </s>  a<|endoftext|>  c<s> b")


def with_phi3_s_tokens(folder: Path) -> Path:
    """A Llama with a tokenizer of Phi-3's kind, whose tokens take the spaces behind them along."""
    llama(tied=False).half().save_pretrained(folder)
    trained_sentencepiece(folder / "tokenizer")
    values = json.loads(Tokenizer.load(folder).definition())
    (folder / "tokenizer.model").unlink()
    model, (plain, *_) = values["model"], values["added_tokens"]
    texts = {2: "</s>", 297: "<|endoftext|>", 298: "<|user|>", 299: "<|end|>"}
    values["added_tokens"] = [t for t in values["added_tokens"] if t["id"] not in texts]
    for number, text in texts.items():
        flags = {"special": text != "</s>", "rstrip": text != "<|endoftext|>"}
        values["added_tokens"].append(plain | {"id": number, "content": text} | flags)
    gone = {text for text, number in model["vocab"].items() if number in texts} - {*texts.values()}
    model["vocab"] = {t: n for t, n in model["vocab"].items() if t not in gone}
    model["merges"] = [m for m in model["merges"] if gone.isdisjoint((*m, "".join(m)))]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
