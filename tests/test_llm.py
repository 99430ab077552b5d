"""The front door against the parts behind it, and against transformers."""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import processes
import pytest
import torch
from checkpoints import change_json, copy_of
from conftest import FAMILIES, ROOT, tiny
from oracle import bundled, reference

from qllm import LLM, CalibrationText, Completion, quantize
from qllm.bitwidths import make_plan
from qllm.calibration import Calibration
from qllm.config import QuantPlan
from qllm.errors import UserError
from qllm.parallel.group import Group
from qllm.parallel.pipeline import ParallelContext
from qllm.pretrained import Pretrained

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["He is working on", "Once upon a time there was a"]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_tokens_and_logits_are_the_references(family):
    llm = LLM.from_pretrained(tiny(family), dtype="float32", device="cpu")
    found = llm.generate(PROMPTS, max_new_tokens=8)
    ids = [list(each.prompt_tokens) for each in found]
    wanted = reference(bundled(family), ids, eos=None, max_new_tokens=8).tokens
    assert [list(each.tokens) for each in found] == wanted
    assert found[0] == Completion(
        PROMPTS[0],
        tuple(llm.tokenizer.encode(PROMPTS[0])),
        tuple(wanted[0]),
        llm.tokenizer.continuation(ids[0], wanted[0]),
        "length",
    )
    assert llm.generate(ids[1], max_new_tokens=8)[0].tokens == found[1].tokens
    assert "".join(llm.stream(PROMPTS[1], max_new_tokens=8)) == found[1].text
    (logits,) = llm.logits(PROMPTS[0])
    with torch.no_grad():
        expected = bundled(family)(torch.tensor([ids[0]])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda llm: pickle.loads(pickle.dumps(llm))}


@pytest.mark.covering(1)
@pytest.mark.parametrize("again", COPIES)
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"bitwidth": 4}),
        ("bloom", {"bitwidth": "8:tc-li", "lm_head_bits": 8}),
        ("opt", {"bitwidth": 3, "group_size": 32, "scheme": "sym", "embedding_bits": 8}),
        ("opt", {"bitwidth": 4, "activation_bits": 8, "kv_bits": 8}),
    ],
)
def test_a_copy_is_a_model_of_its_own(family, settings, again):
    llm = LLM.from_pretrained(tiny(family), **settings)
    want = llm.logits(PROMPTS), llm.generate(PROMPTS, max_new_tokens=4), llm.nbytes
    found = COPIES[again](llm)
    assert len(pickle.dumps(llm)) < 1.1 * llm.nbytes  # though tensors are views of files
    for buffer in llm.model.buffers():
        buffer.zero_()
    assert all(map(torch.equal, found.logits(PROMPTS), want[0]))
    assert (found.generate(PROMPTS, max_new_tokens=4), found.nbytes) == want[1:]


@pytest.mark.parametrize("again", COPIES)
def test_a_copy_of_act_order_and_of_an_onnx_model(again, shallow_of, tmp_path):
    text = CalibrationText(ROOT / "README.md", 2, 32)
    quantize(shallow_of("opt"), 4, save=tmp_path / "4", algorithm="gptq", dataset=text)
    paths = [tmp_path / "4"]
    if find_spec("onnxruntime"):
        from qllm.onnx.export import export

        export(shallow_of("opt"), tmp_path / "onnx")
        paths.append(tmp_path / "onnx")
    for path in paths:
        llm = LLM.from_pretrained(path)
        (want,), (found,) = llm.logits(PROMPTS[:1]), COPIES[again](llm).logits(PROMPTS[:1])
        assert torch.equal(found, want)


@pytest.mark.parametrize("again", COPIES)
def test_what_processes_share_is_not_copied(again):
    llm = LLM.from_pretrained("opt-tiny")
    llm.model.parallel = ParallelContext(Group((0, 1), 0))
    with pytest.raises(TypeError, match="that processes share cannot be copied or pickled"):
        COPIES[again](llm)


