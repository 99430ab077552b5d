"""Models as bytes: most tensors of theirs are views, of a mapped file or of one allocation."""

from __future__ import annotations

import io
import pickle
from typing import Any, SupportsIndex

from torch import Tensor, nn


class _Pickler(pickle.Pickler):
    """Pickles of a view what it shows; torch takes all that it is a view of, for each view anew."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.untyped_storage().nbytes() > obj.nbytes:
            return obj.clone().__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        return NotImplemented


class Picklable(nn.Module):
    """A model whose copies and pickles have about as many bytes as its tensors."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        stream = io.BytesIO()
        _Pickler(stream, pickle.DEFAULT_PROTOCOL).dump(self.__dict__)
        return _restored, (type(self), stream.getvalue())


def _restored(kind: type[nn.Module], dumped: bytes) -> nn.Module:
    module = kind.__new__(kind)
    module.__setstate__(pickle.loads(dumped))
    return module
