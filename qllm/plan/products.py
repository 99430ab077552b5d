"""What products with a model's matrices take on a device: all of them, or the experts that run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qllm.config import EMBEDDING, QuantSpec
from qllm.models.mlp import EXPERTS, SHARED
from qllm.plan.devices import Size, Speed
from qllm.plan.modules import EACH
from qllm.plan.sensitivity import Array
from qllm.plan.shape import Shape, is_head, sees_last_token

FIRST = (f"{EXPERTS}{EACH}.up", f"{SHARED}up")  # matrices of experts, one of each


@dataclass(frozen=True, eq=False)
class Products:
    """Those of a model that is asked something.

    Attributes:
        prompts: sequences whose prompts go through at once.
        tokens: of all of them.
        rows: sequences of a step, or their mean.
        held: bytes that a step reads on a machine, by which caches keep them or do not.
    """

    shape: Shape
    candidates: Sequence[QuantSpec]
    prompts: int
    tokens: int
    rows: float
    held: float

    @classmethod
    def of(
        cls,
        shape: Shape,
        candidates: Sequence[QuantSpec],
        sequences: tuple[int, float],
        prompt: int,
        cache: float,
        machines: int,
    ) -> Products:
        """
        Args:
            sequences: whose prompts go through at once, and of a step.
            prompt: tokens of each.
            cache: bytes of keys and values.
            machines: that share the model.
        """
        prompts, rows = sequences
        read = [shape.products(m, rows)[0] / count for m, count in enumerate(shape.counts)]
        held = float((np.median(shape.nbytes, axis=1) * read).sum() + cache)
        held += sum(nbytes for _, _, nbytes in shape.routers)
        if shape.head is not None:
            held += shape.head[1]
        return cls(shape, candidates, prompts, prompts * prompt, rows, held / machines)

    def seconds(self, speed: Speed) -> tuple[Array, Array]:
        """Of each module's prompts and step, as each candidate has it: (M, C) each."""
        shape = self.shape
        prefill, decode = np.zeros((2, *shape.nbytes.shape))
        for m, name in enumerate(shape.modules):
            if name == EMBEDDING and not shape.config.tied_head:
                continue  # rows are looked up, which takes no time
            tokens = self._tokens(name)
            for c in range(len(self.candidates)):
                prefill[m, c] = self._seconds(speed, m, c, tokens, decode=is_head(name))
                decode[m, c] = self._seconds(speed, m, c, self.rows, decode=True)
        return prefill, decode

    def _tokens(self, name: str) -> int:
        """That a linear sees of prompts."""
        last = sees_last_token(name, self.shape.config.num_layers)
        return self.prompts if last else self.tokens

    def _seconds(self, speed: Speed, m: int, c: int, tokens: float, *, decode: bool) -> float:
        read, each = self.shape.products(m, tokens)
        return read * speed.linear(*self._matrix(m, c), each, decode=decode, model=self.held)

    def _matrix(self, m: int, c: int) -> tuple[QuantSpec, Size, int]:
        """What `Speed.linear` is told of one of a module's matrices."""
        inputs, outputs = map(int, self.shape.sizes[m])
        nbytes = int(self.shape.nbytes[m, c] / self.shape.counts[m])
        return self.candidates[c], (inputs, outputs), nbytes

    def of_one_row(self, speed: Speed, step: Array) -> float:
        """What all of a step's products together would take if each matrix had one row.

        Args:
            step: (M, C), of `seconds`: what takes nothing is left out.
        """
        total = 0.0
        for m, c in np.argwhere(step):
            read, _ = self.shape.products(int(m), self.rows)
            total += read * speed.linear(*self._matrix(m, c), 1, decode=True, model=self.held)
        return total

    def experts(self, speed: Speed) -> tuple[Array, Array]:
        """Of what is beside experts' products, for each half of a layer: (H,) each.

        The matrices that choose them, and the calls of those that are chosen.
        """
        shape, halves = self.shape, len(self.shape.fixed)
        prefill, decode = np.zeros((2, halves))
        for m, name in enumerate(shape.modules):
            if not name.endswith(FIRST):
                continue
            half, channels = int(shape.half_of[m]), int(shape.sizes[m, 0])
            ends = (prefill, self._tokens(name), False), (decode, self.rows, True)
            for table, tokens, decoding in ends:
                read, each = shape.products(m, tokens)
                table[half] += speed.experts(read, read * each * channels, decode=decoding)
        for half, size, nbytes in self.shape.routers:
            router, tokens = (QuantSpec(), size, nbytes), self.tokens
            if half == halves - 1:
                tokens = self.prompts
            prefill[half] += speed.linear(*router, tokens, decode=False, model=self.held)
            decode[half] += speed.linear(*router, self.rows, decode=True, model=self.held)
        return prefill, decode
