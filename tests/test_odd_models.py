"""Models of one layer, one head and a window of 16; odd settings, and odd paths."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, ROOT
from covering import each, slow_but
from inside import call
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BloomConfig, LlamaConfig, OPTConfig
from transformers.models.auto import AutoModelForCausalLM

import qllm_bench
from qllm.bench import speed

SIZES = {"vocab_size": 260, "hidden_size": 32}
ONE = {"num_attention_heads": 1, "num_hidden_layers": 1, "max_position_embeddings": 16}
CONFIGS = {
    "opt": lambda: OPTConfig(**SIZES, **ONE, ffn_dim=40, word_embed_proj_dim=32),
    "bloom": lambda: BloomConfig(**SIZES, n_head=1, n_layer=1),
    "llama": lambda: LlamaConfig(**SIZES, **ONE, intermediate_size=40),
}
TEXT = "It was the best of times, it was the worst of times. " * 60


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """A folder of them, and of text; their tokenizer's tokens are bytes."""
    folder = tmp_path_factory.mktemp("odd")
    torch.manual_seed(0)
    for family, config in CONFIGS.items():
        model = AutoModelForCausalLM.from_config(config()).to(torch.float16)
        model.save_pretrained(folder / family)
        write_tokenizer(folder / family)
    (folder / "text").write_text(TEXT)
    (folder / "rows.jsonl").write_text(json.dumps({"text": TEXT[:50]}) + "\n")
    return folder


def write_tokenizer(folder: Path) -> None:
    special = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
    tokens = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{kind}_token": token for kind, token in special.items()}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


# {} stands for the folder of `odd`.
DEFAULTS = {
    "gen": "qllm_gen.py",
    "gen at 4 bits": "qllm_gen.py --bitwidth 4",
    "ref": "ref_gen.py",
    "calib": "fake_calib_gen.py --save {}/calib",
    "calib of text": "fake_calib_gen.py --save {}/calib --dataset {}/text",
    "convert": "weight_convert.py --save {}/out",
    "rtn": "qllm_quant.py --save {}/out",
    "gptq": "qllm_quant.py --save {}/out --algorithm gptq --dataset {}/text",
    "awq": "qllm_quant.py --save {}/out --algorithm awq --dataset {}/text",
    "int8": "qllm_quant.py --save {}/out --bitwidth 8:tc --dataset {}/text",
    "eval": "qllm_eval.py --dataset {}/text --conventions all --tasks {}/rows.jsonl "
    "--max-tokens 2100",
    "agreement": "qllm_eval.py --agreement --bitwidth 4",
    "bench": "qllm_bench.py --bitwidth 4 -r 1",
    "tree": "qllm_bench.py --tree",
}


@pytest.mark.parametrize(("name", "family"), slow_but(each(DEFAULTS, FAMILIES), DEFAULTS, FAMILIES))
def test_a_default_fits_every_model(name, family, odd, one_thread, monkeypatch):
    # What the machine allows takes the longest to measure, and is the same for every model.
    monkeypatch.setattr(speed.Roofline, "measure", lambda device: None)
    script, *options = DEFAULTS[name].replace("{}", str(odd)).split()
    if "--algorithm" in options and family != "opt":
        options += ["--nsamples", "4"]
    done = call(script, "--model-path", odd / family, *options)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(odd / "out", ignore_errors=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("qllm_gen.py --num-shards 2", "2 shards cannot share 1 layers"),
        ("qllm_gen.py --max-gen-tokens 16", "exceed the model's window of 16"),
        ("fake_calib_gen.py --seqlen 17", "--seqlen 17 exceeds the window of 16"),
        ("qllm_bench.py -p 17", "the model's window is 16"),
        ("qllm_bench.py -p 0 -n 0", "leave nothing to measure"),
    ],
)
def test_what_is_given_is_refused(line, words, odd):
    script, *options = line.split()
    done = call(script, "--model-path", odd / "opt", *options)
    assert done.returncode == 2 and words in done.stderr


def test_a_users_prompt_gets_the_window(odd):
    """A token a byte: a window of 16 less 8 new tokens; BLOOM has no window, and reads it all."""
    text = "It was the best of times, it was the worst of times."
    for family, lost in (
        ("llama", "and loses its beginning; --max-prompt-length is 8"),
        ("bloom", ""),
    ):
        done = call("qllm_gen.py", "--model-path", odd / family, "--prompt", text)
        assert done.returncode == 0 and lost in done.stderr
        assert ("loses" in done.stderr) == bool(lost)


def test_a_quantized_checkpoint_is_compared_with_its_original(odd, tmp_path):
    options = ("--model-path", tmp_path / "out", "--compare")
    made = call("qllm_quant.py", "--model-path", odd / "opt", "--save", tmp_path / "out")
    assert made.returncode == 0, made.stderr
    whole = json.loads(call("ref_gen.py", "--model-path", odd / "opt", "--json").stdout)
    for more in ((), ("--reference", odd / "opt")):
        done = call("qllm_gen.py", *options, *more, "--json")
        assert done.returncode == 0, done.stderr
        assert bool(more) != (f"the reference is {odd / 'opt'}" in done.stderr)
        rows = json.loads(done.stdout)["compare"]
        assert [row["tokens"] for row in rows] == [row["tokens"] for row in whole["results"]]
    done = call("qllm_gen.py", "--model-path", odd / "opt", "--reference", odd / "opt")
    assert done.returncode == 2 and "nothing without --compare" in done.stderr


