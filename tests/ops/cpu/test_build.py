"""The loader of the C++ kernels, with real folders, processes and signals.

The compiler is a script that hands out a library made before, where what it makes does not matter.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from qllm.ops.cpu import build
from qllm.ops.cpu.build import Unavailable

EXPORT = 'extern "C" __attribute__((visibility("default")))'
SEVEN = f"{EXPORT} int seven() {{ return 7; }}\n"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, build.COMPILERS)),
    reason="compiles C++ on Linux",
)


@pytest.fixture(scope="module")
def seven(tmp_path_factory) -> Path:
    """A library, as `SEVEN` becomes one."""
    folder = tmp_path_factory.mktemp("seven")
    (folder / "a.cpp").write_text(SEVEN)
    (compiler, *_) = filter(None, map(shutil.which, build.COMPILERS))
    command = [compiler, *build.LINK, "-fPIC", "a.cpp", "-o", build.LIBRARY]
    subprocess.run(command, cwd=folder, check=True)
    return folder / build.LIBRARY


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path, seven) -> Path:
    """An empty cache, and a compiler that makes what `seven` is."""
    for name in ("QLLM_CXXFLAGS", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    compiler_script(tmp_path, monkeypatch, seven, "")
    folder = tmp_path / "cache"
    monkeypatch.setenv("QLLM_CACHE", str(folder))
    return folder


@pytest.fixture
def real_compiler(monkeypatch) -> None:
    """The compiler of this machine."""
    monkeypatch.delenv("CXX")


@pytest.fixture
def source(tmp_path) -> Path:
    """A source folder of one unit, a.cpp."""
    return folder_of(tmp_path / "src", {"a.cpp": SEVEN})


def folder_of(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def load(source: Path) -> ctypes.CDLL:
    """As if for the first time in this process."""
    return build.load.__wrapped__(source)


def compiler_script(
    tmp_path: Path, monkeypatch, seven: Path, before: str, name: str = "cxx"
) -> Path:
    """A compiler which is $CXX, and does something before it makes a copy of `seven`.

    Its variable $unit is the file compiled, or library.so; `work` is a folder of its own.
    """
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    script = tmp_path / name
    script.write_text(
        f"#!/bin/sh\nwork='{work}'\n"
        'case "$*" in *--version) echo 1; exit;; esac\n'
        'case "$*" in *" -c "*) unit=${*##* -c }; unit=${unit%% *};; *) unit=library.so;; esac\n'
        f"{before}\nfor last; do :; done\ncp '{seven}' \"$last\"\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return work


def refusal(source: Path) -> str:
    """Why there are no kernels: one line; and nothing half-made is left."""
    with pytest.raises(Unavailable) as caught:
        load(source)
    message = str(caught.value)
    assert message and "\n" not in message and "Traceback" not in message
    assert temporary_folders() == []
    return message


def temporary_folders() -> list[Path]:
    return list(Path(os.environ["QLLM_CACHE"]).glob(f"{build.TEMPORARY}*"))


def libraries() -> list[Path]:
    return sorted(Path(os.environ["QLLM_CACHE"]).glob("*.so"))


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def wait_for(path: Path) -> str:
    """The first line of a file that another process writes."""
    until(lambda: path.exists() and path.read_text().endswith("\n"))
    return path.read_text().strip()


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def python(program: str, *args: object, wrapped_in: tuple[str, ...] = ()) -> subprocess.Popen:
    """A fresh Python that has the loader, and starts with `from pathlib import Path`."""
    start = "import os, signal, sys\nfrom pathlib import Path\nfrom qllm.ops.cpu import build\n"
    # In a shell's background, where the tests may run, Ctrl-C is ignored.
    start += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen(
        [*wrapped_in, sys.executable, "-c", start + program, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen) -> str:
    """What it printed, and that it ended well."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out


