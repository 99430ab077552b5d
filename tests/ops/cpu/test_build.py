"""The loader of the C++ kernels: what is compiled, how, and into what."""

from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path

import pytest
import torch
from building import (
    EXPORT,
    MARKS,
    SEVEN,
    compiler_script,
    folder_of,
    libraries,
    lines,
    load,
    output,
    python,
    refusal,
)

from qllm.ops.cpu import build

pytestmark = MARKS


# What is compiled, and how.


def test_whole_paths_have_the_same_ops():
    """A path that this machine is without is not compiled here: what it includes is looked at."""
    files = {path.name: path.read_text() for path in build.SOURCE.glob("*.cpp")}
    whole = {name: text for name, text in files.items() if "QLLM_WHOLE_PATH(" in text}
    included = {
        frozenset(re.findall(r'#include "(.*)"', text)) - {"layout.h", "linear.h"}
        for text in whole.values()  # of these two the scalar path has the other one
    }
    assert len(whole) > 3 and len(included) == 1


def test_units_and_headers_become_one_library(real_compiler, tmp_path):
    files = {
        "a.cpp": f'#include "b.h"\n{EXPORT} int three() {{ return two() + 1; }}\n',
        "b.cpp": '#include "b.h"\nint two() { return 2; }\n',
        "b.h": 'extern "C" int two();\n',
        "notes.txt": "not compiled",
    }
    library = load(folder_of(tmp_path / "src", files))
    assert library.three() == 3
    assert not hasattr(library, "two")  # only what says so can be seen from outside


MACROS = ("__AVX2__", "__FMA__", "__F16C__", "__BMI2__", "__AVXVNNI__", "__AVX512F__")
MACROS += ("__AVX512BW__", "__AVX512DQ__", "__AVX512VL__", "__AVX512VNNI__")
MACROS += ("__AVX512BF16__", "__AMX_TILE__", "__AMX_INT8__", "__AMX_BF16__")
HAS = {
    "scalar": (),
    "avx2": MACROS[:4],
    "avx2int8": MACROS[:4],
    "avx2int8halves": MACROS[:4],
    "avx2linear": MACROS[:4],
    "avxvnni": MACROS[:5],
    "avx512": (*MACROS[:4], *MACROS[5:10]),
    "avx512bf16": (*MACROS[:4], *MACROS[5:11]),
    "amx": (*MACROS[:4], *MACROS[5:]),
}


def test_a_unit_has_the_instructions_of_its_name(real_compiler, tmp_path):
    body = "\n".join(f"#ifdef {name}\n| {1 << i}\n#endif" for i, name in enumerate(MACROS))
    files = {f"{unit}.cpp": f"{EXPORT} int {unit}() {{ return 0\n{body}\n; }}\n" for unit in HAS}
    library = load(folder_of(tmp_path / "src", files))
    for unit, names in HAS.items():
        bits = getattr(library, unit)()
        assert {name for i, name in enumerate(MACROS) if bits >> i & 1} == set(names), unit


def test_every_unit_has_the_common_flags(real_compiler, tmp_path):
    tests = ("__cplusplus == 201703L", "defined(__OPTIMIZE__)", "defined(_OPENMP)")
    tests += ("defined(__NO_MATH_ERRNO__)", "defined(__PIC__)")
    text = "".join(f"#if !({test})\n#error {test}\n#endif\n" for test in tests)
    assert load(folder_of(tmp_path / "src", {"a.cpp": text + SEVEN})).seven() == 7


def test_products_and_sums_are_rounded_apart(real_compiler, tmp_path):
    if "fma" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("this machine cannot fuse them")
    text = f"{EXPORT} float f(float a, float b, float c) {{ return a * b + c; }}\n"
    function = load(folder_of(tmp_path / "src", {"avx2.cpp": text})).f
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    almost_one = 1 + 2.0**-12
    assert function(almost_one, almost_one, -(1 + 2.0**-11)) == 0  # fused: 2^-24


def test_units_compile_beside_each_other(monkeypatch, tmp_path, seven):
    slow = 'test "$unit" = library.so || { echo +; sleep 0.3; echo -; } >> "$work/log"'
    work = compiler_script(tmp_path, monkeypatch, seven, slow)
    files = {f"{unit}.cpp": f"{EXPORT} int {unit}() {{ return 1; }}\n" for unit in "abc"}
    load(folder_of(tmp_path / "src", files))
    running, max_running = 0, 0
    for line in lines(work / "log"):
        running += 1 if line == "+" else -1
        max_running = max(max_running, running)
    assert max_running == min(len(files), build.cgroups.usable_cpus())


