"""Which of our tensors each tensor of a GGUF file is, or a part of, and in which order of rows.

llama.cpp's names are the same in all of its architectures, so that one table takes them to ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qllm.config import ModelConfig
from qllm.errors import UserError
from qllm.gguf.architectures import Architecture
from qllm.gguf.config import architecture_of, read_config
from qllm.gguf.file import GGUF, GGUFTensor
from qllm.gguf.metadata import Metadata
from qllm.models import FAMILIES, RawConfig
from qllm.models import read_config as model_config
from qllm.models.delta_net import has_delta_net
from qllm.models.family import MAX_EXPERTS

# llama.cpp's name of a module: ours, and, of one that is put together, the parts in order.
OUTER = {
    "token_embd": "embed",
    "token_embd_norm": "embed_norm",
    "position_embd": "positions",
    "output_norm": "final_norm",
    "output": "lm_head",
}
INNER: dict[str, tuple[str, int]] = {
    "attn_norm": ("attention_norm", 0),
    "attn_qkv": ("attention.qkv", 0),
    "attn_q": ("attention.qkv", 0),
    "attn_k": ("attention.qkv", 1),
    "attn_v": ("attention.qkv", 2),
    "attn_q_norm": ("attention.qk_norm", 0),
    "attn_k_norm": ("attention.qk_norm", 1),
    "attn_output": ("attention.out", 0),
    "attn_sinks": ("attention.sinks", 0),
    "post_attention_norm": ("attention_output_norm", 0),
    "ffn_norm": ("mlp_norm", 0),
    "ffn_gate": ("mlp.up", 0),
    "ffn_up": ("mlp.up", 1),
    "ffn_down": ("mlp.down", 0),
    "ffn_gate_inp": ("mlp.router", 0),
    "ffn_gate_shexp": ("mlp.shared.up", 0),
    "ffn_up_shexp": ("mlp.shared.up", 1),
    "ffn_down_shexp": ("mlp.shared.down", 0),
    "ffn_gate_inp_shexp": ("mlp.shared_gate", 0),
    "post_ffw_norm": ("mlp_output_norm", 0),
}
# Of all experts of a layer, one behind the other in one tensor; in old files each has its own.
STACKED: dict[str, tuple[str, int]] = {
    "ffn_gate_exps": ("mlp.experts.{}.up", 0),
    "ffn_up_exps": ("mlp.experts.{}.up", 1),
    "ffn_gate_up_exps": ("mlp.experts.{}.up", 0),
    "ffn_down_exps": ("mlp.experts.{}.down", 0),
}
# Of a layer with a delta net, what these and other names are.
DELTA: dict[str, tuple[str, int]] = {
    "attn_qkv": ("attention.qkv", 0),
    "attn_gate": ("attention.qkv", 1),
    "ssm_beta": ("attention.gates", 0),
    "ssm_alpha": ("attention.gates", 1),
    "ssm_conv1d": ("attention.conv", 0),
    "ssm_a": ("attention.log_decay", 0),
    "ssm_dt": ("attention.decay_bias", 0),
    "ssm_norm": ("attention.norm", 0),
    "ssm_out": ("attention.out", 0),
}
# A number of each head there, in place of the logarithm of its negative, and without a kind.
DECAY = "ssm_a"
# Values that the blocks of all types are of, or several of them.
BLOCK_VALUES = 32
ALONE = re.compile(r"(ffn_gate|ffn_up|ffn_down)\.(\d+)")
LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
BARE = re.compile(rf"blk\.\d+\.{DECAY}")
GATES = "gates of attn_q"
# What the configuration has of a file.
CONSUMED = tuple(f"rope_{kind}.weight" for kind in ("freqs", "factors_long", "factors_short"))


@dataclass(frozen=True)
class Part:
    """Rows of one of our tensors, all of a file's tensor.

    Attributes:
        perm: the file's row of each of ours; None where they are the same.
        offset: what its numbers have more than ours.
        chunks: the file's run of columns of each of ours, all of one size; None: the same ones.
        decays: its numbers are -e^x of ours.
    """

    tensor: GGUFTensor
    perm: Tensor | None = None
    offset: float = 0.0
    chunks: Tensor | None = None
    decays: bool = False

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.tensor.shape[0] if self.perm is None else len(self.perm)


def parts_of(found: GGUF) -> dict[str, list[Part]]:
    """Our name of each tensor, to what it is put together from.

    A tensor that has no name of ours keeps its own, in the layer that it is in.
    """
    architecture = architecture_of(Metadata(found))
    offset, names = architecture.norm_offset, inner_parts(architecture)
    config = _config_of(found)
    perms = row_orders(config, architecture)
    parts: dict[str, dict[int, Part]] = {}
    for name, tensor in found.tensors.items():
        spelled = f"{name}.weight" if BARE.fullmatch(name) else name
        layer, (stem, _, kind) = LAYER.fullmatch(spelled), spelled.rpartition(".")
        behind = layer is not None and int(layer[1]) >= config.num_layers
        if name in CONSUMED or (behind and architecture.predicts):
            continue
        if layer and has_delta_net(config, int(layer[1])) and layer[2] in DELTA:
            inner, at = DELTA[layer[2]]
            same = parts.setdefault(f"layers.{int(layer[1])}.{inner}.weight", {})
            _add_part(same, at, _delta_part(config, layer[2], tensor, name), name)
            continue
        at = 0
        if layer:
            kind, where = layer[3], f"layers.{int(layer[1])}."
            if layer[2] in STACKED:
                inner, at = STACKED[layer[2]]
                dims = 2 if kind == "bias" else 3
                for expert, matrix in enumerate(_experts_of(name, tensor, dims)):
                    same = parts.setdefault(f"{where}{inner.format(expert)}.{kind}", {})
                    _add_part(same, at, Part(matrix), name)
                continue
            if alone := ALONE.fullmatch(layer[2]):
                inner, at = STACKED[f"{alone[1]}_exps"]
                inner = inner.format(int(alone[2]))
            else:
                inner, at = names.get(layer[2], (layer[2], 0))
            stem = where + inner
        elif stem in OUTER:
            stem = OUTER[stem]
        perm = perms.get(layer[2]) if layer else None
        gates = perms.get(GATES) if layer and layer[2] == "attn_q" else None
        rows = 0 if perm is None else len(perm) + (0 if gates is None else len(gates))
        if perm is not None and rows != tensor.shape[0]:
            raise UserError(f"{tensor.path}: {name} has {tensor.shape[0]} rows, its heads {rows}")
        same = parts.setdefault(f"{stem}.{kind}", {})
        if gates is not None:  # behind those of values, in the order of parts
            _add_part(same, 3, Part(tensor, gates), name)
        if stem.endswith(".mlp.shared_gate") and len(tensor.shape) == 1:  # of one output
            _add_part(same, at, Part(replace(tensor, shape=(1, *tensor.shape))), name)
            continue
        _add_part(same, at, Part(tensor, perm, offset if stem.endswith("norm") else 0.0), name)
    return {name: [same[at] for at in sorted(same)] for name, same in parts.items()}


def inner_parts(architecture: Architecture) -> dict[str, tuple[str, int]]:
    """INNER, as an architecture has it."""
    return INNER | {name: (ours, 0) for name, ours in architecture.parts.items()}


def _add_part(same: dict[int, Part], at: int, part: Part, name: str) -> None:
    if at in same:
        raise UserError(f"{part.tensor.path}: {name} and another tensor are the same part")
    same[at] = part


def _experts_of(name: str, tensor: GGUFTensor, dims: int) -> list[GGUFTensor]:
    """The matrix, or bias, of each expert in a tensor of all of a layer, of so many dimensions."""
    if len(tensor.shape) != dims or tensor.shape[0] > MAX_EXPERTS:
        raise UserError(
            f"{tensor.path}: {name} has the shape {list(tensor.shape)}; it is to have a "
            f"{'matrix' if dims == 3 else 'bias'} for each of up to {MAX_EXPERTS} experts"
        )
    size = tensor.nbytes // tensor.shape[0]  # of whole blocks, as rows are
    return [
        replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + i * size, nbytes=size)
        for i in range(tensor.shape[0])
    ]


def _delta_part(config: ModelConfig, stem: str, tensor: GGUFTensor, name: str) -> Part:
    """What a tensor is in a layer with a delta net.

    llama.cpp has heads of values by their place among those of a head of keys; ours lie with it.
    """
    delta = config.delta_net
    assert delta is not None  # as of all such layers
    heads, keys, dim = delta.value_heads, delta.key_heads, delta.value_dim
    order = torch.arange(heads).view(heads // keys, keys).t().flatten()
    values = (order[:, None] * dim + torch.arange(dim)).flatten()
    channels = delta.channels - len(values)
    keys_first = torch.arange(channels)
    perms = {
        **dict.fromkeys(("ssm_beta", "ssm_alpha", "ssm_dt", DECAY), order),
        **dict.fromkeys(("attn_qkv", "ssm_conv1d"), torch.cat([keys_first, channels + values])),
        "attn_gate": values,
    }
    perm = perms.get(stem)
    if perm is not None and len(perm) != tensor.shape[0]:
        raise UserError(f"{tensor.path}: {name} has {tensor.shape[0]} rows, its heads {len(perm)}")
    if stem == "ssm_conv1d":
        tensor = replace(tensor, shape=(tensor.shape[0], 1, *tensor.shape[1:]))
    if heads == keys:
        return Part(tensor, decays=stem == DECAY)
    if stem != "ssm_out":
        return Part(tensor, perm, decays=stem == DECAY)
    if tensor.shape[-1] != heads * dim or (tensor.type.packs and dim % BLOCK_VALUES):
        raise UserError(
            f"{tensor.path}: {name} has {tensor.shape[-1]} columns of {heads} heads; QLLM reads "
            f"heads of {dim} channels there, which are to be a multiple of {BLOCK_VALUES}"
        )
    return Part(tensor, chunks=order)


def _config_of(found: GGUF) -> ModelConfig:
    """The model of a file."""
    config = model_config(RawConfig(read_config(found), str(found.path)))
    counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    rows = sum(tensor.shape[0] for tensor in found.tensors.values())
    if sum(counts) * config.head_dim > rows:
        raise UserError(
            f"{found.path}: {config.num_heads} heads of {config.head_dim} channels are more than "
            f"the {rows} rows of its tensors"
        )
    delta = config.delta_net
    if delta is not None and delta.channels > rows:
        raise UserError(
            f"{found.path}: its delta nets have {delta.channels} channels, more than the {rows} "
            "rows of its tensors"
        )
    return config


def row_orders(config: ModelConfig, architecture: Architecture) -> dict[str, Tensor]:
    """llama.cpp's name of each part whose rows are not in our order: the row of each of ours.

    Those of a gate of each head stand in the matrix of queries, and here as GATES.
    """
    gated = (config.num_heads,) if config.attention_gate else ()
    counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    # Heads lie one behind the other here, whatever the family's own checkpoints have.
    family = replace(
        FAMILIES[config.family], interleaved_qkv=False, interleaved_rope=architecture.permuted
    )
    whole, head = family.qkv_perm(config), family.head_perm(config)
    if whole is None:
        return {}
    q, k, _, *gates = whole.split([n * config.head_dim for n in counts + gated])
    found = {"attn_qkv": whole, "attn_q": q, "attn_k": k - len(q) * (1 + len(gates))}
    if gates:
        found[GATES] = gates[0]
    if head is not None and config.qk_norm and not config.wide_qk_norm:
        found |= dict.fromkeys(("attn_q_norm", "attn_k_norm"), head)
    return found
