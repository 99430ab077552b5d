"""Which path runs, what forces another, and what happens where there are no kernels at all."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_user_error, run, run_json
from cpu_paths import forced, on, paths, random_weight
from inside import call_json

from qllm import ops
from qllm.errors import UserError
from qllm.ops import Request
from qllm.ops.cpu import build, interface
from qllm.ops.cpu import library as native
from qllm.ops.cpu import paths as machine

GENERATE = ("--model-name", "opt", "--model-size", "tiny", "--bitwidth", "4")
AVX2, AVX_VNNI, AVX512, AMX, BF16 = 1, 2, 4, 8, 16  # of dispatch.cpp

REQUEST = Request(64, 64, 4, 32, "asym", "cpu")
INT8_REQUEST = Request(64, 64, 8, -1, "sym", "cpu")


@pytest.fixture
def anew():
    """The library is looked for again, in this test and after it."""
    native.library.cache_clear()
    native.unavailable.cache_clear()
    yield
    native.library.cache_clear()
    native.unavailable.cache_clear()
    if not native.unavailable():
        native.library()


@pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, build.COMPILERS)),
    reason="compiles C++ on Linux",
)
def test_there_are_kernels_where_there_is_a_compiler():
    # Without them every other test of theirs is skipped.
    assert native.unavailable() is None


@pytest.fixture
def forgotten(monkeypatch):
    """What this machine's tests force, and what is known of it."""
    monkeypatch.delenv("QLLM_CPU_PATH")
    monkeypatch.delenv("QLLM_CXXFLAGS", raising=False)
    machine._flags.cache_clear()
    yield
    machine._flags.cache_clear()


@pytest.mark.parametrize("name", native.PATHS)
def test_a_path_of_this_machine_runs(name):
    weight = random_weight((16, 32), 4, 32)
    x = torch.eye(32)
    with on(name):
        assert torch.allclose(weight.kernel(x), weight.matrix.t().float())


NEEDS = {
    "amx": AVX512 | AMX | BF16,
    "avx512bf16": AVX512 | BF16,
    "avx512": AVX512,
    "avxvnni": AVX2 | AVX_VNNI,
    "avx2": AVX2,
    "scalar": 0,
}


def test_a_path_is_taken_where_its_features_are():
    known = machine.available()
    paths()
    library = native.library()
    try:
        for features, (name, needed) in itertools.product(range(32), NEEDS.items()):
            took = library.qllm_use(name.encode(), ctypes.c_int64(features))
            assert took == (name in known and features & needed == needed)
    finally:
        library.qllm_use(library.path.encode(), ctypes.c_int64(library.qllm_features()))


OLD = "fpu sse2 avx f16c fma"
HASWELL = f"{OLD} avx2 bmi2"
CASCADE_LAKE = f"{HASWELL} avx512f avx512bw avx512dq avx512vl avx512_vnni"
AVX512_UNITS = "avx512 avx512linear avx512halves"
COOPER_LAKE = f"{CASCADE_LAKE} avx512_bf16"


@pytest.mark.parametrize(
    ("flags", "wanted", "units"),
    [
        (OLD, "scalar", "scalar"),
        (HASWELL, "avx2", "avx2 avx2linear avx2halves avx2int8 avx2int8halves"),
        (f"{HASWELL} avx_vnni", "avxvnni", "avxvnni avxvnnilinear avxvnnihalves"),
        (HASWELL.replace("bmi2", "") + " avx_vnni", "scalar", "scalar"),
        (
            f"{HASWELL} avx512f avx512bw avx512dq avx512vl",
            "avx2",
            "avx2 avx2linear avx2halves avx2int8 avx2int8halves",
        ),
        (CASCADE_LAKE, "avx512", AVX512_UNITS),
        (COOPER_LAKE, "avx512bf16 avx512", f"avx512bf16 {AVX512_UNITS}"),
        (f"{CASCADE_LAKE} amx_tile amx_int8 amx_bf16", "avx512", AVX512_UNITS),
        (
            f"{COOPER_LAKE} amx_tile amx_int8 amx_bf16",
            "amx avx512bf16 avx512",
            f"amx avx512bf16 {AVX512_UNITS}",
        ),
        (None, " ".join(native.PATHS), " ".join(u for p in native.PATHS.values() for u in p.units)),
    ],
)
def test_what_a_machine_can_run_is_what_is_compiled(
    flags, wanted, units, monkeypatch, tmp_path, forgotten
):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        entry = "processor\t: {0}\nflags\t\t: {1}\nbugs\t\t: none\n\n"
        machine.CPUINFO.write_text("".join(entry.format(n, flags) for n in range(400)))
    assert " ".join(machine.wanted()) == wanted
    every = {unit for isa in native.PATHS.values() for unit in isa.units}
    assert machine.omitted(machine.wanted()) == every - set(units.split())


