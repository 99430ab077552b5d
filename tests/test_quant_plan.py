"""QuantPlan: which layer gets which spec, and what is refused."""

from __future__ import annotations

import json

import pytest
import regex
from plans import DEFAULT_7, FOUR, MODULES, assert_refused, found, plan_of

from qllm.config import (
    ALGORITHMS,
    BITWIDTHS,
    EMBEDDING,
    LM_HEAD,
    QuantPlan,
    QuantSpec,
)
from qllm.errors import UserError
from qllm.patterns import ByLayer
from qllm.quant.algorithms import ALGORITHMS as CLASSES

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


# ---- the head and the embedding


@pytest.mark.parametrize("pattern", [".*", "", "e", "layers|head", "attention|mlp"])
def test_a_rule_that_does_not_say_its_name_leaves_the_head(pattern):
    assert not {LM_HEAD, EMBEDDING} & {*plan_of({".*": 8, pattern: 4}).resolve(MODULES, 2)}


@pytest.mark.parametrize("pattern", ["{}", "^{}$", "layers|{}"])
@pytest.mark.parametrize("name", [LM_HEAD, EMBEDDING])
def test_a_rule_that_names_what_is_outside_the_layers(name, pattern):
    pattern = pattern.format(name)
    specs = plan_of({".*": 8, pattern: 4}).resolve(MODULES, 2)
    assert specs[name] == FOUR
    assert len({LM_HEAD, EMBEDDING} & {*specs}) == 1
    assert specs["layers.0.mlp.up"].bits == (4 if "layers" in pattern else 8)


def test_the_last_rule_that_names_the_head_wins():
    assert plan_of({"lm_head": 3, "^lm_head$": 4}).resolve(MODULES, 2)[LM_HEAD] == FOUR
    assert plan_of({"^lm_head$": 4, ".*": 8}).resolve(MODULES, 2)[LM_HEAD] == FOUR
    assert LM_HEAD not in plan_of({"lm_head": 4, "^lm_head$": 16}).resolve(MODULES, 2)
    alone = plan_of({"lm_head": 4}).resolve(MODULES, 2)
    assert alone == {**dict.fromkeys(MODULES, QuantSpec()), LM_HEAD: FOUR}


def test_an_embedding_is_rounded_to_nearest_whatever_the_algorithm():
    specs = plan_of({"layers|embed": {"bits": 4, "algorithm": "gptq"}}).resolve(MODULES, 2)
    assert specs[EMBEDDING].algorithm == "rtn"
    assert specs["layers.0.mlp.up"].algorithm == "gptq"


def test_a_tied_head_of_the_embedding_s_spec_is_no_matrix_of_its_own():
    both = {"embed|lm_head": 4}
    assert LM_HEAD in plan_of(both).resolve(MODULES, 2)
    assert LM_HEAD not in plan_of(both).resolve(MODULES, 2, tied=True)
    assert LM_HEAD in plan_of({**both, "lm_head": 8}).resolve(MODULES, 2, tied=True)


def test_a_tied_head_of_16_bits_beside_a_packed_embedding_is_refused():
    rules = {"embed": 4, "lm_head": 16}
    assert {*plan_of(rules).resolve(MODULES, 2)} == {*MODULES, EMBEDDING}
    with pytest.raises(UserError, match="beside a head of 16 bits an embedding of 4"):
        plan_of(rules).resolve(MODULES, 2, tied=True)
    assert EMBEDDING in plan_of({"embed": 4, ".*": 16}).resolve(MODULES, 2, tied=True)


def test_one_more_rule():
    plan = QuantPlan.parse("4,3", DEFAULT_7)
    more = plan.with_rule("^lm_head$", FOUR).with_rule("mlp", QuantSpec())
    assert plan.rules == more.rules[:2] and (more.num_layers, more.text) == (2, "4,3")
    specs = more.resolve(MODULES, 2)
    assert specs[LM_HEAD] == FOUR
    assert specs["layers.1.mlp.up"] == QuantSpec()
    assert specs["layers.1.attention.out"] == QuantSpec(3, 7, "sym", "weight_only")


def test_rules_of_one_layer_are_looked_for_in_its_names_alone():
    """Whatever the rules say, as looking for each of them in each name has it."""
    patterns = [r"^layers\.1\.", r"^layers\.1\.mlp\.experts\.\d+\.up$", r"^layers\.11\.(mlp)"]
    ours = len(patterns)
    patterns += [r"^layers\.1\.*1", r"^layers\.1\.?1", r"^layers\.1\.{0,2}1", r"^layers\.1", "1"]
    patterns += [r"^layers\.1\.mlp|attention", r"^layers\.1\.(?i)|up", r"^layers.1.mlp", "mlp"]
    names = [f"layers.{i}.{n}" for i in (1, 11, 2) for n in ("attention.out", "mlp.experts.7.up")]
    names += [f"model.{name}" for name in names] + [LM_HEAD]
    by_layer = ByLayer(patterns)
    for name in names:
        places = by_layer.places(name)
        assert places == sorted(places)
        where = [i for i, pattern in enumerate(patterns) if regex.search(pattern, name)]
        assert [i for i in places if regex.search(patterns[i], name)] == where
    assert [i for i in by_layer.places(names[3]) if i < ours] == [2]
    assert [i for i in by_layer.places(LM_HEAD) if i < ours] == []
