"""What `pip install` makes of the scripts."""

from __future__ import annotations

import importlib
import sys

import tomllib
from conftest import ROOT

from qllm.cli import commands


def test_pip_makes_a_command_of_each_script(monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"].keys() == commands.COMMANDS.keys()
    assert set(project["project"]["scripts"].values()) == {"qllm.cli.commands:main"}
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert {f"{module}.py" for module in commands.COMMANDS.values()} == scripts
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"].keys() == {*scripts, "tiny_models"}
    monkeypatch.setattr(commands, "run", lambda main: main())
    for name, module in commands.COMMANDS.items():
        ran = []
        monkeypatch.setattr(importlib.import_module(module), "main", lambda ran=ran: ran.append(1))
        monkeypatch.setattr(sys, "argv", [f"/usr/bin/{name}", "--help"])
        commands.main()
        assert ran