def test_a_path_for_which_the_processor_lacks_something(monkeypatch):
    # As where a hypervisor hides what the system still names.
    paths()
    library = native.library()
    monkeypatch.delenv("QLLM_CPU_PATH")
    with monkeypatch.context() as patch:
        patch.setattr(build, "load", lambda omitted: library)
        patch.setattr(machine, "wanted", lambda: ("amx2",))
        patch.setitem(native.PATHS, "amx2", native.PATHS["amx"])
        with pytest.raises(build.Unavailable, match=r"has no AMX .* set QLLM_CPU_PATH=scalar"):
            native.library.__wrapped__()


def test_the_machine_s_features_are_those_the_system_names():
    paths()
    text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    flags = set(re.search(r"^flags\s*:(.*)", text, re.MULTILINE)[1].split())
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
    expected = 0
    if {"avx2", "fma", "f16c", "bmi2"} <= flags:
        expected = AVX2 | AVX_VNNI * ("avx_vnni" in flags) | AVX512 * (wide <= flags)
        expected |= BF16 * (wide | {"avx512_bf16"} <= flags)
    found = native.library().qllm_features()
    assert found & (AVX2 | AVX_VNNI | AVX512 | BF16) == expected


@pytest.mark.usefixtures("anew")
def test_a_path_can_be_forced(monkeypatch):
    for name in paths():
        monkeypatch.setenv("QLLM_CPU_PATH", forced(name))
        native.library.cache_clear()
        assert native.library().path == name
        assert ops.select("weight_only_linear", REQUEST).reason.startswith(native.PATHS[name].about)


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("name", ["sse", "AVX2", "avx2 ", "amx2"])
def test_a_path_that_there_is_not(monkeypatch, name):
    known = paths()
    monkeypatch.setenv("QLLM_CPU_PATH", name)
    native.library.cache_clear()
    native.unavailable.cache_clear()
    with pytest.raises(UserError) as caught:
        native.unavailable()
    assert str(caught.value) == (
        f"QLLM_CPU_PATH={name!r} cannot run here; choose {', '.join(known)}"
    )


def test_a_path_that_there_is_not_is_one_line_for_the_user():
    known = paths()
    environment = {**os.environ, "QLLM_CPU_PATH": "neon"}
    assert_user_error(run("qllm_gen.py", *GENERATE, "--json", env=environment), "'neon'", *known)


def test_every_path_generates_the_same_tokens():
    arguments = ("qllm_gen.py", *GENERATE, "--explain")
    environment = {**os.environ, "QLLM_CPU_PATH": forced("scalar")}
    best = paths()[0]
    results = {best: call_json(*arguments), "scalar": run_json(*arguments, env=environment)}
    assert all(row["tokens"] for row in results[best]["results"])
    for name, result in results.items():
        assert result["results"] == results[best]["results"]
        said = {row["why"] for row in result["kernels"] if row["kernel"] == "cpu"}
        assert said and any(native.PATHS[name].about in reason for reason in said)


