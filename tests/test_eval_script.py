"""qllm_eval.py as it is run: tables, the JSON object, what it refuses."""

from __future__ import annotations

import hashlib
import json
import math
import shutil

import pytest
from conftest import assert_user_error, tiny
from gguf_files import write_model
from gguf_models import FAMILIES as GGUF_FAMILIES
from inside import call, call_json
from oracle import our_bundled

from qllm import LLM
from qllm.checkpoint.load import module_bytes
from qllm.config import QuantPlan, QuantSpec
from qllm.evaluate.perplexity import CONVENTIONS, PerplexityOptions, Text, perplexity
from qllm.quantize_model import quantize
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from qllm.tokenizer import Tokenizer

EVAL = "qllm_eval.py"
TINY = ("--model-size", "tiny")
STORY = "Once upon a time there was a man who lived by the sea, and he was not a happy man. "
ROWS = [STORY + "He went down to the sea", "The end of it was the end", STORY[:-2]]


SHORT = STORY * 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A text and a task."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(STORY * 30)
    (folder / "task.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return folder


def test_the_object_is_complete(files):
    """Another run, in other batches, says the same but for the times."""
    args = (*TINY, "--model-name", "llama", "--bitwidth", "16,4", "--dtype", "float32")
    (files / "short text").write_text(SHORT)
    args += ("--dataset", files / "short text", "--conventions", "all", "--window", 100)
    args += ("--tasks", files / "task.jsonl", "--agreement", "--max-gen-tokens", 4)
    result = call_json(EVAL, *args)
    assert [row["bitwidth"] for row in result["rows"]] == ["16", "4"]
    for row in result["rows"]:
        model = our_bundled("llama", row["bitwidth"])
        assert row["bytes"] == pytest.approx(module_bytes(model), rel=0.02)  # as a kernel has it
        text = Text.encode(SHORT, Tokenizer.load(tiny("llama")))
        options = PerplexityOptions(tuple(CONVENTIONS), 100)
        assert row["perplexity"] == pytest.approx(perplexity(model, text, options), rel=1e-6)
        assert row["tasks"]["task.jsonl"]["rows"] == 3
        assert row["agreement"]["prefix"]["of"] == 4
        assert row["tokens_per_second"] > 0
    dense, quantized = (row["agreement"]["kl"]["mean"] for row in result["rows"])
    assert dense < 1e-6
    assert quantized > 1e-4
    assert result["dataset"]["sha256"] == hashlib.sha256(SHORT.encode()).hexdigest()
    assert result["dataset"]["tokens"] == len(text.ids)
    assert result["conventions"].keys() == CONVENTIONS.keys()
    assert result["conventions"]["gptq"] | {"about": ""} == {
        "about": "",
        "window": 100,
        "stride": None,
        "windows": len(text.ids) // 100,
        "tokens": len(text.ids) // 100 * 99,
    }
    assert result["conventions"]["strided"]["stride"] == 50
    assert result["fingerprints"].keys() == {"llama-tiny"}
    assert all(len(value) == 64 for value in result["fingerprints"]["llama-tiny"].values())
    for sample in result["samples"]:
        assert sample["rows"][0] == sample["reference"]
    assert result["versions"]["qllm"] and result["versions"]["torch"]
    assert result["machine"]["threads"] > 0
    assert result["settings"]["conventions"] == list(CONVENTIONS)
    again = call_json(EVAL, *args, "--batch-size", 1, "--bitwidth", "4")
    for key in ("dataset", "conventions", "tasks", "fingerprints", "versions"):
        assert again[key] == result[key]
    for row in (*result["rows"], *again["rows"]):
        del row["tokens_per_second"]
    assert again["rows"] == result["rows"][1:]


def test_the_table(files):
    args = ("--bitwidth", "8,3", "--dataset", files / "text.txt", "--compare", "hf")
    done = call(EVAL, *TINY, *args, "--max-tokens", 600)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "opt-tiny, float16 on cpu"
    assert "600 tokens" in lines[1]
    assert "perplexity gptq: disjoint windows" in lines[2] and "512 tokens, 511 pred" in lines[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert rows[0] == ["bitwidth", "MB", "perplexity gptq", "tokens/s"]
    assert [row[0] for row in rows[2:]] == ["8", "3", "transformers"]
    eight, _, theirs = (float(row[2]) for row in rows[2:])
    assert eight == pytest.approx(theirs, rel=0.01)


def test_activations_of_8_bits_where_there_are_layers_for_them(files):
    args = (*TINY, "--dataset", files / "text.txt", "--max-tokens", 600)
    exact = call_json(EVAL, *args, "--bitwidth", "16,4")["rows"]
    args += ("--activation-bits", 8)
    dense, four = call_json(EVAL, *args, "--bitwidth", "16,4")["rows"]
    assert (dense["activation_bits"], four["activation_bits"]) == (16, 8)
    assert dense["perplexity"] == exact[0]["perplexity"]
    assert four["perplexity"] != exact[1]["perplexity"]
    assert four["perplexity"]["gptq"] == pytest.approx(exact[1]["perplexity"]["gptq"], rel=0.02)
    assert "| 4, activations 8 |" in call(EVAL, *args, "--bitwidth", "4").stdout
    assert_user_error(call(EVAL, *args, "--bitwidth", "16"), "layers of 1 to 8 bits")


def test_a_quantized_checkpoint_goes_without_a_bitwidth(files, tmp_path):
    quantize_checkpoint(Job(tiny("opt"), QuantPlan.uniform(QuantSpec.parse("4"))), tmp_path / "q")
    few = ("--max-tokens", 200, "--window", 64)
    args = ("--model-path", tmp_path / "q", "--dataset", files / "text.txt", *few)
    (row,) = call_json(EVAL, *args)["rows"]
    assert row["bitwidth"] == "4"
    (other,) = call_json(EVAL, *TINY, "--bitwidth", 4, *args[2:])["rows"]
    assert row["perplexity"] == pytest.approx(other["perplexity"], rel=1e-6)
    assert_user_error(call(EVAL, *args, "--agreement"), "is quantized, the reference is the 16-bit")
    again = (tmp_path / "q", *args[1:])
    assert_user_error(call(EVAL, "--model-path", *again), "is given more than once")
    assert_user_error(call(EVAL, *args, "--bitwidth", "4"), "is quantized already")
    other = ("--agreement", "--reference", tiny("llama"))
    assert_user_error(call(EVAL, *args, *other), "another model: its family is llama, not opt")
    options = ("--agreement", "--reference", tiny("opt"), "--max-gen-tokens", 2)
    (row,) = call_json(EVAL, *args, *options)["rows"]
    assert 0 < row["agreement"]["kl"]["mean"] < 0.1


def test_checkpoints_side_by_side(files, tmp_path):
    """The record of one leads to the reference of all, and rows are said as they come."""
    for name, algorithm in (("a", "rtn"), ("b", "gptq")):
        plan = QuantPlan.uniform(QuantSpec.parse("3", 32, "sym", algorithm))
        samples = [list(range(5, 69))] * 2
        job = Job(tiny("opt"), plan, samples=samples, origin="opt-tiny")
        quantize_checkpoint(job, tmp_path / name)
    data = ("--dataset", files / "text.txt", "--max-tokens", 200, "--window", 64)
    paths = (tmp_path / "b", tmp_path / "a")
    done = call(EVAL, "--model-path", *paths, *data, "--agreement", "--max-gen-tokens", 2, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [(row["model"], row["algorithm"]) for row in result["rows"]] == [
        ("b", "gptq"),
        ("a", "rtn"),
    ]
    assert {row["format"] for row in result["rows"]} == {"3 bits, group 32, sym"}
    assert all(0 < row["agreement"]["kl"]["mean"] < 0.2 for row in result["rows"])
    said = [line for line in done.stderr.splitlines() if "perplexity gptq" in line]
    assert [line.split(",")[0] for line in said] == ["note: model b", "note: model a"]
    assert "the reference is opt-tiny" in done.stderr
    assert result["fingerprints"].keys() == {"a", "b"}
    (alone,) = call_json(EVAL, "--model-path", paths[1], *data)["rows"]
    assert alone["perplexity"] == result["rows"][1]["perplexity"]
    done = call(EVAL, "--model-path", tiny("opt"), *paths, *data, "--bitwidth", 4)
    assert_user_error(done, "is quantized already")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--dataset {}/text.txt", "the tokenizers of other and opt-tiny differ"),
        ("--dataset {}/text.txt --conventions word --max-tokens 600", "--max-tokens leaves"),
        ("--tasks {}/task.jsonl --agreement", "measure --agreement of one at a time"),
        ("--dataset {}/text.txt --window 100 --conventions word,byte", None),
        ("--tasks {}/task.jsonl", None),
    ],
)
def test_only_what_is_comparable_is_compared(options, words, files, tmp_path):
    """The other model's tokenizer has fewer merges."""
    shutil.copytree(tiny("opt"), tmp_path / "other")
    path = tmp_path / "other/tokenizer.json"
    found = json.loads(path.read_text())
    found["model"]["merges"] = found["model"]["merges"][:100]
    path.write_text(json.dumps(found))
    given = options.format(files, files).split()
    done = call(EVAL, "--model-path", tiny("opt"), tmp_path / "other", *given)
    if words is None:
        assert done.returncode == 0, done.stderr
    else:
        assert_user_error(done, words)


def test_windows_that_differ_are_not_compared(files, tmp_path):
    """BLOOM has no window of its own, and reads what the convention says."""
    paths = (tiny("opt"), tiny("bloom"))
    done = call(
        EVAL, "--model-path", *paths, "--dataset", files / "text.txt", "--conventions", "word"
    )
    assert_user_error(
        done, "windows of bloom-tiny and opt-tiny differ, 2048 and 512", "--window 512"
    )


def test_tasks_of_one_name_in_two_folders(files):
    (files / "other").mkdir(exist_ok=True)
    (files / "other" / "task.jsonl").write_text('{"text": "The sea was calm"}\n')
    first, second = files / "task.jsonl", files / "other" / "task.jsonl"
    result = call_json(EVAL, *TINY, "--tasks", f"{first}, {second},{first}", "--limit", 2)
    found = {name: about["rows"] for name, about in result["tasks"].items()}
    assert found == {str(first): 2, str(second): 1}


def test_agreement_on_prompts():
    args = ("--agreement", "--prompt", "He is", "--prompt", "The sea was", "--max-gen-tokens", 3)
    (row,) = call_json(EVAL, *TINY, "--bitwidth", 2, *args)["rows"]
    count = sum(len(Tokenizer.load(tiny("opt")).encode(text)) for text in ("He is", "The sea was"))
    assert row["agreement"]["positions"] == count
    assert row["agreement"]["prefix"]["prompts"] == 2
    assert row["perplexity"] == row["tasks"] == {}


def test_agreement_with_a_gguf_file(files, tmp_path):
    """Which our own decoder runs, in float32: of itself nothing is different."""
    file = write_model(tmp_path / "model.gguf", GGUF_FAMILIES["llama"](), "Q8_0")
    ask = ("--agreement", "--prompt", "the sea and the land", "--max-gen-tokens", 3)
    own = call_json(EVAL, "--model-path", file, *ask, "--dtype", "float32")
    (row,) = own["rows"]
    assert row["agreement"]["kl"]["max"] == 0 and row["agreement"]["prefix"]["min"] == 3
    rounded = call_json(EVAL, "--model-path", file, "--bitwidth", 2, *ask)
    (row,) = rounded["rows"]
    models = [LLM.from_pretrained(file, bitwidth=bits, dtype="float32") for bits in (16, 2)]
    logits = [llm.model.prefill([llm.tokenizer.encode(ask[2])], last=False) for llm in models]
    p, q = (part.double().log_softmax(-1) for part in logits)
    want = (p.exp() * (p - q)).sum(-1).mean().item()
    assert row["agreement"]["kl"]["mean"] == pytest.approx(want, rel=1e-2)
    quantize(file, 2, save=tmp_path / "q")  # which knows the file that it was made from
    done = call(EVAL, "--model-path", tmp_path / "q", *ask, "--json")
    (again,) = json.loads(done.stdout)["rows"]
    assert again["agreement"]["kl"] == row["agreement"]["kl"]
    assert f"the reference is {file}, which" in done.stderr
    compared = ("--compare", "hf", "--tasks", files / "task.jsonl")
    assert_user_error(call(EVAL, "--model-path", file, *compared), "is a GGUF file; name")


def test_named_data_goes_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(repository, config, *, data_files, split):
        asked.append((repository, config, split))
        return {"text": ROWS * 20}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = ("--dataset", "wikitext2", "--tasks", "lambada_openai", "--limit", 2)
    result = call_json(EVAL, *TINY, "--bitwidth", 4, *args)
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("EleutherAI/lambada_openai", "default", "test"),
    ]
    (row,) = result["rows"]
    assert row["tasks"]["lambada_openai"]["rows"] == 2
    assert math.isfinite(row["perplexity"]["gptq"])


