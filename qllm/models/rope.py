"""What a config.json says of rotary positions, in transformers' words and with its precedence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qllm.config import RopeConfig
from qllm.errors import UserError
from qllm.models.family import MAX_COUNT, RawConfig

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
# YaRN's ramp goes from pairs that turn so often to those that turn so often.
BETA_FAST, BETA_SLOW = 32, 1
KINDS_OF_LAYERS = ("full_attention", "sliding_attention")
PARTIAL, ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"


def read_rope(
    raw: RawConfig,
    trained: int,
    head_dim: int,
    *,
    kinds: Sequence[str] = ROPE_KINDS,
    partial: float | None = None,
) -> RopeConfig:
    """RoPE settings, with transformers' precedence where a file has old and new ones.

    transformers 5 writes `rope_parameters`; a `rope_scaling` of version 4 wins over it where it is
    there, and a top-level `rope_theta` or `partial_rotary_factor` counts where the object has none.

    Args:
        trained: the length that the file says the model has.
        kinds: those that the family knows.
        partial: the share of a head that rotates where the file names none; None: all of it.

    Raises:
        UserError: for values that cannot be.
    """
    name = "rope_scaling" if raw.values.get("rope_scaling") else "rope_parameters"
    value = raw.values.get(name) or {}
    if not isinstance(value, Mapping):
        raise raw.error(name, value, "an object")
    above = {key: raw.values[key] for key in ("rope_theta", PARTIAL) if key in raw.values}
    rope = RawConfig({**above, **value}, f"{raw.where}: {name}")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in kinds:
        raise rope.error("rope_type", kind, f"one of {', '.join(kinds)}")
    theta = rope.number("rope_theta", 10000.0)
    dim = _rotary_dim(rope, kind, head_dim, partial)
    if kind == "default":
        return RopeConfig(theta, rotary_dim=dim)
    if kind == "proportional":
        share = rope.number(PARTIAL, 1.0)
        if share > 1:
            raise rope.error(PARTIAL, share, "1 or less")
        pairs = int(share * head_dim // 2)
        return RopeConfig(theta, kind, factor=rope.number("factor", 1.0), rotated_pairs=pairs)
    if kind in ("linear", "dynamic"):
        rotated = dim or head_dim
        if kind == "dynamic" and rotated < 3:
            raise UserError(
                f"{raw.where}: dynamic RoPE needs a head_dim of 4 or more, not {rotated}"
            )
        return RopeConfig(theta, kind, dim, rope.number("factor"))
    # Of these three, the length may stand outside, and wins there.
    outside = raw.values.get(ORIGINAL) is not None
    original = (raw if outside else rope).count(ORIGINAL, default=trained)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return RopeConfig(theta, kind, dim, rope.number("factor"), low, high, original)
    factor = rope.number("factor", trained / original)
    if kind == "longrope":
        return _longrope(rope, theta, dim, factor, original, -(-(dim or head_dim) // 2))
    return _yarn(rope, theta, dim, factor, original)


def read_ropes(
    raw: RawConfig, trained: int, head_dims: tuple[int, int], thetas: tuple[float, float]
) -> tuple[RopeConfig, RopeConfig]:
    """RoPE of layers that see all tokens, and of those with a window, where each has its own.

    Args:
        head_dims: channels of their heads.
        thetas: their bases, where they do not name one.

    Raises:
        UserError: for values that cannot be.
    """
    ropes = raw.values.get("rope_parameters") or {}
    if not isinstance(ropes, Mapping):
        raise raw.error("rope_parameters", ropes, "an object")
    # transformers 4 had one setting for layers that see all, and a base for the others.
    old = raw.values.get("rope_scaling") or {}
    found = []
    of_kinds = zip(KINDS_OF_LAYERS, head_dims, thetas, (old, {}), strict=True)
    for kind, head_dim, theta, more in of_kinds:
        own = ropes.get(kind) or {}
        for value in (own, more):
            if not isinstance(value, Mapping):
                raise raw.error(f"the RoPE of {kind}", value, "an object")
        values = {"rope_parameters": {"rope_theta": theta, **own, **more}}
        found.append(read_rope(RawConfig(values, f"{raw.where}: {kind}"), trained, head_dim))
    return found[0], found[1]


def reach(rope: RopeConfig, trained: int) -> int:
    """The longest sequence for a model whose file says that it has `trained` positions."""
    if rope.kind in ("linear", "dynamic", "proportional"):
        return int(min(trained * rope.factor, MAX_COUNT))
    if rope.kind == "yarn":
        return int(min(max(trained, rope.original_max_positions * rope.factor), MAX_COUNT))
    return trained


def _rotary_dim(rope: RawConfig, kind: str, head_dim: int, partial: float | None) -> int | None:
    """How many channels of a head rotate, of the kinds that may rotate a part of it; None: all."""
    dim = head_dim
    if partial is not None and kind != "proportional":
        share = rope.number(PARTIAL, partial)
        dim = int(min(head_dim * share, MAX_COUNT))
        if not 1 <= dim <= head_dim:
            raise rope.error(PARTIAL, share, f"a share of the {head_dim} channels of a head")
    elif kind not in ("default", "proportional"):
        # The plain kind takes no notice of it in transformers.
        share = rope.number(PARTIAL, 1.0)
        if int(min(head_dim * share, MAX_COUNT)) != head_dim:
            raise rope.error(PARTIAL, share, f"1 with rope_type {kind!r}, as this family has it")
    where = rope.where.rpartition(": ")[0]
    if head_dim % 2:
        raise UserError(f"{where}: RoPE needs an even head_dim, not {head_dim}")
    if dim % 2 and kind == "yarn":  # the others rotate one channel more
        raise UserError(f"{where}: YaRN needs an even number of channels to rotate, not {dim}")
    return None if dim == head_dim else dim


def _yarn(
    rope: RawConfig, theta: float, dim: int | None, factor: float, original: int
) -> RopeConfig:
    if "factor" not in rope.values:
        raise rope.error("factor", None, "a positive number")
    if theta == 1:
        raise rope.error("rope_theta", theta, "another number than 1 with yarn")
    mscale, mscale_all = rope.values.get("mscale"), rope.values.get("mscale_all_dim")
    scale = math.log(max(factor, 1.0)) / 10
    attention = scale + 1
    if mscale and mscale_all:
        mscale, mscale_all = rope.number("mscale"), rope.number("mscale_all_dim")
        attention = (mscale * scale + 1) / (mscale_all * scale + 1)
    return RopeConfig(
        theta,
        "yarn",
        dim,
        factor,
        original_max_positions=original,
        attention_factor=rope.number("attention_factor", attention),
        beta_fast=rope.number("beta_fast", BETA_FAST),
        beta_slow=rope.number("beta_slow", BETA_SLOW),
        # transformers takes a null for false here, and an entry that is not there for true.
        truncate="truncate" not in rope.values or rope.flag("truncate", False),
    )


def _longrope(
    rope: RawConfig, theta: float, dim: int | None, factor: float, original: int, pairs: int
) -> RopeConfig:
    attention = 1.0
    if factor > 1 and rope.values.get("attention_factor") is None:
        if original == 1:
            raise rope.error(ORIGINAL, original, "more than 1")
        attention = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        theta,
        "longrope",
        dim,
        factor,
        original_max_positions=original,
        attention_factor=rope.number("attention_factor", attention),
        short_factor=rope.numbers("short_factor", pairs),
        long_factor=rope.numbers("long_factor", pairs),
    )