# What is compiled, and how.


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
    running, most = 0, 0
    for line in lines(work / "log"):
        running += 1 if line == "+" else -1
        most = max(most, running)
    assert most == min(len(files), build.cgroups.usable_cpus())


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


# The cache.


def test_a_library_is_compiled_once(monkeypatch, source, tmp_path, own_cache, seven, capsys):
    work = compiler_script(tmp_path, monkeypatch, seven, 'echo "$unit" >> "$work/log"')
    monkeypatch.setenv("QLLM_CACHE", str(own_cache / "deep"))
    for _ in range(2):
        assert load(source).seven() == 7
    assert lines(work / "log") == ["a.cpp", "library.so"]
    assert (own_cache / "deep").stat().st_mode & 0o777 == 0o700
    assert [path.suffix for path in sorted((own_cache / "deep").iterdir())] == [".so", ".lock"]
    captured = capsys.readouterr()
    first, last = captured.err.splitlines()
    assert first == "note: compiling the CPU kernels (once, about 20 s) ..."
    assert re.fullmatch(r"note: the CPU kernels are compiled, in \d+ s", last)
    assert captured.out == ""
    assert build.load(source) is build.load(source)


def test_what_changes_a_library_changes_its_name(monkeypatch, source, tmp_path):
    known = {build._recipe(source).key}

    def assert_new() -> None:
        key = build._recipe(source).key
        assert len(key) == 16 and key not in known
        known.add(key)

    (source / "a.cpp").write_text(SEVEN + "\n")
    assert_new()
    (source / "a.h").touch()
    assert_new()
    (source / "a.h").write_text("\n")
    assert_new()
    (source / "a.h").rename(source / "b.h")
    assert_new()
    (source / "a.cpp").rename(source / "b.cpp")
    assert_new()
    monkeypatch.setitem(build.FLAGS, "b", ("-g",))
    assert_new()
    for name in ("COMMON", "LINK"):
        monkeypatch.setattr(build, name, (*getattr(build, name), "-g"))
        assert_new()
    monkeypatch.setenv("QLLM_CXXFLAGS", "-O1")
    assert_new()
    monkeypatch.setenv("CXX", f"{tmp_path / 'cxx'} -O1")
    assert_new()
    script = (tmp_path / "cxx").read_text()
    (tmp_path / "cxx").write_text(script.replace("--version) ", "--version) echo 99;"))
    assert_new()
    (tmp_path / "cxx").rename(tmp_path / "other")
    (tmp_path / "cxx").symlink_to(tmp_path / "other")
    assert_new()
    recipe = build._recipe(source)
    assert replace(recipe, machine="other").key not in known

    (source / "notes.txt").touch()
    assert build._recipe(source) == recipe


def test_a_source_that_is_edited_meanwhile_waits_for_its_turn(monkeypatch, source, tmp_path):
    script = (tmp_path / "cxx").read_text()
    edits = f"--version) echo new > '{source}/a.cpp';"  # after it was read for the hash
    (tmp_path / "cxx").write_text(script.replace("--version)", edits))
    keep = f'test "$unit" != a.cpp || cp a.cpp "{tmp_path}/compiled"\n'
    (tmp_path / "cxx").write_text(
        (tmp_path / "cxx").read_text().replace("for last", keep + "for last")
    )
    load(source)
    assert (source / "a.cpp").read_text() == "new\n"
    assert (tmp_path / "compiled").read_text() == SEVEN


