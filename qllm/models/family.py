"""What describes a model family: the names in its checkpoints, and how to read its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from torch import Tensor

from qllm.config import LM_HEAD, ExpertsConfig, ModelConfig
from qllm.errors import UserError
from qllm.models.attention import ATTENTION_LINEARS, QK_NORM, QKV
from qllm.models.delta_net import has_delta_net
from qllm.models.mlp import EXPERTS, mlp_linears
from qllm.models.stacks import Stacks

# Far beyond any model, and small enough that nothing overflows or hangs on it.
MAX_COUNT = 2**31 - 1
MAX_LAYERS, MAX_EXPERTS = 1_000, 4_096
# Of settings that are no counts: what is computed from them stays a finite float32.
SMALLEST, LARGEST = 1e-12, 1e12


# The linears of a layer that GPT-2's files have the other way round.
TRANSPOSED = (*ATTENTION_LINEARS, "mlp.up", "mlp.down")


@dataclass(frozen=True)
class RawConfig:
    """A config.json as it was read, with checked access.

    Attributes:
        values: the JSON object.
        where: the file, for messages.
        outer: the model_type of the multimodal model whose text model this is (`multimodal`).
    """

    values: Mapping[str, Any]
    where: str
    outer: str | None = None

    def count(
        self,
        *names: str,
        default: int | None = None,
        minimum: int = 1,
        maximum: int = MAX_COUNT,
    ) -> int:
        """A whole number from `minimum` to `maximum`, under the first of `names` that is there."""
        value = self._find(names, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.error(names[0], value, f"a whole number from {minimum} to {maximum}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number, from SMALLEST to LARGEST."""
        value: Any = self._find((name,), default)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not SMALLEST <= value <= LARGEST:
            raise self.error(name, value, f"a positive number from {SMALLEST} to {LARGEST}")
        return float(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` positive numbers."""
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) != count:
            raise self.error(name, value, f"a list of {count} positive numbers")
        return tuple(RawConfig({name: item}, self.where).number(name) for item in value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._find((name,), default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    @overload
    def text(self, name: str, default: str) -> str: ...

    @overload
    def text(self, name: str, default: None) -> str | None: ...

    def text(self, name: str, default: str | None) -> str | None:
        """A string."""
        value = self._find((name,), default)
        if value is not None and not isinstance(value, str):
            raise self.error(name, value, "a string")
        return value

    def tokens(self, name: str) -> tuple[int, ...]:
        """Token ids: a list of them, one, or none."""
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in ids):
            raise self.error(name, value, "a token id or a list of them")
        return tuple(ids)

    def windows(self, num_layers: int, sliding: Callable[[int], bool]) -> tuple[int, ...]:
        """The window of each layer, 0 where it sees all; () where all do.

        Args:
            sliding: whether a layer has a window, where no `layer_types` say it.
        """
        kinds = self.values.get("layer_types")
        if kinds is None:
            chosen = [sliding(index) for index in range(num_layers)]
        else:
            known = ("full_attention", "sliding_attention")
            unknown = not isinstance(kinds, list) or any(kind not in known for kind in kinds)
            if unknown or len(kinds) < num_layers:
                expected = f"a list of {num_layers} of {' and '.join(known)}"
                raise self.error("layer_types", kinds, expected)
            chosen = [kind == known[1] for kind in kinds[:num_layers]]
        if not any(chosen):
            return ()
        window = self.count("sliding_window")
        return tuple(window if each else 0 for each in chosen)

    def with_defaults(self, defaults: Mapping[str, Any]) -> RawConfig:
        """The same with what a family has where there is no such value."""
        return replace(self, values={**defaults, **self.values})

    def error(self, name: str, value: object, expected: str) -> UserError:
        """The error for a value that cannot be."""
        if value is None:
            return UserError(f"{self.where}: {name} is missing; expected {expected}")
        return UserError(f"{self.where}: {name} is {value!r}; expected {expected}")

    def _find(self, names: tuple[str, ...], default: object) -> object:
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        return default


@dataclass(frozen=True)
class Family:
    """One model family: a table, not code.

    Attributes:
        prefixes: what may stand in front of every tensor's name; the first is what a causal
            language model has, "" or a shorter one what a bare model was saved with.
        outer: our module outside the layers, to the name it has in a checkpoint.
        layer: the prefix of a layer's tensors, with {} for its index.
        inner: our module inside a layer, to the names of the parts it is fused from, in order; with
            {} for the number of an expert.
        delta: the same of a layer with a delta net, where that differs.
        delta_orders: `row_order` of modules of such a layer.
        interleaved_qkv: the QKV matrix has its rows as (head, q/k/v, channel), as BLOOM's has.
        interleaved_rope: RoPE rotates pairs of channels that are neighbours, as GLM's does.
        head: the classifier's name in a checkpoint, where it is not "lm_head".
        transposed: matrices of the layers lie in the file as (inputs, outputs).
        ignored: ends of names of tensors that hold no weights.
        bare: ends of names of parts that are a tensor themselves, and have no ".weight" behind.
        stacks: what tensors of all experts of a layer hold, by their names behind the layer's.
        read_config: the ModelConfig of a config.json.
    """

    name: str
    prefixes: tuple[str, ...]
    outer: Mapping[str, str]
    layer: str
    inner: Mapping[str, tuple[str, ...]]
    read_config: Callable[[RawConfig], ModelConfig]
    delta: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    delta_orders: Mapping[str, Callable[[ModelConfig], Tensor]] = field(default_factory=dict)
    interleaved_qkv: bool = False
    interleaved_rope: bool = False
    head: str = LM_HEAD
    transposed: bool = False
    ignored: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    stacks: Stacks = field(default_factory=dict)

    def parts(self, module: str, config: ModelConfig) -> tuple[str, ...]:
        """The checkpoint's names, without prefix, of what one of our modules is fused from."""
        if not module.startswith("layers."):
            return (self.outer[module],)
        _, index, inner = module.split(".", 2)
        expert = ""
        if inner.startswith(EXPERTS):
            expert, _, linear = inner.removeprefix(EXPERTS).partition(".")
            inner = f"{EXPERTS}{{}}.{linear}"
        own = self.delta.get(inner) if has_delta_net(config, int(index)) else None
        found = own or self.inner[inner]
        if own is None and inner in (QKV, QK_NORM) and len(found) > 1:
            found = found[: len(config.of_layer(int(index)).qkv_parts)]
        return tuple(self.layer.format(index) + part.format(expert) for part in found)

    def without_use(self, config: ModelConfig) -> tuple[str, ...]:
        """The checkpoint's names, without prefix, of parts that files have and no layer needs.

        Those are keys and values of layers that take those of others.
        """
        return tuple(
            f"{self.layer.format(index)}{part}."
            for index in range(len(config.shapes))
            if config.shapes[index].kv_layer is not None
            for module in (QKV, QK_NORM)
            for part in self.inner[module][1:]
        )

    def tensor_name(self, part: str, kind: str) -> str:
        """A checkpoint's name of a tensor of a part ("weight", "bias")."""
        return part if part.endswith(self.bare) else f"{part}.{kind}"

    def row_order(self, module: str, config: ModelConfig) -> Tensor | None:
        """The row of a file's tensor, its parts in order, that each of a module's is.

        None: the same one, as of all modules but QKV, and norms and gates that go with it.
        """
        if not module.startswith("layers."):
            return None
        _, index, inner = module.split(".", 2)
        if has_delta_net(config, int(index)):
            order = self.delta_orders.get(inner)
            return None if order is None else order(config)
        if inner == "attention.qkv":
            return self.qkv_perm(config)
        if inner == "attention.qk_norm" and (perm := self.head_perm(config)) is not None:
            heads = config.num_heads + config.num_kv_heads if config.wide_qk_norm else 2
            first = torch.arange(heads)[:, None] * config.head_dim
            return (first + perm).flatten()
        return None

    def qkv_perm(self, config: ModelConfig) -> Tensor | None:
        """`row_order` of QKV: ours are query heads, key heads, value heads, and gates of heads."""
        count, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        head = self.head_perm(config)
        if not (self.interleaved_qkv or config.attention_gate or head is not None):
            return None
        heads = count + 2 * kv_heads + (count if config.attention_gate else 0)
        rows = torch.arange(heads * dim).view(heads, dim)
        if self.interleaved_qkv:
            rows = rows.view(count, 3, dim).transpose(0, 1).reshape(heads, dim)
        if config.attention_gate:  # a head's stands behind its query
            queries, gates = rows[: 2 * count].view(count, 2, dim).unbind(1)
            rows = torch.cat([queries, rows[2 * count :], gates])
        if head is not None:
            rows[: count + kv_heads] = rows[: count + kv_heads, head]
        return rows.flatten()

    def head_perm(self, config: ModelConfig) -> Tensor | None:
        """The channel of a file's query or key head that each of ours is; None: the same one.

        What RoPE rotates of a head comes in two halves, with what it does not behind each, so that
        pairs are D / 2 apart in any case.
        """
        dim, rotary_dim = config.head_dim, config.rope and config.rope.rotary_dim
        if not (self.interleaved_rope or rotary_dim):
            return None
        pairs = -(-(rotary_dim or dim) // 2)
        still = dim // 2 - pairs
        first, second, *others = torch.arange(dim).split([pairs, pairs, still, still])
        if self.interleaved_rope:
            first, second = torch.arange(2 * pairs).view(pairs, 2).unbind(1)
        return torch.cat([first, others[0], second, others[1]])

    def is_transposed(self, name: str) -> bool:
        """Whether a checkpoint has one of our tensors as (inputs, outputs)."""
        module, _, kind = name.rpartition(".")
        return self.transposed and kind == "weight" and module.endswith(TRANSPOSED)

    def layer_linears(self, config: ModelConfig) -> dict[str, tuple[str, ...]]:
        """Our name of every linear in the layers, to the full names of its parts."""
        names = [
            f"layers.{i}.{linear}"
            for i in range(config.num_layers)
            for linear in (*ATTENTION_LINEARS, *mlp_linears(config, i))
        ]
        return {
            name: tuple(self.prefixes[0] + part for part in self.parts(name, config))
            for name in names
        }


def check_heads(raw: RawConfig, hidden: int, heads: int) -> None:
    """Refuse a hidden size that the heads cannot share out."""
    if hidden % heads:
        raise UserError(f"{raw.where}: {heads} heads cannot share a hidden size of {hidden}")


def read_top_k(raw: RawConfig, names: tuple[str, ...], count: int, top_k: int) -> tuple[int, int]:
    """How many experts a layer has, under the first of `names` that is there, and a token takes.

    Args:
        count, top_k: where a config.json does not say.
    """
    count = raw.count(*names, default=count, maximum=MAX_EXPERTS)
    return count, raw.count("num_experts_per_tok", default=top_k, maximum=count)


def experts_of_all_layers(
    raw: RawConfig,
    config: ModelConfig,
    counts: tuple[int, int],
    *,
    normalizes: bool,
    router_bias: bool = False,
) -> ExpertsConfig:
    """The experts of a model whose layers all have them, each with the inner channels of an MLP.

    Args:
        config: what it has besides.
        counts: how many there are, and a token takes, where a config.json does not say.
        normalizes, router_bias: see `ExpertsConfig`.
    """
    count, top_k = read_top_k(raw, ("num_local_experts", "num_experts"), *counts)
    return ExpertsConfig(
        count=count,
        top_k=top_k,
        intermediate_size=config.intermediate_size,
        normalizes=normalizes,
        layers=(True,) * config.num_layers,
        router_bias=router_bias,
    )


def check_groups(raw: RawConfig, heads: int, kv_heads: int) -> None:
    """Refuse key-value heads that the heads cannot share out."""
    if heads % kv_heads:
        raise UserError(f"{raw.where}: {heads} heads cannot share {kv_heads} key-value heads")
