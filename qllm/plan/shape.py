"""What the planner knows of a model and of what it will be asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qllm.checkpoint.load import module_bytes, outline
from qllm.checkpoint.weights import Weights
from qllm.config import (
    DEFAULT_ALGORITHM,
    EMBEDDING,
    LM_HEAD,
    ModelConfig,
    QuantPlan,
    QuantSpec,
)
from qllm.errors import UserError
from qllm.layers import Linear, linear_class
from qllm.models import Decoder
from qllm.models.cache import KVCache
from qllm.models.delta_net import ALWAYS_FLOAT
from qllm.plan.devices import Size
from qllm.plan.modules import linears_of, of_experts
from qllm.plan.sensitivity import Array
from qllm.quantizer.floats import FRONT


@dataclass(frozen=True)
class Workload:
    """What the model will be asked.

    Attributes:
        prompt, new: tokens of each sequence.
        batch: sequences at once.
    """

    prompt: int = 512
    new: int = 128
    batch: int = 1

    @classmethod
    def within(
        cls, window: int | None, prompt: int | None, new: int | None, batch: int
    ) -> Workload:
        """What fits into a model's window; None stands for the usual, or for less in a small one.

        Raises:
            UserError: what is asked for does not fit.
        """
        if new is None:
            new = cls.new if window is None else min(cls.new, window // 2)
        if prompt is None:
            prompt = cls.prompt if window is None else max(1, min(cls.prompt, window - new))
        if window is not None and prompt + new > window:
            raise UserError(
                f"`prompt` {prompt} and `new` {new} exceed the model's window of {window}; "
                "give less"
            )
        return cls(prompt, new, batch)


@dataclass(frozen=True, eq=False)
class Shape:
    """What of a model's sizes the program needs.

    Attributes:
        modules: names of what is decided on: linears, all experts' of a layer, the embedding.
        half_of: int (M,), their halves of layers; of an embedding the first, or, where the LM head
            is tied to it, the last, where there is a product with it.
        sizes: int (M, 2), inputs and outputs of each matrix.
        counts: int (M,), matrices: those of all experts, or one.
        weights: (M,), elements of all of them.
        nbytes: int (M, C), as they are loaded: in the layout of the device's kernels.
        stays_tied: bool (M, C), of an LM head whether it stays the embedding's own matrix.
        bits: (M, C), per weight: integers, scales and zeros.
        fixed: int (H,), bytes of the rest of each half: dense linears, norms, and with the first
            and last half what is in front of the layers and behind them; an embedding that the LM
            head is tied to is with the last one, where there is a product with it.
        routers: half, size and bytes of the dense matrices that choose experts; `fixed` has them.
        head: size and bytes of an LM head that is not decided on.
        tied: bytes of an embedding in `fixed` that the first of several stages has once more.
    """

    config: ModelConfig
    dtype: torch.dtype
    modules: tuple[str, ...]
    half_of: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray
    weights: Array
    nbytes: Array
    stays_tied: NDArray[np.bool_]
    bits: Array
    fixed: Array
    routers: tuple[tuple[int, Size, int], ...]
    head: tuple[Size, int] | None
    tied: int

    @classmethod
    def of(
        cls,
        folder: Path,
        modules: Sequence[str],
        candidates: Sequence[QuantSpec],
        dtype: torch.dtype | None,
        device: str = "cpu",
        float32_scales: NDArray[np.int64] | None = None,
    ) -> Shape:
        """Of a 16- or 32-bit checkpoint, whose files' headers alone are read.

        Args:
            device: the type of what the linears will lie on.
            float32_scales: see `of_model`.
        """
        plan = QuantPlan.uniform(QuantSpec())
        if LM_HEAD in modules:  # so that a tied one is a matrix of its own, as it will be
            # Of bytes alone: how the integers are chosen is for whoever quantizes.
            spec = replace(candidates[0], algorithm=DEFAULT_ALGORITHM)
            plan = plan.with_rule(f"^{LM_HEAD}$", spec)
        tied = LM_HEAD in modules and Weights.of_floats(folder).config.tied_head
        model = outline(folder, plan, dtype)
        return cls.of_model(
            model, modules, candidates, device, tied_head=tied, float32_scales=float32_scales
        )

    @classmethod
    def of_model(
        cls,
        model: Decoder,
        modules: Sequence[str],
        candidates: Sequence[QuantSpec],
        device: str = "cpu",
        *,
        tied_head: bool = False,
        float32_scales: NDArray[np.int64] | None = None,
    ) -> Shape:
        """Of a dense model, which may be on the meta device.

        Args:
            tied_head: an LM head that is decided on is the embedding's where it is left dense.
            float32_scales: (M, C), of `Sensitivity`; None: as far as is known there are none.
        """
        config = model.config
        if float32_scales is None:
            float32_scales = np.zeros((len(modules), len(candidates)), dtype=np.int64)
        last = 2 * config.num_layers - 1
        halves, sizes, counts, nbytes, bits = [], [], [], [], []
        linears = {name: linears_of(name, config) for name in modules}
        for name, of_float32 in zip(modules, float32_scales.tolist(), strict=True):
            counts.append(len(linears[name]))
            if name == EMBEDDING:
                halves.append(last if config.tied_head else 0)
                size, bias = (config.embed_size, config.vocab_size), False
            else:
                linear = model.get_submodule(linears[name][0])
                assert isinstance(linear, Linear)
                halves.append(last if name == LM_HEAD else _half(name))
                size = (linear.in_features, linear.out_features)
                bias = getattr(linear, "bias", None) is not None
            sizes.append(size)
            held, plain = np.zeros((2, len(candidates)))
            for index, (spec, wide) in enumerate(zip(candidates, of_float32, strict=True)):
                for count, float32 in ((counts[-1] - wide, False), (wide, True)):
                    if count:
                        given = spec, float32, model.dtype
                        held[index] += count * _empty(size, bias, *given).nbytes_on(device)
                        plain[index] += count * _empty(size, False, *given).nbytes()
            nbytes.append(held)
            bits.append(8 * plain / (math.prod(size) * counts[-1]))
        decided = {linear for names in linears.values() for linear in names}
        fixed, routers = np.zeros(last + 1), []
        for name, module in model.named_modules():
            own = sum(t.nbytes for t in module.buffers(recurse=False))
            if not own or name in decided or (name == LM_HEAD and config.tied_head):
                continue
            if name.endswith(ALWAYS_FLOAT):
                assert isinstance(module, Linear)
                routers.append((_half(name), (module.in_features, module.out_features), own))
            front = name.split(".")[0] in FRONT and not (name == EMBEDDING and config.tied_head)
            fixed[_half(name) if name.startswith("layers.") else 0 if front else last] += own
        head = None
        shared = config.tied_head and EMBEDDING in modules
        if LM_HEAD not in modules and not shared:
            linear = model.lm_head
            assert isinstance(linear, Linear)  # of a whole model
            size = (linear.in_features, linear.out_features)
            head = (size, math.prod(size) * model.dtype.itemsize)
        tied = module_bytes(model.embed) if config.tied_head and not shared else 0
        return cls(
            config,
            model.dtype,
            tuple(modules),
            np.array(halves),
            np.array(sizes),
            np.array(counts),
            np.array(counts) * np.prod(np.array(sizes, dtype=np.float64), axis=1),
            np.array(nbytes),
            np.array(
                [
                    [tied_head and name == LM_HEAD and spec.kind == "dense" for spec in candidates]
                    for name in modules
                ]
            ),
            np.array(bits),
            fixed,
            tuple(routers),
            head,
            tied,
        )

    def held(self, devices: int) -> Array:
        """Bytes (M, C) on so many devices: the last of several has a matrix of its own for a head
        that stays tied, and a single one the embedding's."""
        return np.where(self.stays_tied & (devices == 1), 0.0, self.nbytes)

    def products(self, module: int, tokens: float) -> tuple[float, float]:
        """How many of a module's matrices some tokens go through, and how many tokens each has.

        Of experts that is what is expected where a token takes any of them as likely as others: one
        that each of B tokens takes with probability p is read with 1 - (1 - p)^B.
        """
        experts = self.config.experts
        if experts is None or not of_experts(self.modules[module]):
            return 1.0, tokens
        idle = (1 - experts.top_k / experts.count) ** tokens
        read = experts.count * (1 - idle)
        return read, tokens * experts.top_k / read

    def cache(self, work: Workload) -> Array:
        """Bytes (H,) of keys and values in each half: attention has them, the MLP none."""
        tokens = work.prompt + work.new
        layers = KVCache.sizes(self.config, work.batch, tokens, self.dtype)
        return np.array([part for each in layers for part in (each, 0)], dtype=np.float64)

    def buffers(self, work: Workload) -> float:
        """Bytes of activations at the peak of a prompt's pass: a layer's, and the logits."""
        config = self.config
        layers = {config.of_layer(index) for index in range(config.num_layers)}
        heads = max((c.num_heads + 2 * c.num_kv_heads) * c.head_dim for c in layers)
        inner = _inner_channels(config) * (2 if config.gated_mlp else 1)
        tokens = work.batch * work.prompt
        layer = tokens * (3 * config.hidden_size + max(heads, inner)) * self.dtype.itemsize
        if config.experts is not None:  # what they give is added up in float32 beside it
            layer += tokens * config.hidden_size * (4 + self.dtype.itemsize)
        return float(layer + work.batch * config.vocab_size * (4 + self.dtype.itemsize))