def damaged(content: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "cut short": content[: len(content) // 2],
        "overwritten": content[:64] + bytes(len(content[64:])),
    }


@pytest.mark.parametrize("kind", damaged(b""))
def test_a_damaged_library_is_made_anew(monkeypatch, source, tmp_path, kind, seven):
    work = compiler_script(tmp_path, monkeypatch, seven, 'echo "$unit" >> "$work/log"')
    load(source)
    (library,) = libraries()
    # In a folder of its own: this process has the first one in use.
    monkeypatch.setenv("QLLM_CACHE", str(tmp_path / "second"))
    (tmp_path / "second").mkdir()
    copy = tmp_path / "second" / library.name
    copy.write_bytes(damaged(library.read_bytes())[kind])
    copy.chmod(0o755)
    for _ in range(2):
        assert load(source).seven() == 7
    assert lines(work / "log") == ["a.cpp", "library.so"] * 2


def test_a_library_that_never_loads_is_made_once(monkeypatch, source, tmp_path, seven):
    seven = tmp_path / "seven.so"
    seven.write_bytes(b"none")
    work = compiler_script(tmp_path, monkeypatch, seven, 'echo "$unit" >> "$work/log"')
    for _ in range(2):
        assert "do not load" in refusal(source)
    assert lines(work / "log") == ["a.cpp", "library.so"]


def test_what_is_loaded_is_what_was_checked(monkeypatch, source, tmp_path):
    """Even if another library takes its place as soon as it was read."""
    load(source)
    (library,) = libraries()
    content, make = library.read_bytes(), os.memfd_create

    def swapped(name: str) -> int:
        (tmp_path / "other").write_bytes(b"somebody else's")
        (tmp_path / "other").replace(library)
        return make(name)

    monkeypatch.setattr(os, "memfd_create", swapped)
    loaded = load(source)
    assert (loaded.seven(), library.read_bytes()) == (7, b"somebody else's")
    assert Path(loaded._name).read_bytes() == content


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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["library", "cache"])
def test_what_another_user_owns_is_not_loaded(source, own_cache, what):
    load(source)
    os.chown(libraries()[0] if what == "library" else own_cache, 12345, -1)
    assert "owner 12345" in refusal(source)


def test_a_pipe_in_place_of_a_library(source):
    load(source)
    (library,) = libraries()
    library.unlink()
    os.mkfifo(library, 0o600)
    assert "delete it" in refusal(source)


def test_libraries_are_one_s_own_whatever_the_umask(source):
    before = os.umask(0)
    try:
        load(source)
    finally:
        os.umask(before)
    assert load(source).seven() == 7
    assert Path(os.environ["QLLM_CACHE"]).stat().st_mode & 0o777 == 0o700


# Several processes, and those that are killed.


def test_of_many_processes_one_compiles(monkeypatch, source, tmp_path, seven):
    work = compiler_script(
        tmp_path,
        monkeypatch,
        seven,
        'echo "$unit" >> "$work/log"; test "$unit" = library.so || sleep 0.3',
    )
    program = """
children = []
for _ in range(6):
    children.append(os.fork())
    if not children[-1]:
        try:
            os._exit(build.load(Path(sys.argv[1])).seven())
        finally:
            os._exit(1)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
    process = python(program, source)
    assert output(process) == f"{[7] * 6}\n"
    assert lines(work / "log") == ["a.cpp", "library.so"]
    assert temporary_folders() == [] and len(libraries()) == 1


# The first compiler to run says its process and hangs, and so does a child of its own.
HANG_ONCE = """
if mkdir "$work/once" 2> "$work/errors"; then
    sleep 600 &
    echo "$$ $!" > "$work/pids"
    wait
fi
"""


def stopped_while_compiling(source: Path, work: Path, number: int) -> tuple[int, str, list[int]]:
    """Send a signal to a process that compiles: its status and errors, the compiler's pids."""
    process = python("build.load(Path(sys.argv[1]))", source)
    pids = [int(pid) for pid in wait_for(work / "pids").split()]
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error, pids


def test_a_process_killed_while_it_compiles_is_no_trouble(monkeypatch, source, tmp_path, seven):
    work = compiler_script(tmp_path, monkeypatch, seven, HANG_ONCE)
    status, _, pids = stopped_while_compiling(source, work, signal.SIGKILL)
    os.killpg(pids[0], signal.SIGKILL)  # nobody else can end the compiler now
    assert status == -signal.SIGKILL
    (left,) = temporary_folders()
    assert load(source).seven() == 7
    assert temporary_folders() == [left]  # for all we know, someone still works in it

    (source / "a.cpp").write_text(SEVEN + "\n")
    old = time.time() - build.STALE_SECONDS
    os.utime(left, (old + 60, old + 60))
    load(source)
    assert temporary_folders() == [left]

    (source / "a.cpp").write_text(SEVEN + "\n\n")
    os.utime(left, (old - 60, old - 60))
    load(source)
    assert temporary_folders() == []


