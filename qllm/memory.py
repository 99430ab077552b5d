"""Devices: which one is meant, how much memory it has, and how much of that was used."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from qllm import cgroups
from qllm.errors import UserError
from qllm.launch import Launch


def resolve_device(name: str = "auto") -> str:
    """The device of a name, checked to be there: "cpu", "cuda", "cuda:1", or "auto".

    Raises:
        UserError: for one that is not there.
    """
    found = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if found else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"`device` {name!r} is unknown; give cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and (not found or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f"`device` {name}: this machine has {torch.cuda.device_count()} CUDA devices; give cpu"
        )
    return "cpu" if device.type == "cpu" else name


def local_device(name: str) -> str:
    """The same for one of several processes on a host, each of which takes a GPU of its own.

    Raises:
        UserError: there are more of them than GPUs.
    """
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    launch, count = Launch.of_environment(), torch.cuda.device_count()
    ranks = max(len(launch.here), launch.local + 1)
    if ranks > count:
        raise UserError(
            f"`device` {name}: {ranks} ranks on this machine take a GPU each, and it has {count}; "
            "give cpu, or start fewer"
        )
    name = f"cuda:{launch.local}"
    torch.cuda.set_device(name)
    return name


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be had on a device: the machine's, or this container's where fewer."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    available = psutil.virtual_memory().available
    allowed = cgroups.available_memory()
    return available if allowed is None else max(0, min(available, allowed))


def check_fits(
    needed: int,
    device: torch.device | str,
    what: str,
    advice: str = "take a smaller model or fewer bits",
) -> None:
    """Refuse what does not fit.

    Raises:
        UserError: with both numbers, where `needed` bytes are more than there are.
    """
    available = available_bytes(device)
    if needed > available:
        raise UserError(
            f"{what} needs {gigabytes(needed)} of memory and {gigabytes(available)} are free on "
            f"{device}; {advice}"
        )


def gigabytes(count: int) -> str:
    """Bytes as text: "1.23 GB"."""
    return f"{count / 1e9:.2f} GB"


def reset_peak_memory(device: torch.device | str = "cpu") -> None:
    """Count the peak from here on, where the system can."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # not on Linux, or not allowed: the peak stays that of the whole process


def peak_bytes(device: torch.device | str) -> int:
    """The most memory of a device that this process has held at once."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory this process has held at once."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        # Not on Linux. There this would count what the parent held when it forked, too.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Memory of this process's own that is in use: pages of files, which may go, do not count."""
    status = Path("/proc/self/status")
    try:
        return int(status.read_text(encoding="ascii").partition("RssAnon:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return peak_resident_bytes()  # not on Linux
