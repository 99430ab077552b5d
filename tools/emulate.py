"""Run tests on every path of the CPU kernels on a machine that has AVX2 alone.

    python3 -m tools.emulate
    python3 -m tools.emulate --folder DIR tests/ops/cpu -k "fences or kernels" -n 2

copies the tree, as git knows it, into a temporary folder, or into DIR; changes the copy so that
AVX-512, its VNNI and BF16, AVX-VNNI and AMX are AVX2 and loops (tools/emulated/), and are believed
to be there; compiles the kernels, which takes one core some ten minutes, for which DIR keeps them;
and runs pytest there, of tests/ops/cpu, tests/layers and tests/test_invariance.py, or of what is
given. All but --folder goes to pytest, whose status is that of this. Tests that cannot pass here
are left out, each with the reason.

On a machine with these instructions the tests run them by themselves: `python3 -m pytest`. One with
AVX-512 runs the very code for AMX that users have, by tests/trapped_tiles.cpp. What passes here has
run neither. The emulation can be wrong in what it says of the hardware:

- VDPBF16PS adds the odd product of a pair first, TDPBF16PS even and odd ones by themselves, each
  fused; both round to nearest and take what is subnormal for zero, whatever MXCSR says; conversion
  to bfloat16 takes it for zero, too. The tests' arithmetic has it from the same manual, Intel's.
- Whether a number that rounding makes normal counts as subnormal, and which NaN is the result.
- In which order the lanes of a vector are summed up: in that of GCC's header.
- VPDPBUSD, VPDPWSSD, TDPBSSD and TDPBSUD wrap; none saturates.
- Of what raises an exception, only vectors that are not aligned, and tiles that do not fit, end the
  process. Masked lanes are neither read nor written.

It does not cover time, nor what compilers make of these instruction sets: the registers that they
run out of, what they vectorize with AVX-512 by themselves, and the operands of the assembly that is
replaced. The choice of a path, by what processor and system say, is replaced as well.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from qllm import cli
from qllm.errors import UserError
from qllm.ops.cpu import paths

ROOT = Path(__file__).resolve().parent.parent
HEADERS = Path(__file__).parent / "emulated"
KERNELS = "qllm/ops/cpu"
SOURCE = f"{KERNELS}/src"
CPUINFO = f"{KERNELS}/cpuinfo"  # what the copy reads in the place of the system's
TESTS = ("tests/ops/cpu", "tests/layers", "tests/test_invariance.py")
# By their names: tests that cannot pass in a copy that is emulated, and why.
LEFT_OUT = {
    "tests/ops/cpu/test_build.py::test_a_unit_has_the_instructions_of_its_name": (
        "what is emulated is compiled for AVX2"
    ),
    "tests/ops/cpu/test_paths.py::test_the_machine_s_features_are_those_the_system_names": (
        "the machine has fewer than the emulation"
    ),
    "tests/ops/cpu/test_threads.py::test_in_a_process[at_rest-environment3]": (
        "products that are emulated take longer than the waiting that is measured"
    ),
}
BUILD = """
import sys
from qllm.ops.cpu import build, library
try:
    library.library()
except build.Unavailable as error:
    sys.exit(f"error: {error}")
"""


class Change(NamedTuple):
    """A text of a source file, wherever it stands there, and what replaces it."""

    path: str
    old: str
    new: str


def _in_assembly(path: str, name: str, a: str, b: str, register: str, prefix: str = "") -> Change:
    """An instruction that adds a product to `sum`."""
    operands = f'"+{register}"(sum) : "{register}"({a}), "{register}"({b})'
    old = f'__asm__("{prefix}{name} %2, %1, %0" : {operands});'
    return Change(path, old, f"sum = emulated::{name}(sum, {a}, {b});")


AVX512, AVX2 = f"{SOURCE}/isa_avx512.h", f"{SOURCE}/isa_avx2.h"
INCLUDE = ("#include <immintrin.h>", '#include "emulated_avx512.h"')
# Behind the table of flags. With -O3 compiling takes longer, and nobody waits for the kernels. That
# vectors may alias is lost where the emulation has them as arguments of templates.
FLAGS = """
def _emulated(flags: tuple[str, ...]) -> tuple[str, ...]:
    absent = [flag for flag in flags if flag.startswith(("-mavx512", "-mavxvnni", "-mamx"))]
    names = (flag[2:].upper().replace("-", "_") for flag in absent)
    options = (*_AVX2, "-O2", "-fno-strict-aliasing")
    return (*options, *(f"-DEMULATED_{name}" for name in names)) if absent else flags


