"""A script called in this process, where starting one would take longer than its work."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from qllm import cli


def call(script: str, *args: object, input: str = "") -> subprocess.CompletedProcess:
    """What `conftest.run` does, in this process."""
    arguments = [script, *map(str, args)]
    out, error, status = io.StringIO(), io.StringIO(), 0
    main = importlib.import_module(script.removesuffix(".py")).main
    with (
        patch.object(sys, "argv", arguments),
        patch.object(signal, "signal"),  # Ctrl-C stays pytest's
        patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode()))),
        redirect_stdout(out),
        redirect_stderr(error),
    ):
        try:
            cli.run(main)
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), error.getvalue())


def call_json(script: str, *args: object) -> dict:
    """What `conftest.run_json` does, in this process."""
    done = call(script, *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def parsed(script: str, monkeypatch, *args: str) -> argparse.Namespace:
    """What a script reads of its command line."""
    monkeypatch.setattr(sys, "argv", [script, *args])
    return importlib.import_module(script.removesuffix(".py")).parse_args()
