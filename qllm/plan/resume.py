"""What a table of losses had come to when its measuring was interrupted, kept beside the table.

`TABLE.partial` is a safetensors file of the states between two layers, the errors so far, and what
is measured. It is replaced as a whole, from time to time: states of many paths are large.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qllm.checkpoint.tensor_files import SafetensorsFile
from qllm.checkpoint.tensors import TensorInfo
from qllm.checkpoint.writer import SafetensorsWriter, new_file
from qllm.errors import UserError, WritingError
from qllm.folders import partial_path
from qllm.progress import Note

# Of measuring between two savings, in seconds, and in times of what the one before took.
LEAST_SECONDS, LEAST_TIMES = 60.0, 20
ABOUT = "about"
# Goes up with the tensors that a run leaves.
FORMAT = 1


class PartialTable:
    """The tensors of a run that may be interrupted; for folders it is `checkpoint.resume`."""

    def __init__(self, table: Path, about: Mapping[str, object], note: Note) -> None:
        """
        Args:
            about: what decides the figures.
            note: called with a line where nothing can be kept.
        """
        self.path = partial_path(table)
        data = json.dumps([FORMAT, about], sort_keys=True, default=str).encode()
        self._about = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._note = note
        self._saved, self._took = time.monotonic(), 0.0
        self._can = True

    def load(self) -> dict[str, Tensor]:
        """What was saved, {} where nothing was.

        Raises:
            UserError: it is of a run that measures something else, or cannot be read.
        """
        if not self.path.exists():
            return {}
        try:
            file = SafetensorsFile(self.path)
            found = {name: file.read(name) for name in file.tensors}
        except UserError as error:
            raise UserError(f"{error}, or remove it to begin again") from None
        about = found.pop(ABOUT, None)
        if about is None or not torch.equal(about, self._about):
            raise UserError(
                f"{self.path} holds an interrupted run on another model, text or candidates; "
                "remove it, or name another `table`"
            )
        return found

    @property
    def due(self) -> bool:
        """Whether enough was measured since the last saving to pay for another."""
        passed = time.monotonic() - self._saved
        return self._can and passed >= max(LEAST_SECONDS, LEAST_TIMES * self._took)

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep these in place of what was kept before; without space for them, note that."""
        begin = time.monotonic()
        entries = {**tensors, ABOUT: self._about}
        infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in entries.items()}
        try:
            with new_file(self.path) as temporary:
                writer = SafetensorsWriter(temporary, infos, {})
                for name, tensor in entries.items():
                    writer.write(name, tensor.cpu())
                writer.close()
        except WritingError as error:
            self._can = False
            self._note(f"if this is interrupted it begins again: {error}")
        self._saved = time.monotonic()
        self._took = self._saved - begin

    def remove(self) -> None:
        """Once the table is there."""
        self.path.unlink(missing_ok=True)
