"""transformers as the oracle: random models of a config, and how far ours may be from them.

A random model's weights are large enough for a mistake anywhere to show in the logits: norms'
weights are not 1, biases are not 0, attention is not uniform.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from qllm.checkpoint.load import load_model
from qllm.config import QuantPlan
from qllm.generate import generate
from qllm.generation_config import GenerationConfig
from qllm.models import Decoder

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Of cases where versions of transformers differ, and ours is as the one in requirements.txt.
IS_OLDER = Version(transformers.__version__) < Version("5.23")
not_by_older = pytest.mark.skipif(IS_OLDER, reason="transformers did otherwise before 5.23")

# Logits may differ by this share of their range (the largest minus the smallest).
# float32 itself is off by some 1e-6; what the project promises is 1e-4.
LOGITS_TOLERANCE = 2e-5
# Two tokens whose logits are closer than this, as a share of the range, are a tie in float32.
TIE = 1e-5


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A transformers model in float32 whose weights are drawn anew."""
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    # Experts one by one, for the product of all at once takes no sizes but multiples of 4.
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = auto.from_config(config, **eager).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or ".ln_" in name:
                parameter.copy_(noise * 0.3 + (1.0 if name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise * (0.4 if parameter.dim() == 2 else 0.3))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # Gemma 4's, which a file has as well
                buffer.copy_(0.5 + torch.rand(1, generator=generator))
    return model


def load(folder: Path, bitwidth: str = "16", **options) -> Decoder:
    """Our model of a folder in float32."""
    plan = options.pop("plan", None) or QuantPlan.parse(bitwidth)
    return load_model(folder, plan, **{"dtype": torch.float32, **options})


def save(model: PreTrainedModel, folder: Path) -> Decoder:
    """Write a transformers model to a folder, and read it as ours in float32."""
    model.save_pretrained(folder)
    return load(folder)


@cache
def pretrained(folder: Path) -> PreTrainedModel:
    """transformers' model of a folder in float32. Do not change either."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@cache
def bundled(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' bundled model of a family. Do not change it."""
    return AutoModelForCausalLM.from_pretrained(tiny(family), dtype=dtype).eval()


@cache
def our_bundled(family: str, bitwidth: str = "16", dtype: torch.dtype = torch.float32) -> Decoder:
    """Our bundled model of a family. Do not change it."""
    return load(tiny(family), bitwidth, dtype=dtype)


def draw_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, one prompt per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def pad_left(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """The batch as transformers takes it: ids and attention mask, both (B, longest)."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def forget_length(model: PreTrainedModel) -> None:
    """Undo what dynamic RoPE remembers of the longest sequence it has seen."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "original_inv_freq"):
            model.set_submodule(name, type(module)(module.config))


def depends_on_batch(model: PreTrainedModel) -> bool:
    """Whether transformers rotates all sequences of a batch as if they were as long as the longest.

    QLLM rotates each as if it were alone.
    """
    found = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = found.values() if all(isinstance(each, dict) for each in found.values()) else [found]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


@torch.no_grad()
def prefill_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """transformers' logits of all tokens, the pads left out: (N, V), in the prompts' order."""
    if len(prompts) > 1 and depends_on_batch(model):
        return torch.cat([prefill_logits(model, [prompt]) for prompt in prompts])
    forget_length(model)
    ids, mask = pad_left(prompts)
    options = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type != "bloom":  # which finds positions in the mask, and takes none
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(**options).logits
    return logits[mask.bool()].float()


@dataclass(frozen=True)
class Generated:
    """What transformers' greedy search found.

    Attributes:
        tokens: new ids of each row, up to and with its end of text.
        raw: new ids as they came, filled up with pads behind an end of text: (B, T).
        logits: of each step as the model gave them, (T, B, V).
        scores: of each step after the processors, (T, B, V).
    """

    tokens: list[list[int]]
    raw: Tensor
    logits: Tensor
    scores: Tensor


@torch.no_grad()
def reference(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    eos: Sequence[int] | None = (),
    pad: int = 0,
    **settings,
) -> Generated:
    """Greedy search by transformers, all prompts in one left-padded batch.

    Args:
        eos: ids that end a text; None leaves them to the model's generation_config.
    """
    if len(prompts) > 1 and depends_on_batch(model):
        rows = [reference(model, [prompt], eos, pad, **settings) for prompt in prompts]
        return Generated(
            [row.tokens[0] for row in rows],
            torch.cat([row.raw for row in rows]),
            torch.cat([row.logits for row in rows], dim=1),
            torch.cat([row.scores for row in rows], dim=1),
        )
    forget_length(model)
    ids, mask = pad_left(prompts, pad)
    if eos is None:
        eos = model.generation_config.eos_token_id
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    else:
        settings["eos_token_id"] = list(eos) or None
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **settings,
    )
    raw = output.sequences[:, ids.shape[1] :]
    tokens = [cut(row, eos) for row in raw.tolist()]
    return Generated(tokens, raw, torch.stack(output.logits), torch.stack(output.scores))


def cut(tokens: list[int], eos: Sequence[int]) -> list[int]:
    """Tokens up to and with the first end of text."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))]


def spread(logits: Tensor) -> float:
    """The range of logits; those that a processor forbade do not count."""
    finite = logits[logits.isfinite()]
    return (finite.max() - finite.min()).item()


def assert_logits_close(ours: Tensor, theirs: Tensor, tolerance: float = LOGITS_TOLERANCE) -> None:
    """Equal shapes, no NaN, and no logit further away than `tolerance` of the range."""
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    assert ours.isfinite().all()
    distance = (ours - theirs).abs().max().item() / spread(theirs)
    assert distance < tolerance, f"logits differ by {distance:.1e} of their range"


def assert_tokens_equal(ours: list[list[int]], theirs: Generated) -> None:
    """Equal tokens; from a place on where transformers itself had a tie, a row may differ."""
    assert len(ours) == len(theirs.tokens)
    for row, (got, want) in enumerate(zip(ours, theirs.tokens, strict=True)):
        if got == want:
            continue
        pairs = zip(got, want, strict=False)
        step = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        assert step is not None, f"row {row} ends at {len(got)}, not {len(want)}: {got} {want}"
        scores = theirs.scores[step, row]
        first, second = scores.topk(2).values.tolist()
        tie = (first - second) / spread(scores)
        assert tie < TIE, f"row {row} has {got}, not {want}; step {step} is no tie ({tie:.1e})"


def decode_logits(model: Decoder, prompts: Sequence[Sequence[int]], forced: Tensor) -> Tensor:
    """Our logits of each step when the tokens (B, T) are given: (T, B, V)."""
    steps = forced.shape[1]
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + steps)
    logits = [model.prefill(prompts, cache)]
    logits += [model.decode(forced[:, step], cache) for step in range(steps - 1)]
    return torch.stack(logits)


def assert_same_model(
    ours: Decoder,
    theirs: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    tolerance: float = LOGITS_TOLERANCE,
) -> Generated:
    """Prefill of all positions, each decode step, and the tokens of greedy search agree."""
    assert_logits_close(
        ours.prefill(prompts, last=False), prefill_logits(theirs, prompts), tolerance
    )
    want = reference(theirs, prompts, max_new_tokens=new_tokens)
    assert_logits_close(decode_logits(ours, prompts, want.raw), want.logits, tolerance)
    got = generate(ours, prompts, GenerationConfig(max_new_tokens=new_tokens))
    assert_tokens_equal(got, want)
    return want


def layer_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linears that a bitwidth applies to: those of the layers, not the head or projections."""
    outside = ("lm_head", "project_in", "project_out")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in outside
    }
