"""Activation statistics of a model: what flows through its linear layers, and the file of that."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from qllm import folders
from qllm.config import W8A8, QuantPlan
from qllm.errors import UserError
from qllm.files import check_file, portable, readable
from qllm.hub import ModelFolder
from qllm.models import Decoder
from qllm.progress import Note, silent

FORMAT = "qllm-calibration"


@dataclass
class Calibration:
    """Largest absolute values, per channel, of the inputs and outputs of linear layers.

    Attributes:
        inputs: layer name to float32 (K,).
        outputs: layer name to float32 (N,).
        about: how they were found (source, model, samples), strings both ways.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    def observe(self, name: str, x: Tensor, y: Tensor) -> None:
        """Take in the inputs (M, K) and outputs (M, N) of one call of a layer."""
        for store, value in ((self.inputs, x), (self.outputs, y)):
            largest = value.abs().amax(dim=0).float().cpu()
            torch.maximum(store.setdefault(name, largest), largest, out=store[name])

    def digest(self) -> str:
        """What tells these ranges from others."""
        digest = hashlib.sha256()
        for name, value in sorted(self.inputs.items()):
            digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write a safetensors file: `NAME.input` and `NAME.output` of every layer."""
        from safetensors.torch import save

        tensors = {f"{name}.input": value for name, value in self.inputs.items()}
        tensors |= {f"{name}.output": value for name, value in self.outputs.items()}
        about = {key: readable(value) for key, value in self.about.items()}
        path.write_bytes(save(tensors, metadata={"format": FORMAT, **about}))

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """The inverse of `save`.

        Raises:
            UserError: for a file that is none of ours, or holds values that cannot be.
        """
        from safetensors import SafetensorError, safe_open

        calibration = cls()
        try:
            check_file(path)
            with safe_open(portable(path), framework="pt") as file:
                about = dict(file.metadata() or {})
                if about.pop("format", None) != FORMAT:
                    raise UserError(f"{path} is no calibration; fake_calib_gen.py makes one")
                for key in file.keys():  # noqa: SIM118 - it is no dictionary
                    name, _, side = key.rpartition(".")
                    sides = {"input": calibration.inputs, "output": calibration.outputs}
                    sides[side][name] = file.get_tensor(key).clone()
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"{path} cannot be read as a calibration ({error})") from None
        for store in (calibration.inputs, calibration.outputs):
            for name, value in store.items():
                if value.dtype != torch.float32 or value.dim() != 1:
                    raise UserError(
                        f"{path}: the ranges of {name} are {value.dtype} of shape "
                        f"{tuple(value.shape)}, not a float32 vector; make it again"
                    )
                if not value.isfinite().all() or (value < 0).any():
                    raise UserError(
                        f"{path}: the ranges of {name} are not all finite and 0 or more; "
                        "make it again"
                    )
        calibration.about = about
        return calibration

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse statistics of another model.

        Args:
            shapes: name of each linear to (N, K).

        Raises:
            UserError: for a layer that is missing or has other sizes.
        """
        for name, (_, columns) in shapes.items():
            found = self.inputs.get(name)
            if found is None or found.shape != (columns,):
                size = "nothing" if found is None else f"{len(found)} channels"
                raise UserError(
                    f"the calibration is of another model ({self.about.get('model', 'unnamed')}): "
                    f"it has {size} for {name}, which takes {columns}"
                )


def stored_name(model: ModelFolder) -> str:
    """What a model's calibration is called in QLLM's own folder (`qllm.folders`)."""
    return f"calibration/{model.key}.safetensors"


def find_calibration(
    given: str | Path | Calibration | None,
    model: ModelFolder,
    plan: QuantPlan,
    note: Note = silent,
) -> Calibration | None:
    """The activation statistics for a plan's W8A8 layers; None where it has no such layer.

    Args:
        given: the statistics or their file; None is what is kept for the model, if anything is.
        note: called with a line that says which they are.

    Raises:
        UserError: for a file that is not there, or broken.
    """
    if not any(spec.kind in W8A8.values() for _, spec in plan.rules):
        if given is not None:
            note(f"`calibration` {given} is not used: it is for 8:tc-li and 8:tc")
        return None
    if isinstance(given, Calibration):
        return given
    path = folders.find(stored_name(model)) if given is None else Path(given)
    if path is None:
        return None
    if not path.exists():
        raise UserError(f"`calibration` {path}: there is no such file; fake_calib_gen.py makes one")
    calibration = Calibration.load(path)
    note(f"activation statistics of {calibration.about.get('source', 'unknown source')}: {path}")
    made_for = calibration.about.get("model", model.name)
    if made_for != model.name:
        note(f"they are those of {made_for}, and this is {model.name}")
    return calibration


def calibrate(
    model: Decoder, samples: list[list[int]], progress: Callable[[list], Iterable] = iter
) -> Calibration:
    """Statistics of every linear layer while the model reads samples of token ids."""
    # A linear layer is told by its features: those of a random model hold no weight.
    linears = {
        name: module for name, module in model.named_modules() if hasattr(module, "in_features")
    }
    # All that stays is allocated first: small tensors that stay between large ones that go would
    # keep the memory of those from being used again.
    calibration = Calibration(
        {name: torch.zeros(module.in_features) for name, module in linears.items()},
        {name: torch.zeros(module.out_features) for name, module in linears.items()},
    )
    hooks = [
        module.register_forward_hook(_observer(calibration, name))
        for name, module in linears.items()
    ]
    try:
        for sample in progress(samples):
            model.logits(model.hidden([sample])[-1:])
    finally:
        for hook in hooks:
            hook.remove()
    return calibration


def _observer(calibration: Calibration, name: str) -> Callable:
    def observe(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        calibration.observe(name, inputs[0], output)

    return observe
