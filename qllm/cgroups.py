"""What the control groups that this process is in leave it: memory, and processor time.

Version 1 has a hierarchy of groups for each resource, version 2 one for all; a system may mount
both. A process's own group may have a limit, and so may each group above it: the least holds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Where /proc and /sys are.
ROOT = Path("/")
# Of the files of version 2 and of 1: the limit, what is used, and what of it are pages of files.
MEMORY = {
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
    1: (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


def available_memory() -> int | None:
    """Bytes that the groups still allow, what the system caches of files counted as free.

    Returns:
        None where no group has a limit.
    """
    found = []
    for version, group in _groups("memory"):
        limit, used, cached = MEMORY[version]
        with suppress(OSError, ValueError):  # "max"
            max_bytes = int((group / limit).read_text())
            lines = (group / "memory.stat").read_text().splitlines()
            numbers = dict(line.split(None, 1) for line in lines)
            files = sum(int(numbers.get(name, "0")) for name in cached)
            found.append(max_bytes - int((group / used).read_text()) + files)
    return min(found, default=None)


def usable_cpus() -> int:
    """Processors that this process may run on, and not more than the time it is given fills."""
    found = [float(len(os.sched_getaffinity(0)))]
    for version, group in _groups("cpu"):
        with suppress(OSError, ValueError):
            if version == 2:
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota = (group / "cpu.cfs_quota_us").read_text()
                period = (group / "cpu.cfs_period_us").read_text()
            if int(quota) > 0:  # -1 and "max": without limit
                found.append(int(quota) / int(period))
    return max(1, math.ceil(min(found)))


def limit_threads() -> None:
    """Let torch, not yet imported, start as many threads as there are processors for them.

    It counts the processors, of which a container may have the time of a few.
    """
    cpus = usable_cpus()
    if cpus < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(cpus))


def _groups(controller: str) -> Iterator[tuple[int, Path]]:
    """Version and folder of each group that holds this process: its own, and those above it."""
    try:
        groups = (ROOT / "proc/self/cgroup").read_text().splitlines()
        mounts = (ROOT / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not on Linux
        return
    # A hierarchy's number, its controllers (none: version 2), and the group in it.
    own = {}
    for line in groups:
        controllers, _, path = line.partition(":")[2].partition(":")
        if path and (controllers == "" or controller in controllers.split(",")):
            own[2 if controllers == "" else 1] = path
    for line in mounts:
        # "36 35 0:31 ROOT POINT OPTIONS … - TYPE SOURCE SUPER_OPTIONS"; a space is \040
        front, _, back = line.partition(" - ")
        fields, (kind, _, options) = front.split(), (*back.split(), "", "", "")[:3]
        if kind == "cgroup2":
            version = 2
        elif kind == "cgroup" and controller in options.split(","):
            version = 1
        else:
            continue
        if version not in own:
            continue
        top, point = (part.replace("\\040", " ") for part in fields[3:5])
        # What is mounted may be a group; one that this process is not below is its own then.
        relative = os.path.relpath(own[version], top)
        parts = [] if relative.startswith("..") or relative == "." else relative.split("/")
        mount = ROOT / point.lstrip("/")
        for length in range(len(parts), -1, -1):
            yield version, mount.joinpath(*parts[:length])
