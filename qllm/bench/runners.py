"""Prefill and decode of our models and of transformers', one call each, for a clock around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from qllm.checkpoint.load import elements, module_bytes
from qllm.generate import Generator
from qllm.huggingface import HuggingFaceModel
from qllm.models import Decoder
from qllm.models.embeddings import QuantizedEmbedding
from qllm.models.mlp import MixtureOfExperts


class Runner(Protocol):
    """What is timed.

    Attributes:
        nbytes: of the weights.
        multiplied: weights that each token is multiplied by in the layers.
    """

    nbytes: int
    multiplied: int

    def read_bytes(self, rows: int) -> int | None:
        """Bytes of the weights that a pass of so many tokens reads; None: who knows which.

        How many experts they take together is their own choice.
        """

    def begin(self, rows: int, capacity: int) -> None:
        """Make an empty cache for `rows` sequences of up to `capacity` tokens."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Run whole prompts into the cache: logits (B, V) behind each."""

    def step(self, tokens: Tensor) -> Tensor:
        """Run one more token (B,) of each sequence: logits (B, V)."""


def read_bytes(model: Decoder) -> int:
    """Bytes of weights that a step of one sequence reads, which may lie on the meta device.

    Of a mixture of experts these are those that a token takes, as if all had as many bytes.
    """
    embed = model.embed
    if isinstance(embed, QuantizedEmbedding):
        tied = embed.linear is model.lm_head
    else:
        tied = getattr(model.lm_head, "weight", None) is embed.weight
    # Of an embedding that is not the LM head, too, a step reads a row.
    unread = 0 if tied else module_bytes(model.embed)
    return module_bytes(model) - unread - idle(model, module_bytes)


def multiplied(model: Decoder) -> int:
    """Weights of the layers that each token is multiplied with."""
    return elements(model.layers) - idle(model, elements)


def idle(model: Decoder, size: Callable[[nn.Module], int]) -> int:
    """The size of the experts that a token does not take, all being alike."""
    mixtures = (mlp for mlp in model.layers.modules() if isinstance(mlp, MixtureOfExperts))
    counts = ((mlp.experts, len(mlp.experts), mlp.top_k) for mlp in mixtures)
    return sum(size(experts) * (count - top_k) // count for experts, count, top_k in counts)


class ModelRunner:
    """A model with the verbs of a `Decoder`: one of our own, or an ONNX model."""

    def __init__(
        self,
        model: Generator,
        nbytes: int,
        read_bytes: int,
        multiplied: int,
        *,
        chooses: bool = False,
    ) -> None:
        self.model, self.nbytes, self.multiplied = model, nbytes, multiplied
        self.chooses, self._read_bytes = chooses, read_bytes

    def read_bytes(self, rows: int) -> int | None:
        return None if self.chooses and rows > 1 else self._read_bytes

    @classmethod
    def of_decoder(cls, model: Decoder) -> ModelRunner:
        sizes = module_bytes(model), read_bytes(model), multiplied(model)
        return cls(model, *sizes, chooses=model.config.experts is not None)

    def begin(self, rows: int, capacity: int) -> None:
        self.cache = self.model.new_cache(rows, capacity)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        return _whole(self.model.prefill(prompts, self.cache))

    def step(self, tokens: Tensor) -> Tensor:
        return _whole(self.model.decode(tokens, self.cache))


def _whole(logits: Tensor | None) -> Tensor:
    """Logits, which the last stage of several has, and a process by itself."""
    assert logits is not None
    return logits


class ReferenceRunner:
    """transformers' model, with its own cache."""

    def __init__(self, reference: HuggingFaceModel, like: ModelRunner) -> None:
        """
        Args:
            like: a runner of the same model, of whose weights each token meets as many.
        """
        self.model, self.nbytes = reference.model, reference.nbytes
        embed = reference.model.get_input_embeddings().weight
        assert isinstance(embed, Tensor)
        tied = reference.model.get_output_embeddings().weight is embed
        self.multiplied, self.chooses = like.multiplied, like.chooses
        self._read_bytes = self.nbytes - (0 if tied else embed.nbytes)

    def read_bytes(self, rows: int) -> int | None:
        return None if self.chooses else self._read_bytes

    def begin(self, rows: int, capacity: int) -> None:
        self.past = None

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        return self._run(torch.tensor([list(prompt) for prompt in prompts]))

    def step(self, tokens: Tensor) -> Tensor:
        return self._run(tokens[:, None])

    @torch.inference_mode()
    def _run(self, ids: Tensor) -> Tensor:
        out = self.model(
            ids.to(self.model.device), past_key_values=self.past, use_cache=True, logits_to_keep=1
        )
        self.past = out.past_key_values
        return out.logits[:, -1].float()
