"""The forms that a plan chooses from: bitwidths by group sizes by schemes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from qllm.config import QuantSpec
from qllm.errors import UserError


def parse_candidates(
    bits: str, group_sizes: str, schemes: str, default: QuantSpec
) -> tuple[QuantSpec, ...]:
    """The specs of "2,3,4,8:tc-li,16" in groups of "64,-1" and schemes "sym,asym", by rising bits.

    Args:
        default: has the algorithm.

    Raises:
        UserError: for what is no list, or leaves nothing to choose.
    """
    words = ([word.strip() for word in text.split(",")] for text in (bits, group_sizes, schemes))
    specs = {
        QuantSpec.parse(width, _whole(group), scheme, default.algorithm)
        for width, group, scheme in product(*words)
    }
    if len(specs) < 2:
        raise UserError(f"`bits` {bits!r} leaves nothing to choose; name two or more bitwidths")
    return tuple(sorted(specs, key=_size))


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"`group_size` {text!r} is no whole number; give one or several, such as 64,128,-1"
        ) from None


def _size(spec: QuantSpec) -> tuple:
    """What orders specs: bits, then what their groups add to them."""
    per_weight = 0.0 if spec.group_size == -1 else 1 / spec.group_size
    return spec.bits, spec.kind, per_weight, spec.scheme


def key(spec: QuantSpec) -> str:
    """All that a spec's speed depends on, such as "4:g128:asym"."""
    if spec.kind != "weight_only":
        return spec.bitwidth
    return f"{spec.bits}:g{spec.group_size}:{spec.scheme}"


def labels(specs: Sequence[QuantSpec]) -> list[str]:
    """What to call each: its bitwidth, and the group size and scheme where others differ there."""
    packed = [spec for spec in specs if spec.kind == "weight_only"]
    groups, schemes = ({getattr(s, name) for s in packed} for name in ("group_size", "scheme"))
    found = []
    for spec in specs:
        group = f":g{spec.group_size}" if len(groups) > 1 else ""
        scheme = f":{spec.scheme}" if len(schemes) > 1 else ""
        found.append(spec.bitwidth + (group + scheme if spec.kind == "weight_only" else ""))
    return found
