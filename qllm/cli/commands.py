"""What `pip install` makes commands of: each script, by the name of its entry point."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from qllm.cli.console import run

# Names in pyproject.toml, and the modules beside the package that they stand for.
COMMANDS = {
    "qllm-bench": "qllm_bench",
    "qllm-chat": "qllm_chat",
    "qllm-eval": "qllm_eval",
    "qllm-export": "qllm_export",
    "qllm-fake-calib-gen": "fake_calib_gen",
    "qllm-gen": "qllm_gen",
    "qllm-plan": "qllm_plan",
    "qllm-quant": "qllm_quant",
    "qllm-ref-gen": "ref_gen",
    "qllm-weight-convert": "weight_convert",
}


def main() -> None:
    """Run the script that the program was called as."""
    run(lambda: importlib.import_module(COMMANDS[Path(sys.argv[0]).name]).main())
