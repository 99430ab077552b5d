"""How much of what linears put out each candidate changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from qllm.config import ModelConfig, QuantSpec
from qllm.layers import Linear
from qllm.layers.fp16 import DenseLinear
from qllm.plan.modules import linears_of
from qllm.quant.inputs import InputStats, output_error
from qllm.quantizer.layer import (
    OBSERVED_BYTES,
    LinearReport,
    QuantizeOptions,
    quantize_linear,
    stand_in,
)

SMALLEST = 1e-12  # of what is told from none: divergence, and squares


class OutputErrors:
    """The table of errors, which grows as linears are quantized.

    Of experts, which are decided on together, squares are summed over the tokens that reach each:
    one that most tokens choose counts most, and one that none chooses for nothing.

    Attributes:
        rows: of each linear, by its name.
        errors: (M, C), see `Sensitivity`.
        float32_scales: int (M, C), likewise.
    """

    def __init__(
        self,
        modules: Sequence[str],
        config: ModelConfig,
        candidates: Sequence[QuantSpec],
        options: QuantizeOptions,
    ) -> None:
        self.candidates, self.options = candidates, options
        linears = [linears_of(name, config) for name in modules]
        self.rows = {linear: row for row, names in enumerate(linears) for linear in names}
        self.errors = np.zeros((len(modules), len(candidates)))
        self.float32_scales = np.zeros(self.errors.shape, dtype=np.int64)
        self._several = [len(names) > 1 for names in linears]
        self._squares = np.zeros(len(modules))  # of the outputs of linears so far, of several

    def quantized(self, name: str, module: Linear, stats: InputStats) -> list[Linear]:
        """A linear as each candidate has it, whose error and scales are kept."""
        row, found = self.rows[name], []
        share = self._share(row, module, stats)
        for candidate, spec in enumerate(self.candidates):
            if spec.kind == "dense":
                found.append(module)
                continue
            assert isinstance(module, DenseLinear)  # as long as it is the float model's
            linear, report = quantize_linear(module, name, spec, stats, self.options)
            self.keep(row, candidate, linear, report, share)
            found.append(linear)
        return found

    def _share(self, row: int, module: Linear, stats: InputStats) -> float:
        """What part of the squared outputs of the row's linears so far is a new one's."""
        if not self._several[row]:
            return 1.0
        assert isinstance(module, DenseLinear) and stats.hessian is not None
        own = output_error(module.weight.float(), stats.hessian)
        self._squares[row] += own
        return own / self._squares[row] if own else 0.0

    def keep(
        self, row: int, candidate: int, linear: Linear, report: LinearReport, share: float = 1.0
    ) -> None:
        """Put what became of a linear in the table."""
        error = self.errors[row, candidate]
        self.errors[row, candidate] = error + (report.error**2 - error) * share
        scales = linear.get_buffer("scales")
        self.float32_scales[row, candidate] += scales.dtype == torch.float32

    @contextmanager
    def of_int8(
        self, layer: str, modules: Mapping[str, Linear], found: Mapping[str, Sequence[Linear]]
    ) -> Iterator[None]:
        """While states pass, measure what linears with int8 activations put out.

        Their inputs are rounded as well, of which the Hessian says nothing.

        Args:
            layer: its name.
            modules: its float linears, by their names in it.
            found: those of each candidate.
        """
        int8 = [i for i, spec in enumerate(self.candidates) if spec.kind.startswith("w8a8")]
        sums: dict[int, np.ndarray] = {}  # of squares of errors and outputs, of each row

        def watch(name: str) -> Callable:
            row = self.rows[f"{layer}.{name}"]
            squares = sums.setdefault(row, np.zeros((len(int8), 2)))
            linears = [stand_in(found[name][candidate]) for candidate in int8]

            def see(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
                for count, candidate in enumerate(int8):
                    error = linears[count](inputs[0]) - output
                    squares[count] += error.square().sum().item(), output.square().sum().item()
                    self.errors[row, candidate] = squares[count, 0] / max(
                        squares[count, 1], SMALLEST
                    )

            return see

        hooks = [m.register_forward_hook(watch(n)) for n, m in modules.items() if int8]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def observed_together(modules: Mapping[str, Linear]) -> Iterator[dict[str, Linear]]:
    """Runs of a layer's linears, by name, of which one pass sums x x^T: OBSERVED_BYTES, or one.

    Experts run one by one, so that each one's first matrix comes before its second, and those
    before the next one's.
    """
    of_parents: dict[str, list[str]] = {}
    for name in modules:
        of_parents.setdefault(name.rpartition(".")[0], []).append(name)
    run: dict[str, Linear] = {}
    held = 0
    for name in (name for names in of_parents.values() for name in names):
        needed = products_bytes(modules[name])
        if run and held + needed > OBSERVED_BYTES:
            yield run
            run, held = {}, 0
        run[name] = modules[name]
        held += needed
    yield run


def products_bytes(linear: Linear) -> int:
    """Of the sum of x x^T of its inputs."""
    return 4 * linear.in_features**2
