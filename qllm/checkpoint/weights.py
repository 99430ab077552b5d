"""A model's tensors under our names, whichever layout its checkpoint has.

Two layouts: Hugging Face's, where a fused matrix is put together as it is read, and QLLM's own
(`weight_convert.py`), where it lies in one piece and can be mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from qllm.checkpoint.check import check_counts, check_tensors
from qllm.checkpoint.formats import FP4, WORD, Format, Quantized, join_rows, take_rows
from qllm.checkpoint.names import TensorNames
from qllm.checkpoint.reader import Checkpoint, is_packed, read_raw_config
from qllm.config import EMBEDDING, LM_HEAD, ModelConfig
from qllm.errors import UserError
from qllm.models import Family, RawConfig, read_config
from qllm.models.delta_net import ALWAYS_FLOAT
from qllm.ops.reference import dequantize
from qllm.progress import Note, silent
from qllm.quant.packing import PackedWeight

# The types that config.json may name.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
POSITIONS = "positions"
# Elements of two matrices that are compared, in memory together.
COMPARED_AT_ONCE = 1 << 22


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The type of a name; None stays None.

    Raises:
        UserError: for a type in which no model is computed.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise UserError(f"dtype {dtype!r} is unknown; give one of {', '.join(DTYPES)}")
    return found


def config_dtype(raw_config: RawConfig) -> torch.dtype | None:
    """The type that a config.json names; None: it names none."""
    return DTYPES.get(read_config(raw_config).dtype or "")


class Weights:
    """A checkpoint's tensors under our names, checked against the model it claims to be.

    Attributes:
        names: where the checkpoint has each of ours.
        stored: how each quantized linear is stored, by our name; {} at 16 bits.
        dropped: the checkpoint's names of tensors that no model of its config.json has, and that
            change nothing.
    """

    def __init__(self, checkpoint: Checkpoint, note: Note = silent) -> None:
        """
        Args:
            note: called with a line on tensors that are not used.

        Raises:
            UserError: where config.json and the weights disagree.
        """
        self.checkpoint = checkpoint
        self.names = TensorNames.of(checkpoint)
        check_counts(self.names)
        self.names = replace(self.names, config=self._untie_if_different(self.config))
        self.stored = self._find_stored()
        # Learned positions that are packed, as a class Embedding has them, too, and the routers of
        # MLX's mixtures: numbers for us.
        numbers = [name for name in self.stored if name == POSITIONS or name.endswith(ALWAYS_FLOAT)]
        self._unpacked = {name: self.stored.pop(name) for name in numbers}
        self.dropped = check_tensors(self.names, self._formats)
        if checkpoint.raw_config.outer is not None:
            others = checkpoint.file_names.left_out
            note(
                f"{checkpoint.folder} is a {checkpoint.raw_config.outer}: its text model alone is "
                f"used; {others} tensors of its vision tower, or beside it, are not read"
            )
        if self.dropped:
            more = f" and {len(self.dropped) - 1} more" if len(self.dropped) > 1 else ""
            note(
                f"{checkpoint.file_names[self.dropped[0]]}{more} of the checkpoint: no "
                f"{self.family.name} of its config.json has that, it is not used"
            )

    @classmethod
    def of_floats(cls, source: Path, note: Note = silent) -> Self:
        """Those of a folder or GGUF file that is to be quantized.

        Raises:
            UserError: for one that is quantized, or as for others.
        """
        if is_packed(read_raw_config(source, packed=False)):
            raise UserError(
                f"{source} is quantized already; give the 16-bit checkpoint it was made from"
            )
        return cls(Checkpoint(source, packed=False), note)

    @property
    def family(self) -> Family:
        """The model's, by its config.json."""
        return self.names.family

    @property
    def config(self) -> ModelConfig:
        """The model's, with `tied_head` as the weights have it."""
        return self.names.config

    @property
    def _formats(self) -> dict[str, Format]:
        """How each quantized module is stored, those among them that are held as numbers."""
        return self.stored | self._unpacked

    @property
    def converted(self) -> bool:
        """Whether the checkpoint is in QLLM's layout."""
        return self.names.converted

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every float tensor, by our name."""
        return self.names.shapes

    def width(self, module: str) -> int:
        """The input channels of a linear."""
        return self.shapes[f"{module}.weight"][1]

    def _untie_if_different(self, config: ModelConfig) -> ModelConfig:
        """As transformers has it: a head that differs from the embedding is not tied to it."""
        if not config.tied_head or self.converted:
            return config
        name = f"{self.names.head}.weight"
        info = self.checkpoint.tensors.get(name)
        if info is None or not info.dtype.is_floating_point:
            own = f"{self.names.head}."
            head = any(each.startswith(own) for each in self.checkpoint.tensors)
            return replace(config, tied_head=not head)  # a quantized one is its own
        (embed,) = self.names.sources("embed.weight")
        if self.names.packed(EMBEDDING):  # the file's head has other numbers
            return replace(config, tied_head=False)
        return config if self._are_equal(embed, name) else replace(config, tied_head=False)

    def _are_equal(self, one: str, other: str) -> bool:
        """Whether two matrices are, of which a few rows at a time are in memory."""
        infos = [self.checkpoint.tensors[name] for name in (one, other)]
        if infos[0].shape != infos[1].shape:
            return False
        count, columns = infos[0].shape
        step = max(1, COMPARED_AT_ONCE // columns)
        runs = [range(start, min(start + step, count)) for start in range(0, count, step)]
        return all(
            torch.equal(*(self.checkpoint.read(name, rows=run) for name in (one, other)))
            for run in runs
        )

    def _find_stored(self) -> dict[str, Format]:
        """What config.json says of the linears that are quantized."""
        raw, config = self.checkpoint.raw_config, self.checkpoint.quantization
        if config is None:
            return {}
        names = [*self.family.layer_linears(self.config)]
        names += [
            f"layers.{index}.{linear}"
            for index in range(self.config.num_layers)
            for linear in ALWAYS_FLOAT
            if f"layers.{index}.{linear}.weight" in self.shapes
        ]
        stored = {}
        tables = [table for table in (EMBEDDING, POSITIONS) if f"{table}.weight" in self.shapes]
        tables = [table for table in tables if self.names.packed(table)]
        for name in [*tables, *names, *([] if self.config.tied_head else [LM_HEAD])]:
            parts = [part.rpartition(".")[0] for part in self.names.sources(f"{name}.weight")]
            found = {part: config.find(part) for part in parts}
            storage = found[parts[0]]
            tensors = [self.checkpoint.tensors.get(f"{part}.weight") for part in parts]
            if all(info is not None and info.dtype.is_floating_point for info in tensors):
                continue  # the file decides: not every config names what it leaves alone
            if any(other != storage for other in found.values()):
                if all(isinstance(other, FP4) for other in found.values() if other is not None):
                    self.checkpoint.read_as_numbers(parts)
                    continue
                raise UserError(
                    f"{raw.where}: {', '.join(parts)} are one matrix here, and are not all "
                    "quantized in the same way"
                )
            if storage is not None:
                if name in tables and storage.spec.kind != "weight_only":
                    raise UserError(
                        f"{raw.where}: {parts[0]} is an embedding, and has no input_activations "
                        "to quantize; QLLM reads embeddings of 1 to 8 bits without them"
                    )
                stored[name] = storage
        return stored

    def read_quantized(self, module: str, rows: Sequence[range] | None = None) -> Quantized:
        """A quantized linear's integers and scales, its parts put together.

        Args:
            rows: runs of our rows, to have these only, one behind the other.

        Raises:
            UserError: for tensors that are not what config.json says, or parts that do not go
                together.
        """
        total = self.shapes[f"{module}.weight"][0]
        names = self.names.sources(f"{module}.weight")
        runs = [range(total)] if rows is None else list(rows)
        perm = None
        if self.names.is_reordered(f"{module}.weight"):
            perm, pieces = self.names.reordered_rows(f"{module}.weight", runs)
        else:
            pieces = self.names.runs(f"{module}.weight", runs)
        parts = [
            self._read_quantized_source(module, name, count, run) for name, count, run in pieces
        ]
        try:
            joined = join_rows(parts, self._formats[module].spec.bits)
        except UserError as error:
            raise UserError(f"{self.checkpoint.folder}: {', '.join(names)}: {error}") from None
        return joined if perm is None else take_rows(joined, perm)

    def _read_quantized_source(self, module: str, name: str, count: int, run: range) -> Quantized:
        """Some of the `count` output channels of a linear of the checkpoint, and no others."""
        storage, columns = self._formats[module], self.shapes[f"{module}.weight"][1]
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
            cut = (None, part) if dim else (part, None)
            tensors[key] = self.checkpoint.read_any(stem + key, rows=cut[0], columns=cut[1])
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

    def default_dtype(self) -> torch.dtype:
        """What a model is computed in: the type that config.json names, else the embedding's."""
        return DTYPES.get(self.config.dtype or "") or self.dtype()

    def dtype(self, name: str = "embed.weight") -> torch.dtype:
        """The type in which one of our tensors is read."""
        if not self._is_float(name):
            name = next(other for other in self.shapes if self._is_float(other))
        types = [self.checkpoint.tensors[part].dtype for part in self.names.sources(name)]
        found = reduce(torch.promote_types, types)
        return torch.float32 if found == torch.float64 else found

    def _is_float(self, name: str) -> bool:
        """Whether the checkpoint has one of our tensors as floating point."""
        infos = map(self.checkpoint.tensors.get, self.names.sources(name))
        return all(info is not None and info.dtype.is_floating_point for info in infos)

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
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in self._unpacked:
            return self._unpack(module)
        total = self.shapes[name][0]
        runs = [range(total)] if rows is None else list(rows)
        if self.names.is_reordered(name):
            perm, pieces = self.names.reordered_rows(name, runs)
            tensors = [
                self.checkpoint.read(part, rows=inside, columns=columns)
                for part, _, inside in pieces
            ]
            return torch.cat(tensors)[perm]
        pieces = self.names.runs(name, runs)
        if self.names.is_transposed(name):
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

    def _unpack(self, module: str) -> Tensor:
        """The numbers of a quantized module, float32: what is not rounded once more is closer."""
        found, name = self.read_quantized(module), f"{module}.weight"
        assert isinstance(found, PackedWeight)  # whose activations are not quantized
        spec, columns = self._formats[module].spec, self.shapes[name][1]
        shape = (spec.bits, spec.group_size, columns)
        numbers = dequantize(found.qweight, found.scales, found.qzeros, *shape, torch.float32)
        if found.perm is None:
            return numbers
        return torch.empty_like(numbers).index_copy_(1, found.perm, numbers)
