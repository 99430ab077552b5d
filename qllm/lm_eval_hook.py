"""Makes lm-evaluation-harness's own command know the model "qllm".

The harness has no plug-ins: a model has to be registered by code that has run. `pip install` puts
qllm_lm_eval.pth beside the packages, by which every Python of that environment calls `install`;
nothing happens before the harness loads its table of models.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "lm_eval.models"


def register() -> None:
    """Enter the model "qllm" into the harness's table; it is imported when it is asked for."""
    from lm_eval.api.registry import model_registry

    if "qllm" not in model_registry:
        model_registry.register("qllm", target="qllm.harness:HarnessModel")


def install() -> None:
    """Call `register` as soon as the harness's table is there."""
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds nothing, but for the table, whose loader it follows up with `register`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                register()

            spec.loader.exec_module = load_and_register
        return spec