def test_a_text_ends_with_the_models_own_end():
    llm = LLM.from_pretrained("opt-tiny", bitwidth=4)
    (free,) = llm.generate(PROMPTS[0], max_new_tokens=4)
    assert free.finish_reason == "length"
    end = free.tokens[2]
    settings = replace(llm.pretrained.generation, eos_token_ids=(end,))
    llm.pretrained = replace(llm.pretrained, generation=settings)
    (found,) = llm.generate(PROMPTS[0], max_new_tokens=4)
    assert (found.tokens, found.finish_reason) == (free.tokens[:3], "stop")


def test_prompts_may_be_arrays_of_token_ids():
    llm, ids = LLM.from_pretrained("opt-tiny", bitwidth=4), [5, 6, 7]
    (want,) = llm.generate(ids, max_new_tokens=3)
    for same in (
        tuple(ids),
        torch.tensor(ids),
        np.array([ids]),
        list(np.array(ids)),
        [np.array(ids)],
    ):
        (found,) = llm.generate(same, max_new_tokens=3, stop=None)
        assert (found.prompt_tokens, found.tokens) == (want.prompt_tokens, want.tokens)


@pytest.mark.parametrize(
    "wrong", [None, 5, b"abc", {"a": 1}, ["a", None], [[1.5]], [[[5]]], [b"a"]]
)
def test_prompts_that_are_neither_texts_nor_ids(wrong):
    with pytest.raises(TypeError, match=r"(texts? or (a )?sequences?|whole numbers)"):
        LLM.from_pretrained("opt-tiny").generate(wrong, max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1; give a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_prompt_length": 2.5}, "max_prompt_length is 2.5"),
        ({"batch_size": "2"}, "batch_size is '2'"),
        ({"temperature": "1"}, "temperature is '1'; give a number"),
        ({"repetition_penalty": "2"}, "repetition_penalty is '2'"),
        ({"max_prompt_length": 0}, "max_prompt_length is 0; give 1 token or more"),
        ({"batch_size": 0}, "batch_size is 0; give 1 or more, or None"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"seed": 2.0}, "seed is 2.0; give a whole number"),
        ({"stop": "a\udcff"}, r"stop string 'a\\udcff' is not UTF-8"),
        ({"stop": "</s>\n"}, "holds the special token '</s>', .* give that token alone"),
    ],
)
def test_what_cannot_be_asked_for(options, message):
    with pytest.raises(UserError, match=message):
        LLM.from_pretrained("opt-tiny").generate("He", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tempature": 1}, "no setting 'tempature'.* temperature, top_k, top_p, min_p, seed"),
        ({"stop": ["a", None]}, "a stop string is a text, not NoneType"),
        ({"stop": 5}, "stop is a text or several, not int"),
    ],
)
def test_options_of_another_kind(options, message):
    with pytest.raises(TypeError, match=message):
        LLM.from_pretrained("opt-tiny").generate("He", **options)


def test_whole_numbers_may_be_numpy_s():
    llm = LLM.from_pretrained("opt-tiny")
    whole = {"max_new_tokens": 5, "batch_size": 1, "seed": 3, "top_k": 7}
    arrays = {name: np.int64(value) for name, value in whole.items()}
    assert llm.generate(["He", "She"], **arrays) == llm.generate(["He", "She"], **whole)


def test_a_stream_says_what_is_wrong_before_it_is_read():
    with pytest.raises(UserError, match="window of 512"):
        LLM.from_pretrained("opt-tiny").stream("He", max_new_tokens=512)


