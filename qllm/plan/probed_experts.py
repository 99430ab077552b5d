"""What a prompt takes in a mixture of experts besides products: each expert, and what it takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from qllm.config import QuantSpec
from qllm.layers import Linear
from qllm.models import RawConfig, read_config
from qllm.models.mlp import MixtureOfExperts
from qllm.plan.random_model import random_linear
from qllm.plan.timing import undisturbed

CHANNELS, INNER, EXPERTS, TOP_K = 256, 64, 8, 2
# Of prompts: few, and so many that what is moved for them counts.
TOKENS = (32, 1024)


class ProbedExperts:
    """A mixture of random weights, and what calls of it took.

    Attributes:
        times: seconds of each round, of prompts of TOKENS: of the whole, and of products alone.
    """

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        raw = {"model_type": "mixtral", "vocab_size": 64, "num_hidden_layers": 1}
        raw |= {"hidden_size": CHANNELS, "intermediate_size": INNER, "num_attention_heads": 4}
        raw |= {"num_key_value_heads": 4, "num_local_experts": EXPERTS}
        raw |= {"num_experts_per_tok": TOP_K}

        def make(name: str, inputs: int, outputs: int, bias: bool) -> Linear:
            linear = random_linear(QuantSpec(), (inputs, outputs), dtype, device)
            linear.process_weights_after_loading()
            return linear

        self._mixture = MixtureOfExperts(read_config(RawConfig(raw, "the probe")), "mlp", make)
        self._inputs = {
            tokens: torch.randn(tokens, CHANNELS, dtype=dtype, device=device) for tokens in TOKENS
        }
        self.times: defaultdict[tuple[int, bool], list[float]] = defaultdict(list)

    def calls(self) -> Iterator[tuple[tuple[int, bool], Callable[[], object]]]:
        """By tokens, and whether they are the whole: a prompt's way, or its products alone."""
        for tokens, x in self._inputs.items():
            yield (tokens, True), partial(self._mixture, x)
            yield (tokens, False), partial(self._products, x)

    def _products(self, x: Tensor) -> None:
        """Those that are known of elsewhere, of as many tokens as an expert has on the mean."""
        self._mixture.router(x)
        rows = x[: len(x) * TOP_K // EXPERTS]
        for expert in self._mixture.mlps():
            inner = expert.up(rows)
            expert.down(inner[:, :INNER].contiguous())

    def seconds(self) -> tuple[float, float]:
        """Of an expert, and of a value that it takes, which is one of a token's channels."""
        if not self.times:
            return 0.0, 0.0
        few, many = (
            max(0.0, undisturbed(self.times[n, True]) - undisturbed(self.times[n, False]))
            for n in TOKENS
        )
        value = max(0.0, many - few) / ((TOKENS[1] - TOKENS[0]) * TOP_K * CHANNELS)
        return max(0.0, few - value * TOKENS[0] * TOP_K * CHANNELS) / EXPERTS, value
