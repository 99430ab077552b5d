"""QuantSpec and QuantPlan: what a bitwidth means, which layer gets it, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qllm.bitwidths import make_plan
from qllm.config import (
    ALGORITHMS,
    BITWIDTHS,
    DEFAULT_GROUP_SIZE,
    DEFAULT_SCHEME,
    LM_HEAD,
    SCHEMES,
    QuantPlan,
    QuantSpec,
)
from qllm.errors import UserError
from qllm.neural_compressor.rules import to_rules
from qllm.quant.algorithms import ALGORITHMS as CLASSES

# Two layers, named as OPT's: our names, and those of their parts in a Hugging Face checkpoint.
MODULES = {
    f"layers.{i}.{ours}": tuple(f"model.decoder.layers.{i}.{part}" for part in parts)
    for i in range(2)
    for ours, parts in {
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.out_proj",),
        "mlp.up": ("fc1",),
        "mlp.down": ("fc2",),
    }.items()
}
FOUR = QuantSpec.parse("4")


DEFAULT_7 = QuantSpec(group_size=7, scheme="sym")


def found(plan: QuantPlan) -> dict[str, str]:
    """The bitwidth of every layer."""
    return {name: spec.bitwidth for name, spec in plan.resolve(MODULES, 2).items()}


def plan_of(value: dict) -> QuantPlan:
    return QuantPlan.from_json(value)


def assert_refused(call, *words: str) -> None:
    """One line that says these words."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


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


# ---- plans: one value, one per layer, a file


@pytest.mark.parametrize("bitwidth", BITWIDTHS)
def test_one_value_is_for_all(bitwidth):
    plan = QuantPlan.parse(bitwidth, QuantSpec(group_size=64, scheme="sym"))
    expected = QuantSpec.parse(bitwidth, 64, "sym")
    assert plan.resolve(MODULES, 2) == dict.fromkeys(MODULES, expected)
    assert QuantPlan.uniform(expected).resolve(MODULES, 2) == plan.resolve(MODULES, 2)
    assert plan.text == bitwidth


def test_one_value_per_layer():
    assert found(QuantPlan.parse(" 4, 8:tc-li ")) == {
        name: "4" if name.startswith("layers.0.") else "8:tc-li" for name in MODULES
    }


def test_layer_1_is_not_layer_10():
    modules = {f"layers.{i}.mlp.up": (f"model.layers.{i}.mlp.up",) for i in range(12)}
    plan = QuantPlan.parse("1,2,3,4,5,6,7,8,16,1,2,3")
    bits = [spec.bits for spec in plan.resolve(modules, 12).values()]
    assert bits == [1, 2, 3, 4, 5, 6, 7, 8, 16, 1, 2, 3]


@pytest.mark.parametrize("count", [2, 4, 24])
def test_a_list_of_the_wrong_length(count):
    modules = {f"layers.{i}.mlp.up": (f"h.{i}.mlp.up",) for i in range(3)}
    plan = QuantPlan.parse(",".join(["4"] * count))
    assert_refused(lambda: plan.resolve(modules, 3), f"names {count} layers, the model has 3")


@pytest.mark.parametrize("text", ["4,", ",4", "4,,4", "4,9", "4;4", "4 4", ""])
def test_lists_that_are_refused(text):
    assert_refused(lambda: QuantPlan.parse(text), "is unknown; choose from")


def test_a_file(tmp_path):
    path = tmp_path / "plan.json"
    text = '{"attention": 8, "mlp": {"bits": 4, "group_size": 64}}'
    path.write_text(text, encoding="utf-8-sig")  # a byte-order mark is no part of it
    plan = QuantPlan.parse(str(path), QuantSpec(group_size=32, scheme="sym"))
    specs = plan.resolve(MODULES, 2)
    assert specs["layers.1.attention.qkv"] == QuantSpec(8, 32, "sym", "weight_only")
    assert specs["layers.0.mlp.down"] == QuantSpec(4, 64, "sym", "weight_only")
    assert plan.text == str(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ("cannot be read as JSON",)),
        ("{", ("cannot be read as JSON",)),
        ("[" * 100_000, ("cannot be read as JSON",)),
        (b"\xff\xfe", ("cannot be read as JSON",)),
        ("[4, 4]", ("JSON object", '"attention": 8')),
        ("4", ("JSON object",)),
        ("{}", ("JSON object",)),
        ('{"mlp": 9}', ("'mlp'", "'9'", "choose from")),
        ('{"mlp": {"bit": 4}}', ("'mlp'", '{"bits": 4')),
        ('{"mlp(": 4}', ("'mlp('", "no regular expression")),
        ('{"a{99999999999}": 4}', ("no regular expression",)),
    ],
)
def test_files_that_are_refused(tmp_path, content, words):
    path = tmp_path / "plan.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(lambda: QuantPlan.parse(str(path)), str(path), *words)