def test_pictures_and_page(files, tmp_path):
    pytest.importorskip("matplotlib")
    paths = (tmp_path / "x.png", tmp_path / "x.html")
    args = ("--bitwidth", "4,2", "--dataset", files / "text.txt", "--plot", paths[0])
    done = call(EVAL, *TINY, *args, "--report", paths[1])
    assert done.returncode == 0, done.stderr
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert '"bitwidth": "2"' in paths[1].read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ("nothing to measure", "--dataset", "--tasks")),
        (("--dataset", "{}/short"), ("has 3 tokens, fewer than one window of 512",)),
        (("--dataset", "{}/empty"), ("there is no text in it",)),
        (("--dataset", "{}/text.txt", "--window", "513"), ("up to the model's 512",)),
        (("--dataset", "{}/text.txt", "--window", "1"), ("1 tokens cannot be; give 2",)),
        (("--dataset", "nowhere"), ("neither a file nor one of wikitext2",)),
        (("--dataset", "wikitext2"), ("wikitext2: cannot be had", "give a file instead")),
        (("--tasks", "lambada_openai"), ("lambada_openai: cannot be had", "give a file")),
        (("--tasks", "hellaswag"), ("neither a file nor one of lambada_openai",)),
        (("--tasks", "{}/text.txt"), ('each line of a JSON-lines file is {"text"',)),
        (("--tasks", "{}/empty"), ("there are no rows in it",)),
        (("--dataset", "{}/text.txt", "--conventions", "hf"), ("'hf' is unknown", "gptq")),
        (("--dataset", "{}/text.txt", "--stride", "9"), ("--stride does nothing without",)),
        (("--agreement", "--window", "9"), ("--window does nothing without --dataset",)),
        (("--agreement", "--limit", "9"), ("--limit does nothing without --tasks",)),
        (("--agreement", "--max-gen-tokens", "600"), ("window of 512",)),
        (("--dataset", "{}/text.txt", "--bitwidth", "4,4,8"), ("4 more than once", "JSON plan")),
        (("--dataset", "{}/text.txt", "--bitwidth", "4,9"), ("'9' is unknown",)),
        (("--dataset", "{}/text.txt", "--scheme", "sym"), ("--scheme sym does nothing",)),
        (("--dataset", "{}/text.txt", "--plot", "x.gif"), ("--plot x.gif", ".png")),
        (("--dataset", "{}/text.txt", "--report", "no/x.html"), ("there is no folder no",)),
        (("--dataset", "{}/text.txt", "--report", "/proc/x.html"), ("/proc/x.html cannot be",)),
        (("--dataset", "{}/text.txt", "--prompt", "a"), ("--prompt does nothing",)),
        (("--dataset", "{}/text.txt", "--max-gen-tokens", "4"), ("--max-gen-tokens does nothing",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_it_refuses(args, words, files):
    (files / "short").write_text("two words")
    (files / "empty").write_text("")
    given = [arg.format(files) for arg in args]
    assert_user_error(call(EVAL, *TINY, *given), *words)


def test_a_plot_without_matplotlib(files, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    done = call(EVAL, *TINY, "--dataset", files / "text.txt", "--plot", "x.png")
    assert_user_error(done, "matplotlib", "pip install matplotlib")