def test_ctrl_c_leaves_no_folder_and_no_process(monkeypatch, source, tmp_path, seven):
    work = compiler_script(tmp_path, monkeypatch, seven, HANG_ONCE)
    status, error, pids = stopped_while_compiling(source, work, signal.SIGINT)
    assert status == -signal.SIGINT and "KeyboardInterrupt" in error
    assert temporary_folders() == [] and libraries() == []
    until(lambda: all(map(is_gone, pids)))


def test_without_locks_it_compiles_all_the_same(source, own_cache):
    (own_cache / build.LOCK).mkdir(parents=True)
    assert load(source).seven() == 7


def test_a_lock_that_is_never_given_back_holds_up_nobody_for_ever(monkeypatch, source, own_cache):
    import fcntl

    own_cache.mkdir()
    monkeypatch.setattr(build, "LOCK_SECONDS", 0.2)
    with (own_cache / build.LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert load(source).seven() == 7


# What cannot work.


def test_other_machines(monkeypatch, source):
    with monkeypatch.context() as patch:
        patch.setattr(build.platform, "machine", lambda: "aarch64")
        assert "x86-64 Linux; this is aarch64 Linux" in refusal(source)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    assert "this is x86_64 Darwin" in refusal(source)


def test_no_sources(tmp_path):
    assert str(tmp_path / "none") in refusal(tmp_path / "none")
    assert "*.cpp" in refusal(folder_of(tmp_path / "src", {"a.h": ""}))


def test_no_compiler(monkeypatch, source, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert "CXX=no-such-compiler not found" in refusal(source)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX")
    message = refusal(source)
    assert "g++, c++, clang++ not found" in message and "install g++" in message


def test_the_first_compiler_there_is_serves(monkeypatch, source, tmp_path):
    (tmp_path / "cxx").rename(tmp_path / "clang++")
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere")
    monkeypatch.setenv("CXX", " ")
    assert build._compiler() == [str(tmp_path / "clang++")]
    for name in ("c++", "g++"):
        shutil.copy(tmp_path / "clang++", tmp_path / name)
        assert build._compiler() == [str(tmp_path / name)]


@pytest.mark.parametrize("variable", ["CXX", "QLLM_CXXFLAGS"])
def test_a_variable_that_is_no_list_of_words(monkeypatch, source, variable):
    monkeypatch.setenv(variable, "g++ '")
    assert variable in refusal(source)


def test_a_mistake_in_a_source(real_compiler, source):
    (source / "a.cpp").write_text("int on_error() {\n#warning look out\nreturn nothing;\n}\n")
    message = refusal(source)
    assert "a.cpp:3:8: error: " in message and "nothing" in message and "another comp" in message


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("#!/bin/sh\nexit 3\n", "status 3"),
        ("#!/bin/sh\nkill -9 $$\n", "status -9"),
        (
            "#!/bin/sh\necho first; echo strange; echo 'collect2: error: ld' >&2; exit 1\n",
            "strange",
        ),
        ("#!/bin/sh\necho one; echo 'as: Fatal error: two'; echo three; exit 1\n", "error: two"),
        (
            "#!/bin/sh\ntest $# = 1 || { echo 'error: No space left on device'; exit 1; }\n",
            "cannot be kept",
        ),
        ("#!/bin/sh\n", "makes no library"),
        ("#!/no/such/interpreter\n", "does not run (No such file"),
        ("no script", "does not run (Exec format error)"),
    ],
)
def test_a_compiler_that_fails(monkeypatch, source, tmp_path, script, words):
    path = tmp_path / "cxx"
    path.write_text(script)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    message = refusal(source)
    assert words in message and (str(path) in message) == (words != "cannot be kept")
    assert ("another compiler" in message) == (words != "cannot be kept")


