"""What tools.emulate changes is in the sources as it expects it, and compiles."""

from __future__ import annotations

import platform
import re
import runpy
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from qllm.errors import UserError
from qllm.ops.cpu import build, paths
from tools import emulate

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="the CPU kernels are for x86-64 Linux",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A tree with the kernels alone."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / emulate.KERNELS, tree / emulate.KERNELS)
    return tree


@pytest.fixture(scope="module")
def patched(sources, tmp_path_factory):
    tree = tmp_path_factory.mktemp("copy") / "tree"
    shutil.copytree(sources, tree)
    emulate.patch(tree)
    return tree


def flags(tree):
    """What the units of a patched tree are compiled with."""
    return runpy.run_path(str(tree / emulate.KERNELS / "build.py"), run_name="emulated")["FLAGS"]


def test_no_instruction_is_left_that_a_machine_with_avx2_lacks(patched):
    compiled = flags(patched)
    assert compiled.keys() == build.FLAGS.keys() | {"dispatch"}
    for unit, words in compiled.items():
        assert not re.search(r"-mavx(512|vnni)|-mamx", " ".join(words)), unit
    for unit in ("avx2", "avx2linear", "scalar"):
        assert compiled[unit] == build.FLAGS[unit]
    for path in (patched / emulate.SOURCE).iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'_mm512_|%%tmm|"\+v"|\{vex', text), path.name


def test_all_paths_are_believed_to_be_there(patched):
    found = runpy.run_path(str(patched / emulate.KERNELS / "paths.py"), run_name="emulated")
    assert found["available"]() == tuple(paths.PATHS)


@pytest.mark.parametrize("change", emulate.CHANGES, ids=lambda change: change.old[:20])
def test_what_is_no_longer_there_is_one_line(change, sources, tmp_path):
    shutil.copytree(sources, tmp_path / "tree")
    path = tmp_path / "tree" / change.path
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(change.old, "something else"), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        emulate.patch(tmp_path / "tree")
    assert str(caught.value).startswith(f"{change.path} no longer has {change.old!r}; ")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="compiles C++")
@pytest.mark.parametrize(
    ("unit", "source"), [("amx", "amx.cpp"), ("avxvnni", "isa.h"), ("dispatch", "dispatch.cpp")]
)
def test_what_is_emulated_compiles(unit, source, patched):
    command = [*build._compiler(), *build.COMMON, *flags(patched)[unit], "-fsyntax-only"]
    done = subprocess.run(
        [*command, "-x", "c++", "-include", source, "/dev/null"],
        cwd=patched / emulate.SOURCE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_tests_that_are_left_out_are_there():
    for test in emulate.LEFT_OUT:
        path, _, name = test.partition("::")
        name, _, case = name.rstrip("]").partition("[")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert f"\ndef {name}(" in text and case.split("-")[0] in text


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_copy_is_made_anew(monkeypatch, tmp_path):
    root, tree = tmp_path / "root", tmp_path / "tree"
    root.mkdir()
    subprocess.run(["git", "init", "--quiet", root], check=True)
    monkeypatch.setattr(emulate, "ROOT", root)
    for name in ("a.py", "b.py"):
        (root / name).write_text(name)
        emulate.copy(tree)
        assert [path.name for path in tree.glob("*.py")] == [name]
        (root / name).unlink()


def test_a_folder_of_someone_else_s_stays(tmp_path):
    (tmp_path / "tree").mkdir()
    with pytest.raises(UserError, match="is no copy that this made; choose another --folder"):
        emulate.copy(tmp_path / "tree")
    assert (tmp_path / "tree").is_dir()
