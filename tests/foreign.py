"""Checkpoints as other tools write them: bit by bit in numpy, or by the library that writes them.

Nothing here uses QLLM's own packing: what it packs is integers that are drawn, and beside them are
the floats that they stand for.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import IntQuantizationCompressor, PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from oracle import layer_linears, random_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "opt": OPTConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=96,
        max_position_embeddings=64,
    ),
    "bloom": BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4),
    "phi3": Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=None),
    "gemma3_text": Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=16),
    "glm": GlmConfig(**SIZES, num_key_value_heads=2, head_dim=16, pad_token_id=None),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
}

# One linear's tensors by the names that a file has behind the module's, and the weight they are.
Written = tuple[dict[str, Tensor], Tensor]
Writer = Callable[[int, int, np.random.Generator], Written]


@cache
def twin_of(family: str) -> PreTrainedModel:
    """A random model of a family in float32. Do not change it."""
    return random_model(CONFIGS[family])


@dataclass
class Folder:
    """A checkpoint before it is written; a case changes what is peculiar about its own.

    Attributes:
        twin: transformers' model, whose linears have the dequantized weights.
        state: name to tensor.
        config: config.json.
        files: file name to the names of the tensors in it; {} is all in model.safetensors.
        beside: other files, by name; JSON, or bytes.
    """

    twin: PreTrainedModel
    state: dict[str, Tensor]
    config: dict
    files: dict[str, list[str]] = field(default_factory=dict)
    beside: dict[str, object] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        for name, tensors in (self.files or {"model.safetensors": list(self.state)}).items():
            part = {tensor: self.state[tensor].clone().contiguous() for tensor in tensors}
            save_file(part, path / name) if "safetensors" in name else torch.save(part, path / name)
        for name, value in {"config.json": self.config, **self.beside}.items():
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            (path / name).write_bytes(data)


@dataclass(frozen=True)
class Case:
    """A checkpoint.

    Attributes:
        write: of its linears; None leaves them in float32.
        config: its quantization_config; None has none.
        change: what is done to it before it is written.
        error: what the one line says that it is refused with.
        note: what the one note says.
    """

    write: Writer | None = None
    config: dict | None = None
    change: Callable[[Folder], object] = lambda folder: None
    family: str = "llama"
    error: str = ""
    note: str = ""


def folder_of(family: str, write: Writer | None, quantization: dict | None) -> Folder:
    """A model with its linears as a writer has them; None leaves all of them in float32."""
    known = twin_of(family)
    # What a case changes of a configuration is one of its numbers, and a deep copy takes long.
    configs = {id(known.config): copy.copy(known.config)}
    twin = copy.deepcopy(known, configs)
    state = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    if twin.config.tie_word_embeddings:
        del state["lm_head.weight"]
    random = np.random.default_rng(0)
    for name in layer_linears(twin) if write else ():
        quantize(twin, state, name, write, random)
    config = {key: v for key, v in twin.config.to_dict().items() if not key.startswith("_")}
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    return Folder(twin, state, config)


def quantize(
    twin: PreTrainedModel, state: dict, name: str, write: Writer, random: np.random.Generator
) -> None:
    """Put a module's quantized tensors in the place of its weight, which its twin gets back."""
    module = twin.get_submodule(name)
    tensors, weight = write(*module.weight.shape, random)
    module.weight.data = weight.float()
    del state[f"{name}.weight"]
    state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def draw(
    rows: int, columns: int, bits: int, group: int, sym: bool, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random integers (N, K) of b bits, their zero points (N, G) and scales (N, G)."""
    groups = 1 if group == -1 else -(-columns // group)
    values = random.integers(0, 2**bits, (rows, columns))
    middle = 2 ** (bits - 1)
    zeros = np.full((rows, groups), middle)
    if not sym:
        zeros = random.integers(1, 2**bits, (rows, groups))
    scales = random.uniform(0.3, 1.0, (rows, groups)) * 0.8 / middle
    return values, zeros, scales.astype(np.float16)


def floats(values: np.ndarray, zeros: np.ndarray, scales: np.ndarray, of: np.ndarray) -> Tensor:
    """(value - zero) * scale, where `of` (K,) is the group of each input channel."""
    return torch.from_numpy((values - zeros[:, of]) * scales.astype(np.float64)[:, of])


def words_of(values: np.ndarray, bits: int) -> np.ndarray:
    """Each column of (M, R) as a stream of b-bit values, lowest bits first: int32 (W, R)."""
    stream = (values[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    stream = stream.reshape(-1, values.shape[1])
    stream = np.pad(stream, ((0, -len(stream) % 32), (0, 0))).reshape(-1, 32, values.shape[1])
    words = (stream.astype(np.uint64) << np.arange(32, dtype=np.uint64)[None, :, None]).sum(1)
    return words.astype(np.uint32).view(np.int32)


def gptq(
    bits: int = 4,
    group: int = 32,
    *,
    sym: bool = False,
    v1: bool = True,
    shuffled: bool = False,
    bias: float | None = None,
) -> Writer:
    """AutoGPTQ's layout, which is GPTQModel's: v1 stores zero points less 1.

    Args:
        shuffled: act-order: groups are not runs of input channels. The order is that of the
            number of columns, so that q, k and v share theirs.
        bias: of Llama's linears, which have none otherwise.
    """

    def write(rows: int, columns: int, random: np.random.Generator) -> Written:
        values, zeros, scales = draw(rows, columns, bits, group, sym, random)
        of = np.arange(columns) // (columns if group == -1 else group)
        if shuffled:
            of = np.random.default_rng(columns).permutation(of)
        tensors = {
            "qweight": words_of(values.T, bits),
            "qzeros": np.ascontiguousarray(words_of(zeros - (1 if v1 else 0), bits).T),
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": of.astype(np.int32),
        }
        if bias is not None:
            tensors["bias"] = np.full(rows, bias, np.float16)
        found = {key: torch.from_numpy(array) for key, array in tensors.items()}
        return found, floats(values, zeros, scales, of)

    return write


def awq(group: int = 32, bias: float | None = None, *, sym: bool = False) -> Writer:
    """AutoAWQ's WQLinear_GEMM: eight output channels to a word, in an order of their own."""

    def pack(values: np.ndarray) -> np.ndarray:
        out = np.zeros((len(values), values.shape[1] // 8), np.uint32)
        for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out |= values[:, column::8].astype(np.uint32) << np.uint32(4 * place)
        return out.view(np.int32)

    def write(rows: int, columns: int, random: np.random.Generator) -> Written:
        values, zeros, scales = draw(rows, columns, 4, group, sym, random)
        tensors = {
            "qweight": pack(np.ascontiguousarray(values.T)),
            "qzeros": pack(np.ascontiguousarray(zeros.T)),
            "scales": np.ascontiguousarray(scales.T),
        }
        if bias is not None:
            tensors["bias"] = np.full(rows, bias, np.float16)
        of = np.arange(columns) // (columns if group == -1 else group)
        found = {key: torch.from_numpy(array) for key, array in tensors.items()}
        return found, floats(values, zeros, scales, of)

    return write


def mlx(
    bits: int = 4, group: int = 32, offsets: str = "biases", dtype: torch.dtype = torch.float16
) -> Writer:
    """MLX's affine mode: a row is a stream of integers, and a bias is added to each group."""

    def write(rows: int, columns: int, random: np.random.Generator) -> Written:
        values, zeros, scales = draw(rows, columns, bits, group, False, random)
        scales = torch.from_numpy(scales).to(dtype)
        added = (-scales * (torch.from_numpy(zeros) + 0.3)).to(dtype)
        of = np.arange(columns) // group
        words = np.ascontiguousarray(words_of(values.T, bits).T).view(np.uint32)
        tensors = {"weight": torch.from_numpy(words), "scales": scales, offsets: added}
        weight = torch.from_numpy(values) * scales.double()[:, of] + added.double()[:, of]
        return tensors, weight

    return write


def compressed(bits: int, group: int, *, sym: bool, packed: bool = True) -> Writer:
    """What compressed-tensors itself writes."""
    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=sym,
        strategy="channel" if group == -1 else "group",
        group_size=None if group == -1 else group,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = PackedQuantizationCompressor if packed else IntQuantizationCompressor

    def write(rows: int, columns: int, random: np.random.Generator) -> Written:
        values, zeros, scales = draw(rows, columns, bits, group, sym, random)
        of = np.arange(columns) // (columns if group == -1 else group)
        middle = 2 ** (bits - 1)
        weight = floats(values, zeros, scales, of)
        state = {
            "weight": weight.float(),
            "weight_scale": torch.from_numpy(scales.astype(np.float32)),
            "weight_zero_point": torch.from_numpy((zeros - middle).astype(np.int8)),
        }
        return compressor.compress(state, scheme), weight

    return write


def quanto(rows: int, columns: int, random: np.random.Generator) -> Written:
    """optimum-quanto's qint8: parts of the tensor "weight", and no settings in config.json."""
    data = torch.from_numpy(random.integers(-127, 128, (rows, columns)).astype(np.int8))
    scale = torch.from_numpy(random.uniform(0.5, 1.0, (rows, 1)) / 127).float()
    tensors = {"weight._data": data, "weight._scale": scale}
    tensors |= {key: torch.ones(()) for key in ("input_scale", "output_scale")}
    return tensors, data * scale
