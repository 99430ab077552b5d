"""Modules of torch that `import torch` runs and a model does not need, left until they are used.

They are 0.4 of the time of `import torch`: torch.export, the quantization and the distributions of
torch's own, and what torch.compile traces with: operators in Python, of the meta device for one,
which has those that models are built by in C++.
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

# Modules that run code of other modules when they are imported, which nothing else in torch needs.
TRACING = ("torch._meta_registrations", "torch._decomp", "torch._refs", "torch._prims")
MODULES = (
    *TRACING,
    "torch.ao",
    "torch.distributions",
    "torch.export",
    "torch.masked",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
    "torch.profiler",
    "torch.quantization",
    "torch.utils.data",
)
# What may rely on all of torch where it is imported.
USERS = ("transformers", "torch._dynamo", "torch._inductor", "torch.onnx", "torch._export")


class _Deferred(types.ModuleType):
    """A module that runs its code when the first of its names is asked for.

    Attributes:
        own_loader: what runs it.
    """

    own_loader: Loader

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name != "__all__":  # what looks at all modules asks for these
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        _run(self)
        return getattr(self, name)


_lock = threading.RLock()


def _run(module: types.ModuleType) -> None:
    with _lock:
        if isinstance(module, _Deferred):
            loader = module.own_loader
            object.__setattr__(module, "__class__", types.ModuleType)
            module.__loader__ = loader
            if module.__spec__ is not None:
                module.__spec__.loader = loader
            loader.exec_module(module)


class _Later(Loader):
    """Makes a module, and leaves its code.

    Attributes:
        loader: what runs it.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = _Deferred(spec.name)
        module.own_loader = self.loader
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == TRACING[0]:
            _stand_in()

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)


def _stand_in() -> None:
    """What importing TRACING does that others rely on: torch 2.13 has it for torch.Generator."""
    import torch

    if set_metaclass := getattr(torch._C, "_set_generator_metaclass", None):
        set_metaclass(importlib.import_module("torch._opaque_base").OpaqueBaseMeta)
    for name in TRACING[1:]:
        importlib.import_module(name)  # without their code, as attributes of torch


class _Finder(MetaPathFinder):
    """Finds the modules of `MODULES`, until one of their users comes."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in USERS:
            load()
        if name not in MODULES or self not in sys.meta_path:
            if (parent := name.rpartition(".")[0]) in MODULES and parent in sys.modules:
                _run(sys.modules[parent])
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Later(spec.loader)
        return spec


def defer() -> None:
    """Leave the modules until they are used, in a process that has not imported torch yet."""
    if "torch" not in sys.modules:
        sys.meta_path.insert(0, _Finder())


def load() -> None:
    """Run the code of those that were left, and of the others when they are imported."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    for name in MODULES:
        if name in sys.modules:
            _run(sys.modules[name])
