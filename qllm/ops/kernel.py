"""What an op has for an implementation, what it is asked for, and how it wants its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qllm.quant.packing import PackedWeight


@dataclass(frozen=True)
class Request:
    """What a layer asks of an op: its shape, its format, and where it runs."""

    in_features: int
    out_features: int
    bits: int
    group_size: int
    scheme: str
    device: str


@dataclass(frozen=True)
class Layout:
    """How a kernel wants a quantized weight, and the way back.

    Attributes:
        pack: (weight, request) to the tensors that the kernel takes in its place.
        unpack: the inverse.
        look_up: (row numbers (n,), tensors, request, dtype) to those rows of the weight, (n, K).
        nbytes: (weight, request) to the bytes of what `pack` makes of it, by shapes and types.
    """

    pack: Callable[[PackedWeight, Request], PackedWeight]
    unpack: Callable[[PackedWeight, Request], PackedWeight]
    look_up: Callable[[torch.Tensor, PackedWeight, Request, torch.dtype], torch.Tensor]
    nbytes: Callable[[PackedWeight, Request], int]


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    Attributes:
        about: says what it does, for `--explain`.
        run: has the signature of the reference op.
        unsupported_reason: the reason why it cannot serve a request, None where it can.
        layout: of the weight, None where it is the one that the reference takes.
        takes_rows: it gains where x is `Int8Rows` already, which a norm in front can make.
    """

    name: str
    about: Callable[[], str]
    run: Callable[..., torch.Tensor]
    unsupported_reason: Callable[[Request], str | None] = lambda request: None
    layout: Layout | None = None
    takes_rows: bool = False


@dataclass(frozen=True)
class Choice:
    """The kernel that serves a layer, and why it is that one."""

    kernel: Kernel
    reason: str
