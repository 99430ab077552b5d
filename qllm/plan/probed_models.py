"""What passes through random models take besides their products, measured and told apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from qllm.config import LM_HEAD, QuantSpec
from qllm.layers import Linear
from qllm.models import Decoder
from qllm.plan.devices import MeasuredSpeed
from qllm.plan.random_model import random_decoder
from qllm.plan.shape import Workload, sees_last_token
from qllm.plan.timing import time_generation, undisturbed

# Of the models with which is measured what is beside the products: family, channels of a head and
# heads that share keys; hidden size, layers and vocabulary. Scores take what they do by their
# number, and products with keys and values by their channels. Logits take so little that a head
# which shared caches keep at one time and not at another would hide it.
FAMILIES = (("llama", 64, 4), ("opt", 32, 1))
MODELS = ((256, 2, 1024), (256, 2, 8192), (256, 8, 1024), (1024, 4, 4096))
# Sequences, and the tokens of each.
WORK = ((1, 32), (1, 192), (1, 768), (4, 128), (8, 16), (8, 128))
# And models that no cache keeps, as those that are served are. Products take longer there than by
# themselves, since other memory is read between them, and so does each half of a layer, whose small
# tensors come from memory, each for itself. One of them is mostly an LM head. Their prompts say
# nothing new.
FAR_FAMILIES = (("llama", 64, 4), ("opt", 64, 1))
FAR_MODELS = ((768, 16, 1024), (2048, 2, 1024), (1024, 2, 32768))
FAR_WORK = ((1, 32), (1, 128), (4, 128))
STEPS = 16


class Kind(NamedTuple):
    """Of a model: one of FAMILIES and of MODELS, or one of FAR_FAMILIES and of FAR_MODELS."""

    family: str
    channels: int
    sharing: int
    hidden: int
    layers: int
    vocabulary: int

    def is_far(self) -> bool:
        return self[3:] in FAR_MODELS

    def work(self) -> tuple[tuple[int, int], ...]:
        return FAR_WORK if self.is_far() else WORK


class Rest(NamedTuple):
    """What there is of a pass besides its products; or the seconds of each, as `MeasuredSpeed` has.

    Attributes:
        whole, sequence, logit: of its `passes`.
        half, far_half, value, score, product: of its `halves`.
        byte: of its `cache`, the first.
        among_others: seconds of the products by themselves: of a step, as far as caches keep none
            of them, and of prompts.
    """

    whole: float
    sequence: float
    logit: float
    half: float
    far_half: float
    value: float
    score: float
    product: float
    byte: float
    among_others: float


class Models:
    """One of each kind, whose linears have a spec.

    Attributes:
        models: which they are.
        times: seconds that passes took, of each round: by phase, kind, sequences and their tokens.
    """

    def __init__(self, spec: QuantSpec, dtype: torch.dtype, device: str) -> None:
        self._spec, self._dtype = spec, dtype
        self.models = {
            kind: random_decoder(*kind[:5], spec, dtype, device, kind.vocabulary)
            for kind in _kinds()
        }
        self.times: defaultdict[tuple[str, Kind, int, int], list[float]] = defaultdict(list)

    def measure(self) -> None:
        """Another round."""
        for kind, model in self.models.items():
            for batch, context in kind.work():
                work = Workload(context, STEPS, batch)
                prompt, step = time_generation(model, work, repeats=1)
                self.times["prefill", kind, batch, context].append(prompt)
                self.times["decode", kind, batch, context].append(step)

    def _seconds(self, phase: str, kind: Kind, batch: int, context: int) -> float:
        return undisturbed(self.times[phase, kind, batch, context])

    def rest(self, products: MeasuredSpeed) -> dict[str, Rest]:
        """What passes through models take besides their products, by phase.

        Args:
            products: of which `linears`, and `cache` but for the first of it, are known.
        """
        _, far_byte, far_head = products.cache
        decode: list[tuple[Rest, float, float]] = []
        prefill: list[tuple[Rest, float, float]] = []
        for kind, model in self.models.items():
            _, channels, sharing, hidden, layers, vocabulary = kind
            count, heads = 2 * layers, hidden // channels
            held = float(sum(module.nbytes() for module in linears(model).values()))
            given = model, self._spec, products
            for batch, context in kind.work():
                scores = layers * batch * heads * (context + STEPS / 2)
                read = 2 * scores * channels / sharing * self._dtype.itemsize
                far = products.farness(held + read)
                known = products_of(*given, batch, batch, held + read, decoding=True)
                step = Rest(
                    whole=1.0,
                    sequence=batch,
                    logit=batch * vocabulary,
                    half=count,
                    far_half=count * far,
                    value=count * batch * hidden,
                    score=scores,
                    product=scores * channels,
                    byte=read,
                    among_others=far * known,
                )
                known += far * (far_byte * read + far_head * layers * batch * heads / sharing)
                decode.append((step, self._seconds("decode", kind, batch, context), known))
                if kind.is_far():
                    continue
                rows, scores = batch * context, layers * batch * heads * context**2
                known = products_of(*given, rows, batch, held, decoding=False)
                prompt = step._replace(
                    far_half=0.0,
                    value=count * rows * hidden,
                    score=scores,
                    product=scores * channels,
                    byte=0.0,
                    among_others=known,
                )
                prefill.append((prompt, self._seconds("prefill", kind, batch, context), known))
        return {"decode": Rest(*fit(decode)), "prefill": Rest(*fit(prefill))}


def _kinds() -> Iterator[Kind]:
    for families, models in ((FAMILIES, MODELS), (FAR_FAMILIES, FAR_MODELS)):
        for family in families:
            for sizes in models:
                yield Kind(*family, *sizes)


def linears(model: Decoder) -> dict[str, Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear)}


def products_of(
    model: Decoder,
    spec: QuantSpec,
    products: MeasuredSpeed,
    rows: int,
    last_rows: int,
    held: float,
    *,
    decoding: bool,
) -> float:
    """Seconds of a model's linears, of which some see only each prompt's last token.

    Args:
        spec: of those in layers.
        held: bytes that a step reads.
    """
    seconds = 0.0
    for name, module in linears(model).items():
        size = module.in_features, module.out_features
        n = last_rows if sees_last_token(name, model.config.num_layers) else rows
        own, as_step = (QuantSpec(), True) if name == LM_HEAD else (spec, decoding)
        seconds += products.linear(own, size, 0, n, decode=as_step, model=held)
    return seconds


def fit(
    rows: Sequence[tuple[Sequence[float], float, float]],
) -> tuple[float, ...]:
    """Coefficients, 0 or more, with which features and what is known add up to the seconds.

    What is missed counts by its share of a pass, which is what predictions are judged by, and not
    squared: passes that take longer than others by what is no feature (caches that keep less of
    some cache of keys and values) do not make all others seem to take longer, too.

    Args:
        rows: features, the seconds of a pass, and those that are known, as of its products.
    """
    from scipy.optimize import linprog

    features = np.array([row for row, _, _ in rows])
    seconds, known = np.array([[whole, part] for _, whole, part in rows]).T
    weighed = features / seconds[:, None]
    scale = weighed.max(axis=0)
    scale[scale == 0] = 1  # what none of them has
    matrix, target = weighed / scale, 1 - known / seconds
    missed = np.eye(len(rows))  # each of them at least as large as what is missed, either way
    found = linprog(
        np.r_[np.zeros(len(scale)), np.ones(len(rows))],
        A_ub=np.block([[matrix, -missed], [-matrix, -missed]]),
        b_ub=np.r_[target, -target],
    )
    return tuple(map(float, found.x[: len(scale)] / scale))