def test_flags_of_the_user_reach_compiler_and_linker(monkeypatch, real_compiler, source, capfd):
    text = f"{EXPORT} int grow(int x) {{ return x << LARGE; }}\n"
    (source / "a.cpp").write_text(text)
    monkeypatch.setenv("QLLM_CXXFLAGS", "-fsanitize=undefined '-DLARGE=(30 + 10)'")
    load(source).grow(1)
    assert "runtime error: shift exponent 40" in capfd.readouterr().err


def test_the_compiler_may_have_arguments_and_another_name(monkeypatch, source, tmp_path, seven):
    # As ccache does, this one looks at the name it is called by.
    check = 'test "${0##*/} $1" = "link -D=(3 + 4)" || { echo "error: $0 $1"; exit 1; }'
    compiler_script(tmp_path, monkeypatch, seven, check)
    (tmp_path / "link").symlink_to(tmp_path / "cxx")
    monkeypatch.setenv("CXX", f"'{tmp_path / 'link'}' '-D=(3 + 4)'")
    assert load(source).seven() == 7


def test_the_compiler_may_be_named_relative_to_where_one_is(monkeypatch, source, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "./cxx")
    monkeypatch.setenv("QLLM_CACHE", ".")
    assert load(source).seven() == 7
    assert libraries()[0].resolve().parent == tmp_path


@pytest.mark.parametrize("check", ['test -z "$LD_PRELOAD"', 'test "$TMPDIR" -ef .'])
def test_the_environment_of_the_compiler(monkeypatch, source, tmp_path, seven, check):
    """Without what is preloaded for us; its temporary files are in the cache."""
    compiler_script(tmp_path, monkeypatch, seven, f"{check} || exit 1")
    monkeypatch.setenv("LD_PRELOAD", "libm.so.6")
    assert load(source).seven() == 7


# The OpenMP library.


TEAM = f"""
#include <omp.h>
{EXPORT} int team() {{
    int threads = 0;
    #pragma omp parallel
    #pragma omp single
    threads = omp_get_num_threads();
    return threads;
}}
"""


def test_the_kernels_have_torch_s_openmp(real_compiler, tmp_path):
    program = """
import ctypes, torch
def mapped():
    text = Path("/proc/self/maps").read_text()
    return {line.split(maxsplit=5)[5] for line in text.splitlines() if "libgomp" in line}
before = mapped()
library = build.load(Path(sys.argv[1]))
assert len(before) == 1 and mapped() == before, (before, mapped())
assert b"libgomp" not in Path(library._name).read_bytes()  # it would ask for the system's
for threads in (1, 3, 2):
    torch.set_num_threads(threads)
    assert library.team() == threads
# A library that another package brings changes nothing.
ctypes.CDLL(sys.argv[2])
assert mapped() > before
assert {build._openmp_of_torch()} == before
"""
    mapped = Path("/proc/self/maps").read_text().splitlines()
    libgomp = next((line.split(maxsplit=5)[5] for line in mapped if "libgomp" in line), None)
    if libgomp is None:
        pytest.skip("torch is built without libgomp")
    copy = shutil.copy(libgomp, tmp_path / "libgomp-1234.so.1")
    output(python(program, folder_of(tmp_path / "src", {"a.cpp": TEAM}), copy))


def test_without_openmp_in_torch_the_system_s_serves(monkeypatch, real_compiler, tmp_path):
    monkeypatch.setattr(build, "_openmp_of_torch", lambda: None)
    source = folder_of(tmp_path / "src", {"a.cpp": TEAM})
    assert load(source).team() == torch.get_num_threads()
    monkeypatch.setattr(build, "SYSTEM_OPENMP", "libgomp-none.so.1")
    message = refusal(source)
    assert "no OpenMP library" in message and "libgomp-none.so.1" in message


@pytest.mark.parametrize("mode", [0o777, 0o757])
@pytest.mark.parametrize("what", ["library", "cache", "above"])
def test_what_others_can_write_is_not_loaded(source, own_cache, what, mode):
    load(source)
    (library,) = libraries()
    assert library.stat().st_mode & 0o777 == 0o755
    path = {"library": library, "cache": own_cache, "above": own_cache.parent}[what]
    path.chmod(mode)
    message = refusal(source)
    assert str(path) in message and f"mode {mode:o}" in message and "set QLLM_CACHE" in message
    assert ("delete it" in message) == (what == "library")