FLAGS = {unit: _emulated(flags) for unit, flags in FLAGS.items()}
FLAGS["dispatch"] = ("-DQLLM_TRAPPED_AMX",)  # tiles are there, whatever the processor says
"""
CHANGES = (
    Change(f"{SOURCE}/isa.h", "defined(__AVX512F__)", "defined(EMULATED_AVX512F)"),
    Change(AVX512, *INCLUDE),
    Change(AVX512, "defined(__AVX512BF16__)", "defined(EMULATED_AVX512BF16)"),
    Change(AVX512, '#define REGISTER "v"', '#define REGISTER "m"'),
    Change(AVX512, "_mm512_", "emulated::"),
    Change(AVX512, "_mm256_mask", "emulated::mask"),
    _in_assembly(AVX512, "vpdpbusd", "w", "x", "v"),
    _in_assembly(AVX512, "vpdpwssd", "w", "x", "v"),
    _in_assembly(AVX512, "vfmadd231ps", "a", "b", "v"),
    _in_assembly(AVX512, "vdpbf16ps", "a", "b", "v"),
    Change(f"{SOURCE}/tile_amx.h", "_mm512_", "emulated::"),
    Change(AVX2, *INCLUDE),
    Change(AVX2, "defined(__AVXVNNI__)", "defined(EMULATED_AVXVNNI)"),
    _in_assembly(AVX2, "vpdpbusd", "w", "x", "x", prefix="%{vex%} "),
    Change(
        f"{SOURCE}/dispatch.cpp",
        "int64_t found = AVX2;",
        "int64_t found = AVX2 | AVX_VNNI | BF16;",
    ),
    Change(
        f"{SOURCE}/dispatch.cpp",
        "if ((state & 0xE6) != 0xE6 || (b7 & wide) != wide || !(c7 & vnni)) return found;",
        "(void)(wide | vnni | c7);",
    ),
    Change(f"{KERNELS}/paths.py", '"/proc/cpuinfo"', f'__file__).with_name("{Path(CPUINFO).name}"'),
    Change(f"{KERNELS}/build.py", "\n# Not -fopenmp:", f"{FLAGS}\n# Not -fopenmp:"),
    Change(f"{KERNELS}/build.py", "TIMEOUT = 300.0", "TIMEOUT = 3600.0"),
)


def patch(tree: Path) -> None:
    """Change the copy of a tree so that the instructions are emulated.

    Raises:
        UserError: what is to be replaced is not there.
    """
    for path, old, new in CHANGES:
        text = (tree / path).read_text(encoding="utf-8")
        if old not in text:
            raise UserError(f"{path} no longer has {old!r}; change CHANGES in tools/emulate.py")
        (tree / path).write_text(text.replace(old, new), encoding="utf-8")
    for header in HEADERS.glob("*.h"):
        shutil.copy(header, tree / SOURCE)
    has = " ".join(sorted(frozenset().union(*(isa.flags for isa in paths.PATHS.values()))))
    text = paths.CPUINFO.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"^(flags\s*:.*)$", rf"\1 {has}", text, flags=re.MULTILINE)
    (tree / CPUINFO).write_text(text, encoding="utf-8")


def copy(tree: Path) -> None:
    """Copy all files that git knows, or would add, in the place of an earlier copy.

    Raises:
        UserError: there is something else in that place, or this is no clone.
    """
    if tree.exists():
        if not (tree / CPUINFO).exists():
            raise UserError(f"{tree} is no copy that this made; choose another --folder")
        shutil.rmtree(tree)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise UserError(f"git lists no files of {ROOT}; run this in a clone") from None
    (tree / CPUINFO).parent.mkdir(parents=True)
    (tree / CPUINFO).touch()  # by which the next one knows this, even if it ends here
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # not one that was deleted
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)


def main() -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for the copy and its kernels")
    args, chosen = parser.parse_known_args()
    if "avx2" not in paths.available():
        raise UserError("this machine lacks AVX2, by which the others are emulated")
    if not any((ROOT / argument.partition("::")[0]).exists() for argument in chosen):
        chosen += TESTS
    with ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tree = folder.absolute() / "tree"
        copy(tree)
        patch(tree)
        environment = {
            **os.environ,
            "QLLM_CACHE": str(tree.with_name("cache")),
            "QLLM_CPU_PATH": ",".join(paths.PATHS),
        }
        environment.pop("PYTHONPATH", None)  # the tree's own qllm

        def run(*arguments: str) -> int:
            command = [sys.executable, *arguments]
            return subprocess.run(command, cwd=tree, env=environment, check=False).returncode

        cli.note("the kernels of all paths are compiled in some ten minutes, unless they are kept")
        if status := run("-c", BUILD):
            return status
        for test, reason in LEFT_OUT.items():
            cli.note(f"left out: {test} ({reason})")
        out = [f"--deselect={test}" for test in LEFT_OUT]
        return run("-m", "pytest", *out, *chosen)


if __name__ == "__main__":
    cli.run(main)
