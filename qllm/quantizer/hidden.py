"""The hidden states of all calibration samples between two layers, and passes over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from qllm.checkpoint.tensor_files import SafetensorsFile
from qllm.checkpoint.tensors import TensorInfo
from qllm.checkpoint.writer import SafetensorsWriter, new_file
from qllm.errors import UserError
from qllm.layers import Linear
from qllm.models import Decoder
from qllm.models.cache import Prefill
from qllm.models.positions import PositionEncoding
from qllm.quant.inputs import InputStats

# Tokens per pass: whole samples, more than one of them where they are short.
TOKENS_PER_PASS = 2048

Run = Callable[[Tensor, Prefill], Tensor]


class _ReachedError(Exception):
    """The module that was watched has got its input; the rest of the pass is of no use."""


class HiddenStates:
    """What every sample is in front of the next layer. Layers compute in float32.

    Attributes:
        states: (S, T, C) in the type they are kept in.
        passed: called with the share of the samples that went through a part of the model.
    """

    def __init__(self, states: Tensor, positions: PositionEncoding) -> None:
        self.states, self.positions = states, positions
        length = states.shape[1]
        self.per_pass = max(1, TOKENS_PER_PASS // length)
        self.passed: Callable[[float], object] = lambda share: None
        self._step: tuple[int, Prefill] | None = None

    @classmethod
    def embed(
        cls, model: Decoder, samples: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> HiddenStates:
        """The samples' embeddings, by the modules in front of the layers."""
        device = model.device
        channels = model.config.hidden_size
        states = torch.empty(len(samples), len(samples[0]), channels, dtype=dtype, device=device)
        hidden = cls(states, model.positions)
        for index, sample in enumerate(samples):
            tokens = torch.tensor(sample, device=device)
            x = model.project_in(model.embed_norm(model.embed_scale(model.embed(tokens).float())))
            step = Prefill([len(sample)], None, model.positions, x)
            states[index] = model.positions.embed(x, step.positions)
        return hidden

    def copy(self) -> HiddenStates:
        """The same states, which go their own way from here."""
        return HiddenStates(self.states.clone(), self.positions)

    def part(self, samples: slice) -> HiddenStates:
        """Some of the samples, whose states stay those of this."""
        return HiddenStates(self.states[samples], self.positions)

    def save(self, path: Path) -> None:
        """Write the states to a file, which is there when it is whole."""
        states = self.states.cpu()
        info = TensorInfo(tuple(states.shape), states.dtype)
        with new_file(path) as temporary:
            writer = SafetensorsWriter(temporary, {"states": info}, {})
            writer.write("states", states)
            writer.close()

    @classmethod
    def load(cls, path: Path, positions: PositionEncoding, device: str) -> HiddenStates:
        """The inverse of `save`."""
        return cls(SafetensorsFile(path).read("states").to(device), positions)

    def passes(self) -> Iterator[tuple[Tensor, Tensor, Prefill]]:
        """Runs of samples: their place in `states`, the same in float32 (N, C), and their step."""
        for states in self.states.split(self.per_pass):
            x = states.flatten(0, 1).float()
            if self._step is None or self._step[0] != len(states):
                lengths = [states.shape[1]] * len(states)
                self._step = (len(states), Prefill(lengths, None, self.positions, x))
            yield states, x, self._step[1]
            self.passed(len(states) / len(self.states))

    def observe(
        self, run: Run, modules: Mapping[str, Linear], products: set[str], where: str
    ) -> dict[str, InputStats]:
        """The statistics of the inputs of some modules, in a pass that changes nothing.

        Args:
            run: what the states go through; it is left when the last module has its input.
            modules: name to linear, in the order in which they run.
            products: the names whose x x^T is wanted.
            where: the layer they are in, for messages.

        Returns:
            name to InputStats.

        Raises:
            UserError: for inputs that are not finite.
        """
        device, last = self.states.device, list(modules)[-1]
        stats = {
            name: InputStats(
                module.in_features, device, products=name in products, multiply=module.run
            )
            for name, module in modules.items()
        }

        def watch(name: str) -> Callable:
            def see(module: nn.Module, inputs: tuple[Tensor]) -> None:
                stats[name].add(inputs[0])
                if name == last:
                    raise _ReachedError

            return see

        hooks = [m.register_forward_pre_hook(watch(name)) for name, m in modules.items()]
        try:
            for _, x, step in self.passes():
                with suppress(_ReachedError):
                    run(x, step)
        finally:
            for hook in hooks:
                hook.remove()
        for name, found in stats.items():
            if not found.finite:
                raise UserError(
                    f"the input of {where}.{name} is not finite in calibration; the weights in "
                    "front of it are broken, or `dtype` float32 is needed"
                )
        return stats

    def advance(self, run: Run) -> None:
        """Put the states through a part of the model.

        Raises:
            UserError: where they leave the range of their type.
        """
        for states, x, step in self.passes():
            states.copy_(run(x, step).unflatten(0, states.shape[:2]))
            # The extremes are NaN or infinite where any element is; isfinite is much slower.
            if not torch.stack(states.aminmax()).isfinite().all():
                name = str(states.dtype).removeprefix("torch.")
                raise UserError(
                    f"activations leave the range of {name}; use `dtype` bfloat16 or float32"
                )
