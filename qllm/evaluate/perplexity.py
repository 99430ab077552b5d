"""Perplexity of a text, in the conventions that people compare with."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from qllm.config import ModelConfig
from qllm.errors import UserError
from qllm.evaluate.scoring import DEFAULT_BATCH, Predictor, ScoringRequest, score
from qllm.tokenizer import Tokenizer

LONGEST_WINDOW = 2048  # where neither the user nor the model says one
LLAMA_CPP_WINDOW = 512
# Texts of as many windows, drawn from those there are, that say how far a figure is from certain.
RESAMPLES = 1000


@dataclass(frozen=True)
class Text:
    """A text, and its tokens for one model.

    Attributes:
        ids: with the special tokens that the tokenizer puts in front.
        added_bos_id: the token that the tokenizer puts in front of every text; None where it puts
            none.
        prefix_token_id: the token that stands for what comes before a text.
        tail: the token that the tokenizer put behind this one; None where it put none.
    """

    text: str
    ids: Sequence[int]
    added_bos_id: int | None = None
    prefix_token_id: int | None = None
    tail: int | None = None

    @classmethod
    def encode(cls, text: str, tokenizer: Tokenizer, max_tokens: int | None = None) -> Text:
        """
        Args:
            max_tokens: tokens, of a longer text its first; None for all.
        """
        ids, tail = tokenizer.encode(text), tokenizer.tail
        if max_tokens is not None and max_tokens < len(ids):
            ids, tail = ids[:max_tokens], None
            text = tokenizer.decode(ids)
        return cls(text, ids, tokenizer.added_bos_id, tokenizer.prefix_token_id, tail)


class Window(NamedTuple):
    """What one forward call reads of a text, and which tokens it predicts.

    Attributes:
        begin, end: the tokens that are read, ids[begin:end].
        first, last: those that are predicted, ids[first:last], each by the one in front of it.
    """

    begin: int
    end: int
    first: int
    last: int


class Windows(NamedTuple):
    """A text in windows.

    Attributes:
        replacement: the token that takes the place of each window's first, None for none.
    """

    ids: Sequence[int]
    windows: list[Window]
    replacement: int | None = None

    def requests(self, windows: Iterable[Window]) -> Iterator[ScoringRequest]:
        """What is scored of these windows."""
        for begin, end, first, last in windows:
            tokens = list(self.ids[begin:end])
            if self.replacement is not None:
                tokens[0] = self.replacement
            yield ScoringRequest(tokens, first - 1 - begin, self.ids[first:last])


@dataclass(frozen=True)
class PerplexityMethod:
    """A way to measure perplexity.

    Attributes:
        about: in a few words.
        window: the longest window where none is given.
        cut: (text, window, stride) to the windows.
        count: what the loss is divided by: of the text, None for the predicted tokens.
        whole: whether a last window that is shorter is left out.
    """

    about: str
    cut: Callable[[Text, int, int], Windows]
    window: int = LONGEST_WINDOW
    count: Callable[[str], int] | None = None
    whole: bool = False


def _disjoint(text: Text, window: int, stride: int) -> Windows:
    """GPTQ's (Frantar et al. 2023): the last, shorter window is left out, and the first token of
    each window is not predicted."""
    starts = range(0, len(text.ids) - window + 1, window)
    return Windows(text.ids, [Window(s, s + window, s + 1, s + window) for s in starts])


def _strided(text: Text, window: int, stride: int) -> Windows:
    """Windows that overlap, as in https://huggingface.co/docs/transformers/perplexity: each token
    is predicted once, with at least window - stride others in front where the text has them. The
    first is not, nor is that of any window if they do not overlap."""
    windows: list[Window] = []
    done, size = 1, len(text.ids)
    for begin in range(0, size, stride):
        end = min(begin + window, size)
        first = max(done, begin + 1)  # what stands in front of `begin` is not read
        if first < end:
            windows.append(Window(begin, end, first, end))
        done = end
        if end == size:
            break
    return Windows(text.ids, windows)


def _second_halves(text: Text, window: int, stride: int) -> Windows:
    """llama.cpp's `llama-perplexity`: windows that do not overlap, of which the second half is
    predicted; where the tokenizer puts a token in front of a text, it begins each window."""
    starts = range(0, len(text.ids) - window + 1, window)
    windows = [Window(s, s + window, s + window // 2 + 1, s + window) for s in starts]
    return Windows(text.ids, windows, text.added_bos_id)


def _rolling(text: Text, window: int, stride: int) -> Windows:
    """lm-evaluation-harness's rolling windows: every token of the text is predicted, the first
    one after it; the last window reaches back as far as the others."""
    assert text.prefix_token_id is not None  # as every encoded text has one
    ids = [text.prefix_token_id, *(text.ids if text.tail is None else text.ids[:-1])]
    size, windows = len(ids) - 1, []
    for done in range(0, size, window):
        end = min(done + window, size)
        windows.append(Window(max(0, end - window), end, done + 1, end + 1))
    return Windows(ids, windows)


def count_words(text: str) -> int:
    """Words as lm-evaluation-harness counts them: pieces between runs of white space."""
    return len(re.split(r"\s+", text))


def count_bytes(text: str) -> int:
    """Bytes in UTF-8."""
    return len(text.encode())


CONVENTIONS: dict[str, PerplexityMethod] = {
    "gptq": PerplexityMethod("disjoint windows, as in GPTQ", _disjoint, whole=True),
    "strided": PerplexityMethod("overlapping windows, as in transformers' documentation", _strided),
    "llama.cpp": PerplexityMethod(
        "second half of each window, as in llama.cpp", _second_halves, LLAMA_CPP_WINDOW, whole=True
    ),
    "word": PerplexityMethod("per word, as in lm-evaluation-harness", _rolling, count=count_words),
    "byte": PerplexityMethod("per byte, as in lm-evaluation-harness", _rolling, count=count_bytes),
}


@dataclass(frozen=True)
class PerplexityOptions:
    """How to measure it.

    Attributes:
        conventions: names of CONVENTIONS.
        window: tokens that are read at once; None is the convention's, or the model's where that
            is less.
        stride: of the strided convention; None is half the window.
        batch: windows that may share a forward call.
    """

    conventions: tuple[str, ...] = ("gptq",)
    window: int | None = None
    stride: int | None = None
    batch: int = DEFAULT_BATCH


class Cut(NamedTuple):
    """A text as one or more conventions read it.

    Attributes:
        names: of the conventions.
        window, stride: in tokens; stride is None where the convention has none.
    """

    names: tuple[str, ...]
    window: int
    stride: int | None
    windows: Windows

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        return sum(window.last - window.first for window in self.windows.windows)


class Estimate(NamedTuple):
    """A perplexity, and its standard error; None where the text is one window."""

    value: float
    error: float | None


def perplexity(
    model: Predictor,
    text: Text,
    options: PerplexityOptions = PerplexityOptions(),
    progress: Callable[[list], Iterable] = iter,
) -> dict[str, float]:
    """exp of the mean negative log-likelihood, by convention.

    Args:
        progress: wraps the windows of each pass over the text.

    Raises:
        UserError: see `cut`.
    """
    return {name: found.value for name, found in estimate(model, text, options, progress).items()}


def estimate(
    model: Predictor,
    text: Text,
    options: PerplexityOptions = PerplexityOptions(),
    progress: Callable[[list], Iterable] = iter,
) -> dict[str, Estimate]:
    """`perplexity`, with the standard error that the choice of the text's windows leaves."""
    found = {}
    for part in cut(text, model.config, options):
        windows = part.windows.windows
        requests = part.windows.requests(progress(windows))
        losses = [each.loss for each in score(model, requests, options.batch)]
        total, resamples = math.fsum(losses), resampled(losses, [w.last - w.first for w in windows])
        for name in part.names:
            count = CONVENTIONS[name].count
            divisor = count(text.text) if count else part.tokens
            values = [exp(each * part.tokens / divisor) for each in resamples]
            error = torch.tensor(values, dtype=torch.float64).std().item() if values else None
            found[name] = Estimate(exp(total / divisor), error)
    return {name: found[name] for name in options.conventions}


