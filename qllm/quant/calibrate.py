"""Statistics of what flows through linear layers, and the file they are kept in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qllm.errors import UserError
from qllm.files import check_file, portable, readable

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
                    store = {"input": calibration.inputs, "output": calibration.outputs}
                    store[side][name] = file.get_tensor(key).clone()
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

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
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
