"""QLLM's models in lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

    python3 -m qllm.harness --model qllm --model_args path=DIR,bitwidth=4 --tasks lambada_openai

is `lm_eval` with one more model: the harness has no plug-ins, so that code which has run must
enter a model into its table, and this is the command that does. Python code calls `register()`.
Log-likelihoods are those of `qllm.evaluate`; they equal the harness's own of the same weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qllm import stopping
from qllm.config import DEFAULT_GROUP_SIZE, DEFAULT_KV_BITS, DEFAULT_SCHEME
from qllm.errors import UserError
from qllm.evaluate.lambada import continuation
from qllm.evaluate.perplexity import PerplexityOptions, Text, cut
from qllm.evaluate.scoring import ScoringRequest, score
from qllm.generate import generate
from qllm.generation_config import GenerationConfig
from qllm.llm import LLM
from qllm.sampling import MAX_SEED, Sampling

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

NEW_TOKENS = 256  # as the harness has it


class Methods:
    """What the harness asks of a model; `HarnessModel` is this and the harness's own class."""

    def __init__(
        self,
        path: str,
        bitwidth: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 8,
        group_size: int = DEFAULT_GROUP_SIZE,
        scheme: str = DEFAULT_SCHEME,
        kv_bits: int | str = DEFAULT_KV_BITS,
        max_batch_size: int | None = None,
    ) -> None:
        """
        Args:
            path: a folder or a Hub repository; one that is quantized goes without a bitwidth.
            bitwidth: a value, or a JSON plan; None is 16, or what a quantized model has.
            kv_bits: of keys and values, 16, 8 or 4.
            device: "cpu", "cuda" or "cuda:1"; the CPU where there is no other, or None is given.
            batch_size: requests per forward call; "auto" is 8. It changes no result.
            max_batch_size: what the harness passes on; nothing here grows by itself.

        Raises:
            UserError: see `LLM.from_pretrained`.
        """
        super().__init__()
        self.llm = LLM.from_pretrained(
            path,
            bitwidth=None if bitwidth is None else str(bitwidth),
            group_size=int(group_size),
            scheme=scheme,
            kv_bits=int(kv_bits),
            dtype=None if dtype == "auto" else dtype,
            device=device if device and torch.cuda.is_available() else "cpu",
        )
        self.model, self.tokens = self.llm.model, self.llm.tokenizer
        self.batch = 8 if str(batch_size).startswith("auto") else int(batch_size)
        self.path = str(path)

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer's cached requests from another's."""
        return self.path

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-likelihood, and whether greedy search says it."""
        longest = self.model.config.max_positions
        continuations = [
            continuation(self.tokens, context, text, longest, f"request {number}")
            for number, (context, text) in enumerate((each.args for each in requests), 1)
        ]
        found = self._score(continuations, disable_tqdm, greedy=True)
        return [(-each.loss, each.greedy is True) for each in found]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of each text: the log-likelihood of all of its tokens."""
        found = []
        for request in requests:
            (text,) = request.args
            encoded = Text.encode(text, self.tokens)
            (part,) = cut(encoded, self.model.config, PerplexityOptions(("word",)))
            windows = list(part.windows.requests(part.windows.windows))
            found.append(-math.fsum(s.loss for s in self._score(windows, disable_tqdm)))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, settings): text, up to one of the settings' `until`.

        Greedy, or with `do_sample` drawn by the settings and those of generation_config.json; the
        seed is the harness's own. A context that comes again is drawn anew.
        """
        from tqdm import tqdm

        asked: list[tuple[str, dict[str, Any]]] = [request.args for request in requests]
        again: Counter[str] = Counter()
        texts = []
        for context, settings in tqdm(asked, disable=disable_tqdm, desc="generating"):
            texts.append(self._generate(context, settings, again[context]))
            again[context] += 1
        return texts

    def _generate(self, context: str, settings: dict[str, Any], time: int) -> str:
        """
        Args:
            time: how often the context has come before.
        """
        count = int(settings.get("max_gen_toks", NEW_TOKENS))
        window = self.model.config.max_positions
        max_length = None if window is None else window - count
        if max_length is not None and max_length < 1:
            raise UserError(
                f"max_gen_toks {count} leaves no token for a prompt in the model's window of "
                f"{window}"
            )
        prompt = self.tokens.encode(context, max_length)
        if not prompt and self.tokens.prefix_token_id is not None:
            prompt = [self.tokens.prefix_token_id]
        eos = self.model.config.eos_token_ids
        config = GenerationConfig(count, eos_token_ids=eos, sampling=self._sampling(settings, time))
        until = settings.get("until") or []
        ends = [end for end in ([until] if isinstance(until, str) else until) if end]
        stop = stopping.StopStrings(self.tokens, [prompt], ends) if ends else None
        (ids,) = generate(self.model, [prompt], config, stop=stop)
        return stopping.cut(self.tokens.continuation(list(prompt), ids), ends)

    def _sampling(self, settings: dict[str, Any], time: int) -> Sampling | None:
        """How tokens are drawn; None: the likeliest is taken."""
        given = {name: settings.get(name) for name in ("temperature", "top_k", "top_p", "min_p")}
        if not settings.get("do_sample") or given["temperature"] == 0:
            return None
        given["seed"] = torch.initial_seed() & MAX_SEED
        sampling = self.llm.pretrained.generation_with(**given).sampling
        return None if sampling is None else sampling.repeated(time)

    def _score(
        self, requests: Sequence[ScoringRequest], quiet: bool, *, greedy: bool = False
    ) -> Iterator:
        """Scores in order, with a bar; requests of like length share a forward call."""
        from tqdm import tqdm

        bar = tqdm(requests, disable=quiet, desc="scoring")
        return score(self.model, bar, self.batch, greedy=greedy)


def __getattr__(name: str) -> type:
    """`HarnessModel`, made when it is asked for: the harness is not among QLLM's requirements."""
    if name != "HarnessModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lm_eval.api.model import LM

    return type(name, (Methods, LM), {})


def register() -> None:
    """Enter the model "qllm" into the harness's table; it is imported when it is asked for."""
    from lm_eval.api.registry import model_registry

    if "qllm" not in model_registry:
        model_registry.register("qllm", target="qllm.harness:HarnessModel")


def main() -> None:
    """The harness's own command."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError(
            "lm-evaluation-harness is not installed; pip install lm_eval installs it"
        ) from None
    register()
    cli_evaluate()


if __name__ == "__main__":
    from qllm import cli

    cli.run(main)
