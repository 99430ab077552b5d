"""The paths of the kernels: what each is built on, wants of a machine, and is compiled from."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qllm.errors import UserError

VARIABLE = "QLLM_CPU_PATH"
TRAPPED = "-DQLLM_TRAPPED_AMX"  # tests carry out what this machine refuses of AMX
CPUINFO = Path("/proc/cpuinfo")
CPUINFO_BYTES = 1 << 14  # of one processor's entry; a machine may have hundreds, slow to list


@dataclass(frozen=True)
class Isa:
    """A path's instruction set.

    Attributes:
        about: its name, in words.
        flags: what /proc/cpuinfo says of a machine that has it.
        units: the stems of the source files of the path, and of what it builds on.
    """

    about: str
    flags: frozenset[str]
    units: tuple[str, ...]


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
_BF16 = _AVX512 | {"avx512_bf16"}
_AMX = _BF16 | {"amx_tile", "amx_int8", "amx_bf16"}

_AVX512_UNITS = ("avx512", "avx512linear", "avx512halves")

# The best one first.
PATHS = {
    "amx": Isa("AMX int8 and bfloat16", _AMX, ("amx", "avx512bf16", *_AVX512_UNITS)),
    "avx512bf16": Isa("AVX-512 VNNI and BF16", _BF16, ("avx512bf16", *_AVX512_UNITS)),
    "avx512": Isa("AVX-512 VNNI", _AVX512, _AVX512_UNITS),
    "avxvnni": Isa("AVX-VNNI", _AVX2 | {"avx_vnni"}, ("avxvnni", "avxvnnilinear", "avxvnnihalves")),
    "avx2": Isa("AVX2", _AVX2, ("avx2", "avx2linear", "avx2halves", "avx2int8", "avx2int8halves")),
    "scalar": Isa("no vector instructions", frozenset(), ("scalar",)),
}


@cache
def _flags() -> frozenset[str] | None:
    """What the system says that this machine has; None where it says nothing."""
    try:
        with CPUINFO.open("rb", buffering=0) as file:
            text = file.read(CPUINFO_BYTES).decode(errors="replace")
    except OSError:
        return None
    found = re.search(r"^flags\s*:(.*)\n", text, re.MULTILINE)
    if not found:
        return None
    trapped = TRAPPED in os.environ.get("QLLM_CXXFLAGS", "")
    return frozenset(found[1].split()) | (_AMX - _BF16 if trapped else frozenset())


def available() -> tuple[str, ...]:
    """The paths that this machine has by /proc/cpuinfo, the best one first; all without it."""
    flags = _flags()
    return tuple(name for name, isa in PATHS.items() if flags is None or isa.flags <= flags)


def wanted() -> tuple[str, ...]:
    """The paths to compile, and to take the first of that works: those of QLLM_CPU_PATH, or this
    machine's best with those that it builds on.

    Raises:
        UserError: for a path that is unknown, or that this machine lacks.
    """
    known = available()
    if value := os.environ.get(VARIABLE):
        names = tuple(value.split(","))
        if not set(names) <= set(PATHS) or not set(names) & set(known):
            raise refusal(known)
        return tuple(name for name in names if name in known)
    if _flags() is None:
        return known  # of which the compiled library finds the best
    units = set(PATHS[known[0]].units)
    return tuple(name for name in known if units.issuperset(PATHS[name].units))


def omitted(names: tuple[str, ...]) -> frozenset[str]:
    """The source files' stems that belong to other paths alone."""
    needed = {unit for name in names for unit in PATHS[name].units}
    return frozenset(unit for isa in PATHS.values() for unit in isa.units) - needed


def refusal(known: tuple[str, ...]) -> UserError:
    """That QLLM_CPU_PATH names no path which runs here."""
    value = os.environ.get(VARIABLE)
    return UserError(f"{VARIABLE}={value!r} cannot run here; choose {', '.join(known)}")
