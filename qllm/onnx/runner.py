"""An ONNX decoder in onnxruntime, with the verbs of `qllm.models.Decoder`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from onnxruntime import OrtValue
from torch import Tensor

from qllm.checkpoint.reader import read_raw_config
from qllm.errors import UserError, first_line
from qllm.models import read_config
from qllm.onnx.decoder import LOGITS
from qllm.onnx.external import nbytes
from qllm.onnx.linears import looked_up, multiplied
from qllm.onnx.model import (
    POSITIONS,
    bitwidth,
    check_decoder,
    model_file,
    read_model,
    tensors,
)


class OnnxCache:
    """Keys and values of every token so far, as the model returned them.

    Attributes:
        past: by the name of the input that takes it; a batch's rows are padded on the left.
        mask: int64 (B, S), 0 for pads.
        lengths: tokens held for each of the B rows.
    """

    def __init__(self, rows: int, capacity: int, past: dict[str, OrtValue]) -> None:
        self.capacity, self.past = capacity, past
        self.mask = np.zeros((rows, 0), np.int64)
        self.lengths = np.zeros(rows, np.int64)

    def keep(self, indices: Sequence[int]) -> None:
        """Let all rows go but those at these places, and with them pads that all others have."""
        kept = list(indices)
        first = int(self.mask[kept].any(0).argmax()) if kept else 0
        self.mask, self.lengths = self.mask[kept, first:], self.lengths[kept]
        self.past = {
            name: OrtValue.ortvalue_from_numpy(value.numpy()[kept, :, first:])
            for name, value in self.past.items()
        }


class RowCaches:
    """A cache for each row, of a model whose attention cannot leave pads out.

    Attributes:
        rows: with one row each.
    """

    def __init__(self, rows: Sequence[OnnxCache]) -> None:
        self.rows = list(rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens held for each row."""
        return np.concatenate([cache.lengths for cache in self.rows])

    def keep(self, indices: Sequence[int]) -> None:
        """Let all rows go but those at these places."""
        self.rows = [self.rows[index] for index in indices]


