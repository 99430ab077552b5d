"""Lay out a checkpoint of a published configuration with random weights, where no hub is reachable.

    python3 -m tools.random_checkpoint --repository facebook/opt-1.3b --save DIR
    python3 -m tools.random_checkpoint --repository bigscience/bloom-560m --hf-home DIR

With --hf-home the files lie as huggingface_hub's cache holds them, so that HF_HOME=DIR
HF_HUB_OFFLINE=1 goes through the real loading code. The tokenizer is a bundled model's. Names of
tensors and fields of config.json are written here as they are published, not taken from the
tables of qllm.models, which the tests hold against them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from qllm import cli

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "27dcfa74d334bc871f3234de431e71c6eeba5dd6"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def opt_config(hidden: int, layers: int, heads: int, **others: object) -> dict:
    """config.json of facebook/opt-*."""
    return {
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": 4 * hidden,
        "hidden_size": hidden,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "model_type": "opt",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "prefix": "</s>",
        "torch_dtype": "float16",
        "transformers_version": "4.21.0.dev0",
        "use_cache": True,
        "vocab_size": 50272,
        "word_embed_proj_dim": hidden,
        **others,
    }


def bloom_config(hidden: int, layers: int, heads: int, **others: object) -> dict:
    """config.json of bigscience/bloom-*, with its own names for the sizes."""
    return {
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["BloomForCausalLM"],
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "masked_softmax_fusion": True,
        "model_type": "bloom",
        "n_embed": hidden,
        "n_inner": None,
        "n_layer": layers,
        "num_attention_heads": heads,
        "offset_alibi": 100,
        "pad_token_id": 3,
        "pretraining_tp": 1,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "slow_but_exact": False,
        "transformers_version": "4.20.0",
        "unk_token_id": 0,
        "use_cache": True,
        "vocab_size": 250880,
        **others,
    }


def llama_config(
    hidden: int, layers: int, heads: int, kv_heads: int, inner: int, **others: object
) -> dict:
    """config.json of TinyLlama and Llama-2."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.35.0",
        "use_cache": True,
        "vocab_size": 32000,
        **others,
    }


PUBLISHED = {
    "facebook/opt-125m": opt_config(768, 12, 12),
    "facebook/opt-350m": opt_config(
        1024, 24, 16, do_layer_norm_before=False, word_embed_proj_dim=512
    ),
    "facebook/opt-1.3b": opt_config(2048, 24, 32),
    "facebook/opt-13b": opt_config(5120, 40, 40),
    "bigscience/bloom-560m": bloom_config(1024, 24, 16),
    "bigscience/bloom-1b1": bloom_config(1536, 24, 16),
    "bigscience/bloom-7b1": bloom_config(4096, 30, 32),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": llama_config(2048, 22, 32, 4, 5632),
    "meta-llama/Llama-2-7b-hf": llama_config(4096, 32, 32, 32, 11008),
}

Shape = tuple[int, ...]


