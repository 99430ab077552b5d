"""What the files of a checkpoint call the tensors of its text model, where that is part of more."""

from __future__ import annotations

import torch

from qllm.checkpoint.tensors import TensorInfo
from qllm.models.family import RawConfig
from qllm.models.multimodal import HEAD, INNER, multimodal_type


class FileNames:
    """Names in a checkpoint's files, and those that its model has alone.

    Attributes:
        left_out, elements_left_out: how many tensors are none of the text model's, and their size.
    """

    def __init__(self, raw_config: RawConfig) -> None:
        self.left_out = self.elements_left_out = 0
        self._outer = multimodal_type(raw_config.outer)
        # What the files have in the place of names that are others there, and of INNER and HEAD.
        self._names: dict[str, str] = {}
        self._prefixes: dict[str, set[str]] = {INNER: set(), HEAD: set()}

    def own(self, name: str, info: TensorInfo) -> str | None:
        """What the model calls a tensor of a file; None: it has none of it."""
        if self._outer is None:
            return name
        own = self._outer.text_name(name)
        if own is None:
            self.left_out += 1
            self.elements_left_out += torch.Size(info.shape).numel()
            return None
        start = next(each for each in self._prefixes if own.startswith(each))
        self._prefixes[start].add(name.removesuffix(own.removeprefix(start)))
        if own != name:
            self._names.setdefault(own, name)
        return own

    def __getitem__(self, name: str) -> str:
        """What the files call a tensor of the model's."""
        return self._names.get(name, name)

    def expected(self, name: str) -> str:
        """The same, or what they would call one that is not there."""
        return self._names.get(name) or self.in_transformers(name)

    def in_transformers(self, name: str) -> str:
        """What transformers' own class calls a module, or a tensor."""
        return name if self._outer is None else self._outer.module_name(name)

    def of_module(self, module: str) -> list[str]:
        """What settings may call a module: as the files do, or as transformers does."""
        if self._outer is None:
            return [module]
        found = [self.in_transformers(module)]
        for own, names in self._prefixes.items():
            if module.startswith(own):
                found += [name + module.removeprefix(own) for name in sorted(names)]
        return found
