"""QuantSpec: what a bitwidth means, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
from plans import DEFAULT_7, FOUR, assert_refused

from qllm.config import (
    BITWIDTHS,
    DEFAULT_GROUP_SIZE,
    DEFAULT_SCHEME,
    SCHEMES,
    QuantSpec,
)

# ---- one spec


@pytest.mark.parametrize(
    ("bitwidth", "expected"),
    [
        *((str(bits), QuantSpec(bits, 64, "sym", "weight_only")) for bits in range(1, 9)),
        ("8:tc-li", QuantSpec(8, -1, "sym", "w8a8_dynamic")),
        ("8:tc", QuantSpec(8, -1, "sym", "w8a8_static")),
        ("16", QuantSpec()),
    ],
)
def test_what_a_bitwidth_means(bitwidth, expected):
    assert QuantSpec.parse(bitwidth, 64, "sym") == expected
    assert QuantSpec.parse(f" {bitwidth} ", 64, "sym") == expected
    assert expected.bitwidth == bitwidth


def test_the_bitwidths_are_those_of_the_design():
    assert list(BITWIDTHS) == [*"12345678", "8:tc-li", "8:tc", "16"]
    assert list(SCHEMES) == ["sym", "asym"]


@pytest.mark.parametrize("bitwidth", BITWIDTHS)
def test_every_bitwidth_is_a_spec_of_its_own(bitwidth):
    spec = QuantSpec.parse(bitwidth)
    assert spec.bitwidth == bitwidth
    assert sum(QuantSpec.parse(other) == spec for other in BITWIDTHS) == 1


def test_defaults():
    assert QuantSpec.parse(4) == QuantSpec(4, DEFAULT_GROUP_SIZE, DEFAULT_SCHEME, "weight_only")
    assert (DEFAULT_GROUP_SIZE, DEFAULT_SCHEME) == (128, "asym")
    assert QuantSpec().kind == "dense" and QuantSpec().bits == 16


def test_a_spec_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FOUR.bits = 3


@pytest.mark.parametrize(
    "bitwidth", ["0", "9", "-1", "", "4.0", "four", "8:tc_li", "8:", "04", 0, 32, 4.5, True, None]
)
def test_bitwidths_that_are_refused(bitwidth):
    assert_refused(lambda: QuantSpec.parse(bitwidth), repr(str(bitwidth)), ", ".join(BITWIDTHS))


@pytest.mark.parametrize("bitwidth", BITWIDTHS)
@pytest.mark.parametrize("group_size", [0, -2, -128])
def test_group_sizes_that_are_refused(group_size, bitwidth):
    assert_refused(
        lambda: QuantSpec.parse(bitwidth, group_size), f"group size {group_size} ", "1 or more"
    )


@pytest.mark.parametrize("group_size", ["64", 64.0, None, True, [64]])
def test_group_sizes_that_are_no_numbers(group_size):
    assert_refused(lambda: QuantSpec.parse("4", group_size), "is not a whole number")


@pytest.mark.parametrize("scheme", ["symmetric", "", None, 1, ["sym"]])
def test_schemes_that_are_refused(scheme):
    assert_refused(lambda: QuantSpec.parse("4", 128, scheme), repr(scheme), "sym, asym")


@pytest.mark.parametrize(
    ("group_size", "columns", "expected"),
    [(-1, 67, 1), (1, 67, 67), (32, 64, 2), (32, 65, 3), (128, 67, 1), (128, 128, 1), (7, 1, 1)],
)
def test_groups(group_size, columns, expected):
    assert QuantSpec.parse("4", group_size).groups(columns) == expected


@pytest.mark.parametrize("group_size", [-1, 32, 128])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bitwidth", BITWIDTHS)
def test_a_spec_both_ways(bitwidth, scheme, group_size):
    spec = QuantSpec.parse(bitwidth, group_size, scheme)
    text = json.dumps(spec.to_json())
    # What the object says wins over other defaults.
    assert QuantSpec.from_json(json.loads(text), DEFAULT_7) == spec


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4, QuantSpec(4, 32, "sym", "weight_only")),
        ("4", QuantSpec(4, 32, "sym", "weight_only")),
        ("8:tc", QuantSpec(8, -1, "sym", "w8a8_static")),
        (16, QuantSpec()),
        ({"bits": 4}, QuantSpec(4, 32, "sym", "weight_only")),
        ({"bits": "3", "group_size": -1}, QuantSpec(3, -1, "sym", "weight_only")),
        ({"bits": 2, "scheme": "asym"}, QuantSpec(2, 32, "asym", "weight_only")),
    ],
)
def test_what_json_may_say(value, expected):
    assert QuantSpec.from_json(value, QuantSpec(group_size=32, scheme="sym")) == expected


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({}, "no quantization spec"),
        ({"group_size": 64}, "no quantization spec"),
        ({"bits": 4, "groupsize": 64}, "groupsize"),
        ({"bits": 4, "group_size": "64"}, "'64' is not a whole number"),
        ({"bits": 4, "group_size": 0}, "group size 0"),
        ({"bits": 4, "scheme": "x"}, "'x'"),
        ({"bits": None}, "None is no bitwidth"),
        ({"bits": {"bits": 4}}, "no bitwidth"),
        (4.0, "4.0 is no bitwidth"),
        (True, "True is no bitwidth"),
        ([4], "no bitwidth"),
        (None, "no bitwidth"),
        (12, "'12' is unknown"),
    ],
)
def test_json_that_is_refused(value, word):
    assert_refused(lambda: QuantSpec.from_json(value), word)


def test_a_user_error_is_a_value_error():
    with pytest.raises(ValueError, match="choose from"):
        QuantSpec.parse("nonsense")
