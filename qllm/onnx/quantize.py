"""Quantize an ONNX model, whoever exported it: its linears become MatMulNBits.

GPTQ needs what goes into each linear. The graph is cut in front of the linears that share an
input, and run stage by stage: what crosses a cut is kept on the disk, one file per sample, so that
memory holds one stage's weights and one sample. Linears in front are the quantized ones already.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import onnx
import torch
from torch import Tensor

from qllm.checkpoint.reader import read_raw_config
from qllm.checkpoint.writer import new_folder
from qllm.config import EMBEDDING, LM_HEAD, QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.files import copy_file
from qllm.folders import check_new
from qllm.hub import TEMPLATES
from qllm.layers.fp16 import DenseLinear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models import read_config
from qllm.onnx import DEFAULT_ACCURACY_LEVEL, external
from qllm.onnx.graph import DataFile, Graph, save
from qllm.onnx.linears import OnnxLinear, find_linears
from qllm.onnx.model import check_decoder, model_file, model_files, read_model
from qllm.onnx.nbits import DOMAIN, NBits, block_size
from qllm.onnx.stages import Stages
from qllm.onnx_files import CHECKPOINTS, SUFFIX
from qllm.quant.algorithm import QuantizeOptions
from qllm.quant.algorithms import ALGORITHMS
from qllm.quant.inputs import InputStats
from qllm.quantizer.layer import LinearReport, needs_inputs, quantize_linear

Progress = Callable[[list], Iterable]


@dataclass(frozen=True)
class OnnxJob:
    """What to quantize, and how.

    Attributes:
        source: folder of an ONNX decoder with past, its config.json beside it.
        plan: which linear gets which spec, by names like "layers.0.self_attn.q_proj".
        samples: token ids for calibration, of one length; None where the plan needs none.
        accuracy_level: of MatMulNBits; see `qllm.onnx`.
        file: of the model, where the folder has several; see `model_file`.
    """

    source: Path
    plan: QuantPlan
    options: QuantizeOptions = field(default_factory=QuantizeOptions)
    samples: Sequence[Sequence[int]] | None = None
    accuracy_level: int = DEFAULT_ACCURACY_LEVEL
    file: Path | None = None


def quantize_onnx(job: OnnxJob, target: Path, progress: Progress = iter) -> list[LinearReport]:
    """Write a folder like the job's, with the model's linears quantized; it appears when whole.

    Returns:
        what became of each linear.

    Raises:
        UserError: for a model that is broken or has nothing to quantize, a plan that does not fit
            it or that MatMulNBits cannot hold, or a target that is there.
    """
    config = read_config(read_raw_config(job.source))
    path = job.file or model_file(job.source)
    model = read_model(path)
    check_decoder(model, config, path)
    if any(True for node in model.graph.node for each in node.attribute if each.HasField("g")):
        raise UserError(f"{path} has branches (If, Loop), which QLLM does not quantize")
    _constants_to_initializers(model.graph)
    linears = find_linears(model.graph, config.vocab_size)
    specs = _specs(job, linears, config.num_layers, path)
    check_new(target)
    with new_folder(target) as folder:
        chosen = [each for each in linears if each.name in specs]
        run = _Run(job, model, path.parent, chosen, specs, folder)
        run.work(progress)
        run.save()
        _copy_others(job.source, folder, {file.name for file in model_files(path)})
    return run.reports


def _copy_others(source: Path, folder: Path, skipped: Collection[str]) -> None:
    """Copy what is no weights, of this model or of others beside it, and no folder."""
    weights = [f"*{SUFFIX}*", *CHECKPOINTS, "*.index.json"]
    for file in [*source.iterdir(), *source.glob(TEMPLATES)]:
        others = any(fnmatch(file.name, pattern) for pattern in weights)
        if file.is_file() and file.name not in skipped and not others:
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            copy_file(file, target)


def _specs(
    job: OnnxJob, linears: list[OnnxLinear], num_layers: int, path: Path
) -> dict[str, QuantSpec]:
    """The spec of each linear that is to be quantized, by name."""
    names = [each.name for each in linears]
    if not names:
        raise UserError(f"{path} has no product with a float matrix; there is nothing to quantize")
    layers = {name: (name,) for name in names if name != LM_HEAD}
    try:
        specs = job.plan.resolve(layers, num_layers)
    except UserError:
        if layers:
            raise
        # No rule can match; what one would be like is no help.
        raise UserError(
            f"{path}: its layers are quantized already; quantize the model that it was made from"
        ) from None
    specs = {name: spec for name, spec in specs.items() if spec.kind != "dense"}
    if EMBEDDING in specs:
        raise UserError(
            f"{path}: the embedding of an ONNX model stays as it is; leave `embedding_bits` out"
        )
    if LM_HEAD in specs and LM_HEAD not in names:
        raise UserError(f"{path} has no LM head that could be quantized")
    if not specs:
        raise UserError(
            "every layer stays as it is; name fewer bits with `bitwidth` or `QuantPlan.rules`"
        )
    for name, spec in specs.items():
        block_size(spec, name)
        algorithm = ALGORITHMS[spec.algorithm]
        if algorithm.divides_inputs or algorithm.tunes(job.options):
            raise UserError(
                f"{spec.algorithm} works on whole layers of a checkpoint: quantize that, and "
                "export it; ONNX models take rtn and gptq"
            )
        if needs_inputs(spec) and job.samples is None:
            raise UserError(f"{spec.algorithm} needs calibration text; name one with `dataset`")
    return specs


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Constant nodes with a tensor become what they are."""
    rest = []
    for node in graph.node:
        value = node.attribute[0] if node.op_type == "Constant" else None
        if value is None or not value.HasField("t"):
            rest.append(node)
            continue
        tensor = graph.initializer.add()
        tensor.CopyFrom(value.t)
        tensor.name = node.output[0]
    del graph.node[:]
    graph.node.extend(rest)


