"""A model's tensors under our names, whichever layout its checkpoint has.

Two layouts: Hugging Face's, where a fused matrix is put together as it is read, and QLLM's own
(`weight_convert.py`), where it lies in one piece and can be mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from qllm.checkpoint.formats import (
    FORMATS,
    WORD,
    Format,
    Quantized,
    join_rows,
    parse,
    take_rows,
)
from qllm.checkpoint.reader import (
    LAYOUT,
    LAYOUT_KEY,
    QUANTIZATION_FILES,
    QUANTIZATION_KEY,
    Checkpoint,
)
from qllm.config import LM_HEAD, ModelConfig
from qllm.errors import UserError
from qllm.gguf import is_gguf
from qllm.layers import Linear
from qllm.models import Decoder, RawConfig, family_of

# The types that config.json may name.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Ends of names of tensors that change no result without what else they are for: scales of a
# quantized cache, masks and frequencies that are computed anew.
UNUSED = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".rotary_emb.inv_freq", ".masked_bias")
# Parts of names of an adapter's tensors.
ADAPTER = (".lora_", ".adapter", ".ia3_")


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The type of a name; None stays None.

    Raises:
        UserError: for a type in which no model is computed.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise UserError(f"dtype {dtype!r} is unknown; give one of {', '.join(DTYPES)}")
    return found


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


def check_readable_by_transformers(raw_config: RawConfig) -> None:
    """Refuse the reference what it cannot read.

    Raises:
        UserError: for a checkpoint in QLLM's layout, a quantized one, or a GGUF file.
    """
    if is_gguf(Path(raw_config.where)):
        raise UserError(
            f"{raw_config.where}: the reference is a checkpoint in Hugging Face's layout, and this "
            "is a GGUF file; name the checkpoint it was made from with --reference"
        )
    if QUANTIZATION_KEY in raw_config.values:
        raise UserError(
            f"{raw_config.where}: this checkpoint is quantized, the reference is the 16-bit one; "
            "name that, which it was made from (--reference, or --model-path of ref_gen.py)"
        )
    if LAYOUT_KEY in raw_config.values:
        raise UserError(
            f"{raw_config.where}: this checkpoint is in QLLM's layout, the reference reads "
            "Hugging Face's; name the one it was converted from (--reference, or --model-path of "
            "ref_gen.py)"
        )


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


class Weights:
    """A checkpoint's tensors under our names, checked against the model it claims to be.

    Attributes:
        config: the model's, with `tied_head` as the weights have it.
        converted: whether the checkpoint is in QLLM's layout.
        stored: how each quantized linear is stored, by our name; {} at 16 bits.
        dropped: the checkpoint's names of tensors that no model of its config.json has, and that
            change nothing.
    """

    def __init__(
        self, checkpoint: Checkpoint, note: Callable[[str], None] = lambda line: None
    ) -> None:
        """
        Args:
            note: called with a line on tensors that are not used.

        Raises:
            UserError: where config.json and the weights disagree.
        """
        self.checkpoint = checkpoint
        self.family = family_of(checkpoint.raw_config)
        self.converted = is_converted(checkpoint)
        self.config = self.family.read_config(checkpoint.raw_config)
        self._prefix = "" if self.converted else self._find_prefix()
        self._head = LM_HEAD if self.converted else self._find_head()
        self._confirm_sizes()
        self.config = self._untie_if_different(self.config)
        self.stored = self._find_stored()
        self._check()
        if self.dropped:
            more = f" and {len(self.dropped) - 1} more" if len(self.dropped) > 1 else ""
            note(
                f"{self.dropped[0]}{more} of the checkpoint: no {self.family.name} of its "
                "config.json has that, it is not used"
            )

    def _find_prefix(self) -> str:
        names = self.checkpoint.tensors
        for prefix in self.family.prefixes:
            if any(name.startswith(prefix + self.family.layer.format(0)) for name in names):
                return prefix
        example = self.family.prefixes[0] + self.family.layer.format(0)
        raise UserError(
            f"{self.checkpoint.folder} has no tensor that begins with {example}; its config.json "
            f"says that it is {self.family.name}"
        )

    def _find_head(self) -> str:
        """The classifier's name: the family's, or that of today's transformers."""
        own = f"{self.family.head}."
        found = any(name.startswith(own) for name in self.checkpoint.tensors)
        return self.family.head if found else LM_HEAD

    def _confirm_sizes(self) -> None:
        """Refuse counts of config.json that the tensors do not bear out.

        Nothing is made of such a count before, nor repeated so often.
        """
        count, layers = self.config.num_layers, self._prefix + "layers."
        if not self.converted:
            layers = self._prefix + self.family.layer.partition("{}")[0]
        found = {
            name.removeprefix(layers).partition(".")[0]
            for name in self.checkpoint.tensors
            if name.startswith(layers)
        }
        if count > len(found):
            raise UserError(
                f"{self.checkpoint.folder} holds {len(found)} layers, its config.json implies "
                f"{count}"
            )
        (embed,) = self._sources("embed.weight")
        self._check_shape(embed, (self.config.vocab_size, self.config.embed_size))

    def _check_shape(self, part: str, shape: tuple[int, ...]) -> None:
        info = self.checkpoint.tensors.get(part)
        if info is None:
            raise self._lacks(part)
        if info.shape != shape:
            raise UserError(
                f"{self.checkpoint.path(part)}: {part} has the shape {list(info.shape)}, "
                f"config.json implies {list(shape)}"
            )

    def _untie_if_different(self, config: ModelConfig) -> ModelConfig:
        """As transformers has it: a head that differs from the embedding is not tied to it."""
        if not config.tied_head or self.converted:
            return config
        name = f"{self._head}.weight"
        info = self.checkpoint.tensors.get(name)
        if info is None or not info.dtype.is_floating_point:
            own = f"{self._head}."
            head = any(each.startswith(own) for each in self.checkpoint.tensors)
            return replace(config, tied_head=not head)  # a quantized one is its own
        (embed,) = self._sources("embed.weight")
        if embed not in self.checkpoint.tensors:
            return config
        pair = [self.checkpoint.read(each, mapped=True) for each in (embed, name)]
        return config if torch.equal(*pair) else replace(config, tied_head=False)

    def _find_stored(self) -> dict[str, Format]:
        """What config.json says of the linears that are quantized."""
        raw = self.checkpoint.raw_config
        value = raw.values.get(QUANTIZATION_KEY)
        if value is None:
            return {}
        config = parse(value, raw.where)
        names = [*self.family.layer_linears(self.config.num_layers)]
        stored = {}
        for name in [*names, *([] if self.config.tied_head else [LM_HEAD])]:
            parts = [part.rpartition(".")[0] for part in self._sources(f"{name}.weight")]
            found = {part: config.find(part) for part in parts}
            storage = found[parts[0]]
            tensors = [self.checkpoint.tensors.get(f"{part}.weight") for part in parts]
            if all(info is not None and info.dtype.is_floating_point for info in tensors):
                continue  # the file decides: not every config names what it leaves alone
            if any(other != storage for other in found.values()):
                raise UserError(
                    f"{raw.where}: {', '.join(parts)} are one matrix here, and are not all "
                    "quantized in the same way"
                )
            if storage is not None:
                stored[name] = storage
        return stored

    def _sources(self, name: str) -> tuple[str, ...]:
        """The checkpoint's names of the tensors that ours is fused from."""
        if self.converted:
            return (name,)
        module, kind = name.rsplit(".", 1)
        if module == LM_HEAD:
            return (f"{self._head}.{kind}",)
        parts = tuple(f"{self._prefix}{part}.{kind}" for part in self.family.parts(module))
        if name == "embed.weight" and parts[0] not in self.checkpoint.tensors:
            return (f"{self._head}.weight",) if self.config.tied_head else parts
        return parts

    def _row_counts(self, module: str, parts: int) -> list[int]:
        """How many rows of our module's fused tensors each of its sources has."""
        if parts == 1:
            tensors = (f"{module}.weight", f"{module}.bias")
            return [next(self.shapes[name][0] for name in tensors if name in self.shapes)]
        if module.endswith(".attention.qkv"):
            heads = (self.config.num_heads, self.config.num_kv_heads, self.config.num_kv_heads)
            return [count * self.config.head_dim for count in heads]
        return [self.shapes[f"{module}.weight"][0] // parts] * parts

    def _check(self) -> None:
        tensors = self.checkpoint.tensors
        try:
            self.shapes = float_tensors(Decoder(self.config, {}, torch.float16))
        except (RuntimeError, TypeError, OverflowError):
            raise UserError(
                f"{self.checkpoint.folder / 'config.json'} implies tensors larger than any memory"
            ) from None
        expected = set()
        for name, shape in self.shapes.items():
            parts = self._sources(name)
            rows = self._row_counts(name.rpartition(".")[0], len(parts))
            module = name.rpartition(".")[0]
            if name.endswith(".weight") and module in self.stored:
                expected |= self._check_quantized(module)
                continue
            turn = -1 if self._is_transposed(name) else 1
            for part, count in zip(parts, rows, strict=True):
                expected.add(part)
                self._check_shape(part, (count, *shape[1:])[::turn])
        tied = {f"{self._head}.weight"} if self.config.tied_head else set()
        self.dropped = self._check_unused(name for name in tensors if name not in expected | tied)

    def _lacks(self, name: str) -> UserError:
        """The error for a float tensor that is not there, and what is there in its place."""
        raw, stem = self.checkpoint.raw_config, name.removesuffix("weight")
        lacks = f"{self.checkpoint.folder} lacks {name}"
        keys = dict.fromkeys(key for format in FORMATS.values() for key in format.tensors)
        there = [stem + key for key in keys if stem + key in self.checkpoint.tensors]
        if name.endswith("weight") and there:
            listed = f"{lacks} and holds {', '.join(there)}: it is quantized, but "
            if QUANTIZATION_KEY in raw.values:
                return UserError(
                    f"{listed}the {QUANTIZATION_KEY} of its config.json leaves that module out"
                )
            return UserError(
                f"{listed}config.json has no {QUANTIZATION_KEY}, and beside it there is no "
                f"{' or '.join(QUANTIZATION_FILES)}"
            )
        if name == f"{self._head}.weight":
            key, family = "tie_word_embeddings", self.family.name
            said = f"config.json has no {key}, which is false for {family}"
            if raw.values.get(key) is not None:
                said = f"{key} is false in its config.json"
            return UserError(
                f"{lacks}, and {said}: transformers would draw a head at random; set {key} to true "
                "if the embedding is the head"
            )
        return UserError(f"{lacks}, which its config.json implies")

    def _check_unused(self, names: Iterable[str]) -> tuple[str, ...]:
        """Refuse tensors that no model of the config.json has where they would change the result.

        Returns:
            Names of the others, but for those that the family's older checkpoints have.
        """
        dropped = []
        outer = [self._sources(f"{name}.weight")[0] for name in (*self.family.outer, LM_HEAD)]
        layer = "layers." if self.converted else self.family.layer.partition("{")[0]
        inside = (
            self._prefix + layer,
            *(part.removesuffix("weight") for part in outer),
        )
        for name in names:
            if name.endswith(self.family.ignored):
                continue
            unused = name.endswith(UNUSED) or any(part in name for part in ADAPTER)
            if name.startswith(inside) and not unused:
                where = f"{self.checkpoint.path(name)} holds {name}"
                if not name.endswith(".bias"):
                    raise UserError(f"{where}, which no {self.family.name} of its config.json has")
                if self.checkpoint.read_any(name).count_nonzero():
                    raise UserError(
                        f"{where}, which is not 0, and no {self.family.name} of its config.json "
                        "has this bias"
                    )
            dropped.append(name)
        return tuple(dropped)

    def _check_quantized(self, module: str) -> set[str]:
        """Refuse a quantized linear whose tensors are not there; returns their names."""
        storage = self.stored[module]
        expected = set()
        for part in self._sources(f"{module}.weight"):
            stem = part.removesuffix("weight")
            for key in storage.tensors:
                if stem + key not in self.checkpoint.tensors:
                    there = [name for name in self.checkpoint.tensors if name.startswith(stem)]
                    raise UserError(
                        f"{self.checkpoint.folder} lacks {stem + key}, which the "
                        f"{QUANTIZATION_KEY} of its config.json implies; it holds "
                        f"{', '.join(there[:4]) or 'nothing of that module'}"
                    )
            expected |= {stem + key for key in (*storage.tensors, *storage.optional)}
        return expected

    def read_quantized(self, module: str, rows: Sequence[range] | None = None) -> Quantized:
        """A quantized linear's integers and scales, its parts put together.

        Args:
            rows: runs of our rows, to have these only, one behind the other.

        Raises:
            UserError: for tensors that are not what config.json says, or parts that do not go
                together.
        """
        total = self.shapes[f"{module}.weight"][0]
        names = self._sources(f"{module}.weight")
        runs = [range(total)] if rows is None else list(rows)
        if self._is_reordered(module):
            order, span = self._reordered_rows(total, runs)
            part = self._read_quantized_source(module, names[0], total, span)
            return take_rows(join_rows([part], self.stored[module].spec.bits), order)
        parts = [
            self._read_quantized_source(module, name, count, run)
            for name, count, run in self._runs_of_sources(f"{module}.weight", runs)
        ]
        try:
            return join_rows(parts, self.stored[module].spec.bits)
        except UserError as error:
            raise UserError(f"{self.checkpoint.folder}: {', '.join(names)}: {error}") from None

    def _read_quantized_source(self, module: str, name: str, count: int, run: range) -> Quantized:
        """Some of the `count` output channels of a linear of the checkpoint, and no others."""
        storage, columns = self.stored[module], self.shapes[f"{module}.weight"][1]
        stem, infos = name.removesuffix("weight"), self.checkpoint.tensors
        keys = sorted({*storage.tensors, *storage.optional})
        shapes = {key: infos[stem + key].shape for key in keys if stem + key in infos}
        # Some tensors have several channels in a word.
        wide = range(run.start // WORD * WORD, min(count, -(-run.stop // WORD) * WORD))
        slices = storage.slices(shapes, count, wide) if len(wide) < count else {}
        if slices is None:
            wide, slices = range(count), {}
        tensors = {}
        for key in shapes:
            dim, part = slices.get(key, (0, None))
            cut = {"columns" if dim else "rows": part}
            tensors[key] = self.checkpoint.read_any(stem + key, **cut)
        if slices and tuple(shapes.get("weight_shape", ())) == (2,):
            tensors["weight_shape"] -= torch.tensor([count - len(wide), 0])
        try:
            found = storage.read(tensors, columns, len(wide))
        except UserError as error:
            file = self.checkpoint.path(stem + next(iter(tensors)))
            raise UserError(f"{file}: {stem}{error}") from None
        if wide == run:
            return found
        return take_rows(found, slice(run.start - wide.start, run.stop - wide.start))

    def _runs_of_sources(self, name: str, runs: Sequence[range]) -> list[tuple[str, int, range]]:
        """Where runs of a tensor's rows are: a part, how many rows it has, and which of them."""
        parts = self._sources(name)
        counts = self._row_counts(name.rpartition(".")[0], len(parts))
        starts, found = [sum(counts[:i]) for i in range(len(counts))], []
        for run in runs:
            for part, begin, count in zip(parts, starts, counts, strict=True):
                inside = range(max(run.start, begin) - begin, min(run.stop, begin + count) - begin)
                if inside:
                    found.append((part, count, inside))
        return found

    def _reordered_rows(self, total: int, runs: Sequence[range]) -> tuple[Tensor, range]:
        """Where runs of our QKV rows are in the checkpoint: a span, and each one's place in it."""
        rows = torch.cat([torch.arange(run.start, run.stop) for run in runs])
        wanted = self._order()[rows]
        span = range(int(wanted.min()), int(wanted.max()) + 1)
        return wanted - span.start, span

    def default_dtype(self) -> torch.dtype:
        """What a model is computed in: the type that config.json names, else the embedding's."""
        return DTYPES.get(self.config.dtype or "") or self.dtype()

    def dtype(self, name: str = "embed.weight") -> torch.dtype:
        """The type in which one of our tensors is read."""
        types = [self.checkpoint.tensors[part].dtype for part in self._sources(name)]
        found = reduce(torch.promote_types, types)
        return torch.float32 if found == torch.float64 else found

    def read(
        self,
        name: str,
        *,
        mapped: bool = False,
        rows: Sequence[range] | None = None,
        columns: range | None = None,
    ) -> Tensor:
        """One of our tensors, fused; with `mapped`, a view of the file where it lies in one piece.

        Args:
            rows: runs of our rows, to have these only, one behind the other.
            columns: a run of columns, likewise.

        Raises:
            UserError: for values that are not finite.
        """
        parts = self._sources(name)
        total = self.shapes[name][0]
        runs = [range(total)] if rows is None else list(rows)
        if self._is_reordered(name):
            order, span = self._reordered_rows(total, runs)
            return self.checkpoint.read(parts[0], rows=span, columns=columns)[order]
        pieces = self._runs_of_sources(name, runs)
        if self._is_transposed(name):
            tensors = [
                self.checkpoint.read(part, rows=columns, columns=None if rows is None else inside)
                for part, _, inside in pieces
            ]
            return torch.cat(tensors, dim=1).t().contiguous()
        mapped = mapped and len(pieces) == 1
        read = partial(self.checkpoint.read, mapped=mapped, columns=columns)
        tensors = [
            read(part, rows=None if len(inside) == count else inside)
            for part, count, inside in pieces
        ]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def _is_transposed(self, name: str) -> bool:
        """Whether the checkpoint has one of our tensors as (inputs, outputs)."""
        return not self.converted and self.family.is_transposed(name)

    def _is_reordered(self, name: str) -> bool:
        """Whether the checkpoint has the rows of one of our tensors in another order."""
        return not self.converted and ".attention.qkv" in name and self._order() is not None

    def _order(self) -> Tensor | None:
        """The row that each of our QKV rows has in Hugging Face's layout; None: the same."""
        return self.family.qkv_order(self.config)

    def rows_of_parts(self, module: str) -> dict[str, slice | Tensor]:
        """Which rows of one of our modules' tensors each part has, by its Hugging Face name.

        Rows are a slice, or the index of each of the part's own, in their order.
        """
        if module == LM_HEAD:
            return {self.family.head if self.converted else self._head: slice(None)}
        parts = [self.family.prefixes[0] + part for part in self.family.parts(module)]
        if ".attention.qkv" in module and (order := self._order()) is not None:
            return {parts[0]: order.argsort()}
        counts = self._row_counts(module, len(parts))
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return {
            part: slice(end - count, end)
            for part, count, end in zip(parts, counts, ends, strict=True)
        }
