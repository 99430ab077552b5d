"""DESIGN §1: imports point one way, heavy ones come late, and importing does nothing else."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from conftest import ROOT
from gguf_files import write_model
from gguf_models import FAMILIES as GGUF_FAMILIES

from qllm import hub
from qllm.cli.options import NAME, OPTIONS
from qllm.deferred import MODULES

PACKAGE = ROOT / "qllm"
FILES = sorted(PACKAGE.rglob("*.py"))
LIBRARY = [path for path in FILES if path.parent.name != "cli"]
SCRIPTS = sorted(ROOT.glob("*.py"))

# What may import what: each name below takes from its own row and those above it.
ROWS = (
    (
        *("qllm", "start", "deferred", "cgroups", "errors", "text", "files", "folders", "launch"),
        *("patterns", "progress", "temporary"),
    ),
    ("config", "memory", "data"),
    ("ops", "quant"),
    ("gguf", "onnx_files"),
    ("hub",),
    ("layers",),
    ("models", "parallel"),
    (
        "checkpoint",
        *("generate", "generation_config", "sampling", "stopping", "stream"),
        "evaluate",
        "bench",
        "export",
        "calibration",
        "random_model",
        "tokenizer",
        "huggingface",
        "report",
    ),
    ("quantizer",),
    ("plan",),
    ("onnx",),
    ("neural_compressor",),
    ("bitwidths", "pretrained", "prompts"),
    ("llm", "quantize_model"),
    ("candidates",),
    ("chat",),
    ("cli",),
    ("harness",),
)
HEIGHT = {name: height for height, row in enumerate(ROWS) for name in row}

# Too slow to import before they are needed, or not needed to run at all.
HEAVY = {"transformers", "datasets", "accelerate", "huggingface_hub"}
# What generation leaves alone: a good part of a second each, and sympy is torch's compiler's.
NOT_TO_GENERATE = HEAVY | {
    *("gguf", "onnx", "onnxruntime", "scipy", "matplotlib", "jinja2", "sympy"),
    *("torch._dynamo", "torch._inductor", *MODULES),
}


def name_of(path: Path) -> str:
    """qllm/layers/base.py -> qllm.layers.base."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str:
    """The name in the table: qllm.layers.base -> layers; qllm itself, or what is in it -> qllm."""
    parts = module.split(".")
    if len(parts) > 1 and any((PACKAGE / f"{parts[1]}{end}").exists() for end in ("", ".py")):
        return parts[1]
    return "qllm"


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path, *, late: bool = True) -> set[str]:
    """Every module that a file imports: at its top, and `late`, inside functions, as well."""
    tree = tree_of(path)
    module = name_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree) if late else at_import(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            origin = importlib.util.resolve_name(name, package) if node.level else name
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def at_import(tree: ast.Module):
    """The nodes that run when a module is imported, and not only for a type checker."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in (
            "TYPE_CHECKING",
            "__name__ == '__main__'",
        ):
            waiting += node.orelse
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += [*getattr(node, "decorator_list", []), node.args]
        else:
            waiting += ast.iter_child_nodes(node)


def own_imports(path: Path) -> set[str]:
    """The names in the table that a file imports, its own left out."""
    found = {part_of(name) for name in imports(path) if name.split(".")[0] == "qllm"}
    return found - {part_of(name_of(path))}


def test_there_is_something_to_test():
    assert {name_of(path) for path in FILES} >= {"qllm", "qllm.cli.console", "qllm.layers.base"}
    assert {"qllm_gen.py", "ref_gen.py"} <= {path.name for path in SCRIPTS}


def test_imports_point_one_way():
    for path in FILES:
        part = part_of(name_of(path))
        assert part in HEIGHT, f"{part} is new: give it its row in ROWS, and in DESIGN §1"
        above = {name for name in own_imports(path) if HEIGHT[name] > HEIGHT[part]}
        assert not above, f"{name_of(path)} imports from above {part}: {above}"


def test_imports_make_no_circle():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(part_of(name_of(path)), set()).update(own_imports(path))
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def imported(path: Path, *, late: bool = True) -> set[str]:
    """The packages that a file imports."""
    return {name.split(".")[0] for name in imports(path, late=late)}


def test_the_library_does_not_import_what_stands_around_it():
    around = {script.stem for script in SCRIPTS} | {"tests", "tools", "benchmarks", "conftest"}
    for path in FILES:
        assert not imported(path) & around, name_of(path)


def test_only_cli_knows_argparse():
    for path in FILES:
        assert "argparse" not in imported(path) or part_of(name_of(path)) == "cli", name_of(path)


# What writes, and why no script does it: `print`, or a standard stream, may stand in no other file.
WRITING = {
    "start.py": "it runs before a script can import anything",
    **dict.fromkeys(
        ("plan/network.py", "plan/stages.py"), "each is a process's program, which answers so"
    ),
    "parallel/watch.py": "a thread says why it ends the process, whose main thread may hang",
    **dict.fromkeys(
        ("ops/cpu/build.py", "ops/cpu/library.py", "ops/gpu/device.py", "ops/gpu/graph.py"),
        "kernels are compiled, or found missing, at first use, by whatever calls an op",
    ),
}


def test_the_library_does_not_print():
    writing = {"print", "sys.stdout", "sys.stderr"}
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in LIBRARY
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in writing
    }
    assert not found ^ WRITING.keys()


# What a message may have of options: a whole command. Arguments of compilers are not messages.
OPTION = re.compile(r"--[a-z][\w-]*")
COMMAND = re.compile(r"\b(\w+\.py|torchrun|python3 -m [\w.]+|optimum-cli export onnx) --[a-z]")
COMPILERS = re.compile(r"--(version|std=c\+\+17|gpu-architecture=sm_.*)")


def texts(path: Path) -> list[str]:
    """The strings of a file but for its docstrings; {} stands where an f-string has a value."""
    left_out = {id(n.value) for n in ast.walk(tree_of(path)) if isinstance(n, ast.Expr)}
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.JoinedStr):
            left_out |= {id(value) for value in node.values}
            words = (getattr(value, "value", None) for value in node.values)
            found.append("".join(word if isinstance(word, str) else "{}" for word in words))
        elif isinstance(node, ast.Constant) and id(node) not in left_out:
            found += [node.value] if isinstance(node.value, str) else []
    return found


def test_the_library_names_no_option():
    for path in LIBRARY:
        for text in texts(path):
            option = not COMPILERS.fullmatch(text) and OPTION.search(COMMAND.sub("", text))
            assert not option, f"{name_of(path)} names {option[0]}: name its parameter in backticks"


def test_what_messages_name_is_there_and_has_an_option():
    known = {f"{family}-{hub.TINY}" for family in hub.bundled()}
    for path in LIBRARY:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                known |= {node.name, *(arg.arg for arg in (*node.args.args, *node.args.kwonlyargs))}
            elif isinstance(node, ast.ClassDef):
                fields = (ast.unparse(n.target) for n in node.body if isinstance(n, ast.AnnAssign))
                known |= {name for field in fields for name in (field, f"{node.name}.{field}")}
    named = {name for path in LIBRARY for text in texts(path) for name in NAME.findall(text)}
    assert not named - known
    assert not OPTIONS.keys() - named
    told = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    for name in named - OPTIONS.keys():
        assert f"`--{name.replace('_', '-')}`" not in told, f"qllm.cli.options lacks {name}"
    for option in OPTIONS.values():
        assert all(f"`{word}`" in told for word in option.split() if word.startswith("--"))


def test_ops_and_quant_know_tensors_only():
    for path in FILES:
        if part_of(name_of(path)) in ("ops", "quant"):
            assert not imports(path) & {"torch.nn", "torch.nn.Module"}, name_of(path)
            allowed = {"cgroups", "errors", "files", "folders", "temporary", "ops", "quant"}
            assert own_imports(path) <= allowed, name_of(path)


def test_heavy_imports_are_late():
    for path in (*FILES, *SCRIPTS):
        assert not imported(path, late=False) & HEAVY, name_of(path)


def test_a_module_only_defines():
    allowed = (
        *(ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign),
        *(ast.FunctionDef, ast.ClassDef, ast.If, ast.Try),
    )
    doing = {"print", "input", "open", "exit", "parse_args", "parse_known_args", "read_text", "run"}
    for path in (*FILES, *SCRIPTS):
        tree = tree_of(path)
        assert ast.get_docstring(tree), f"{name_of(path)} says at its top what it is"
        odd = [ast.unparse(node) for node in tree.body[1:] if not isinstance(node, allowed)]
        assert not odd, f"{name_of(path)} runs at import: {odd}"
        calls = {ast.unparse(node.func) for node in at_import(tree) if isinstance(node, ast.Call)}
        done = {call for call in calls if call.rpartition(".")[2] in doing}
        assert not done, f"{name_of(path)} does at import: {done}"


def test_lines_of_cpp_and_cuda_are_no_longer_than_those_of_python():
    files = (path for part in (PACKAGE, ROOT / "tests", ROOT / "tools") for path in part.rglob("*"))
    for path in files:
        if path.suffix in (".h", ".cpp", ".cu"):
            lines = path.read_text(encoding="utf-8").splitlines()
            long = [number for number, line in enumerate(lines, 1) if len(line) > 100]
            assert not long, f"{path.relative_to(ROOT)} has more than 100 characters in {long}"


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_finds_its_folder(path):
    """As `python -P` and PYTHONSAFEPATH do not; tests/cli/test_options.py runs some so."""
    line = "sys.path.insert(0, str(Path(__file__).resolve().parent))"
    source = path.read_text(encoding="utf-8")
    assert 0 < source.find(line) < source.find("from qllm import cli")


def python(program: str, *args: str) -> str:
    """What a fresh Python prints, which must be all it says."""
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_everything_imports_in_silence():
    # A module that parsed would fail over these arguments; one that printed would be heard.
    program = """
import importlib, os, sys
names = sys.argv[1].split(",")
sys.argv = ["program", "--no-such-option"]
before = sorted(os.environ)
for name in names:
    importlib.import_module(name)
assert sorted(os.environ) == before
"""
    names = [name_of(path) for path in [*FILES, *SCRIPTS]]
    done = processes.run(["-c", program, ",".join(names)], os.environ, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_cli_answers_without_torch():
    program = """
import sys, qllm.cli
print([name for name in ("torch", "numpy", "safetensors", "tokenizers") if name in sys.modules])
"""
    assert python(program) == "[]\n"


def test_generation_imports_only_what_it_needs(tmp_path):
    program = """
import json, runpy, sys
file, *options = sys.argv[1:]
tiny = {"opt": "4", "bloom": "8:tc-li", "llama": "16"}
models = [*((f"tiny_models/{name}-tiny", bits) for name, bits in tiny.items()), (file, None)]
for path, bitwidth in models:
    more = ["--bitwidth", bitwidth] if bitwidth else []
    sys.argv = ["qllm_gen.py", "--model-path", path, *more, *options]
    try:
        runpy.run_path("qllm_gen.py", run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
from qllm.deferred import _Deferred
print(json.dumps([name for name, each in sys.modules.items() if not isinstance(each, _Deferred)]))
import transformers  # which may use all of torch
assert not any(isinstance(each, _Deferred) for each in sys.modules.values())
"""
    file = write_model(tmp_path / "model.gguf", GGUF_FAMILIES["llama"](), "Q4_1")
    done = subprocess.run(
        [sys.executable, "-c", program, file, "--json", "--max-gen-tokens", "2", "--seed", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *results, modules = map(json.loads, done.stdout.splitlines())
    assert len(results) == 4 and all(result["results"] for result in results)
    assert "torch.nn" in modules
    assert not NOT_TO_GENERATE & set(modules)
