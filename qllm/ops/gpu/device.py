"""Whether the GPU kernels can run, and what they need of a device."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

OLDEST = (8, 0)  # Ampere: the first compute capability that multiplies bfloat16
INTERPRETED_PROCESSORS = 4  # so that the interpreter gets to split a product
MOST_TILES = 1 << 16


def interpreting() -> bool:
    """Whether the kernels are to run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: str) -> str | None:
    """Why the kernels cannot run on a device, by its type; None where they can."""
    if device != "cuda" and not (device == "cpu" and interpreting()):
        return "it is for CUDA devices"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None if device == "cpu" else _unfit()


def _unfit() -> str | None:
    """Why no GPU here can run them."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip:
        return "it is for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        name, version = torch.cuda.get_device_name(), ".".join(map(str, capability))
        return f"{name} is of compute capability {version}, below {'.'.join(map(str, OLDEST))}"
    return None


def about() -> str:
    """Where the kernels run, for `--explain`."""
    if interpreting():
        return "Triton, in its interpreter"
    return f"Triton, on compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}"


@cache
def architecture(device: torch.device) -> tuple[str, int]:
    """A device's compute capability, such as "9.0", and how many processors it has."""
    if device.type != "cuda":
        return "interpreter", INTERPRETED_PROCESSORS
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.major}.{properties.minor}", properties.multi_processor_count


def current(tensor: Tensor) -> AbstractContextManager:
    """Makes a tensor's device the one that kernels are launched on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def counters(device: torch.device) -> Tensor:
    """int32 zeros (MOST_TILES,), of the stream in use, which every launch leaves as it finds."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _counters(device, stream)


@cache
def _counters(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)
