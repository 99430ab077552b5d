"""Our names of a model's tensors, and where each lies in a checkpoint of either layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from qllm.checkpoint.reader import LAYOUT, LAYOUT_KEY, Checkpoint
from qllm.config import LM_HEAD, ModelConfig
from qllm.errors import UserError
from qllm.layers import Linear
from qllm.models import Decoder, Family, family_of
from qllm.models.delta_net import has_delta_net


def is_converted(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is in QLLM's layout.

    Raises:
        UserError: for one in a layout that a later QLLM wrote.
    """
    layout = checkpoint.raw_config.values.get(LAYOUT_KEY)
    if layout not in (None, LAYOUT):
        raise UserError(
            f"{checkpoint.folder} has QLLM layout {layout!r}; this version reads {LAYOUT}"
        )
    return layout == LAYOUT


def float_tensors(model: Decoder) -> dict[str, tuple[int, ...]]:
    """Name and shape of every float tensor that a model is made from, a tied head left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            if name == "lm_head" and model.config.tied_head:
                continue
            shapes[f"{name}.weight"] = (module.out_features, module.in_features)
            if module.bias is not None:
                shapes[f"{name}.bias"] = (module.out_features,)
        else:
            for key, buffer in module.named_buffers(recurse=False):
                shapes[f"{name}.{key}"] = tuple(buffer.shape)
    return shapes


# Rows of a part of the checkpoint: its name, how many it has, and which of them.
Run = tuple[str, int, range]


@dataclass(frozen=True)
class TensorNames:
    """What a checkpoint calls the tensors that ours are fused from.

    Attributes:
        family: whose tables say it.
        config: the model's, with `tied_head` as the weights have it.
        converted: whether the checkpoint is in QLLM's layout, which has our names.
        prefix: in front of the names of all but the head.
        head: the classifier's name.
    """

    checkpoint: Checkpoint
    family: Family
    config: ModelConfig
    converted: bool
    prefix: str
    head: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """
        Raises:
            UserError: for a config.json that is broken, or another model's.
        """
        family, converted = family_of(checkpoint.raw_config), is_converted(checkpoint)
        config = family.read_config(checkpoint.raw_config)
        if converted:
            return cls(checkpoint, family, config, converted, "", LM_HEAD)
        prefix, head = _find_prefix(checkpoint, family), _find_head(checkpoint, family)
        return cls(checkpoint, family, config, converted, prefix, head)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor of ours.

        Raises:
            UserError: for sizes that no memory holds.
        """
        try:
            return float_tensors(Decoder(self.config, {}, torch.float16))
        except (RuntimeError, TypeError, OverflowError):
            raise UserError(
                f"{self.checkpoint.folder / 'config.json'} implies tensors larger than any memory"
            ) from None

    @property
    def layers(self) -> str:
        """What the names of the layers' tensors begin with."""
        return self.prefix + ("layers." if self.converted else self.family.layer.partition("{")[0])

    def sources(self, name: str) -> tuple[str, ...]:
        """The checkpoint's names of the tensors that ours is fused from."""
        if self.converted:
            return (name,)
        module, kind = name.rsplit(".", 1)
        if module == LM_HEAD:
            return (f"{self.head}.{kind}",)
        parts = tuple(
            self.prefix + self.family.tensor_name(part, kind)
            for part in self.family.parts(module, self.config)
        )
        if name == "embed.weight" and self.config.tied_head and not self._holds(parts[0]):
            return (f"{self.head}.weight",)
        return parts

    def packed(self, table: str) -> list[str]:
        """The tensors that a table of embeddings is packed into; [] where it is floating point."""
        (source,) = self.sources(f"{table}.weight")
        info = self.checkpoint.tensors.get(source)
        if info is not None and info.dtype.is_floating_point:
            return []
        stem = source.removesuffix("weight")
        return [name for name in self.checkpoint.tensors if name.startswith(stem)]

    def _holds(self, part: str) -> bool:
        """Whether the checkpoint has a tensor, or those that it is packed into."""
        stem = part.removesuffix("weight")
        return any(name.startswith(stem) for name in self.checkpoint.tensors)

    def row_counts(self, module: str, parts: int) -> list[int]:
        """How many rows of our module's fused tensors each of its sources has."""
        if parts == 1:
            tensors = (f"{module}.weight", f"{module}.bias")
            return [next(self.shapes[name][0] for name in tensors if name in self.shapes)]
        wide = self.config.wide_qk_norm and module.endswith(".attention.qk_norm")
        if wide or module.endswith(".attention.qkv"):
            index = int(module.split(".")[1])
            config = self.config.of_layer(index)
            if has_delta_net(config, index):
                assert config.delta_net is not None
                whole, channels = self.shapes[f"{module}.weight"][0], config.delta_net.channels
                return [channels, whole - channels]
            counts = [count * config.head_dim for count in config.qkv_parts[:parts]]
            if config.attention_gate and not wide:  # beside their queries
                counts[0] *= 2
            return counts
        return [self.shapes[f"{module}.weight"][0] // parts] * parts

    def runs(self, name: str, runs: Sequence[range]) -> list[Run]:
        """Where runs of a tensor's rows are: a part, how many rows it has, and which of them."""
        parts = self.sources(name)
        counts = self.row_counts(name.rpartition(".")[0], len(parts))
        starts, found = [sum(counts[:i]) for i in range(len(counts))], []
        for run in runs:
            for part, begin, count in zip(parts, starts, counts, strict=True):
                inside = range(max(run.start, begin) - begin, min(run.stop, begin + count) - begin)
                if inside:
                    found.append((part, count, inside))
        return found

    def reordered_rows(self, name: str, runs: Sequence[range]) -> tuple[Tensor, list[Run]]:
        """Where runs of our QKV rows are in the checkpoint: each one's place in some of its rows.

        Returns:
            those places, and the rows: as `runs` has them, one behind the other.
        """
        rows = torch.cat([torch.arange(run.start, run.stop) for run in runs])
        perm = self._order(name)
        assert perm is not None  # see `is_reordered`
        wanted, places, found = perm[rows], torch.empty_like(rows), []
        before = first = 0
        parts = self.sources(name)
        counts = self.row_counts(name.rpartition(".")[0], len(parts))
        for part, count in zip(parts, counts, strict=True):
            inside = (wanted >= first) & (wanted < first + count)
            if inside.any():
                low, high = wanted[inside].aminmax()
                places[inside] = wanted[inside] - low + before
                found.append((part, count, range(int(low) - first, int(high) + 1 - first)))
                before += int(high) + 1 - int(low)
            first += count
        return places, found

    def is_transposed(self, name: str) -> bool:
        """Whether the checkpoint has one of our tensors as (inputs, outputs).

        Small floats are as a linear has them, in GPT-2, too.
        """
        if self.converted or not self.family.is_transposed(name):
            return False
        return self.sources(name)[0] not in self.checkpoint.floats

    def is_reordered(self, name: str) -> bool:
        """Whether the checkpoint has the rows of one of our tensors in another order."""
        return not self.converted and self._order(name) is not None

    def _order(self, name: str) -> Tensor | None:
        """The row that each of a tensor of ours has in Hugging Face's layout; None: the same."""
        return self.family.row_order(name.rpartition(".")[0], self.config)

    def rows_of_parts(self, module: str) -> dict[str, slice | Tensor]:
        """Which rows of one of our modules' tensors each part has, by its Hugging Face name.

        Rows are a slice, or the index of each of the part's own, in their order.
        """
        if module == LM_HEAD:
            return {self.family.head if self.converted else self.head: slice(None)}
        parts = [self.family.prefixes[0] + part for part in self.family.parts(module, self.config)]
        counts = self.row_counts(module, len(parts))
        if (perm := self.family.row_order(module, self.config)) is not None:
            return dict(zip(parts, perm.argsort().split(counts), strict=True))
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return {
            part: slice(end - count, end)
            for part, count, end in zip(parts, counts, ends, strict=True)
        }


def _find_prefix(checkpoint: Checkpoint, family: Family) -> str:
    names = checkpoint.tensors
    for prefix in family.prefixes:
        if any(name.startswith(prefix + family.layer.format(0)) for name in names):
            return prefix
    example = checkpoint.file_names.expected(family.prefixes[0] + family.layer.format(0))
    raise UserError(
        f"{checkpoint.folder} has no tensor that begins with {example}; its config.json "
        f"says that it is {family.name}"
    )


def _find_head(checkpoint: Checkpoint, family: Family) -> str:
    """The classifier's name: the family's, or that of today's transformers."""
    own = f"{family.head}."
    found = any(name.startswith(own) for name in checkpoint.tensors)
    return family.head if found else LM_HEAD