def opt_tensors(config: dict, prefix: str = "model.decoder.") -> Iterator[tuple[str, Shape]]:
    """Names and shapes in facebook's files; some of them have "decoder." alone in front."""
    hidden, inner = config["hidden_size"], config["ffn_dim"]
    embed = config["word_embed_proj_dim"]
    yield f"{prefix}embed_tokens.weight", (config["vocab_size"], embed)
    yield f"{prefix}embed_positions.weight", (config["max_position_embeddings"] + 2, hidden)
    if embed != hidden:
        yield f"{prefix}project_in.weight", (hidden, embed)
        yield f"{prefix}project_out.weight", (embed, hidden)
    if config["do_layer_norm_before"]:
        yield from _affine(f"{prefix}final_layer_norm", hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"{prefix}layers.{i}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _affine(f"{layer}self_attn.{name}", hidden, hidden)
        yield from _affine(f"{layer}self_attn_layer_norm", hidden)
        yield from _affine(f"{layer}fc1", inner, hidden)
        yield from _affine(f"{layer}fc2", hidden, inner)
        yield from _affine(f"{layer}final_layer_norm", hidden)
    yield "lm_head.weight", (config["vocab_size"], embed)


def bloom_tensors(config: dict) -> Iterator[tuple[str, Shape]]:
    """Names and shapes in BigScience's files, which were saved from the bare model."""
    hidden = config["n_embed"]
    yield "word_embeddings.weight", (config["vocab_size"], hidden)
    yield from _affine("word_embeddings_layernorm", hidden)
    for i in range(config["n_layer"]):
        yield from _affine(f"h.{i}.input_layernorm", hidden)
        yield from _affine(f"h.{i}.self_attention.query_key_value", 3 * hidden, hidden)
        yield from _affine(f"h.{i}.self_attention.dense", hidden, hidden)
        yield from _affine(f"h.{i}.post_attention_layernorm", hidden)
        yield from _affine(f"h.{i}.mlp.dense_h_to_4h", 4 * hidden, hidden)
        yield from _affine(f"h.{i}.mlp.dense_4h_to_h", hidden, 4 * hidden)
    yield from _affine("ln_f", hidden)


def llama_tensors(config: dict) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of Llama-2, with the buffer that older files hold."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    dim = hidden // config["num_attention_heads"]
    narrow = config["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield f"{layer}self_attn.q_proj.weight", (hidden, hidden)
        yield f"{layer}self_attn.k_proj.weight", (narrow, hidden)
        yield f"{layer}self_attn.v_proj.weight", (narrow, hidden)
        yield f"{layer}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}self_attn.rotary_emb.inv_freq", (dim // 2,)
        yield f"{layer}mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _affine(name: str, *shape: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


TENSORS: dict[str, Callable[[dict], Iterator[tuple[str, Shape]]]] = {
    "opt": opt_tensors,
    "bloom": bloom_tensors,
    "llama": llama_tensors,
}


class RandomWeights:
    """Float16 values of deviation 0.02, cut from one block: drawing a billion takes too long."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        # A prime, so that the rows of a matrix are not equal.
        self.block = (torch.randn(4_194_301, generator=generator) * 0.02).half()

    def __call__(self, name: str, shape: Shape) -> torch.Tensor:
        if "norm" in name or name.startswith("ln_f"):
            return torch.full(shape, float(name.endswith(".weight")), dtype=torch.float16)
        return torch.cat(list(self.pieces(name, torch.Size(shape).numel()))).view(shape)

    def pieces(self, name: str, count: int) -> Iterator[torch.Tensor]:
        """`count` values in the runs that the block has them in."""
        # A tied head is the embedding's tensor; every other name has a start of its own.
        key = "tied" if name == "lm_head.weight" or "embed_tokens" in name else name
        start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:2], "little")
        while count:
            piece = self.block[start : start + count]
            yield piece
            start, count = 0, count - len(piece)


def write_safetensors(path: Path, tensors: list[tuple[str, Shape]]) -> None:
    """A file that is never in memory whole, header and bytes written by hand."""
    header, end = {}, 0
    for name, shape in tensors:
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    data = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    data += b" " * (-len(data) % 8)
    weights = RandomWeights()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        for name, shape in tensors:
            small = len(shape) == 1
            count = torch.Size(shape).numel()
            runs = [weights(name, shape)] if small else weights.pieces(name, count)
            for run in runs:
                file.write(memoryview(run.view(torch.uint8).numpy()))


def write_torch(path: Path, tensors: list[tuple[str, Shape]]) -> None:
    """A pytorch_model.bin."""
    weights = RandomWeights()
    torch.save({name: weights(name, shape) for name, shape in tensors}, path)


def write_checkpoint(
    folder: Path, config: dict, *, kind: str = "safetensors", weights: bool = True
) -> None:
    """Write config.json, a tokenizer, and weights.

    Args:
        kind: "safetensors" or "bin".
        weights: False leaves them out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    family = config["model_type"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(ROOT / "tiny_models" / f"{family}-tiny" / name, folder / name)
    if weights:
        tensors = list(TENSORS[family](config))
        if kind == "bin":
            write_torch(folder / "pytorch_model.bin", tensors)
        else:
            write_safetensors(folder / "model.safetensors", tensors)


def lay_out(
    home: Path,
    repository: str,
    config: dict | None = None,
    *,
    kind: str = "safetensors",
    weights: bool = True,
) -> Path:
    """Put a model into the cache below `home`, which stands for HF_HOME.

    Args:
        config: in place of the published one.

    Returns:
        The snapshot: a folder of links into blobs/.
    """
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot, blobs, refs = folder / "snapshots" / COMMIT, folder / "blobs", folder / "refs"
    for new in (snapshot, refs):
        new.mkdir(parents=True)
    (refs / "main").write_text(COMMIT, encoding="utf-8")
    write_checkpoint(blobs, config or PUBLISHED[repository], kind=kind, weights=weights)
    for file in list(blobs.iterdir()):
        blob = file.rename(blobs / hashlib.sha256(file.name.encode()).hexdigest())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--repository", choices=list(PUBLISHED), required=True)
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--save", metavar="DIR")
    target.add_argument("--hf-home", metavar="DIR")
    args = parser.parse_args()
    if args.save:
        write_checkpoint(Path(args.save), PUBLISHED[args.repository], kind=args.format)
    else:
        lay_out(Path(args.hf_home), args.repository, kind=args.format)


if __name__ == "__main__":
    cli.run(main)
