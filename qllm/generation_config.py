"""How long to generate, and what to avoid: what generation_config.json says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qllm.checkpoint.reader import read_json
from qllm.config import ModelConfig
from qllm.models import RawConfig
from qllm.models.multimodal import TEXT_CONFIG, multimodal_type
from qllm.progress import Note, silent
from qllm.sampling import Sampling

# What transformers generates when nothing says how much.
DEFAULT_NEW_TOKENS = 20

# Settings of generation_config.json that would change what is generated and are not applied here,
# and the value, besides null, at which they do nothing.
NOT_APPLIED = {
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": {},
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1,
    "num_beams": 1,
    "stop_strings": [],
    "watermarking_config": None,
    "penalty_alpha": 0,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "num_return_sequences": 1,
    "max_time": None,
    "token_healing": False,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "top_h": None,
}


@dataclass(frozen=True)
class GenerationConfig:
    """How long to generate, and what to avoid; lengths count as transformers counts them.

    Attributes:
        max_new_tokens: how many tokens at the most; wins over max_length.
        max_length: the same, the longest prompt of the batch included.
        min_length: no end of text before this length, the longest prompt included.
        min_new_tokens: no end of text before this many new tokens; wins over min_length.
        eos_token_ids: each of them ends a text.
        repetition_penalty: divides positive logits of tokens seen so far, multiplies negative
            ones (Keskar et al. 2019).
        sampling: how tokens are drawn; None: the largest logit is taken.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_length: int = 0
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    sampling: Sampling | None = None

    def new_tokens(self, longest: int) -> int:
        """How many tokens a batch may get whose longest prompt has `longest`."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is not None:
            return max(0, self.max_length - longest)
        return DEFAULT_NEW_TOKENS

    def min_tokens(self, longest: int) -> int:
        """How many tokens a batch whose longest prompt has `longest` gets before a text may end."""
        return self.min_new_tokens or self.min_length - longest


def read_sampling(folder: Path) -> Sampling:
    """How a checkpoint's generation_config.json would have tokens drawn.

    Raises:
        UserError: for values that are no numbers.
    """
    path = folder / "generation_config.json"
    return Sampling.read(RawConfig(read_json(path), str(path))) if path.exists() else Sampling()


def read_generation_config(
    folder: Path, config: ModelConfig, note: Note = silent
) -> GenerationConfig:
    """The settings of a checkpoint: generation_config.json, else those that config.json has.

    Args:
        note: called with a line for settings that would change the result and are not applied.

    Raises:
        UserError: for values that cannot be.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        path = folder / "config.json"
    if not path.exists():
        return GenerationConfig(eos_token_ids=config.eos_token_ids)
    values = read_json(path)
    if multimodal_type(values.get("model_type")) and isinstance(values.get(TEXT_CONFIG), dict):
        own = {key: value for key, value in values.items() if value is not None}
        values = {**values[TEXT_CONFIG], **own}
    raw = RawConfig(values, str(path))
    ignored = [
        key for key, neutral in NOT_APPLIED.items() if raw.values.get(key) not in (None, neutral)
    ]
    if ignored:
        note(f"{path.name} sets {', '.join(ignored)}, which QLLM does not apply")
    lengths: dict[str, Any] = {
        key: raw.count(key)
        for key in ("max_new_tokens", "max_length", "min_length", "min_new_tokens")
        if raw.values.get(key) not in (None, 0)
    }
    return GenerationConfig(
        **lengths,
        eos_token_ids=raw.tokens("eos_token_id"),
        repetition_penalty=raw.number("repetition_penalty", 1.0),
    )
