"""Tensors that a model keeps in a file beside it.

The file may be a link, as in a Hub cache, which onnx's own reader and checker refuse; onnxruntime
takes it.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from qllm.errors import UserError

TYPES = helper.get_all_tensor_dtypes()


def nbytes(tensor: TensorProto) -> int:
    """Bytes of a tensor's elements.

    Raises:
        UserError: for a shape or a type that no tensor has.
    """
    if min(tensor.dims, default=0) < 0 or tensor.data_type not in TYPES:
        raise UserError(
            f"the tensor {tensor.name} has the shape {list(tensor.dims)} and the type "
            f"{tensor.data_type}; onnx knows no such tensor"
        )
    count = math.prod(tensor.dims)
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return -(-count // 2)
    return count * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def check_data(path: Path, tensor: TensorProto) -> None:
    """Refuse external data that is not there, or elsewhere."""
    if not external_data_helper.uses_external_data(tensor):
        return
    entries = _external_data(tensor)
    where = f"{path}: the data of {tensor.name}"
    name = entries.get("location", "")
    # A name is compared with those of the folder; it never becomes a path of its own.
    # protobuf gives bytes for text that is no UTF-8.
    if not isinstance(name, str) or name != Path(name).name or name in ("", ".."):
        raise UserError(f"{where} is in {name!r}, which is not a file of its own folder")
    file = path.parent / name
    if not file.is_file():
        raise UserError(f"{where} is in {name}, which {path.parent} lacks; get it again")
    try:
        start = int(entries.get("offset", 0))
        length = int(entries.get("length", nbytes(tensor)))
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{where} has no place in {name}: {entries}") from None
    if start < 0 or length != nbytes(tensor) or start + length > file.stat().st_size:
        raise UserError(
            f"{where} takes {nbytes(tensor)} bytes from {start} on, which {name} does not have "
            f"({file.stat().st_size} bytes); get it again"
        )


def load(tensor: TensorProto, folder: Path) -> TensorProto:
    """A checked tensor with its data in it, wherever that is."""
    whole = TensorProto()
    whole.CopyFrom(tensor)
    if external_data_helper.uses_external_data(tensor):
        entries = _external_data(tensor)
        with (folder / entries["location"]).open("rb") as file:
            file.seek(int(entries.get("offset", 0)))
            whole.raw_data = file.read(nbytes(tensor))
        whole.data_location = TensorProto.DEFAULT
        del whole.external_data[:]
    return whole


def values(tensor: TensorProto, folder: Path) -> np.ndarray:
    """The elements of a checked tensor, wherever they are.

    Raises:
        UserError: for data of another size than its shape.
    """
    try:
        return numpy_helper.to_array(load(tensor, folder))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the tensor {tensor.name} has the shape {list(tensor.dims)}, which its data has not "
            f"({error})"
        ) from None


def files(path: Path, tensors: Iterable[TensorProto]) -> list[Path]:
    """The files in which a model keeps tensors."""
    stored = filter(external_data_helper.uses_external_data, tensors)
    return [path.parent / name for name in sorted({_external_data(t)["location"] for t in stored})]


@contextmanager
def without_links(path: Path, data: Iterable[Path]) -> Iterator[Path]:
    """Where onnx's checker finds the graph beside files of those names, and none is a link."""
    data = list(data)
    if not any(file.is_symlink() for file in data):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in data:
            (Path(folder) / file.name).touch()  # it does not look inside
        yield Path(shutil.copy(path, folder))


def _external_data(tensor: TensorProto) -> dict[str, str]:
    """What a tensor says of where its data is."""
    return {entry.key: entry.value for entry in tensor.external_data}
