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
from qllm.plan.devices import Size
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
        modules: names of the linears that are decided on, and of the embedding.
        half_of: int (M,), their halves of layers; of an embedding the first, or, where the LM head
            is tied to it, the last, where there is a product with it.
        sizes: int (M, 2), their inputs and outputs.
        weights: (M,), elements.
        nbytes: int (M, C), as they are loaded: in the layout of the device's kernels.
        stays_tied: bool (M, C), of an LM head whether it stays the embedding's own matrix.
        bits: (M, C), per weight: integers, scales and zeros.
        fixed: int (H,), bytes of the rest of each half: dense linears, norms, and with the first
            and last half what is in front of the layers and behind them; an embedding that the LM
            head is tied to is with the last one, where there is a product with it.
        head: size and bytes of an LM head that is not decided on.
        tied: bytes of an embedding in `fixed` that the first of several stages has once more.
    """

    config: ModelConfig
    dtype: torch.dtype
    modules: tuple[str, ...]
    half_of: np.ndarray
    sizes: np.ndarray
    weights: Array
    nbytes: Array
    stays_tied: NDArray[np.bool_]
    bits: Array
    fixed: Array
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
        float32_scales: NDArray[np.bool_] | None = None,
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
        float32_scales: NDArray[np.bool_] | None = None,
    ) -> Shape:
        """Of a dense model, which may be on the meta device.

        Args:
            tied_head: an LM head that is decided on is the embedding's where it is left dense.
            float32_scales: (M, C), of `Sensitivity`; None: as far as is known all are float16.
        """
        config = model.config
        if float32_scales is None:
            float32_scales = np.zeros((len(modules), len(candidates)), dtype=bool)
        last = 2 * config.num_layers - 1
        halves, sizes, nbytes, bits = [], [], [], []
        for name, are_float32 in zip(modules, float32_scales, strict=True):
            if name == EMBEDDING:
                halves.append(last if config.tied_head else 0)
                size, bias = (config.embed_size, config.vocab_size), False
            else:
                linear = model.get_submodule(name)
                assert isinstance(linear, Linear)
                halves.append(last if name == LM_HEAD else _half(name))
                size = (linear.in_features, linear.out_features)
                bias = getattr(linear, "bias", None) is not None
            sizes.append(size)
            specs = list(zip(candidates, are_float32, strict=True))
            held = [_empty(size, bias, *spec, model.dtype) for spec in specs]
            nbytes.append([each.nbytes_on(device) for each in held])
            plain = [_empty(size, False, *spec, model.dtype) for spec in specs]
            bits.append([8 * each.nbytes() / math.prod(size) for each in plain])
        fixed = np.zeros(last + 1)
        for name, module in model.named_modules():
            own = sum(t.nbytes for t in module.buffers(recurse=False))
            if not own or name in modules or (name == LM_HEAD and config.tied_head):
                continue
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
            np.array([math.prod(size) for size in sizes], dtype=np.float64),
            np.array(nbytes, dtype=np.float64),
            np.array(
                [
                    [tied_head and name == LM_HEAD and spec.kind == "dense" for spec in candidates]
                    for name in modules
                ]
            ),
            np.array(bits),
            fixed,
            head,
            tied,
        )

    def held(self, devices: int) -> Array:
        """Bytes (M, C) on so many devices: the last of several has a matrix of its own for a head
        that stays tied, and a single one the embedding's."""
        return np.where(self.stays_tied & (devices == 1), 0.0, self.nbytes)

    def cache(self, work: Workload) -> Array:
        """Bytes (H,) of keys and values in each half: attention has them, the MLP none."""
        tokens = work.prompt + work.new
        layers = KVCache.sizes(self.config, work.batch, tokens, self.dtype)
        return np.array([part for each in layers for part in (each, 0)], dtype=np.float64)

    def buffers(self, work: Workload) -> float:
        """Bytes of activations at the peak of a prompt's pass: a layer's, and the logits."""
        config = self.config
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        inner = config.intermediate_size * (2 if config.gated_mlp else 1)
        tokens = work.batch * work.prompt
        layer = tokens * (3 * config.hidden_size + max(heads, inner)) * self.dtype.itemsize
        return float(layer + work.batch * config.vocab_size * (4 + self.dtype.itemsize))


def _empty(
    size: Size, bias: bool, spec: QuantSpec, float32_scales: bool, dtype: torch.dtype
) -> Linear:
    """The linear of a spec on the meta device."""
    linear = linear_class(spec).empty(*size, bias, spec, dtype)
    if float32_scales:
        linear.register_buffer("scales", linear.get_buffer("scales").float())
    return linear


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