class OnnxDecoder:
    """A decoder with past, of the names that optimum gives its inputs and outputs.

    Attributes:
        dtype: of its keys and values.
        bitwidth: of its packed matrices, "16" without any.
        nbytes: of its tensors.
        read_bytes: of them, those that one decode step reads.
        multiplied: weights that each token is multiplied by in the layers.
    """

    device = torch.device("cpu")
    stage = None  # of a pipeline: one process has all of the model

    def __init__(self, folder: Path, file: Path | None = None) -> None:
        """
        Args:
            file: of the model, where the folder has several; see `model_file`.

        Raises:
            UserError: for a folder whose model is broken, or no decoder that onnxruntime runs.
        """
        self.config = read_config(read_raw_config(folder))
        path = file or model_file(folder)
        self._made_of = folder.absolute(), path.absolute()
        model = read_model(path)
        kind = check_decoder(model, self.config, path)
        self._numpy = helper.tensor_dtype_to_np_dtype(kind)
        self.dtype = torch.float32 if kind == TensorProto.FLOAT else torch.float16
        self.bitwidth = bitwidth(model)
        self.nbytes = sum(nbytes(tensor) for tensor in tensors(model.graph))
        rows = looked_up(model.graph)
        one_row = sum(nbytes(tensor) for tensor in model.graph.initializer if tensor.name in rows)
        self.read_bytes = self.nbytes - one_row
        self.multiplied = multiplied(model.graph, self.config.vocab_size)
        self._positions = any(value.name == POSITIONS for value in model.graph.input)
        # It takes a row's tokens for its first ones, as many as the mask counts: no pads before.
        self._rows_alone = any(n.op_type == "GroupQueryAttention" for n in model.graph.node)
        del model
        self._session = session(path)
        names = [value.name for value in self._session.get_inputs()]
        self._past = [name for name in names if name.startswith("past_key_values.")]
        self._present = [name.replace("past_key_values", "present") for name in self._past]

    def __reduce__(self) -> tuple[type[OnnxDecoder], tuple[Path, Path]]:
        """For copy and pickle: onnxruntime's session is made again, of the files."""
        return type(self), self._made_of

    def new_cache(self, rows: int, capacity: int) -> OnnxCache | RowCaches:
        """An empty cache for `rows` sequences of up to `capacity` tokens."""
        if self._rows_alone:
            return RowCaches([self._new_cache(1, capacity) for _ in range(rows)])
        return self._new_cache(rows, capacity)

    def _new_cache(self, rows: int, capacity: int) -> OnnxCache:
        shape = (rows, self.config.num_kv_heads, 0, self.config.head_dim)
        empty = OrtValue.ortvalue_from_numpy(np.zeros(shape, self._numpy))
        return OnnxCache(rows, capacity, dict.fromkeys(self._past, empty))

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: OnnxCache | RowCaches | None = None,
        *,
        last: bool = True,
        share: bool = True,
    ) -> Tensor:
        """Run whole prompts, padded on the left; arguments and errors are those of `Decoder`."""
        cache = cache or self.new_cache(len(prompts), max(map(len, prompts)))
        longest = max(map(len, prompts))
        if len(prompts) != len(cache.lengths):
            raise ValueError(f"{len(prompts)} prompts for a cache of {len(cache.lengths)} rows")
        if isinstance(cache, RowCaches):
            pairs = zip(prompts, cache.rows, strict=True)
            return torch.cat([self.prefill([prompt], row, last=last) for prompt, row in pairs])
        ids = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        logits = self._run(ids, mask, np.maximum(mask.cumsum(1) - 1, 0), cache)
        return logits[:, -1] if last else logits[torch.from_numpy(mask).bool()]

    def decode(self, tokens: Tensor, cache: OnnxCache | RowCaches, *, share: bool = True) -> Tensor:
        """Run one new token per row, int64 (B,): float32 logits (B, V)."""
        if isinstance(cache, RowCaches):
            pairs = zip(tokens.split(1), cache.rows, strict=True)
            return torch.cat([self.decode(token, row) for token, row in pairs])
        ids = tokens.numpy()[:, None]
        return self._run(ids, np.ones_like(ids), cache.lengths[:, None].copy(), cache)[:, -1]

    def hidden(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits (N, V) of all tokens, each prompt run alone: the graph ends nowhere earlier."""
        return torch.cat([self.prefill([prompt], last=False) for prompt in prompts])

    def logits(self, x: Tensor) -> Tensor:
        """Logits (M, V) of rows of `hidden`, which they are already."""
        return x

    def _run(
        self, ids: np.ndarray, mask: np.ndarray, position_ids: np.ndarray, cache: OnnxCache
    ) -> Tensor:
        """Logits (B, T, V) in float32; the cache takes what is new.

        Raises:
            IndexError: a row is longer than the cache.
        """
        whole = np.concatenate((cache.mask, mask), axis=1)
        if whole.shape[1] > cache.capacity:
            raise IndexError(f"{whole.shape[1]} tokens in a cache for {cache.capacity}")
        given = {"input_ids": ids, "attention_mask": whole}
        if self._positions:
            given[POSITIONS] = position_ids
        inputs = {name: OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
        try:
            logits, *present = self._session.run_with_ort_values(
                [LOGITS, *self._present], inputs | cache.past
            )
        except Exception as error:  # onnxruntime's own classes derive from nothing narrower
            raise UserError(f"onnxruntime cannot run the model: {first_line(error)}") from None
        cache.past = dict(zip(self._past, present, strict=True))
        cache.mask, cache.lengths = whole, cache.lengths + mask.sum(1)
        return torch.from_numpy(logits.numpy()).float()


def session(path: Path | bytes) -> onnxruntime.InferenceSession:
    """A model in onnxruntime on the CPU, with as many threads as torch has.

    Raises:
        UserError: where onnxruntime does not take it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; they need not be printed, too
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin behind a run would take the processors from what comes next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(
            path if isinstance(path, bytes) else str(path),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:  # as above
        raise UserError(f"onnxruntime does not take {path!s}: {first_line(error)}") from None