@pytest.mark.parametrize(
    ("options", "window", "expected"),
    [
        ("", None, ["pp512", "tg128"]),
        ("", 16, ["pp16", "tg13"]),
        ("-p 0", None, ["tg128"]),
        ("-n 0", 16, ["pp16"]),
        ("-p 7", None, ["pp7"]),
        ("-p 0,7 -n 5", None, ["pp7", "tg5"]),
    ],
)
def test_what_is_measured_by_default(options, window, expected, monkeypatch):
    """As llama-bench has it: a length of 0 stands for no test, and leaves the other at its own."""
    monkeypatch.setattr(sys, "argv", ["qllm_bench.py", *options.split()])
    args = qllm_bench.parse_args()
    qllm_bench.check_options(args)
    found = qllm_bench.throughput_cases(args, SimpleNamespace(max_positions=window))
    assert [str(case) for case in found] == expected


SETTINGS = [
    {"top_k": 4, "penalty_alpha": 0.6},
    {"eos_token_id": "</s>"},
    {"pad_token_id": -1},
    {"repetition_penalty": 2},
    {"repetition_penalty": -1.0},
    {"num_return_sequences": 2},
    {"stop_strings": ["a"]},
    {"cache_implementation": "none"},
    {"use_cache": False},
    {"dola_layers": "low"},
    {"constraints": [1]},
    {"force_words_ids": [[5]]},
    {"return_dict_in_generate": True, "output_scores": True},
    {"bad_words_ids": "x"},
    {"suppress_tokens": [5, 6]},
    {"prompt_lookup_num_tokens": 3},
    {"guidance_scale": 2.0},
    {"watermarking_config": {"bias": 1.0, "seeding_scheme": "x"}},
    {"forced_eos_token_id": "x"},
    {"sequence_bias": {"x": 1.0}},
    {"min_length": "3"},
    {"early_stopping": "x"},
    {"do_sample": True, "temperature": 0.0, "top_p": 0.5},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    {"token_healing": True},
    {"compile_config": {}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=",".join)
def test_settings_are_followed_named_or_refused(settings, odd, tmp_path):
    """Never a traceback; where neither says a word, both give the same tokens."""
    folder = shutil.copytree(odd / "llama", tmp_path / "llama")
    (folder / "generation_config.json").write_text(json.dumps(settings))
    options = ("--model-path", folder, "--dtype", "float32", "--prompt", "It was", "--json")
    found = [call(script, *options) for script in ("ref_gen.py", "qllm_gen.py")]
    for done in found:
        assert done.returncode in (0, 2)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
        assert len(lines) == (1 if done.returncode else 0), done.stderr
    if [done.returncode for done in found] == [0, 0] and "does not apply" not in found[1].stderr:
        rows = [json.loads(done.stdout)["results"] for done in found]
        assert rows[0] == rows[1]


# A locale whose encoding is ASCII, in which the bytes of a path become what no library takes.
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


OURS = (
    "fake_calib_gen.py --save {}/calib --dataset {}/text",
    "qllm_gen.py --bitwidth 8:tc --calib {}/calib",
    "weight_convert.py --save {}/out",
    "qllm_quant.py --save {}/gptq --algorithm gptq --dataset {}/text --nsamples 4",
    "qllm_eval.py --dataset {}/text --max-tokens 99 --report {}/page.html",
)
THEIRS = ("qllm_gen.py --bitwidth 4 --compare", "ref_gen.py")  # import transformers


@pytest.mark.slow
@pytest.mark.parametrize("theirs", [False, True])
def test_a_path_that_the_locale_cannot_decode(theirs, odd, tmp_path):
    name = "m\u00fc".encode() + b"\xff"
    folder = os.path.join(os.fsencode(tmp_path), name)  # noqa: PTH118 - of bytes
    os.mkdir(folder)  # noqa: PTH102
    for path in (odd / "llama").iterdir():
        shutil.copy(path, os.path.join(folder, os.fsencode(path.name)))  # noqa: PTH118
    shutil.copy(odd / "text", os.path.join(folder, b"text"))  # noqa: PTH118
    program = (
        "import os, sys\nsys.path[:0] = sys.argv[1:3]\nfrom inside import call\n"
        "folder = sys.argv[3]\n"
        "for line in sys.argv[4:]:\n"
        "    script, *options = line.split()\n"
        "    options = [option.replace('{}', folder) for option in options]\n"
        "    done = call(script, '--model-path', folder, *options)\n"
        "    print(script, done.returncode, ascii(done.stderr))\n"
    )
    lines = OURS + THEIRS if theirs else OURS
    done = subprocess.run(
        [sys.executable, "-c", program, ROOT, ROOT / "tests", folder, *lines],
        env={**os.environ, **ASCII},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["0"] * len(lines), done.stdout