def test_a_file_that_is_not_there(tmp_path):
    missing = str(tmp_path / "plan.json")
    assert_refused(lambda: QuantPlan.parse(missing), missing, "there is no such file")
    folder = tmp_path / "folder.json"
    folder.mkdir()
    assert_refused(lambda: QuantPlan.parse(str(folder)), "is a folder")


# ---- rules


def test_what_no_rule_names_stays_at_16():
    specs = plan_of({r"layers\.0\.mlp": 4}).resolve(MODULES, 2)
    named = [name for name, spec in specs.items() if spec != QuantSpec()]
    assert named == ["layers.0.mlp.up", "layers.0.mlp.down"]
    assert list(specs) == list(MODULES)


def test_the_last_rule_wins():
    plan = plan_of({".*": 4, "mlp": 3, r"layers\.1\.mlp\.down": "8:tc-li"})
    assert found(plan) == {
        **dict.fromkeys(MODULES, "4"),
        "layers.0.mlp.up": "3",
        "layers.0.mlp.down": "3",
        "layers.1.mlp.up": "3",
        "layers.1.mlp.down": "8:tc-li",
    }
    # The order is the file's: a wider rule that stands last takes them all.
    assert set(found(plan_of({"mlp": 3, ".*": 4})).values()) == {"4"}


@pytest.mark.parametrize("name", ["self_attn", "attention", "q_proj|k_proj|v_proj|out_proj"])
def test_names_of_either_checkpoint(name):
    bits = found(plan_of({name: 4}))
    assert {layer for layer, b in bits.items() if b == "4"} == {
        layer for layer in MODULES if "attention" in layer
    }


def test_rules_that_name_the_parts_of_a_fused_layer_alike():
    apart = plan_of({"q_proj": 4, "k_proj": 4, "v_proj": 4})
    assert found(apart)["layers.0.attention.qkv"] == "4"
    assert found(apart)["layers.0.attention.out"] == "16"


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"q_proj": 8, "k_proj|v_proj": 4}, ("q_proj: {'bits': 8", "k_proj: {'bits': 4")),
        ({"q_proj": 8}, ("q_proj: {'bits': 8", "'16'")),
        ({".*": 4, "v_proj": {"bits": 4, "group_size": 32}}, ("128", "32")),
        ({".*": "8:tc", "v_proj": "8:tc-li"}, ("8:tc'", "8:tc-li'")),
    ],
)
def test_rules_that_split_a_fused_layer(rules, words):
    fused = ("layers.0.attention.qkv", "one fused matrix", "the same")
    assert_refused(lambda: plan_of(rules).resolve(MODULES, 2), *fused, *words)


def test_a_later_rule_mends_a_split():
    assert found(plan_of({"q_proj": 8, "attention": 4}))["layers.1.attention.qkv"] == "4"


@pytest.mark.parametrize("pattern", ["mpl", r"^mlp", r"layers\.2\.", "MLP"])
def test_a_rule_that_matches_nothing(pattern):
    plan = plan_of({".*": 4, pattern: 8})
    assert_refused(lambda: plan.resolve(MODULES, 2), repr(pattern), "layers.0.attention.qkv")


def test_a_rule_that_is_overruled_everywhere_is_used_nonetheless():
    assert set(found(plan_of({"mlp": 8, ".*": 4})).values()) == {"4"}


def test_a_plan_both_ways():
    value = {
        ".*": {"bits": 4, "group_size": 64, "scheme": "sym"},
        "mlp": {"bits": "8:tc-li"},
        r"layers\.1\.mlp": {"bits": "16"},
        "out": {"bits": 3, "group_size": -1, "scheme": "asym"},
    }
    plan = plan_of(value)
    assert plan.to_json() == value
    again = QuantPlan.from_json(json.loads(json.dumps(plan.to_json())), default=DEFAULT_7)
    assert again.rules == plan.rules
    assert list(again.to_json()) == list(value)


@pytest.mark.parametrize("text", ["4", "8:tc", "4,8:tc-li"])
def test_what_the_command_line_gave_both_ways(text):
    plan = QuantPlan.parse(text, QuantSpec(group_size=64, scheme="sym"))
    again = QuantPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.resolve(MODULES, 2) == plan.resolve(MODULES, 2)