def _empty(
    size: Size, bias: bool, spec: QuantSpec, float32_scales: bool, dtype: torch.dtype
) -> Linear:
    """The linear of a spec on the meta device."""
    linear = linear_class(spec).empty(*size, bias, spec, dtype)
    if float32_scales:
        linear.register_buffer("scales", linear.get_buffer("scales").float())
    return linear


def _inner_channels(config: ModelConfig) -> int:
    """Those of the widest MLP; experts run one by one, and all tokens may have chosen the same."""
    experts = config.experts
    if experts is None:
        return config.intermediate_size
    of_mlp = 0 if all(experts.layers) else config.intermediate_size
    return max(of_mlp, experts.intermediate_size, experts.shared_size)


def _half(name: str) -> int:
    """Of a module in a layer: 2 i is the attention of layer i, 2 i + 1 its MLP."""
    _, index, inner = name.split(".", 2)
    return 2 * int(index) + inner.startswith("mlp")


def is_head(name: str) -> bool:
    """Whether a linear is the LM head, or an embedding that is it.

    A prompt asks it for its last token alone, and it is run as in a step.
    """
    return name in (LM_HEAD, EMBEDDING)


def sees_last_token(name: str, layers: int) -> bool:
    """Whether a linear is asked for each prompt's last token alone.

    Those are the head, and in the last of some layers what is behind the keys and values.
    """
    return is_head(name) or (name.startswith(f"layers.{layers - 1}.") and not name.endswith(".qkv"))
