"""How far a model is from a reference: distributions, likeliest tokens, greedy text, layers.

Of the reference only hidden states are kept, and its LM head: models are compared with it one
after the other, and at no time is more than one of them in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qllm.config import ModelConfig
from qllm.data import sample_windows
from qllm.evaluate.scoring import Predictor, logit_pieces
from qllm.generate import generate
from qllm.generation_config import GenerationConfig
from qllm.models import Decoder
from qllm.models.logits import finish_logits
from qllm.report import first_difference

PERCENTILES = (50, 90, 99)
# Of a text: prompts that are continued, and tokens whose every distribution is compared.
PROMPTS, TOKENS = 64, 16384
SAMPLES = 3  # prompts whose continuation is shown
LAYER_TOKENS = 512  # of the first sequence, of which each layer's output is compared

Progress = Callable[[list], Iterable]


class ReferenceModel(Predictor, Protocol):
    """What a reference has besides: `DecoderReference`, or transformers' model."""

    def layers(self) -> Sequence[nn.Module]:
        """The layers, whose outputs are compared."""

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """The `count` tokens that follow each prompt, whatever ends a text."""

    def head(self) -> Callable[[Tensor], Tensor]:
        """`logits`, without the layers."""


class DecoderReference:
    """One of our own models as a reference."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.config = model, model.config
        self.hidden, self.logits = model.hidden, model.logits

    def layers(self) -> Sequence[nn.Module]:
        return list(self.model.layers)

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        return generate(self.model, prompts, GenerationConfig(max_new_tokens=count))

    def head(self) -> Callable[[Tensor], Tensor]:
        model = self.model
        lm_head, project, norm = model.lm_head, model.project_out, model.final_norm
        config = self.config

        @torch.inference_mode()
        def logits(x: Tensor) -> Tensor:
            return finish_logits(config, lm_head(project(norm(x))))

        return logits


def cut_text(
    ids: Sequence[int], window: int, prompt_length: int
) -> tuple[list[Sequence[int]], list[list[int]]]:
    """The sequences of a text that are compared, and prompts drawn from it.

    Args:
        ids: its tokens, of which the first TOKENS are taken.
        window, prompt_length: tokens of each sequence and prompt; of a shorter text, all it has.
    """
    ids = ids[:TOKENS]
    window, prompt_length = min(window, len(ids)), min(prompt_length, len(ids))
    sequences = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]
    return sequences, sample_windows(list(ids), PROMPTS, prompt_length, seed=1)


@dataclass(frozen=True)
class ReferenceOutputs:
    """What a reference model said.

    Attributes:
        sequences: token lists whose every next-token distribution is compared.
        hidden: its hidden states for them.
        logits: its LM head.
        layers: (T, C) behind each layer, for the first LAYER_TOKENS tokens of the first sequence.
        prompts: token lists that are continued.
        tokens: what it continues them with.
    """

    config: ModelConfig
    sequences: list[Sequence[int]]
    hidden: list[Tensor]
    logits: Callable[[Tensor], Tensor]
    layers: list[Tensor]
    prompts: list[Sequence[int]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: ReferenceModel,
        sequences: Sequence[Sequence[int]],
        prompts: Sequence[Sequence[int]] = (),
        new_tokens: int = 0,
        progress: Progress = iter,
    ) -> ReferenceOutputs:
        """Run a reference model.

        Args:
            sequences: one or more token lists.
            prompts: token lists to be continued by `new_tokens` tokens.
        """
        sequences = list(sequences)
        hidden = [model.hidden([sequence]) for sequence in progress(sequences)]
        tokens = model.greedy(prompts, new_tokens) if prompts else []
        outputs = layer_outputs(model, model.layers(), sequences[0][:LAYER_TOKENS])
        return cls(model.config, sequences, hidden, model.head(), outputs, list(prompts), tokens)


def agreement(
    model: Decoder, reference: ReferenceOutputs, progress: Progress = iter
) -> dict[str, Any]:
    """How a model agrees with a reference.

    Returns:
        `kl`: Kullback-Leibler divergence D(reference || model) of the next-token distributions, in
        nats, its `mean`, percentiles (`p50`, `p90`, `p99`) and `max`; `same_top`: the share of
        positions with the same likeliest token; `positions`: how many there were; `layers`: the
        relative error of the output of each layer. With prompts, `prefix`: how many greedy tokens
        agree before the first that does not: `mean`, `median`, `min`, `of`, and the number of
        `prompts`; `samples`: the tokens that continue the first of them.
    """
    parts = list(zip(reference.sequences, reference.hidden, strict=True))
    divergences, equal = [], []
    for sequence, expected in progress(parts):
        for kl, same in _compare(model, reference, sequence, expected):
            divergences.append(kl)
            equal.append(same)
    kl = torch.cat(divergences)
    outputs = layer_outputs(model, list(model.layers), reference.sequences[0][:LAYER_TOKENS])
    found: dict[str, Any] = {
        "kl": {
            "mean": kl.mean().item(),
            **{f"p{share}": quantile(kl, share / 100) for share in PERCENTILES},
            "max": kl.max().item(),
        },
        "same_top": torch.cat(equal).double().mean().item(),
        "positions": len(kl),
        "layers": [
            ((ours - theirs).norm() / theirs.norm()).item()
            for ours, theirs in zip(outputs, reference.layers, strict=True)
        ],
    }
    if reference.prompts:
        count = len(reference.tokens[0])
        tokens = generate(model, reference.prompts, GenerationConfig(max_new_tokens=count))
        pairs = zip(tokens, reference.tokens, strict=True)
        lengths = [
            count if first is None else first
            for first in (first_difference(*pair) for pair in pairs)
        ]
        common = torch.tensor(lengths, dtype=torch.float64)
        found["prefix"] = {
            "mean": common.mean().item(),
            "median": quantile(common, 0.5),
            "min": min(lengths),
            "of": count,
            "prompts": len(lengths),
        }
        found["samples"] = tokens[:SAMPLES]
    return found


@torch.inference_mode()
def _compare(
    model: Decoder, reference: ReferenceOutputs, sequence: Sequence[int], expected: Tensor
) -> Iterable[tuple[Tensor, Tensor]]:
    """Divergences, and whether the likeliest tokens are the same, piece by piece."""
    theirs = logit_pieces(reference.logits, expected, reference.config.vocab_size)
    ours = logit_pieces(model.logits, model.hidden([sequence]), reference.config.vocab_size)
    for found, wanted in zip(ours, theirs, strict=True):
        p, q = wanted.log_softmax(-1), found.log_softmax(-1)
        kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        # Rounding may leave a little less than nothing of two that are the same.
        yield kl.double().clamp(min=0).cpu(), (p.argmax(-1) == q.argmax(-1)).cpu()


def quantile(values: Tensor, share: float) -> float:
    """The value that a share of all are not above: float64 (N,), any N."""
    index = min(len(values) - 1, int(share * len(values)))
    return values.kthvalue(index + 1).values.item()


def layer_outputs(
    model: Predictor, layers: Sequence[nn.Module], tokens: Sequence[int]
) -> list[Tensor]:
    """float32 (T, C) behind each layer."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor | tuple) -> None:
        output = output[0] if isinstance(output, tuple) else output
        outputs.append(output.detach().reshape(len(tokens), -1).float().cpu())

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        model.hidden([tokens])
    finally:
        for handle in handles:
            handle.remove()
    return outputs
