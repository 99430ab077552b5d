"""The CPU kernels on every path that this machine has, and weights for them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import pytest
import torch
from torch import Tensor

from qllm.config import SCHEMES
from qllm.ops import KERNELS, Kernel, Layout, Request, phase, reference
from qllm.ops.cpu import library as native
from qllm.quant.packing import PackedWeight, pack

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


AMD = 32  # of dispatch.cpp


def use(name: str) -> bool:
    """Take a path; False where this machine lacks it.

    AVX-512 beside a better one adds as this machine would not, so that its sums are tested, too.
    """
    library = native.library()
    features = library.qllm_features()
    if name == "avx512" and name != library.path:
        features ^= AMD
    return library.qllm_use(name.encode(), ctypes.c_int64(features))


@cache
def paths() -> tuple[str, ...]:
    """Those that this machine has, the best one first."""
    if reason := native.unavailable():
        pytest.skip(reason)
    found = tuple(filter(use, native.PATHS))
    use(native.library().path)
    return found


def forced(name: str) -> str:
    """QLLM_CPU_PATH of a process on a path, which takes it from the library that tests share."""
    return f"{name},{','.join(native.PATHS)}"


@contextmanager
def on(name: str) -> Iterator[None]:
    """A path for a while; the test is skipped where this machine lacks it."""
    if name not in paths():
        pytest.skip(f"this machine lacks {native.PATHS[name].about}")
    use(name)
    try:
        yield
    finally:
        use(native.library().path)


def bits_of(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers, so that two of them can be compared whatever they stand for."""
    return tensor.view(INTEGERS[tensor.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the bit."""
    return a.dtype == b.dtype and torch.equal(bits_of(a), bits_of(b))


def assert_rows_are_their_own(run, x: Tensor, *others: Tensor) -> Tensor:
    """A row's result is the same to the bit whatever stands beside it and whatever the threads.

    Args:
        run: of x and others, all of which have as many rows; and of rows of them.
    """
    together = run(x, *others)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same(run(x, *others), together)
    torch.set_num_threads(1)
    for rows in ([0], [len(x) - 1], [*range(len(x))][::-1], [len(x) // 2] * 3):
        assert same(run(x[rows], *(other[rows] for other in others)), together[rows])
    return together


def everywhere(compute: Callable[[], Tensor], but: Collection[str] = ()) -> Tensor:
    """What a function gives, which has to be the same to the bit on every path but some."""
    results = {}
    for name in paths():
        if name not in but:
            with on(name):
                results[name] = compute()
    first, *others = results
    for name in others:
        assert same(results[first], results[name]), f"{first} and {name} differ"
    return results[first]


def kernel(op: str) -> Kernel:
    """The compiled kernel of an op."""
    return next(kernel for kernel in KERNELS[op] if kernel.name == "cpu")


@dataclass(frozen=True)
class Weight:
    """A quantized matrix (N, K): as checkpoints have it, as the kernels do, and in float64."""

    request: Request
    stored: PackedWeight
    matrix: Tensor

    @property
    def layout(self) -> Layout:
        return kernel("weight_only_linear").layout

    @cached_property
    def packed(self) -> PackedWeight:
        paths()
        return self.layout.pack(self.stored, self.request)

    @property
    def _format(self) -> tuple[int, int, int]:
        return self.request.out_features, self.request.bits, self.request.group_size

    def kernel(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of a decode step on the current path; that of a prefill is one for AMX."""
        run = kernel("weight_only_linear").run
        with phase.decode():
            return run(x, *self.packed[:3], bias, *self._format)

    def everywhere(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product on every path."""
        return everywhere(lambda: self.kernel(x, bias))

    def everywhere_int8(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of a decode step with int8 activations on every path."""
        run = kernel("weight_only_linear_int8").run
        with phase.decode():
            return everywhere(lambda: run(x, *self.packed[:3], bias, *self._format))

    def reference(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.weight_only_linear(x, *self.stored[:3], bias, *self._format)

    def exact(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = x.double() @ self.matrix.t()
        return y if bias is None else y + bias.double()

    def size(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Of what is summed up, to which rounding errors are in proportion."""
        y = x.double().abs() @ self.matrix.t().abs()
        return y if bias is None else y + bias.double().abs()


# Of weights that are stored; users choose among `qllm.config.SCHEMES`.
STORED_SCHEMES = (*SCHEMES, "offset")


def weight_of(
    q: np.ndarray,
    zeros: np.ndarray | None,
    scales: Tensor,
    bits: int,
    group_size: int,
    offsets: Tensor | None = None,
) -> Weight:
    """The weight with these integers (N, K), zeros (N, G) or None, scales, and offsets (N, G)."""
    outputs, inputs = q.shape
    scheme = "sym" if zeros is None else "asym"
    if offsets is not None:
        scheme, zeros = "offset", np.zeros(scales.shape)
    request = Request(inputs, outputs, bits, group_size, scheme, "cpu")
    index = np.arange(inputs) // (inputs if group_size == -1 else group_size)
    zero = 2 ** (bits - 1) if zeros is None else zeros.astype(np.int64)[:, index]
    matrix = (q.astype(np.int64) - zero) * scales.double().numpy()[:, index]
    qzeros = np.empty(0) if zeros is None else zeros
    rows = pack(torch.from_numpy(q.astype(np.uint8)), bits)
    stored = PackedWeight(rows, scales, torch.from_numpy(qzeros.astype(np.uint8)))
    if offsets is not None:
        matrix += offsets.double().numpy()[:, index]
        stored = stored._replace(qzeros=offsets)
    return Weight(request, stored, torch.from_numpy(matrix))


def random_weight(
    shape: tuple[int, int],
    bits: int = 4,
    group_size: int = 128,
    scheme: str = "asym",
    scales_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Weight:
    """A weight of this shape (N, K), of integers that may be any."""
    random = np.random.default_rng((*shape, bits, group_size + 1, seed))
    groups = 1 if group_size == -1 else -(-shape[1] // group_size)
    q = random.integers(0, 2**bits, shape)
    zeros = random.integers(0, 2**bits, (shape[0], groups)) if scheme == "asym" else None
    scales = torch.from_numpy(random.uniform(0.01, 0.1, (shape[0], groups))).to(scales_dtype)
    offsets = None
    if scheme == "offset":  # as of a minimum that is no multiple of the step
        offsets = -scales * torch.from_numpy(random.uniform(0, 2**bits, (shape[0], groups)))
        offsets = offsets.to(scales_dtype)
    return weight_of(q, zeros, scales, bits, group_size, offsets)


def factored_weight(
    shape: tuple[int, int], bits: int, group_size: int, scheme: str, seed: int = 0
) -> Weight:
    """The same, whose scales and offsets are products of integers, as llama.cpp's K types have."""
    weight = random_weight(shape, bits, group_size, scheme, torch.float32, seed)
    random = np.random.default_rng(seed)

    def products() -> Tensor:
        groups = weight.stored.scales.shape
        parts = (groups[0], -(-groups[1] // (256 // group_size)))
        factors = (random.uniform(-0.01, 0.01, parts)).astype(np.float16).astype(np.float32)
        whole = random.integers(-128, 128, groups).astype(np.float32)
        each = factors.repeat(256 // group_size, axis=1)[:, : groups[1]]
        return torch.from_numpy(whole * each)

    stored = weight.stored._replace(scales=products())
    if scheme == "offset":
        stored = stored._replace(qzeros=products())
    matrix = reference.dequantize(*stored[:3], bits, group_size, shape[1], torch.float64)
    return Weight(weight.request, stored, matrix)


def leveled_weight(
    shape: tuple[int, int], bits: int, group_size: int, scheme: str, levels: int = 16, seed: int = 0
) -> Weight:
    """A weight whose integers are some few, the least and the largest among them."""
    weight = random_weight(shape, bits, group_size, scheme, torch.float32, seed)
    random = np.random.default_rng(seed)
    some = random.permutation(np.arange(1, 2**bits - 1))[: levels - 2]
    q = random.choice(np.array([0, 2**bits - 1, *some]), shape).astype(np.uint8)
    stored = weight.stored._replace(qweight=pack(torch.from_numpy(q), bits))
    matrix = reference.dequantize(*stored[:3], bits, group_size, shape[1], torch.float64)
    return Weight(weight.request, stored, matrix)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 1000 * seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def pattern(values: Tensor) -> Tensor:
    """What is no finite number, and of which kind."""
    return values.isnan() * 3 + values.isposinf() * 2 + values.isneginf() * 1


class Int8:
    """int8 weights (N, K) with a scale per channel, for the reference and for the kernels."""

    def __init__(self, qweight: Tensor, scales: Tensor) -> None:
        self.qweight, self.scales = qweight, scales
        outputs, inputs = qweight.shape
        request = Request(inputs, outputs, 8, -1, "sym", "cpu")
        rows = pack((qweight.int() + 128).to(torch.uint8), 8)
        stored = PackedWeight(rows, scales[:, None], rows.new_empty(0))
        self.packed = kernel("int8_linear").layout.pack(stored, request)

    @staticmethod
    def random(shape: tuple[int, int], scales_dtype: torch.dtype = torch.float16) -> Int8:
        random = np.random.default_rng(shape)
        q = torch.from_numpy(random.integers(-128, 128, shape, dtype=np.int8))
        return Int8(q, torch.from_numpy(random.uniform(0.001, 0.01, shape[0])).to(scales_dtype))

    def kernel(self, x: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        arguments = (self.packed.qweight, self.packed.scales, bias, scale, len(self.qweight))
        return kernel("int8_linear").run(x, *arguments)

    def assert_exact(
        self, x: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        """The same as the reference, to the bit where it is a number."""
        got = everywhere(lambda: self.kernel(x, bias, scale))
        expected = reference.int8_linear(
            x, self.qweight, self.scales, bias, scale, len(self.scales)
        )
        assert torch.equal(pattern(got), pattern(expected))
        number = ~expected.isnan()
        assert same(got[number], expected[number])
