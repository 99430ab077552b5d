"""Limits of control groups, in made-up roots: versions 1 and 2, both, nested, containers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from qllm import cgroups, memory

V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory"
V1_CPU = "36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
NO_LIMIT = "9223372036854771712"


def system(root: Path, groups: str, mounts: list[str], files: dict[str, str]) -> Path:
    """/proc and the mounted groups as this process sees them."""
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    files |= {"proc/self/cgroup": groups, "proc/self/mountinfo": "\n".join(mounts) + "\n"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(group: str, limit: str, used: int = 0, cached: int = 0) -> dict[str, str]:
    stat = f"anon 1\nfile {used}\ninactive_file {cached // 4}\nactive_file {cached - cached // 4}"
    values = {"max": limit, "current": str(used), "stat": stat}
    return {f"{group}memory.{name}": text for name, text in values.items()}


def v1(group: str, limit: str, used: int = 0, cached: int = 0) -> dict[str, str]:
    stat = f"cache 7\ninactive_file 7\ntotal_inactive_file {cached}\ntotal_active_file 0"
    values = {"limit_in_bytes": limit, "usage_in_bytes": str(used), "stat": stat}
    return {f"memory/{group}memory.{name}": text for name, text in values.items()}


NESTED = "0::/user.slice/run.scope"
MEMORY = {
    "no groups": ("9:name=systemd:/", [], {}, None),
    "no limit": (NESTED, [V2], v2("user.slice/run.scope/", "max", 3000), None),
    "the group's own": (NESTED, [V2], v2("user.slice/run.scope/", "5000", 3000, 800), 2800),
    "of one above": (
        NESTED,
        [V2],
        v2("user.slice/run.scope/", "5000", 100) | v2("user.slice/", "4000", 3500, 100),
        600,
    ),
    # Inside a container's own namespace its group is the root, and has a limit.
    "a container": ("0::/", [V2], v2("", "5000", 1000), 4000),
    "a group that is not there": ("0::/../elsewhere", [V2], v2("", "5000", 1000), 4000),
    "version 1": (
        "4:memory:/a b\n1:cpu,cpuacct:/x\n0::/",
        ["30 23 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw", V1_CPU, V1_MEMORY],
        v1("a b/", "5000", 3000, 800) | v1("", NO_LIMIT, 9000),
        2800,
    ),
    # A container of docker without a namespace sees its group as the whole mount.
    "a mounted group": (
        "4:memory:/docker/c1/below",
        [V1_MEMORY.replace(" / ", " /docker/c1 ")],
        v1("below/", NO_LIMIT, 500) | v1("", "700", 500),
        200,
    ),
    "both versions": (
        "4:memory:/a\n0::/b",
        [V2.replace("cgroup rw", "cgroup/unified rw"), V1_MEMORY],
        v1("a/", "900", 100) | v2("unified/b/", "5000"),
        800,
    ),
    "a space": (
        "0::/b",
        [V2.replace("/cgroup rw", r"/cgroup/my\040groups rw")],
        v2("my groups/b/", "70", 20),
        50,
    ),
    "more than allowed": ("0::/", [V2], v2("", "5000", 6000, 10), -990),
}


@pytest.mark.parametrize(("groups", "mounts", "files", "expected"), MEMORY.values(), ids=MEMORY)
def test_memory(groups, mounts, files, expected, tmp_path, monkeypatch):
    import psutil

    class Machine:
        available = 3900

    monkeypatch.setattr(cgroups, "ROOT", system(tmp_path, groups, mounts, files))
    assert cgroups.available_memory() == expected
    monkeypatch.setattr(psutil, "virtual_memory", Machine)
    assert memory.available_bytes() == max(0, min(3900, 3900 if expected is None else expected))


def quota(text: str) -> dict[str, str]:
    names = ("cpu,cpuacct/x/cpu.cfs_quota_us", "cpu,cpuacct/x/cpu.cfs_period_us")
    return dict(zip(names, text.split(), strict=True))


CPUS = {
    "no groups": ("9:name=systemd:/", [], {}, 8),
    "half a processor more": ("0::/a", [V2], {"a/cpu.max": "150000 100000"}, 2),
    "none": ("0::/a", [V2], {"a/cpu.max": "max 100000"}, 8),
    "less than one": ("0::/a", [V2], {"a/cpu.max": "1000 100000"}, 1),
    "more than there are": ("0::/a", [V2], {"a/cpu.max": "6400000 100000"}, 8),
    "of one above": (
        "0::/a/b",
        [V2],
        {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"},
        3,
    ),
    "version 1": ("1:cpu,cpuacct:/x", [V1_CPU], quota("150000 100000"), 2),
    "version 1, none": ("1:cpu,cpuacct:/x", [V1_CPU], quota("-1 100000"), 8),
}


@pytest.mark.parametrize(("groups", "mounts", "files", "expected"), CPUS.values(), ids=CPUS)
def test_processors(groups, mounts, files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(cgroups, "ROOT", system(tmp_path, groups, mounts, files))
    assert cgroups.usable_cpus() == expected
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cgroups.limit_threads()
    assert os.environ.pop("OMP_NUM_THREADS", "8") == str(expected)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    cgroups.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine():
    assert memory.available_bytes() > 0
    assert 1 <= cgroups.usable_cpus() <= len(os.sched_getaffinity(0))
