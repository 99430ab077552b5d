"""The checkpoint that quantizing writes: its shards, its formats, and what stands beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from qllm.checkpoint import origin
from qllm.checkpoint.convert import SOURCE_KEY, copy_small_files, own_config
from qllm.checkpoint.formats import Int8Weight, Quantized, describe, parse, take_rows
from qllm.checkpoint.reader import LAYOUT_KEY, QUANTIZATION_KEY
from qllm.checkpoint.weights import Weights
from qllm.checkpoint.writer import ShardWriter
from qllm.config import DEFAULT_ALGORITHM, EMBEDDING, LM_HEAD, QuantSpec
from qllm.folders import FULL, writing
from qllm.layers import Linear
from qllm.layers.w8a8 import DynamicInt8Linear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models import Decoder
from qllm.progress import Note
from qllm.quantizer.card import model_card
from qllm.quantizer.compatibility import Loading, find_ragged
from qllm.quantizer.job import Job
from qllm.quantizer.layer import LinearReport, algorithm_of


class OutputCheckpoint:
    """What a run writes, tensor by tensor.

    Attributes:
        specs: of each linear, by our name.
        quantization: of the config.json.
        folder: where it is written, from `open` on.
        writer: of the weights, likewise.
    """

    folder: Path
    writer: ShardWriter

    def __init__(
        self, job: Job, weights: Weights, specs: Mapping[str, QuantSpec], model: Decoder
    ) -> None:
        """
        Raises:
            UserError: for specs that no format holds.
        """
        self.job, self.weights, self.specs = job, weights, specs
        self.by_part = {
            part: spec for name, spec in self.specs.items() for part in self.rows_of_parts(name)
        }
        others = [n for n, m in model.named_modules() if isinstance(m, Linear) and n not in specs]
        for name in others:  # OPT-350m's projections, routers: other tools look them up as well
            if name != LM_HEAD:
                self.by_part |= dict.fromkeys(self.weights.names.rows_of_parts(name), QuantSpec())
        gptq = job.options.gptq
        algorithms = {spec.algorithm for spec in specs.values()}
        reordered = gptq.act_order and not gptq.static_groups and "gptq" in algorithms
        # GPTQ has no embeddings.
        compressed = job.compressed or EMBEDDING in specs
        self.quantization = describe(self.by_part, desc_act=reordered, compressed=compressed)
        self.storage = parse(self.quantization, "config.json")

    def open(self, folder: Path, state: list[dict] | None) -> None:
        """Go on with a folder, from the shards that are there.

        Args:
            state: what `ShardWriter.sync` said; None: there are none.
        """
        names = (len(name) for name in self.weights.checkpoint.tensors)
        self.folder = folder
        self.writer = ShardWriter(
            folder,
            limit=self.job.shard_bytes,
            header_bytes=sum(4 * (length + 160) for length in names) + 65536,
            state=state,
        )

    def rows_of_parts(self, module: str) -> dict[str, slice | Tensor]:
        """As `TensorNames.rows_of_parts`; a quantized head has the name that readers look for."""
        if module == LM_HEAD and LM_HEAD in self.specs:
            return {module: slice(None)}
        return self.weights.names.rows_of_parts(module)

    def write_floats(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Append a module's tensors, in the type that the checkpoint has them in."""
        for part, rows in self.rows_of_parts(module).items() if tensors else ():
            for key, tensor in tensors.items():
                name = f"{module}.{key}"
                values = tensor[rows].to(self.weights.dtype(name))
                stored = self.weights.family.tensor_name(part, key)
                self.writer.write(stored, self._as_stored(name, values))

    def _as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """One of our tensors as Hugging Face's layout has it."""
        return tensor.t().contiguous() if self.weights.family.is_transposed(name) else tensor

    def write_linear(self, module: str, linear: Linear) -> None:
        """Append a quantized linear's parts in the format of the checkpoint."""
        whole = linear.dequantize() if self.job.fake else None
        for part, rows in self.rows_of_parts(module).items():
            if whole is not None:
                dtype = self.weights.dtype(
                    "embed.weight" if module == LM_HEAD else f"{module}.weight"
                )
                tensors = {"weight": self._as_stored(f"{module}.weight", whole[rows].to(dtype))}
            else:
                tensors = self._pack(linear, part, rows)
            if linear.bias is not None:
                tensors["bias"] = linear.bias[rows].to(self.weights.dtype(f"{module}.bias"))
            for key, tensor in tensors.items():
                self.writer.write(f"{part}.{key}", tensor)

    def _pack(self, linear: Linear, part: str, rows: slice | Tensor) -> dict[str, Tensor]:
        """Some rows of a quantized linear as the tensors of a module of the checkpoint."""
        stored = self.storage.find(part)
        assert stored is not None  # as of all that are quantized
        whole: Quantized
        if isinstance(linear, DynamicInt8Linear):
            whole = Int8Weight(*linear.integers, linear.input_scale)
        else:
            assert isinstance(linear, WeightOnlyLinear)
            whole = linear.packed
        return stored.write(take_rows(whole, rows), linear.in_features)

    def scales_of(self, module: str, linear: WeightOnlyLinear) -> dict[str, Tensor]:
        """The checkpoint's tensors that hold a linear's scales."""
        return {
            f"{part}.{key}": tensor.cpu().contiguous()
            for part, rows in self.rows_of_parts(module).items()
            for key, tensor in self._pack(linear, part, rows).items()
            if tensor.is_floating_point()
        }

    def write_small_files(self, reports: Sequence[LinearReport], note: Note) -> None:
        """What stands beside the weights: config.json, the tokenizer, the model card."""
        with writing(self.folder, FULL):
            self._write_small_files(reports, note)

    def _write_small_files(self, reports: Sequence[LinearReport], note: Note) -> None:
        job, folder = self.job, self.folder
        raw = own_config(self.weights.checkpoint.raw_config)
        gone = (QUANTIZATION_KEY, LAYOUT_KEY, SOURCE_KEY, *origin.KEYS)
        config = {key: value for key, value in raw.items() if key not in gone}
        config["tie_word_embeddings"] = self.weights.config.tied_head and LM_HEAD not in self.specs
        # A converted copy knows what it was made from.
        base = raw.get(origin.BASE_MODEL_KEY, job.origin) if LAYOUT_KEY in raw else job.origin
        config |= origin.record(base, map(self._algorithm, reports))
        if job.fake:
            entries = {
                part: spec.to_json() | {"algorithm": spec.algorithm}
                for part, spec in self.by_part.items()
            }
            _write_json(folder / "weight_config.json", entries)
        else:
            config[QUANTIZATION_KEY] = self.quantization
        _write_json(folder / "config.json", config)
        copy_small_files(job.source, folder)
        loading = Loading(
            self.quantization,
            find_ragged(self.specs, self.weights.shapes),
            transposed=self.weights.family.transposed,
            experts=self.weights.config.experts is not None,
        )
        if (outer := self.weights.checkpoint.raw_config.outer) is not None:
            note(
                f"what is written is the text model of the {outer} alone, a {config['model_type']}"
            )
        if not job.fake:
            note(loading.summary())
        card = model_card(
            job.about,
            reports,
            job.options,
            loading,
            fake=job.fake,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _algorithm(self, report: LinearReport) -> str:
        """What chose a linear's integers, in a word or two."""
        spec, job = report.spec, self.job
        if spec.kind != "weight_only" and job.samples is None:
            return DEFAULT_ALGORITHM
        algorithm = algorithm_of(spec)
        clipped = spec.kind == "weight_only" and job.options.clip and not algorithm.own_clipping
        return f"{algorithm.name}, clipped" if clipped else algorithm.name


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