@pytest.mark.usefixtures("anew")
def test_without_kernels_the_reference_runs(monkeypatch, capsys):
    def load(omitted: frozenset[str]) -> None:
        raise build.Unavailable("no compiler today; install one")

    monkeypatch.setattr(build, "load", load)
    for op, request in (("weight_only_linear", REQUEST), ("int8_linear", INT8_REQUEST)):
        choice = ops.select(op, request)
        assert choice.kernel.name != "cpu"
        assert "; not cpu: not on this machine: no compiler today; install one" in choice.reason
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "note: no compiler today; install one; running plain torch ops, which are slow"
    ]


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("op", ["add", "attend"])
def test_arguments_of_another_size_are_refused(op, monkeypatch):
    monkeypatch.setitem(interface.OPS, op, interface.Embed)
    with pytest.raises(build.Unavailable, match=f"differ on the arguments of {op}; reinstall"):
        native.library()
    monkeypatch.delitem(interface.OPS, op)
    with pytest.raises(build.Unavailable, match=f"differ on the arguments of {op}; reinstall"):
        native.library()


@pytest.mark.slow
@pytest.mark.parametrize("header", sorted(path.name for path in build.SOURCE.glob("*.h")))
def test_a_header_includes_what_it_uses(header):
    # As the scalar path has it; what is for one instruction set compiles with its path alone.
    if "amx" in header or header.startswith("isa_avx"):
        pytest.skip("for one instruction set")
    compiler = next(filter(None, map(shutil.which, build.COMPILERS)), None)
    if compiler is None:
        pytest.skip("needs a compiler")
    command = [compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", str(build.SOURCE / header)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_without_a_compiler_a_model_runs(tmp_path):
    environment = {**os.environ, "CXX": "/nonexistent", "QLLM_CACHE": str(tmp_path)}
    done = run("qllm_gen.py", *GENERATE, "--explain", env=environment)
    assert done.returncode == 0
    (line,) = (line for line in done.stderr.splitlines() if "kernels" in line)
    assert line.startswith("note: ") and "/nonexistent" in line and "install g++" in line
    assert "not cpu: not on this machine: no C++ compiler" in done.stdout


def test_no_device_but_the_cpu_has_kernels():
    for op, request in (("weight_only_linear", REQUEST), ("int8_linear", INT8_REQUEST)):
        choice = ops.select(op, Request(**{**vars(request), "device": "cuda"}))
        assert choice.kernel.name == "reference"
        assert "not cpu: it is for CPUs" in choice.reason


@pytest.mark.parametrize("group_size", [-1, 1, 7, 15, 16, 100])
@pytest.mark.parametrize("inputs", [5, 16, 64])
def test_small_groups_are_the_reference_s(group_size, inputs):
    paths()
    choice = ops.select("weight_only_linear", Request(inputs, 8, 4, group_size, "sym", "cpu"))
    small = 0 < group_size < min(16, inputs)
    assert choice.kernel.name == ("reference" if small else "cpu")
    assert ("groups of fewer than 16 inputs" in choice.reason) == small


def test_no_path_shares_a_function_with_another(tmp_path):
    # An inline function that several units define is linked once, from any: one of AVX-512, say.
    paths()
    if not shutil.which("nm"):
        pytest.skip("needs nm, of binutils")
    copy = tmp_path / "library.so"  # what is loaded has a path in this process alone
    copy.write_bytes(Path(native.library()._name).read_bytes())
    said = subprocess.run(
        ["nm", "--defined-only", str(copy)], check=True, capture_output=True, text=True
    )
    symbols = [line.split()[1:] for line in said.stdout.splitlines()]
    # A compiler may put a function's unlikely part elsewhere.
    functions = {name.removesuffix(".cold") for kind, name in symbols if kind in "tTwWvVui"}
    if "_ZN4qllm7scratchEm" not in functions:
        pytest.skip("the library has no table of its symbols")
    own = re.compile(r"_Z+NK?4qllm\d+_GLOBAL__N_|_ZL|_ZN4qllmL|_ZN\d+_GLOBAL__N_")
    shared = {name for name in functions if name.startswith("_Z") and not own.match(name)}
    # Of the units that all machines run.
    names = {re.match(r"_ZN4qllm\d+([a-z_]+)E", name)[1] for name in shared}
    assert names == {"scratch", "max_threads", "share_work", "idle"}
    assert any(own.match(name) for name in functions)
