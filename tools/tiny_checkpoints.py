"""Checkpoints of every kind that QLLM reads, two layers and some kilobytes each, in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from qllm.bitwidths import make_plan
from qllm.checkpoint.convert import convert
from qllm.checkpoint.names import TensorNames
from qllm.checkpoint.reader import read_raw_config
from qllm.checkpoint.to_gguf import export_gguf
from qllm.config import QuantPlan, QuantSpec
from qllm.hub import ModelFolder
from qllm.models import RawConfig, family_of, read_config
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from qllm.random_model import calibrate_random
from tools.random_checkpoint import (
    TENSORS,
    RandomWeights,
    bloom_config,
    llama_config,
    opt_config,
    write_safetensors,
    write_torch,
)

Files = dict[str, bytes]

VOCAB, HIDDEN, LAYERS, HEADS = 64, 32, 2, 4
SIZES = {"vocab_size": VOCAB, "max_position_embeddings": 64}
CONFIGS: dict[str, dict] = {
    "opt": opt_config(HIDDEN, LAYERS, HEADS, **SIZES),
    "bloom": bloom_config(HIDDEN, LAYERS, HEADS, vocab_size=VOCAB),
    "llama": llama_config(HIDDEN, LAYERS, HEADS, 2, 48, **SIZES)
    | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
}
# Families that come from Llama, by what their config.json has besides its settings.
OTHERS: dict[str, dict] = {
    "glm4": {"head_dim": 8, "eos_token_id": 2, "rope_scaling": None},
    "cohere2": {"sliding_window": 4, "sliding_window_pattern": 2},
    "exaone4": {"sliding_window": 4, "sliding_window_pattern": 2},
    "phi": {"rope_scaling": None},
    "qwen3_5_text": {
        **{"head_dim": 8, "rope_scaling": None, "linear_num_key_heads": 2},
        **{"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 4},
    },
    "stablelm": {"use_parallel_residual": True, "rope_scaling": None},
}
PLAN, CALIBRATION = "plan.json", "calibration.safetensors"
GENERATION = {"eos_token_id": 2, "max_length": 20, "min_length": 0, "repetition_penalty": 1.2}
# The last rule is one that takes exponential time in an engine that goes back.
RULES = {
    "embed": 8,
    "attention": 8,
    "mlp": {"bits": 4, "group_size": 16, "scheme": "sym"},
    r"(\w+\.?)+up": 3,
}


def tokenizer_files() -> Files:
    """A byte-level BPE of single letters, and its settings."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    special = ("<s>", "<pad>", "</s>", "<unk>")
    letters = "ĠabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,"
    vocabulary = {token: i for i, token in enumerate((*special, *letters, "th"))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    eos = {"__type": "AddedToken", "content": "</s>"}
    settings = {"bos_token": "</s>", "eos_token": eos, "unk_token": "<unk>"}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def checkpoints(*, onnx: bool = True) -> dict[str, Files]:
    """A checkpoint of each kind, by a name that says which.

    Args:
        onnx: an ONNX model is among them, which takes the packages.
    """
    found: dict[str, Files] = {}
    with tempfile.TemporaryDirectory() as tmp_dir:
        root = Path(tmp_dir)
        for family, config in CONFIGS.items():
            for kind, write in WRITERS.items():
                name = f"{family} {kind}"
                _write(root / name, family, config, write)
                found[name] = _read(root / name)
        source = root / "llama safetensors"
        found["opt converted"] = _converted(root / "opt safetensors", root / "converted")
        for name, bits, compressed in QUANTIZED:
            plan = QuantPlan.uniform(QuantSpec.parse(bits, 16))
            quantize_checkpoint(Job(source, plan, compressed=compressed), root / name)
            found[f"llama {name}"] = _read(root / name)
        for family in CONFIGS:
            plan = make_plan("4", QuantSpec(group_size=16), embedding_bits=3)
            quantize_checkpoint(
                Job(root / f"{family} safetensors", plan), root / f"{family} embedding"
            )
            found[f"{family} packed embedding"] = _read(root / f"{family} embedding")
        found["llama inside"] = _inside(source)
        found["llama awq"] = _awq(root / "awq")
        found["llama mlx"] = _mlx(root / "mlx")
        found["llama fp8"] = _fp8(root / "fp8")
        found["llama nf4"] = _nf4(root / "nf4")
        found["llama bitnet"] = _bitnet(root / "bitnet")
        found["llama hqq"] = _hqq(root / "hqq")
        found["llama torchao"] = _torchao(root / "torchao")
        found["gpt-oss"] = _gpt_oss(root / "gpt-oss")
        for family, changes in OTHERS.items():
            config = CONFIGS["llama"] | changes | {"model_type": family}
            _write(root / family, family, config, WRITERS["safetensors"])
            found[family] = _read(root / family)
        for family in CONFIGS:
            found[f"{family} statistics"] = _with_statistics(root / f"{family} safetensors")
        found |= _gguf(root)
        if onnx:
            from qllm.onnx.export import export

            for name, origin in (("packed onnx", root / "gptq"), ("dense onnx", source)):
                export(origin, root / name)
                found[name] = _read(root / name)
    return found


def _gguf(root: Path) -> dict[str, Files]:
    """GGUF files, of 16 bits and of blocks; llama.cpp's Llama has no dynamic RoPE."""
    source, packed = root / "plain rope", root / "groups of 32"
    config = CONFIGS["llama"] | {"rope_scaling": None, "intermediate_size": 64}
    _write(source, "llama", config, WRITERS["safetensors"])
    plan = make_plan("4", QuantSpec(group_size=32, scheme="sym"), embedding_bits=8)
    quantize_checkpoint(Job(source, plan), packed)
    found = {}
    for name, origin in (("gguf", source), ("packed gguf", packed)):
        target = root / name / "model.gguf"
        export_gguf(origin, target)
        found[f"llama {name}"] = _read(target.parent)
    return found


def _write(folder: Path, family: str, config: dict, write: Callable[[Path, list], None]) -> None:
    folder.mkdir()
    files = {"config.json": config, "generation_config.json": GENERATION, PLAN: RULES}
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    for name, data in tokenizer_files().items():
        (folder / name).write_bytes(data)
    write(folder, list(TENSORS.get(family, _tensors)(config)))


def _tensors(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in a file, by what the family's description says."""
    raw = RawConfig(config, "config.json")
    family = family_of(raw)
    names = TensorNames(None, family, read_config(raw), False, family.prefixes[0], family.head)
    for name, shape in names.shapes.items():
        parts = names.sources(name)
        counts = names.row_counts(name.rpartition(".")[0], len(parts))
        for part, rows in zip(parts, counts, strict=True):
            yield part, (rows, *shape[1:])


def _sharded(folder: Path, tensors: list) -> None:
    half, weight_map = len(tensors) // 2, {}
    for number, part in enumerate((tensors[:half], tensors[half:])):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        write_safetensors(folder / name, part)
        weight_map |= {tensor: name for tensor, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _legacy(folder: Path, tensors: list) -> None:
    weights = RandomWeights()
    state = {name: weights(name, shape) for name, shape in tensors}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


WRITERS: dict[str, Callable[[Path, list], None]] = {
    "safetensors": lambda folder, t: write_safetensors(folder / "model.safetensors", t),
    "sharded": _sharded,
    "bin": lambda folder, t: write_torch(folder / "pytorch_model.bin", t),
    "legacy bin": _legacy,
}
QUANTIZED = (
    ("gptq", "4", False),
    ("pack-quantized", "3", True),
    ("int-quantized", "8:tc-li", False),
)


def _converted(source: Path, target: Path) -> Files:
    convert(ModelFolder(source, "opt"), target, overwrite=False)
    return _read(target)


def _packed(
    folder: Path, settings: dict, matrix: Callable[[int, int], dict[str, torch.Tensor]]
) -> Files:
    """A checkpoint of another tool's layout, whose linears are tensors that are drawn.

    Args:
        settings: in config.json.
        matrix: the integers of one of some rows and columns, by the names of its tensors.
    """
    config = dict(CONFIGS["llama"]) | settings
    weights, state = RandomWeights(), {}
    for name, shape in TENSORS["llama"](config):
        if "_proj" not in name:
            state[name] = weights(name, shape)
            continue
        stem = name.removesuffix("weight")
        state |= {stem + key: tensor for key, tensor in matrix(*shape).items()}

    def write(target: Path, tensors: list) -> None:
        from safetensors.torch import save_file

        save_file(state, target / "model.safetensors", metadata={"format": "pt"})

    _write(folder, "llama", config, write)
    (folder / PLAN).unlink()
    return _read(folder)


def _words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape).int()


def _awq(folder: Path) -> Files:
    """A checkpoint of AutoAWQ's layout, in groups of 16."""

    def matrix(rows: int, columns: int) -> dict[str, torch.Tensor]:
        groups = columns // 16
        tensors = {"qweight": _words(columns, rows // 8), "qzeros": _words(groups, rows // 8)}
        return tensors | {"scales": torch.rand(groups, rows).half() + 0.01}

    entry = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 16}
    entry |= {"zero_point": True, "modules_to_not_convert": None}
    return _packed(folder, {"quantization_config": entry}, matrix)


def _mlx(folder: Path) -> Files:
    """A checkpoint of MLX's layout, in groups of 16."""

    def matrix(rows: int, columns: int) -> dict[str, torch.Tensor]:
        scales = torch.rand(rows, columns // 16).half() + 0.01
        words = _words(rows, columns // 8).view(torch.uint32)
        return {"weight": words, "scales": scales, "biases": scales * -8}

    return _packed(folder, {"quantization": {"bits": 4, "group_size": 16}}, matrix)


def _gpt_oss(folder: Path) -> Files:
    """A mixture of three experts in MXFP4, those of a layer in one tensor."""
    config = CONFIGS["llama"] | {"model_type": "gpt_oss", "num_local_experts": 3}
    config |= {"num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4}
    config |= {"intermediate_size": HIDDEN, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    config |= {"quantization_config": {"quant_method": "mxfp4"}}
    weights, state = RandomWeights(), {}
    for name, shape in TENSORS["llama"](config):
        if ".mlp." not in name:
            state[name] = weights(name, shape)
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}."
        router = f"{stem}mlp.router"
        state |= {f"{stem}self_attn.sinks": torch.rand(HEADS), f"{router}.bias": torch.rand(3)}
        state[f"{router}.weight"] = weights(router, (3, HIDDEN))
        for part, rows in (("gate_up_proj", 2 * HIDDEN), ("down_proj", HIDDEN)):
            name = f"{stem}mlp.experts.{part}"
            blocks = torch.randint(256, (3, rows, 1, 16), dtype=torch.uint8)
            scales = torch.randint(118, 122, (3, rows, 1), dtype=torch.uint8)
            state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            state[f"{name}_bias"] = torch.rand(3, rows)

    def write(target: Path, tensors: list) -> None:
        from safetensors.torch import save_file

        save_file(state, target / "model.safetensors", metadata={"format": "pt"})

    _write(folder, "llama", config, write)
    (folder / PLAN).unlink()
    return _read(folder)


def _inside(source: Path) -> Files:
    """A checkpoint of a multimodal model whose text model another one is."""
    import safetensors.torch

    files = _read(source)
    text = json.loads(files["config.json"])
    config = {"model_type": "llava", "text_config": text}
    state = safetensors.torch.load(files["model.safetensors"])
    state = {f"language_model.{name}": tensor for name, tensor in state.items()}
    state["vision_tower.layers.0.weight"] = torch.zeros(8, 8)
    files["config.json"] = json.dumps(config).encode()
    files["model.safetensors"] = safetensors.torch.save(state)
    return files


def _fp8(folder: Path) -> Files:
    """A checkpoint of FP8, a scale for 16 x 16."""

    def matrix(rows: int, columns: int) -> dict[str, torch.Tensor]:
        numbers = (torch.rand(rows, columns) * 400 - 200).to(torch.float8_e4m3fn)
        scales = torch.rand(-(-rows // 16), -(-columns // 16)) / 2000
        return {"weight": numbers, "weight_scale_inv": scales}

    entry = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    return _packed(folder, {"quantization_config": entry}, matrix)


def _nf4(folder: Path) -> Files:
    """A checkpoint of bitsandbytes, of 4 bits, whose scales have 8."""

    def matrix(rows: int, columns: int) -> dict[str, torch.Tensor]:
        blocks = -(-rows * columns // 64)
        state = {"quant_type": "nf4", "blocksize": 64, "shape": [rows, columns]}
        state |= {"nested_blocksize": 256, "nested_offset": 0.2}
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return {
            "weight": torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8),
            "weight.absmax": torch.randint(0, 256, (blocks,), dtype=torch.uint8),
            "weight.quant_map": torch.linspace(-1, 1, 16),
            "weight.nested_absmax": torch.rand(-(-blocks // 256)),
            "weight.nested_quant_map": torch.linspace(-1, 1, 256),
            "weight.quant_state.bitsandbytes__nf4": text,
        }

    entry = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return _packed(folder, {"quantization_config": entry}, matrix)


def _bitnet(folder: Path) -> Files:
    """A checkpoint of BitNet's layout."""

    def matrix(rows: int, columns: int) -> dict[str, torch.Tensor]:
        quarters = torch.randint(3, (4, rows // 4, columns), dtype=torch.uint8)
        packed = sum(quarter << 2 * i for i, quarter in enumerate(quarters))
        return {"weight": packed, "weight_scale": torch.rand(1).half() + 4}

    return _packed(folder, {"quantization_config": {"quant_method": "bitnet"}}, matrix)


def _hqq(folder: Path) -> Files:
    """A checkpoint of HQQ's layout, in groups of 16."""

    def matrix(rows: int, columns: int) -> dict[str, torch.Tensor]:
        groups = rows * columns // 16
        return {
            "W_q": torch.randint(256, (groups // 2, 16), dtype=torch.uint8),
            "scale": torch.rand(groups, 1).half() + 0.01,
            "zero": torch.rand(groups, 1).half() * 16,
            "axis": torch.tensor(1, dtype=torch.int32),
            "shape": torch.tensor([rows, columns]),
        }

    entry = {"weight_quant_params": {"nbits": 4, "group_size": 16, "axis": 1}}
    settings = {"quant_method": "hqq", "quant_config": entry, "skip_modules": ["lm_head"]}
    return _packed(folder, {"quantization_config": settings}, matrix)


def _torchao(folder: Path) -> Files:
    """A checkpoint of torchao's layout of 4 bits, in groups of 16; each MLP's first has 8 bits."""

    def matrix(rows: int, columns: int) -> dict[str, torch.Tensor]:
        if rows == CONFIGS["llama"]["intermediate_size"]:
            return {
                "_weight_qdata": torch.randint(-128, 128, (rows, columns), dtype=torch.int8),
                "_weight_scale": torch.rand(rows, 1) + 0.01,
                "_weight_zero_point": torch.zeros(rows, 1, dtype=torch.int8),
            }
        return {
            "_weight_qdata": torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8),
            "_weight_scale": torch.rand(columns // 16, rows).half() + 0.01,
            "_weight_zero_point": torch.rand(columns // 16, rows).half(),
        }

    per_row = {"_type": "PerRow", "_data": {"dim": -1}}
    names = {
        "_default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 16}, "_version": 2},
        "re:.*(up|gate)_proj": {
            **{"_type": "Int8WeightOnlyConfig", "_data": {"granularity": per_row}, "_version": 2}
        },
    }
    settings = {"default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": names}}}
    entry = {"quant_method": "torchao", "quant_type": settings}
    return _packed(folder, {"quantization_config": entry}, matrix)


def _with_statistics(folder: Path) -> Files:
    """The files of a folder, and statistics of its model's activations."""
    found = calibrate_random(read_config(read_raw_config(folder)), 1, 8, seed=0)
    found.save(folder / CALIBRATION)
    files = _read(folder)
    (folder / CALIBRATION).unlink()
    return files


def _read(folder: Path) -> Files:
    files = sorted(path for path in folder.iterdir() if path.name != "README.md")
    return {path.name: path.read_bytes() for path in files}
