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
from qllm.config import ModelConfig
from qllm.errors import UserError
from qllm.layers import Linear
from qllm.models import Decoder
from qllm.models.passes import Prefill
from qllm.models.positions import PositionEncoding
from qllm.quant.inputs import InputStats

# Tokens per pass: whole samples, more than one of them where they are short.
TOKENS_PER_PASS = 2048

Run = Callable[[Tensor, Prefill], Tensor]
STATES, INPUTS = "states", "inputs"


class _ReachedError(Exception):
    """The module that was watched has got its input; the rest of the pass is of no use."""


def check_alone(config: ModelConfig, what: str, instead: str) -> None:
    """Refuse a model whose layers take more than the states in front of them.

    Args:
        what: does not know such models.
        instead: what does.

    Raises:
        UserError: for such a one.
    """
    if config.has_ties:
        raise UserError(
            f"{what} does not know this {config.family}, whose layers share keys and values or "
            f"have inputs of their own; {instead}"
        )


def beside_states(config: ModelConfig) -> dict[str, int]:
    """Channels of what layers take of a token beside the states, as `HiddenStates` names it."""
    found = {INPUTS: config.num_layers * config.layer_inputs} if config.layer_inputs else {}
    for index, shape in enumerate(config.shapes):
        if shape.shares_kv:
            found[str(index)] = 2 * shape.num_kv_heads * shape.head_dim
    return found


class HiddenStates:
    """What every sample is in front of the next layer. Layers compute in float32.

    Attributes:
        states: (S, T, C) in the type they are kept in.
        beside: what layers take besides, of the same type: "inputs" (S, T, layers P), and, by the
            number of a layer, keys and values (S, T, 2 H_kv D) that others take as well.
        passed: called with the share of the samples that went through a part of the model.
    """

    def __init__(
        self,
        states: Tensor,
        positions: PositionEncoding,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.states, self.positions, self.beside = states, positions, dict(beside or {})
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
        widths = beside_states(model.config)
        hidden.beside = {name: states.new_zeros(*states.shape[:2], n) for name, n in widths.items()}
        for index, sample in enumerate(samples):
            tokens = torch.tensor(sample, device=device)
            x = model.project_in(model.embed_norm(model.embed_scale(model.embed(tokens).float())))
            step = Prefill([len(sample)], None, model.positions, x)
            states[index] = model.positions.embed(x, step.positions)
            if model.layer_inputs is not None:
                hidden.beside[INPUTS][index] = model.layer_inputs(tokens, x)
        return hidden

    def copy(self) -> HiddenStates:
        """The same states, which go their own way from here."""
        beside = {name: part.clone() for name, part in self.beside.items()}
        return HiddenStates(self.states.clone(), self.positions, beside)

    def part(self, samples: slice) -> HiddenStates:
        """Some of the samples, whose states stay those of this."""
        beside = {name: part[samples] for name, part in self.beside.items()}
        return HiddenStates(self.states[samples], self.positions, beside)

    def save(self, path: Path) -> None:
        """Write the states to a file, which is there when it is whole."""
        tensors = {STATES: self.states, **self.beside}
        infos = {name: TensorInfo(tuple(part.shape), part.dtype) for name, part in tensors.items()}
        with new_file(path) as temporary:
            writer = SafetensorsWriter(temporary, infos, {})
            for name, part in tensors.items():
                writer.write(name, part.cpu())
            writer.close()

    @classmethod
    def load(cls, path: Path, positions: PositionEncoding, device: str) -> HiddenStates:
        """The inverse of `save`."""
        file = SafetensorsFile(path)
        tensors = {name: file.read(name).to(device) for name in file.tensors}
        return cls(tensors.pop(STATES), positions, tensors)

    def passes(self) -> Iterator[tuple[Tensor, Tensor, Prefill]]:
        """Runs of samples: their place in `states`, the same in float32 (N, C), and their step."""
        for start in range(0, len(self.states), self.per_pass):
            samples = slice(start, start + self.per_pass)
            states = self.states[samples]
            x = states.flatten(0, 1).float()
            if self._step is None or self._step[0] != len(states):
                lengths = [states.shape[1]] * len(states)
                self._step = (len(states), Prefill(lengths, None, self.positions, x))
            step = self._step[1]
            beside = {n: part[samples].flatten(0, 1).float() for n, part in self.beside.items()}
            step.layer_inputs = beside.pop(INPUTS, None)
            step.qkv_of = {int(layer): kv for layer, kv in beside.items()}
            yield states, x, step
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
        start = 0
        for states, x, step in self.passes():
            states.copy_(run(x, step).unflatten(0, states.shape[:2]))
            for layer, qkv in step.qkv_of.items():  # which the layer itself has made anew
                kept = self.beside[str(layer)][start : start + len(states)]
                kept.copy_(qkv[:, -kept.shape[2] :].unflatten(0, states.shape[:2]))
            start += len(states)
            # The extremes are NaN or infinite where any element is; isfinite is much slower.
            if not torch.stack(states.aminmax()).isfinite().all():
                name = str(states.dtype).removeprefix("torch.")
                raise UserError(
                    f"activations leave the range of {name}; use `dtype` bfloat16 or float32"
                )