class _Run:
    """One call of `quantize_onnx`."""

    def __init__(
        self,
        job: OnnxJob,
        model: onnx.ModelProto,
        place: Path,
        linears: list[OnnxLinear],
        specs: dict[str, QuantSpec],
        folder: Path,
    ) -> None:
        """
        Args:
            place: the folder that the model's external data is in.
            folder: to be written.
        """
        self.job, self.model, self.linears, self.specs = job, model, linears, specs
        self.place = place
        self.folder = folder
        self.reports: list[LinearReport] = []
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.data = DataFile(folder)
        # The nodes that take the place of each linear's.
        self.graph = Graph(self.data)
        self.nodes: dict[int, list[onnx.NodeProto]] = {}

    def work(self, progress: Progress) -> None:
        """Quantize every linear, in the order in which they run."""
        if not any(needs_inputs(spec) for spec in self.specs.values()):
            for linear in progress(self.linears):
                self._quantize(linear, None)
            return
        folder = self.folder / "states"
        assert self.job.samples is not None  # as `quantize_onnx` has looked
        stages = Stages(self.model, self.linears, self.place, self.job.samples, folder)
        for members in progress(stages.groups):
            stats = InputStats(members[0].columns, "cpu", products=True)
            for x in stages.run(members):
                stats.add(x.reshape(-1, members[0].columns))
            if not stats.finite:
                raise UserError(
                    f"the input of {members[0].name} is not finite on the calibration text"
                )
            for linear in members:
                stages.replace(linear, self._quantize(linear, stats))
        shutil.rmtree(folder)

    def _quantize(self, linear: OnnxLinear, stats: InputStats | None) -> Tensor:
        """Write what a linear becomes; returns the matrix that it then is, (N, K)."""
        weight = torch.from_numpy(external.values(self.tensors[linear.weight], self.place).copy())
        if not weight.isfinite().all():
            raise UserError(f"{linear.weight} holds NaN or infinite values; export it again")
        if not linear.transposed:
            weight = weight.t().contiguous()
        name, spec = linear.name, self.specs[linear.name]
        dense = DenseLinear(weight.float(), None, QuantSpec())
        found, report = quantize_linear(dense, name, spec, stats, self.job.options)
        assert isinstance(found, WeightOnlyLinear)  # `block_size` lets no other kind through
        self.reports.append(report)
        matrix = NBits.of(found.packed, spec, linear.columns, weight.dtype, name)
        node, before = self.model.graph.node[linear.index], len(self.graph.nodes)
        self.graph.scope = f"{name}/quantized"
        self.graph.matmul_nbits(
            linear.x,
            f"{name}.{linear.index}",
            matrix,
            linear.bias,
            level=self.job.accuracy_level,
            output=node.output[0],
        )
        self.nodes[linear.index] = self.graph.nodes[before:]
        return found.dequantize().to(weight.dtype)

    def save(self) -> None:
        """Write the graph with its new nodes, and the weights that stay."""
        graph, outputs = self.model.graph, {value.name for value in self.model.graph.output}
        nodes = []
        for index, node in enumerate(graph.node):
            nodes += self.nodes.get(index, [node])
        nodes = _used(nodes, outputs)
        used = {name for node in nodes for name in node.input} | outputs
        kept = [
            self.data.move(tensor, self.place)
            for tensor in graph.initializer
            if tensor.name in used
        ]
        self.data.close()
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend([*kept, *self.graph.initializers])
        if not any(opset.domain == DOMAIN for opset in self.model.opset_import):
            self.model.opset_import.add(domain=DOMAIN, version=1)
        save(self.model, self.folder)


def _used(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that some tensors come from."""
    wanted, found = set(wanted), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            found.append(node)
            wanted |= set(node.input)
    return found[::-1]