def resampled(losses: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """Mean losses per token of texts drawn from the windows of one (the bootstrap of Efron 1979).

    Args:
        losses, tokens: of each window, summed up.

    Returns:
        RESAMPLES of them, the same for the same windows; none for one window.
    """
    if len(losses) < 2:
        return []
    draw = torch.Generator().manual_seed(0)
    sums = torch.tensor([losses, tokens], dtype=torch.float64)
    means = []
    for _ in range(RESAMPLES):
        chosen = torch.randint(len(losses), (len(losses),), generator=draw)
        loss, count = sums[:, chosen].sum(1).tolist()
        means.append(loss / count)
    return means


def exp(value: float) -> float:
    """math.exp, infinite where that overflows."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def cut(text: Text, config: ModelConfig, options: PerplexityOptions) -> list[Cut]:
    """A text's windows for each convention; conventions with the same windows share them.

    Raises:
        UserError: for a convention that is not known, a window that the model cannot take, a
            stride that leaves tokens out, a text that is too short.
    """
    cuts: dict[Callable, Cut] = {}
    for name in options.conventions:
        if name not in CONVENTIONS:
            known = ", ".join(CONVENTIONS)
            raise UserError(f"perplexity convention {name!r} is unknown; choose from {known}")
        convention = CONVENTIONS[name]
        if convention.cut in cuts:
            before = cuts[convention.cut]
            cuts[convention.cut] = before._replace(names=(*before.names, name))
            continue
        window = _window(convention, config, options.window)
        strided = convention.cut is _strided
        stride = options.stride or window // 2
        if strided and stride > window:
            raise UserError(f"a stride of {stride} leaves tokens out of windows of {window}")
        if convention.cut is _rolling and text.prefix_token_id is None:
            raise UserError(
                f"the {name} convention begins with a special token, and the tokenizer names none"
            )
        min_tokens = window if convention.whole else 2
        windows = convention.cut(text, window, stride)
        if len(windows.ids) < min_tokens:
            count = len(text.ids)
            what = f"one window of {window}" if convention.whole else "2"
            shorter = f", or `window` {count}" if convention.whole and count > 1 else ""
            raise UserError(
                f"the text has {count} tokens, fewer than {what}; give a longer one{shorter}"
            )
        cuts[convention.cut] = Cut((name,), window, stride if strided else None, windows)
    return list(cuts.values())


def _window(convention: PerplexityMethod, config: ModelConfig, asked: int | None) -> int:
    longest = config.max_positions
    window = min(convention.window, longest or convention.window) if asked is None else asked
    if window < 2 or (longest is not None and window > longest):
        raise UserError(
            f"a window of {window} tokens cannot be; give 2 or more"
            + (f", up to the model's {longest}" if longest is not None else "")
        )
    return window
