"""Models as bytes: most tensors of theirs are views, of a mapped file or of one allocation."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class _Pickler(pickle.Pickler):
    """Pickles of a view what it shows; torch takes all that it is a view of, for each view anew."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.untyped_storage().nbytes() > obj.nbytes:
            return obj.clone().__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        return NotImplemented


def dumps(state: Mapping[str, Any]) -> bytes:
    """The attributes of a model, of about as many bytes as its tensors have."""
    stream = io.BytesIO()
    _Pickler(stream, pickle.DEFAULT_PROTOCOL).dump(state)
    return stream.getvalue()


def restored(kind: type[nn.Module], dumped: bytes) -> nn.Module:
    """A module of a class with what `dumps` gave."""
    module = kind.__new__(kind)
    module.__setstate__(pickle.loads(dumped))
    return module
