"""The contract that every linear layer keeps, whatever it holds its weight as."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from qllm import ops
from qllm.config import QuantSpec
from qllm.layers.sharding import Sharding
from qllm.ops.gpu.device import settle
from qllm.quant.packing import PackedWeight, group_width

ALL_ROWS = slice(None)


class Linear(nn.Module, ABC):
    """y = x W^T + b for x (M, K) and W (N, K), with W held as `spec` says.

    Built on the meta device a layer has its tensors' shapes but no memory, so that a model can be
    measured before it is loaded; `from_float` makes the real one.

    Attributes:
        in_features: K.
        out_features: N.
    """

    op: str
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, spec: QuantSpec) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.spec = spec

    @cached_property
    def choice(self) -> ops.Choice:
        """The kernel for this layer, and the reason: chosen when first asked, where it then is."""
        return ops.select(self.op, self.request)

    @property
    def request(self) -> ops.Request:
        """What this layer asks of its op."""
        spec, device = self.spec, next(self.buffers()).device.type
        shape = (self.in_features, self.out_features)
        return ops.Request(*shape, spec.bits, spec.group_size, spec.scheme, device)

    @property
    def run(self) -> Callable[..., Tensor]:
        """What multiplies, which takes the layer's tensors as they lie in memory."""
        return self.choice.kernel.run

    @abstractmethod
    def process_weights_after_loading(self) -> None:
        """Let the tensors take the layout of the layer's kernel, once, before the layer is used."""

    @classmethod
    @abstractmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool, spec: QuantSpec, dtype: torch.dtype
    ) -> Linear:
        """The layer on the meta device: shapes and types, no memory."""

    @classmethod
    @abstractmethod
    def from_float(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        *,
        input_range: float | None,
        all_fit: Callable[[bool], bool] = bool,
    ) -> Linear:
        """The layer that holds a float weight (N, K), and bias (N,), as `spec` says.

        Args:
            weight: floating point, on the layer's device. A dense layer keeps it as it is; the
                others compute in the type of what they are given.
            input_range: the largest |x| seen in calibration, None without calibration.
            all_fit: of a weight that is part of a larger one, takes whether this part's scales
                fit into float16, and returns whether those of all parts do.

        Raises:
            UserError: where the spec needs a calibration that is not given.
        """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x (M, K) to (M, N)."""

    @abstractmethod
    def dequantize(self, rows: slice = ALL_ROWS) -> Tensor:
        """The matrix the layer stands for, or some rows of it: float32 (N, K)."""

    @abstractmethod
    def narrow(self, dim: int, *ranges: range) -> Linear:
        """A layer of some of this one's channels, with nothing of the others in memory.

        Args:
            dim: 0: some output channels, as runs of them, in the order given. 1: one run of input
                channels: what the layer then computes is a summand of the whole layer's output,
                without the bias, which whoever sums adds once.
        """

    def shard(self, sharding: Sharding, rank: int) -> Linear:
        """The layer of the channels that one of the ranks of a sharding has; see `narrow`."""
        return self.narrow(sharding.dim, *sharding.ranges[rank])

    @classmethod
    def columns_to_read(cls, columns: range, spec: QuantSpec, in_features: int) -> range:
        """The input channels of a float weight that decide the values of some of them."""
        return columns

    def nbytes(self) -> int:
        """Bytes of the tensors the layer holds."""
        return sum(tensor.nbytes for tensor in self.buffers())

    def nbytes_on(self, device: str) -> int:
        """Bytes of the tensors in the layout of the kernel that a type of device has for them.

        The layer may be on the meta device.
        """
        return self.nbytes()

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {describe(self.spec)}"


class QuantizedLinear(Linear):
    """A layer of packed integers, made as a subclass says, which is how checkpoints have them.

    `process_weights_after_loading` lets them lie in memory as the kernel wants them, and nothing
    else does; until then the reference multiplies. `packed` is in either case what it was made of.

    Attributes:
        kernel: the one whose layout the tensors have; None: that of checkpoints.
    """

    kernel: ops.Kernel | None = None

    @property
    def layout(self) -> ops.Layout | None:
        """The layout of the tensors; None where they are as checkpoints have them."""
        return self.kernel.layout if self.kernel else None

    @property
    def run(self) -> Callable[..., Tensor]:
        # The last kernel of an op is the reference, which takes what checkpoints have.
        return (self.kernel or ops.KERNELS[self.op][-1]).run

    def process_weights_after_loading(self) -> None:
        """Choose the kernel, and let the tensors take its layout; a second call does nothing."""
        if self.kernel is not None:
            return
        kernel = self.choice.kernel
        if kernel.layout:
            self.tensors = kernel.layout.pack(self.packed, self.request)
        settle(next(self.buffers()))
        self.kernel = kernel

    def nbytes_on(self, device: str) -> int:
        asked, stored = replace(self.request, device=device), self._packed_shapes()
        layout = ops.select(self.op, asked).kernel.layout
        if layout is None:
            return self.nbytes()
        others = (t for name, t in self.named_buffers() if name not in PackedWeight._fields[:3])
        return layout.nbytes(stored, asked) + sum(tensor.nbytes for tensor in others)

    def _packed_shapes(self) -> PackedWeight:
        """`packed` of a layer that may be on the meta device, of which values do not matter."""
        return self.packed

    @classmethod
    def columns_to_read(cls, columns: range, spec: QuantSpec, in_features: int) -> range:
        width = group_width(in_features, spec.group_size)  # a group is quantized as a whole
        start, stop = columns.start // width * width, -(-columns.stop // width) * width
        return range(start, min(in_features, stop))

    @property
    def packed(self) -> PackedWeight:
        """The layer's integers, scales and zeros, as checkpoints have them."""
        return self.layout.unpack(self.tensors, self.request) if self.layout else self.tensors

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: tensors as checkpoints have them, for other machines have other kernels."""
        gone = ("kernel", "choice")
        state = {key: value for key, value in self.__dict__.items() if key not in gone}
        state["_buffers"] = {**self._buffers, **self.stored()}
        return state | {"laid_out": self.kernel is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        laid_out = state.pop("laid_out")
        super().__setstate__(state)
        if laid_out:
            self.process_weights_after_loading()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy as it is, which lies in memory as the kernel has it."""
        found = type(self).__new__(type(self))
        memo[id(self)] = found
        found.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return found

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """The buffers that a kernel's layout changes, as checkpoints have them."""

    @property
    @abstractmethod
    def tensors(self) -> PackedWeight:
        """The same as they lie in memory."""

    @tensors.setter
    @abstractmethod
    def tensors(self, packed: PackedWeight) -> None: ...


def describe(spec: QuantSpec) -> str:
    """A spec in a few words: "4 bits, group 128, asym"."""
    if spec.kind != "weight_only":
        return f"{spec.bitwidth}" if spec.kind != "dense" else "16 bits"
    group = "channel" if spec.group_size == -1 else f"group {spec.group_size}"
    return f"{spec.bits} bit{'s' if spec.bits > 1 else ''}, {group}, {spec.scheme}"
