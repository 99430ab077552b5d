"""Lay out a checkpoint of a published configuration with random weights, where no hub is reachable.

    python3 -m tools.random_checkpoint --repository facebook/opt-1.3b --save DIR
    python3 -m tools.random_checkpoint --repository bigscience/bloom-560m --hf-home DIR

With --hf-home the files lie as the Hub cache would hold them, so that HF_HOME=DIR
HF_HUB_OFFLINE=1 goes through the real loading code. The tokenizer is a bundled model's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from qllm import cli
from qllm.checkpoint.reader import TensorInfo
from qllm.checkpoint.weights import float_tensors
from qllm.checkpoint.writer import SafetensorsWriter
from qllm.models import FAMILIES, Decoder, RawConfig

ROOT = Path(__file__).resolve().parent.parent

COMMIT = "0" * 40
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def opt(hidden: int, layers: int, heads: int, **others: object) -> dict:
    """The fields of a published OPT config.json."""
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "activation_function": "relu",
        "bos_token_id": 2,
        "do_layer_norm_before": True,
        "eos_token_id": 2,
        "ffn_dim": 4 * hidden,
        "hidden_size": hidden,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "torch_dtype": "float16",
        "vocab_size": 50272,
        "word_embed_proj_dim": hidden,
        **others,
    }


def bloom(hidden: int, layers: int, heads: int) -> dict:
    """The fields of a published BLOOM config.json."""
    return {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "apply_residual_connection_post_layernorm": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "layer_norm_epsilon": 1e-5,
        "n_embed": hidden,
        "n_layer": layers,
        "num_attention_heads": heads,
        "pad_token_id": 3,
        "torch_dtype": "float16",
        "vocab_size": 250880,
    }


def llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> dict:
    """The fields of a published Llama config.json."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": 32000,
    }


PUBLISHED: dict[str, dict] = {
    "facebook/opt-125m": opt(768, 12, 12),
    "facebook/opt-350m": opt(1024, 24, 16, do_layer_norm_before=False, word_embed_proj_dim=512),
    "facebook/opt-1.3b": opt(2048, 24, 32),
    "bigscience/bloom-560m": bloom(1024, 24, 16),
    "bigscience/bloom-1b1": bloom(1536, 24, 16),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": llama(2048, 22, 32, 4, 5632),
    "meta-llama/Llama-2-7b-hf": llama(4096, 32, 32, 32, 11008),
}


def tensors(config: dict) -> dict[str, TensorInfo]:
    """Names and shapes of a published checkpoint's tensors, all of them float16.

    OPT and Llama are published with their full names, BLOOM without the leading "transformer.".
    """
    family = FAMILIES[config["model_type"]]
    model = family.read_config(RawConfig(config, "config.json"))
    prefix = "" if family.name == "bloom" else family.prefixes[0]
    found = {}
    for name, (rows, *rest) in float_tensors(Decoder(model, {}, torch.float16)).items():
        module, kind = name.rsplit(".", 1)
        if module == "lm_head":
            found[name] = TensorInfo((rows, *rest), torch.float16)
            continue
        parts = family.parts(module)
        counts = [rows // len(parts)] * len(parts)
        if len(parts) == 3:  # q, k and v: the keys and values of a group have fewer heads
            heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
            counts = [count * model.head_dim for count in heads]
        for part, count in zip(parts, counts, strict=True):
            found[f"{prefix}{part}.{kind}"] = TensorInfo((count, *rest), torch.float16)
    return found


def random_tensor(name: str, info: TensorInfo, block: torch.Tensor) -> torch.Tensor:
    """Weights of deviation 0.02 from one repeated block, norms at 1, biases small."""
    count = torch.Size(info.shape).numel()
    # Not a multiple of the block: equal tensors, or rows, would be a model that no one has.
    start = sum(name.encode()) * 7919 % (len(block) // 2)
    source = block[start:]
    values = source.repeat(-(-count // len(source)))[:count].clone().view(info.shape)
    is_norm = len(info.shape) == 1 and name.endswith(".weight")
    return values + 1 if is_norm else values


def write_checkpoint(folder: Path, config: dict, *, kind: str = "safetensors") -> None:
    """Write config.json, weights and tokenizer.

    Args:
        kind: "safetensors" or "bin".
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn((1 << 21) + 1, generator=generator) * 0.02).half()
    infos = tensors(config)
    if kind == "bin":
        state = {name: random_tensor(name, info, block) for name, info in infos.items()}
        torch.save(state, folder / "pytorch_model.bin")
    else:
        writer = SafetensorsWriter(folder / "model.safetensors", infos, {"format": "pt"})
        for name, info in infos.items():
            writer.write(name, random_tensor(name, info, block))
        writer.close()
    for name in TOKENIZER_FILES:
        shutil.copyfile(ROOT / "tiny_models" / "opt-tiny" / name, folder / name)


def write_cache(hf_home: Path, repository: str, *, kind: str = "safetensors") -> Path:
    """Write a published model as the Hub cache holds it: blobs, and a snapshot of links to them.

    Returns:
        the model's folder in the cache.
    """
    top = hf_home / "hub" / f"models--{repository.replace('/', '--')}"
    blobs, snapshot = top / "blobs", top / "snapshots" / COMMIT
    write_checkpoint(blobs, PUBLISHED[repository], kind=kind)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return top


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
        write_cache(Path(args.hf_home), args.repository, kind=args.format)


if __name__ == "__main__":
    cli.run(main)