# ---- algorithms


def test_the_algorithms():
    assert ALGORITHMS == tuple(CLASSES) == ("rtn", "gptq", "awq", "signround")
    assert FOUR.algorithm == "rtn"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("bitwidth", BITWIDTHS)
def test_an_algorithm_is_for_weights_alone(bitwidth, algorithm):
    spec = QuantSpec.parse(bitwidth, algorithm=algorithm)
    weights = spec.kind == "weight_only"
    assert spec.algorithm == (algorithm if weights else "rtn")
    # What a reader takes without it is left out.
    named = algorithm if weights and algorithm != "rtn" else None
    assert spec.to_json().get("algorithm") == named
    again = QuantSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec


@pytest.mark.parametrize("algorithm", ["GPTQ", "", None, 1, "obq"])
def test_algorithms_that_are_refused(algorithm):
    assert_refused(
        lambda: QuantSpec.parse("4", algorithm=algorithm), repr(algorithm), "rtn, gptq, awq"
    )
    assert_refused(lambda: plan_of({"mlp": {"bits": 4, "algorithm": algorithm}}), "'mlp'")


def test_algorithms_of_a_plan():
    default = QuantSpec(group_size=32, scheme="sym", algorithm="gptq")
    rules = {".*": 4, "mlp": {"bits": 3, "algorithm": "awq"}, r"down|fc2": "8:tc-li"}
    specs = QuantPlan.from_json(rules, default=default).resolve(MODULES, 2)
    assert specs["layers.0.attention.qkv"] == QuantSpec(4, 32, "sym", "weight_only", "gptq")
    assert specs["layers.1.mlp.up"] == QuantSpec(3, 32, "sym", "weight_only", "awq")
    assert specs["layers.1.mlp.down"] == QuantSpec(8, -1, "sym", "w8a8_dynamic", "rtn")
    listed = QuantPlan.parse("4,3", default).resolve(MODULES, 2)
    assert {spec.algorithm for spec in listed.values()} == {"gptq"}


def test_parts_of_a_fused_layer_have_one_algorithm():
    rules = {".*": 4, "v_proj": {"bits": 4, "algorithm": "awq"}}
    assert_refused(lambda: plan_of(rules).resolve(MODULES, 2), "one fused matrix", "awq")


# ---- the head


@pytest.mark.parametrize("pattern", [".*", "", "e", "layers|head", "attention|mlp"])
def test_a_rule_that_does_not_say_its_name_leaves_the_head(pattern):
    assert LM_HEAD not in plan_of({".*": 8, pattern: 4}).resolve(MODULES, 2)


@pytest.mark.parametrize("pattern", ["lm_head", "^lm_head$", "layers|lm_head"])
def test_a_rule_that_names_the_head(pattern):
    specs = plan_of({".*": 8, pattern: 4}).resolve(MODULES, 2)
    assert specs[LM_HEAD] == FOUR
    assert specs["layers.0.mlp.up"].bits == (4 if "layers" in pattern else 8)


def test_the_last_rule_that_names_the_head_wins():
    assert plan_of({"lm_head": 3, "^lm_head$": 4}).resolve(MODULES, 2)[LM_HEAD] == FOUR
    assert plan_of({"^lm_head$": 4, ".*": 8}).resolve(MODULES, 2)[LM_HEAD] == FOUR
    assert LM_HEAD not in plan_of({"lm_head": 4, "^lm_head$": 16}).resolve(MODULES, 2)
    alone = plan_of({"lm_head": 4}).resolve(MODULES, 2)
    assert alone == {**dict.fromkeys(MODULES, QuantSpec()), LM_HEAD: FOUR}


def test_one_more_rule():
    plan = QuantPlan.parse("4,3", DEFAULT_7)
    more = plan.with_rule("^lm_head$", FOUR).with_rule("mlp", QuantSpec())
    assert plan.rules == more.rules[:2] and (more.num_layers, more.text) == (2, "4,3")
    specs = more.resolve(MODULES, 2)
    assert specs[LM_HEAD] == FOUR
    assert specs["layers.1.mlp.up"] == QuantSpec()
    assert specs["layers.1.attention.out"] == QuantSpec(3, 7, "sym", "weight_only")


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


def test_a_user_error_is_a_value_error():
    with pytest.raises(ValueError, match="choose from"):
        QuantSpec.parse("nonsense")