def test_a_compiler_that_hangs(monkeypatch, source, tmp_path, seven):
    work = compiler_script(tmp_path, monkeypatch, seven, HANG_ONCE)
    monkeypatch.setattr(build, "TIMEOUT", 1.0)
    assert "cxx hangs (1 s)" in refusal(source)
    pids = wait_for(work / "pids").split()
    until(lambda: all(is_gone(int(pid)) for pid in pids))


def test_one_unit_that_fails_ends_the_others(monkeypatch, tmp_path, seven):
    hang = "case $unit in a.cpp) exit 1;; b.cpp) sleep 600 & wait;; esac"
    compiler_script(tmp_path, monkeypatch, seven, hang)
    start = time.monotonic()
    refusal(folder_of(tmp_path / "src", {"a.cpp": "", "b.cpp": ""}))
    assert time.monotonic() - start < 60


def test_a_folder_for_temporary_files_serves_where_there_is_no_home(monkeypatch, source, capsys):
    folders = build.folders
    monkeypatch.delenv("QLLM_CACHE")
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(source.parent))
    assert load(source).seven() == 7
    note, *_ = capsys.readouterr().err.splitlines()
    assert f"kept in {folders.temporary()}" in note and "/proc/none" in note
    assert "set QLLM_CACHE" in note
    assert folders.temporary().stat().st_mode & 0o777 == 0o700
    assert load(source).seven() == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_cache_that_is_a_file(monkeypatch, source, tmp_path, below):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QLLM_CACHE", str(tmp_path / "file" / below))
    message = refusal(source)
    assert f"{tmp_path}/file" in message and "set QLLM_CACHE" in message


def test_a_cache_that_cannot_be_created(monkeypatch, source):
    monkeypatch.setenv("QLLM_CACHE", "/proc/qllm")
    assert "/proc/qllm" in refusal(source)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_the_right_to_write(source, own_cache):
    own_cache.mkdir(mode=0o555)
    assert "Permission denied" in refusal(source)


def test_a_disk_that_is_full_and_one_that_is_read_only(source, tmp_path):
    # A disk of this test's own, of 16 KB at first: even root cannot write what does not fit. Nor
    # does it run anything from there, which keeps nobody from loading what it holds.
    program = f"""
import subprocess
def mount(options):
    command = ["mount", "-t", "tmpfs", "-o", options, "none", sys.argv[2]]
    if subprocess.run(command, check=False).returncode:
        sys.exit(77)
def refusal(source):
    try:
        build.load.__wrapped__(source)
    except build.Unavailable as error:
        return str(error)
source, disk = map(Path, sys.argv[1:])
mount("size=16k,noexec")
os.environ["QLLM_CACHE"] = str(disk)
print(refusal(source))
print([path.name for path in disk.iterdir()])
mount("remount,noexec,size=10m")
assert build.load.__wrapped__(source).seven() == 7
mount("remount,noexec,ro")
assert build.load.__wrapped__(source).seven() == 7
(source / "a.cpp").write_text({SEVEN + "//"!r})
print(refusal(source))
"""
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = ("unshare", "--mount", *(["--map-root-user"] if os.geteuid() else []))
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("no right to mount a disk")
    process = python(program, source, disk, wrapped_in=unshare)
    out, error = process.communicate(timeout=120)
    if process.returncode == 77:
        pytest.skip("no right to mount a disk")
    assert process.returncode == 0, error
    full, left, read_only = out.splitlines()
    assert "No space left on device" in full and "set QLLM_CACHE" in full
    assert left == str([build.LOCK])
    assert "Read-only file system" in read_only and str(disk) in read_only
