"""QLLM in lm-evaluation-harness: against transformers, and against the harness where it is."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from types import SimpleNamespace

import processes
import pytest
import torch
from conftest import FAMILIES, ROOT, tiny
from oracle import bundled, reference

from qllm import harness
from qllm.errors import UserError
from qllm.generate import generate
from qllm.harness import Methods
from qllm.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [
    ("He went down to the", " sea"),
    ("Once upon a time there was a ", "little girl, and"),
    ("", "The end"),
    ("and the sea was wide " * 150, " and deep"),
    ("She was not", " a"),
]
STORY = "Once upon a time there was a man who lived by the sea, and he was not a happy man. "


def requests(*args: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=each) for each in args]


def ours(family: str, **options) -> Methods:
    return Methods(str(tiny(family)), dtype="float32", **options)


@torch.no_grad()
def log_probs(family: str, tokens: list[int]) -> torch.Tensor:
    return bundled(family)(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihoods_equal_transformers(family):
    coder = Tokenizer.load(tiny(family))
    found = ours(family, batch_size="auto").loglikelihood(requests(*PAIRS), True)
    for (context, text), (got, greedy) in zip(PAIRS, found, strict=True):
        bare = context.rstrip()
        whole = coder.encode(context + text)
        before = coder.encode(bare) if bare else [coder.prefix_token_id]
        targets = whole[len(before) :] if bare else whole
        room = len(whole) if family == "bloom" else 512  # BLOOM's window has no end
        tokens = [*before, *targets][-(room + 1) :]
        logs = log_probs(family, tokens[:-1])[-len(targets) :]
        wanted = torch.tensor(targets)
        assert got == pytest.approx(logs.gather(1, wanted[:, None]).sum().item(), rel=1e-5)
        assert greedy == torch.equal(logs.argmax(-1), wanted)


def test_rolling_scores_every_token():
    text = STORY * 40
    coder = Tokenizer.load(tiny("llama"))
    ids = [coder.prefix_token_id, *coder.encode(text)]
    assert 513 < len(ids) < 1024
    first = log_probs("llama", ids[:512])
    total = math.fsum(first[i, ids[i + 1]].item() for i in range(512))
    end = ids[-513:]
    rest = log_probs("llama", end[:-1])
    new = len(ids) - 513
    total += math.fsum(rest[i, end[i + 1]].item() for i in range(512 - new, 512))
    (found,) = ours("llama").loglikelihood_rolling(requests((text,)), True)
    assert found == pytest.approx(total, rel=1e-6)


def test_greedy_text_ends_where_it_is_told(monkeypatch):
    model, coder = ours("opt"), Tokenizer.load(tiny("opt"))
    prompt = coder.encode(STORY)
    (tokens,) = reference(bundled("opt"), [prompt], eos=None, max_new_tokens=12).tokens
    text = coder.continuation(prompt, tokens)
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    assert model.generate_until(requests((STORY, settings)), True) == [text]
    end = text[len(text) // 2]
    settings["until"] = ["no such words", end]
    found = []
    monkeypatch.setattr(
        harness, "generate", lambda *a, **k: found.extend(generate(*a, **k)) or found
    )
    assert model.generate_until(requests((STORY, settings)), True) == [text.partition(end)[0]]
    (ids,) = found
    assert 0 < len(ids) < len(tokens) and end in coder.continuation(prompt, ids)


def test_drawn_text_is_that_of_the_front_door():
    model = ours("opt")
    torch.manual_seed(7)
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.9, "top_p": 0.8}
    found = model.generate_until(requests((STORY, settings), (STORY, settings)), True)
    drawn = {"temperature": 0.9, "top_p": 0.8, "seed": 7}
    want = model.llm.generate([STORY, STORY], max_new_tokens=8, **drawn)
    assert found == [completion.text for completion in want]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": -1.0}, "temperature is -1.0; give a number above 0"),
        ({"max_gen_toks": 512}, "512 leaves no token for a prompt in the model's window of 512"),
    ],
)
def test_what_it_cannot_generate(settings, message):
    with pytest.raises(UserError, match=message):
        ours("opt").generate_until(requests(("text", settings)), True)


def test_without_the_harness_one_line_says_so():
    if importlib.util.find_spec("lm_eval"):
        pytest.skip("lm-evaluation-harness is installed")
    program = "import runpy; runpy.run_module('qllm.harness', run_name='__main__', alter_sys=True)"
    words = ["-c", program, "--model", "qllm", "--tasks", "x"]
    done = processes.run(words, os.environ, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "pip install lm_eval" in line


def test_the_model_enters_the_harness_table_once(monkeypatch):
    """A table of a few lines in the place of the harness's."""
    table = {"hf": "some:Class"}
    registry = type("Table", (), {"__contains__": lambda self, name: name in table})()
    registry.register = lambda name, target: table.update({name: target})
    module = SimpleNamespace(model_registry=registry)
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, module)
    harness.register()
    harness.register()
    assert table == {"hf": "some:Class", "qllm": "qllm.harness:HarnessModel"}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_harness(family):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    def instances(kind: str, args: list[tuple]) -> list[Instance]:
        return [Instance(kind, {}, each, number) for number, each in enumerate(args)]

    harness.register()
    mine = get_model("qllm").create_from_arg_string(f"path={tiny(family)},dtype=float32")
    theirs = HFLM(str(tiny(family)), dtype="float32", device="cpu", batch_size=3)
    found, want = (
        model.loglikelihood(instances("loglikelihood", PAIRS), True) for model in (mine, theirs)
    )
    for (got, greedy), (expected, likeliest) in zip(found, want, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
        assert greedy == likeliest
    texts = instances("loglikelihood_rolling", [(STORY * 40,), ("The end",)])
    found, want = (model.loglikelihood_rolling(texts, True) for model in (mine, theirs))
    assert found == pytest.approx(want, rel=1e-6)
