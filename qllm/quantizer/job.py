"""What to quantize, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qllm.config import QuantPlan
from qllm.quant.algorithm import QuantizeOptions

DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass
class Job:
    """What to quantize, and how.

    Attributes:
        source: folder of a 16- or 32-bit checkpoint.
        origin: what the result records as that it was made from, see `ModelFolder.origin`; None:
            nothing.
        plan: which linear gets which spec.
        samples: token ids for calibration, of one length; None where the plan needs none.
        dtype: that activations are kept in between layers; None is the checkpoint's.
        fake: write the dequantized values in Hugging Face's layout.
        compressed: write compressed-tensors where GPTQ would do, too.
        about: what the model card says besides, such as the model's name and the data set.
    """

    source: Path
    plan: QuantPlan
    options: QuantizeOptions = field(default_factory=QuantizeOptions)
    samples: Sequence[Sequence[int]] | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"
    fake: bool = False
    compressed: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    origin: str | None = None
    about: Mapping[str, str] = field(default_factory=dict)
