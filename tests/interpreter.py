"""Triton's interpreter, without what it does anew at every call of a function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from triton.language import core, semantic
from triton.runtime import interpreter


def make_quicker() -> None:
    """Let kernels take half the time; what they compute stays.

    Each call of a function inside a kernel replaces the whole language by what interprets it, which
    the launch has done; each sum of indices is asserted not to overflow, which tests' small tensors
    cannot make it do; each array's type is looked up in a table that is built for that; each
    argument is asked whether it is a list or a tuple, before whether it is a constant; and a
    block's shape is checked, named and made into constants anew for each tensor, and compared with
    another one as a tuple of the language that is made for that.
    """
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    interpreter._patch_attr = _patch_attr
    core.block_type.__init__ = _init_block_type
    core.tensor.__init__ = _init_tensor
    core.tuple.__eq__ = _compare_values_first(core.tuple.__eq__)
    semantic.TritonSemantic.broadcast_impl_value = _broadcast_unless_equal(
        semantic.TritonSemantic.broadcast_impl_value
    )
    core._unwrap_if_constexpr = _unwrapped_at_once(core._unwrap_if_constexpr)
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched = set()  # the modules' names, of the launch at hand

    def launched(self: interpreter.GridExecutor, *args: object, **kwargs: object) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def patch_once(function: Callable) -> object:
        name = function.__globals__["__name__"]
        if name in patched:
            return None  # a function's scope is not asked for, unlike a launch's
        patched.add(name)
        return patch(function)

    interpreter.GridExecutor.__call__ = launched
    interpreter._patch_lang = patch_once


def _remembered(find: Callable) -> Callable:
    """`interpreter._get_np_dtype`, whose answers depend on the name of the numbers' type."""
    known: dict[str, np.dtype] = {}

    def remembered(of: object) -> np.dtype:
        scalar = of.scalar
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    return remembered


def _patch_attr(obj: object, name: str, member: Callable, builder: object, scope: object) -> None:
    """`interpreter._patch_attr`, without a copy of the arguments at each call."""

    def interpreted(*args: object, **kwargs: object) -> object:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return member(*args, **kwargs)

    scope.set_attr(obj, name, interpreted)


class _Shape(NamedTuple):
    """What all tensors of one shape share: in their type, and in themselves."""

    numbers: core.tuple
    name: str
    constants: core.tuple
    numel: core.constexpr


@functools.cache
def _shape(*sizes: int) -> _Shape:
    numbers, numel = core.tuple(sizes), core.validate_block_shape(sizes)
    constants = core.tuple([core.constexpr(size) for size in sizes])
    return _Shape(numbers, str(numbers), constants, core.constexpr(numel))


def _init_block_type(self: core.block_type, element_ty: core.dtype, shape: Iterable) -> None:
    """`core.block_type.__init__`, which finds what it knows of the shape."""
    found = _shape(*[size.value if isinstance(size, core.constexpr) else size for size in shape])
    if not found.numbers.values:
        raise TypeError("0d block_type is forbidden")
    self.element_ty, self.of_shape = element_ty, found
    self.shape, self.numel = found.numbers, found.numel.value
    self.name = f"<{found.name}, {element_ty}>"


def _init_tensor(self: core.tensor, handle: object, type: core.dtype) -> None:
    """`core.tensor.__init__`, which takes what its type has found."""
    found = type.of_shape if type.is_block() else _shape()
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = found.numel, found.constants


def _compare_values_first(compare: Callable) -> Callable:
    """`core.tuple.__eq__`, which makes no tuple of a list."""

    def compare_values(self: core.tuple, other: object) -> object:
        if isinstance(other, list):
            return core.constexpr(self.values == other)
        return compare(self, other)

    return compare_values


def _broadcast_unless_equal(broadcast: Callable) -> Callable:
    """`TritonSemantic.broadcast_impl_value`, which has nothing to do where shapes are equal."""

    def broadcast_unless_equal(self: object, lhs: core.tensor, rhs: core.tensor) -> tuple:
        if lhs.shape is rhs.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return broadcast_unless_equal


def _unwrapped_at_once(unwrap: Callable) -> Callable:
    """`core._unwrap_if_constexpr`, which gives most arguments back as they are."""

    def unwrapped(o: object) -> object:
        kind = type(o)
        if kind is core.tensor or kind is int or kind is float:
            return o
        return o.value if kind is core.constexpr else unwrap(o)

    return unwrapped