def test_perplexity_is_that_of_the_logits():
    llm = LLM.from_pretrained("llama-tiny", dtype="float32")
    text = "the sea and the ship and the man who went down to it " * 3
    ids = llm.tokenizer.encode(text)
    (logits,) = llm.logits(text)
    loss = torch.nn.functional.cross_entropy(logits[:-1].double().cpu(), torch.tensor(ids[1:]))
    found = llm.perplexity(text, convention="strided", window=512, stride=512)
    assert found == pytest.approx(loss.exp().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("bitwidth", "bits"),
    [
        (3, [3] * 6),
        ("3", [3] * 6),
        ([4, 4, 8, 8, 4, 16], [4, 4, 8, 8, 4, 16]),
        ({r"layers\.[0-2]\.": 2, "mlp": 5}, None),
    ],
)
def test_what_a_bitwidth_may_be(bitwidth, bits):
    llm = LLM.from_pretrained("opt-tiny", bitwidth=bitwidth)
    found = [layer.attention.qkv.spec.bits for layer in llm.model.layers]
    assert found == (bits or [2, 2, 2, 16, 16, 16])
    if bits is None:
        assert {layer.mlp.up.spec.bits for layer in llm.model.layers} == {5}


def test_a_plan_has_the_head_and_the_embedding_that_were_asked_for():
    assert make_plan(4, lm_head_bits=8, embedding_bits=5).to_json() == {
        ".*": {"bits": 4, "group_size": 128, "scheme": "asym"},
        "^lm_head$": {"bits": 8, "group_size": 128, "scheme": "asym"},
        "^embed$": {"bits": 5, "group_size": 128, "scheme": "asym"},
    }


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("no/such/folder", {}, "there is no such folder"),
        ("opt-tiny", {"bitwidth": {}}, "the plan has no rules"),
        ("opt-tiny", {"bitwidth": 9}, "bitwidth '9' is unknown"),
        ("opt-tiny", {"bitwidth": 4.0}, "bitwidth 4.0 is unknown"),
        ("opt-tiny", {"bitwidth": "4,4"}, "^`bitwidth` 4,4 names 2 layers"),
        ("opt-tiny", {"bitwidth": "8:tc"}, "name one with `calibration`, or use 8:tc-li"),
        ("some/one", {}, "; `opt-tiny` runs offline$"),
        ("opt-tiny", {"kv_bits": 5}, "kv_bits is 5; give one of 16, 8, 4"),
        ("opt-tiny", {"activation_bits": 4}, "activation_bits is 4; give one of 8, 16"),
        ("llama-tiny", {"embedding_bits": 4, "activation_bits": 8}, "there are none"),
        (
            "opt-tiny",
            {"embedding_bits": 4, "lm_head_bits": 16},
            "an embedding of 4 saves nothing; leave the embedding's bits out, or give the head 1",
        ),
        ("opt-tiny", {"embedding_bits": "8:tc-li"}, "bits of the embedding are '8:tc-li'"),
        ("opt-tiny", {"embedding_bits": True}, "bits of the embedding are True; choose from 1"),
        ("opt-tiny", {"lm_head_bits": 9}, "bits of the LM head are 9; choose from 1"),
        ("opt-tiny", {"device": "tpu"}, "give cpu, cuda"),
        ("opt-tiny", {"device": None}, "give cpu, cuda"),
        ("opt-tiny", {"group_size": 64}, "`group_size` 64 does nothing without `bitwidth`"),
        ("opt-tiny", {"scheme": "none"}, "`scheme` none does nothing without `bitwidth`"),
        ("opt-tiny", {"bitwidth": "8:tc-li", "calibration": "none.safetensors"}, "no such file"),
    ],
)
def test_what_cannot_be_loaded(model, options, message):
    with pytest.raises(UserError, match=message):
        LLM.from_pretrained(model, **options)


