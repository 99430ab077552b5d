"""Options that cannot work, given to every script that takes them: one line, status 2, no output.

Each case says what is given, and what the line must name.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from bad_input import ALL, BENCH, CALIB, CHAT, CONVERT, GEN, REF, TINY, cases
from conftest import assert_user_error, tiny
from inside import call

PROCESSES = {
    *("name", "size", "size of bloom", "option", "bitwidth", "scheme", "no shards", "dtype"),
    *("too many shards", "a list too short", "a list too long", "group size 0"),
    *("a prompt beyond the window", "an empty prompt", "a blank prompt", "two models"),
    *("no folder", "a file", "an empty folder", "no model of the Hub"),
}


@dataclass(frozen=True)
class Options:
    """Options that cannot work.

    Attributes:
        words: what the line says.
        args: {} stands for the test's own folder.
        files: what that folder holds.
    """

    words: tuple[str, ...]
    args: tuple[str, ...]
    scripts: tuple[str, ...] = (GEN,)
    files: tuple[tuple[str, bytes], ...] = ()


OPTIONS = {
    "name": Options(("'gpt'", "opt", "bloom", "llama"), ("--model-name", "gpt"), ALL),
    "size": Options(("'9b'", "125m", "66b", "tiny"), ("--model-size", "9b"), ALL),
    "size of bloom": Options(
        ("560m", "176b", "tiny"), ("--model-name", "bloom", "--model-size", "125m")
    ),
    "option": Options(("--bits", "--help"), ("--bits", "4"), ALL),
    "bitwidth": Options(
        ("'9'", "1, 2, 3, 4, 5, 6, 7, 8, 8:tc-li, 8:tc, 16"), (*TINY, "--bitwidth", "9")
    ),
    "bitwidth 8:tcli": Options(("'8:tcli'", "8:tc-li"), (*TINY, "--bitwidth", "8:tcli")),
    "bitwidth of nothing": Options(("''", "8:tc-li"), (*TINY, "--bitwidth", "")),
    "bitwidth in a list": Options(("'x'", "8:tc-li"), (*TINY, "--bitwidth", "4,4,x,4,4,4")),
    "a list too short": Options(("names 3 layers", "has 6"), (*TINY, "--bitwidth", "4,4,8")),
    "a list too long": Options(("names 7 layers", "has 6"), (*TINY, "--bitwidth", "4,4,8,4,4,4,4")),
    "no plan": Options(("plan.json", "no such file"), (*TINY, "--bitwidth", "{}/plan.json")),
    "a plan that is no JSON": Options(
        ("plan.json", "cannot be read"),
        (*TINY, "--bitwidth", "{}/plan.json"),
        files=(("plan.json", b"{"),),
    ),
    "a plan that matches nothing": Options(
        ("'q_porj' matches no layer", "layers.0.attention.qkv"),
        (*TINY, "--bitwidth", "{}/plan.json"),
        files=(("plan.json", b'{"attention": 4, "q_porj": 8}'),),
    ),
    "a plan that splits QKV": Options(
        ("one fused matrix",),
        (*TINY, "--bitwidth", "{}/plan.json"),
        files=(("plan.json", b'{".*": 4, "q_proj": 8}'),),
    ),
    "a plan with a group size of 0": Options(
        ("group size 0",),
        (*TINY, "--bitwidth", "{}/plan.json"),
        files=(("plan.json", b'{".*": {"bits": 4, "group_size": 0}}'),),
    ),
    "group size 0": Options(
        ("group size 0", "1 or more, or -1"), (*TINY, "--bitwidth", "4", "--group-size", "0")
    ),
    "group size -2": Options(
        ("group size -2", "-1"), (*TINY, "--bitwidth", "4", "--group-size", "-2")
    ),
    "scheme": Options(("'both'", "sym", "asym"), (*TINY, "--scheme", "both")),
    "a group size with nothing to round": Options(
        ("--group-size 128 does nothing", "--bitwidth"),
        (*TINY, "--group-size", "128"),
        (GEN, BENCH),
    ),
    "a group size of channels": Options(
        ("--group-size 64 does nothing", "8:tc-li and 8:tc have a scale per channel"),
        (*TINY, "--bitwidth", "8:tc-li", "--group-size", "64"),
        (GEN, BENCH),
    ),
    "a scheme with nothing to round": Options(
        ("--scheme asym does nothing", "--bitwidth"), (*TINY, "--scheme", "asym"), (CHAT,)
    ),
    "dtype": Options(("'int8'", "float32", "bfloat16"), (*TINY, "--dtype", "int8"), (GEN, REF)),
    "device": Options(("'tpu'", "cpu, cuda"), (*TINY, "--device", "tpu"), (GEN, REF)),
    "activations of 4 bits": Options(("choose from 8, 16",), (*TINY, "--activation-bits", "4")),
    "activations of 8 bits without a layer for them": Options(
        ("layers of 1 to 8 bits", "8:tc-li"), (*TINY, "--activation-bits", "8")
    ),
    "too many shards": Options(("7 shards", "give 1 to 6"), (*TINY, "--num-shards", "7")),
    "no shards": Options(("0 is too small", "1 or more"), (*TINY, "--num-shards", "0")),
    "shards in words": Options(("'two'",), (*TINY, "--num-shards", "two")),
    "a prompt beyond the window": Options(
        ("600 tokens", "window of 512", "--max-prompt-length"),
        (*TINY, "--max-prompt-length", "600", "--prompt", "king " * 1000),
        (GEN, REF),
    ),
    "more new tokens than the window": Options(
        ("600 new", "window of 512", "--max-gen-tokens"),
        (*TINY, "--max-gen-tokens", "600"),
        (GEN, REF),
    ),
    "samples beyond the window": Options(
        ("--seqlen 600", "512"), (*TINY, "--seqlen", "600"), (CALIB,)
    ),
    "an empty prompt": Options(("prompt 1 is empty",), (*TINY, "--prompt", ""), (GEN, REF)),
    "a blank prompt": Options(
        ("prompt 2 is empty",), (*TINY, "--prompt", "a", "--prompt", " \t"), (GEN, REF)
    ),
    "no prompt in a file": Options(
        ("there is no prompt",),
        (*TINY, "--prompt-file", "{}/prompts"),
        (GEN, REF),
        (("prompts", b"\n \n"),),
    ),
    "no prompt on the input": Options(("there is no prompt",), (*TINY, "--stdin"), (GEN, REF)),
    "no prompt file": Options(
        ("prompts", "No such file"), (*TINY, "--prompt-file", "{}/prompts"), (GEN, REF)
    ),
    "a prompt file that is no text": Options(
        ("p is not UTF-8 text: line 2 has the byte 0xff",),
        (*TINY, "--prompt-file", "{}/p"),
        (GEN, REF),
        (("p", b"a\nb\xff"),),
    ),
    "a seed beyond 63 bits": Options(
        ("--seed", "is too large; give 9223372036854775807 or less"),
        (*TINY, "--seed", "9223372036854775808"),
        (GEN, CALIB),
    ),
    "a reference that is another model": Options(
        ("the reference bloom-tiny of opt-tiny is another model", "family is bloom, not opt"),
        (*TINY, "--compare", "--reference", "bloom-tiny"),
    ),
    "two models": Options(("--model-path and --model-size",), (*TINY, "--model-path", "{}"), ALL),
    "two models by name": Options(
        ("--model-path and --model-name",), ("--model-path", "{}", "--model-name", "opt"), ALL
    ),
    "a timeout of one process": Options(("--timeout is for ranks",), (*TINY, "--timeout", "5")),
    "groups that all rules have": Options(
        ("--group-size 32 does nothing here", "leave it out"),
        (*TINY, "--bitwidth", "{}/plan.json", "--group-size", "32"),
        (GEN, BENCH),
        (("plan.json", b'{".*": {"bits": 4, "group_size": 64}}'),),
    ),
    "a type of random input": Options(
        ("--dtype does nothing with random input", "--dataset"),
        (*TINY, "--dtype", "float32"),
        (CALIB,),
    ),
    "no folder": Options(("nowhere", "no such folder"), ("--model-path", "{}/nowhere"), ALL),
    "a file": Options(("is a file",), ("--model-path", "{}/f"), ALL, (("f", b""),)),
    "an empty folder": Options(("no checkpoint", "config.json"), ("--model-path", "{}"), ALL),
    "no model of the Hub": Options(
        ("some/one is not in the cache", "--model-size tiny runs offline"),
        ("--model-path", "some/one"),
        ALL,
    ),
    "a size that is not in the cache": Options(
        ("bigscience/bloom-560m is not in the cache", "--model-size tiny runs offline"),
        ("--model-name", "bloom"),
        ALL,
    ),
    "static activations without calibration": Options(
        ("8:tc needs a calibration", "fake_calib_gen.py"), (*TINY, "--bitwidth", "8:tc")
    ),
    "no calibration file": Options(
        ("there is no such file", "fake_calib_gen.py"),
        (*TINY, "--bitwidth", "8:tc", "--calib", "{}/c"),
    ),
    "a calibration that is none": Options(
        ("cannot be read as a calibration",),
        (*TINY, "--bitwidth", "8:tc-li", "--calib", "{}/c"),
        files=(("c", b"no calibration"),),
    ),
    "a checkpoint for a calibration": Options(
        ("is no calibration",),
        (*TINY, "--bitwidth", "8:tc", "--calib", str(tiny("opt") / "model.safetensors")),
    ),
    "a folder that is there": Options(
        ("is there already", "--save"),
        (*TINY, "--save", "{}"),
        (CONVERT,),
        (("something", b"of another's"),),
    ),
    "a folder for a file": Options(("is a folder",), (*TINY, "--save", "{}"), (CALIB,)),
    "no data set": Options(
        ("'wikitext9'", "wikitext2, c4"), (*TINY, "--dataset", "wikitext9"), (CALIB,)
    ),
    "a data set out of reach": Options(
        ("--dataset ptb: cannot be had",), (*TINY, "--dataset", "ptb"), (CALIB,)
    ),
    "too little text": Options(
        ("one sample takes 256", "--seqlen"),
        (*TINY, "--dataset", "{}/t"),
        (CALIB,),
        (("t", b"A few words."),),
    ),
}


@pytest.mark.parametrize(("start", "script", "case"), cases(OPTIONS, PROCESSES))
def test_options(start, script, case, tmp_path):
    for name, data in case.files:
        (tmp_path / name).write_bytes(data)
    args = [arg.replace("{}", str(tmp_path)) for arg in case.args]
    assert_user_error(start(script, *args), *case.words)


def test_more_new_tokens_than_the_window_are_refused_without_a_note_of_cut_prompts():
    done = call(GEN, *TINY, "--max-gen-tokens", "600", "--prompt", "He is working on")
    assert done.stderr.count("\n") == 1, done.stderr


def test_the_calibration_of_another_model(tmp_path):
    path = tmp_path / "calibration.safetensors"
    assert call(CALIB, *TINY, "--model-name", "llama", "--save", path).returncode == 0
    done = call(GEN, *TINY, "--bitwidth", "8:tc", "--calib", path)
    assert_user_error(done, "of another model (llama-tiny)")
