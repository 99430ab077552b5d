"""Neural Compressor's configurations as plans."""

from __future__ import annotations

import json

import pytest
from plans import MODULES, assert_refused

from qllm.bitwidths import make_plan
from qllm.config import (
    QuantSpec,
)
from qllm.neural_compressor.rules import to_rules

# ---- Neural Compressor's configurations


def weight(**values: object) -> dict:
    return {"weight": values}


def compressor(by_type: object = None, by_name: object = None, default=None) -> dict:
    """The spec of every layer."""
    tables = {"op_type_dict": by_type, "op_name_dict": by_name}
    value = {key: table for key, table in tables.items() if table is not None}
    return make_plan(value, default).resolve(MODULES, 2)


@pytest.mark.parametrize("bit", ["bit", "bits"])
@pytest.mark.parametrize("type_name", [".*", "Linear", "Lin.*|Conv"])
def test_one_type_is_all_linears(type_name, bit):
    entry = {bit: [4], "group_size": [64], "scheme": ["asym"], "algorithm": ["GPTQ"]}
    specs = compressor({type_name: weight(**entry)})
    expected = QuantSpec(4, 64, "asym", "weight_only", "gptq")
    assert specs == dict.fromkeys(MODULES, expected)


@pytest.mark.parametrize("entry", [{}, {"dtype": "int"}, {"dtype": ["int4"]}])
def test_what_is_left_out_is_as_neural_compressor_has_it(entry):
    """Whatever the defaults of the command line are."""
    expected = QuantSpec(4, 32, "sym", "weight_only", "rtn")
    default = QuantSpec(group_size=128, scheme="asym", algorithm="awq")
    assert compressor({".*": weight(**entry)}, None, default) == dict.fromkeys(MODULES, expected)
    assert compressor(None, {}, default) == dict.fromkeys(MODULES, expected)


def test_the_first_of_a_space_counts():
    specs = compressor({".*": weight(bit=[3, 4], group_size=(64, 32), scheme="asym")})
    assert set(specs.values()) == {QuantSpec(3, 64, "asym", "weight_only")}


def test_names_win_over_types():
    """A name's expression has to match all of it."""
    names = {
        r".*\.fc1": weight(bit=8),
        "fc2": weight(bit=2),
        r"model\.decoder\.layers\.1\.fc1": weight(dtype="fp32"),
        r"layers\.0\.attention\..*": weight(dtype=["int8"], group_size=[-1]),
    }
    assert_refused(lambda: compressor({".*": weight()}, names), "fc2", "matches no layer")
    del names["fc2"]
    specs = compressor({".*": weight()}, names)
    assert specs["layers.0.mlp.up"].bits == 8
    assert specs["layers.1.mlp.up"] == QuantSpec()
    assert specs["layers.0.mlp.down"].bits == 4
    assert specs["layers.0.attention.qkv"] == QuantSpec(8, -1, "sym", "weight_only")
    assert specs["layers.1.attention.qkv"].bits == 4


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", ["fp32"]])
def test_what_is_left_at_16_bits(dtype):
    specs = compressor({".*": weight(bit=4)}, {".*fc.": weight(dtype=dtype)})
    assert {name for name, spec in specs.items() if spec.kind == "dense"} == {
        name for name in MODULES if "mlp" in name
    }


def test_activations_stay():
    entry = {**weight(bit=[4]), "activation": {"dtype": ["fp32"]}}
    assert compressor({".*": entry}) == compressor({".*": weight(bit=[4])})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"op_type_dict": {}, "recipes": 1, "a": 2}, ("recipes", "a")),
        ({"op_type_dict": [4]}, ("op_type_dict",)),
        ({"op_type_dict": {"Conv2d": weight(bit=4)}}, ("'Conv2d' does not match 'Linear'",)),
        ({"op_type_dict": {"(": weight(bit=4)}}, ("'('", "no regular expression")),
        ({"op_name_dict": {"(": weight(bit=4)}}, ("no regular expression",)),
        ({"op_type_dict": {".*": 4}}, ("'.*' is 4", '{"weight":')),
        ({"op_type_dict": {".*": {"weights": {}}}}, ("weight",)),
        ({"op_type_dict": {".*": {"weight": 4}}}, ("weight",)),
        ({"op_type_dict": {".*": {**weight(), "more": 1}}}, ("more",)),
        ({"op_type_dict": {".*": weight(zeros=1)}}, ("QLLM knows no 'zeros'",)),
        ({"op_type_dict": {".*": weight(dtype="nf4")}}, ("no weights of type 'nf4'",)),
        ({"op_type_dict": {".*": weight(bit=9)}}, ("'9' is unknown",)),
        ({"op_type_dict": {".*": weight(bit=[])}}, ("no bitwidth",)),
        ({"op_type_dict": {".*": weight(group_size=0)}}, ("group size 0",)),
        ({"op_type_dict": {".*": weight(scheme="full")}}, ("'full'",)),
        ({"op_type_dict": {".*": weight(algorithm="TEQ")}}, ("'teq'", "rtn, gptq, awq")),
        (
            {"op_type_dict": {".*": {**weight(), "activation": {"dtype": "int8"}}}},
            ("activation", "fp32"),
        ),
    ],
)
def test_neural_compressor_s_that_are_refused(value, words, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(value))
    assert_refused(lambda: make_plan(path), str(path), *words)


def test_the_rules_of_a_neural_compressor_configuration():
    value = {"op_type_dict": {"Linear": weight(bit=3)}, "op_name_dict": {"a.b|c": weight()}}
    rules = to_rules(value, "text")
    assert list(rules) == [".*", "^(?:a.b|c)$"]
    assert rules[".*"]["bits"] == 3