def test_the_front_door_opens_from_any_folder_without_transformers(tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from qllm import LLM
print(LLM.from_pretrained("bloom-tiny", bitwidth=4).generate("He has a", max_new_tokens=2)[0].text)
assert not {{"transformers", "datasets", "accelerate"}} & set(sys.modules)
"""
    done = processes.run(["-c", program], os.environ, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()


def test_what_quantize_saves_is_what_a_bitwidth_computes(tmp_path):
    reports = quantize("opt-tiny", 4, save=tmp_path / "out", lm_head_bits=8)
    assert len(reports) == 4 * 6 + 1
    saved, rounded = (
        LLM.from_pretrained(tmp_path / "out"),
        LLM.from_pretrained("opt-tiny", bitwidth=4, lm_head_bits=8),
    )
    assert torch.equal(saved.logits(PROMPTS[0])[0], rounded.logits(PROMPTS[0])[0])
    with pytest.raises(UserError, match="is quantized already"):
        quantize(tmp_path / "out", save=tmp_path / "again")


def test_what_an_onnx_model_has_is_refused_of_a_checkpoint_and_the_other_way_round(tmp_path):
    with pytest.raises(UserError, match="`accuracy_level` is for ONNX models"):
        quantize("opt-tiny", 4, save=tmp_path / "out", accuracy_level=4)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    for option in ({"fake": True}, {"compressed": True}, {"dtype": "float32"}):
        with pytest.raises(UserError, match="leave `fake`, `compressed` and `dtype` out"):
            quantize(tmp_path / "onnx", 4, save=tmp_path / "out", **option)


@pytest.mark.parametrize("tp", [0, 2])
def test_a_number_of_processes_that_is_not_there_is_refused(tp):
    with pytest.raises(UserError, match=f"^tp={tp} takes .*, and this is one: put the program"):
        LLM.from_pretrained("opt-tiny", tp=tp)


@pytest.mark.parametrize("dtype", ["float12", "int8", torch.float64])
def test_a_type_that_no_model_is_computed_in_is_refused(dtype, tmp_path):
    message = r"^dtype .* is unknown; give one of float32, float16, bfloat16"
    with pytest.raises(UserError, match=message):
        LLM.from_pretrained("opt-tiny", dtype=dtype)
    with pytest.raises(UserError, match=message):
        quantize("opt-tiny", 4, save=tmp_path / "out", dtype=dtype)


def test_what_ranks_compare_tells_settings_plans_and_versions_apart(tmp_path, monkeypatch):
    folder = copy_of("opt", tmp_path / "opt")
    plan = QuantPlan.parse("4")

    def facts(plan=plan, calibration=None):
        return Pretrained.open(folder).facts(plan, calibration)

    found = [facts(), facts(QuantPlan.parse("3")), facts(calibration=Calibration())]
    change_json(folder / "generation_config.json", repetition_penalty=1.5)
    found.append(facts())
    monkeypatch.setattr("qllm.pretrained.__version__", "9")
    found.append(facts())
    changed = [
        [key for key, value in after.items() if value != before[key]]
        for before, after in ((found[0], each) for each in found[1:])
    ]
    settings = "generation config"
    assert changed == [["plan"], ["calibration"], [settings], ["QLLM version", settings]]


SHARED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from qllm import LLM
llm = LLM.from_pretrained("opt-tiny", bitwidth=4, tp=2)
found = [str(llm.generate(text, max_new_tokens=8)[0].tokens) for text in ("He is", "Once")]
found.append(str(llm.generate("Once", max_new_tokens=8, temperature=3)[0].tokens))
found.append("".join(llm.stream("Once", max_new_tokens=8, temperature=3)).strip())
Path(__file__).with_name(os.environ["RANK"]).write_text("\\n".join(found))
"""


@pytest.mark.usefixtures("no_gpu")
def test_ranks_that_share_a_model_from_python_say_what_one_says(tmp_path):
    (tmp_path / "shared.py").write_text(SHARED.format(root=str(ROOT)))
    ranks = processes.start_ranks(2, [str(tmp_path / "shared.py")])
    said = [rank.communicate(120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    llm = LLM.from_pretrained("opt-tiny", bitwidth=4)
    wanted = [str(each.tokens) for each in llm.generate(["He is", "Once"], max_new_tokens=8)]
    first, second = ((tmp_path / rank).read_text() for rank in "01")
    assert first == second and first.splitlines()[:2] == wanted  # drawn without a seed, too
