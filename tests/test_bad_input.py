"""Every kind of bad input, given to every script that takes it: one line, status 2, no output.

Each case says what is given, and what the line must name. qllm_gen.py runs as a process for the
cases that users were promised an answer to, and whatever ends before torch is imported does;
the rest is called in this process, where a second less goes by.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import (
    LFS_POINTER,
    change_json,
    copy_of,
    legacy_bin,
    rewritten,
    state_of,
)
from conftest import assert_user_error, run, tiny
from inside import call

GEN, REF, CHAT = "qllm_gen.py", "ref_gen.py", "qllm_chat.py"
CONVERT, CALIB, BENCH = "weight_convert.py", "fake_calib_gen.py", "qllm_bench.py"
ALL = (GEN, REF, CONVERT, CALIB, BENCH)
PROCESSES = {
    *("name", "size", "size of bloom", "option", "bitwidth", "scheme", "no shards", "dtype"),
    *("too many shards", "a list too short", "a list too long", "group size 0"),
    *("a prompt beyond the window", "an empty prompt", "a blank prompt", "two models"),
    *("no folder", "a file", "an empty folder", "no model of the Hub"),
    *("text for safetensors", "truncated safetensors", "truncated torch file"),
    *("LFS pointer for weights", "other shapes than config.json", "more layers than weights"),
    *("a missing shard", "an index entry above its folder", "an index entry elsewhere"),
    *("token ids beyond the vocabulary", "NaN weights", "code in a pickle"),
}
TINY = ("--model-size", "tiny")


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
        ("is there already", "--save"), (*TINY, "--save", "{}"), (CONVERT,)
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


def cases(table: dict) -> list:
    """A parameter set for each case and each script that takes it: how to start it, which, what."""
    return [
        pytest.param(
            run if name in PROCESSES and script == GEN else call,
            script,
            case,
            id=f"{name}-{script.removesuffix('.py')}",
        )
        for name, case in table.items()
        for script in case.scripts
    ]


def test_the_names_of_processes_are_cases():
    assert {**OPTIONS, **CHECKPOINTS}.keys() >= PROCESSES


@pytest.mark.parametrize(("start", "script", "case"), cases(OPTIONS))
def test_options(start, script, case, tmp_path):
    for name, data in case.files:
        (tmp_path / name).write_bytes(data)
    args = [arg.replace("{}", str(tmp_path)) for arg in case.args]
    assert_user_error(start(script, *args), *case.words)


def test_more_new_tokens_than_the_window_are_refused_without_a_note_of_cut_prompts():
    done = call(GEN, *TINY, "--max-gen-tokens", "600", "--prompt", "He is working on")
    assert done.stderr.count("\n") == 1, done.stderr


def broken_state(name: str, value: float, family: str = "opt") -> dict[str, torch.Tensor]:
    state = state_of(family)
    state[name].view(-1)[7] = value
    return state


def with_nan(folder: Path) -> None:
    state = broken_state("model.decoder.layers.5.fc2.weight", float("nan"))
    rewritten("opt", folder, "safetensors", state)


def with_infinite_bias(folder: Path) -> None:
    state = broken_state(
        "transformer.h.0.self_attention.query_key_value.bias", float("inf"), "bloom"
    )
    rewritten("bloom", folder, "bin", state)


def truncated(folder: Path) -> None:
    copy_of("opt", folder, weights=False)
    whole = (tiny("opt") / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def truncated_bin(folder: Path) -> None:
    rewritten("opt", folder, "bin")
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:3_000_000])


def holding(name: str, data: bytes, family: str = "opt") -> Callable[[Path], None]:
    """A copy whose file of this name holds something else."""

    def make(folder: Path) -> None:
        copy_of(family, folder, weights=not name.startswith(("model.", "pytorch")))
        (folder / name).write_bytes(data)

    return make


def changed(**config: object) -> Callable[[Path], None]:
    """A copy with changes to its config.json."""
    return lambda folder: copy_of("opt", folder, **config) and None


def without_weights(folder: Path) -> None:
    copy_of("llama", folder, weights=False)


def missing_shard(folder: Path) -> None:
    rewritten("opt", folder, "bin-sharded")
    (folder / "pytorch_model-00003-of-00003.bin").unlink()


def leaving(name: str) -> Callable[[Path], None]:
    """An index whose first entry is elsewhere, where there is a good file."""

    def make(folder: Path) -> None:
        rewritten("opt", folder, "safetensors-sharded")
        first = "model-00001-of-00003.safetensors"
        target = folder / name  # an absolute name stays what it is
        (folder / first).rename(target)
        path = folder / "model.safetensors.index.json"
        path.write_text(path.read_text().replace(first, name))

    return make


def code_in_a_pickle(folder: Path) -> None:
    copy_of("opt", folder, weights=False)
    (folder / "pytorch_model.bin").write_bytes(
        pickle.dumps({"a": Touch(str(folder / "it-ran"))}, protocol=2)
    )


class Touch:
    """Unpickling one makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def large_ids(folder: Path) -> None:
    """A tokenizer with a token more than the model has embeddings for, which a prompt becomes."""
    copy_of("opt", folder)
    path = folder / "tokenizer.json"
    tokens = json.loads(path.read_text())["added_tokens"]
    extra = {**tokens[0], "id": 4096, "content": " working"}
    change_json(path, added_tokens=[*tokens, extra])


def other_tensors(folder: Path) -> None:
    """A bare dictionary of something else, in the old format."""
    copy_of("opt", folder, weights=False)
    legacy_bin(folder, {"a": torch.zeros(3)})


def absolute(folder: Path) -> None:
    leaving(str(folder.parent / "elsewhere.safetensors"))(folder)


@dataclass(frozen=True)
class Broken:
    """A checkpoint that cannot work."""

    words: tuple[str, ...]
    make: Callable[[Path], None]
    scripts: tuple[str, ...] = (GEN, REF, CONVERT)


CHECKPOINTS = {
    "text for safetensors": Broken(
        ("model.safetensors", "not a whole safetensors file"),
        holding("model.safetensors", b"no checkpoint"),
        (*ALL,),
    ),
    "text for a torch file": Broken(
        ("pytorch_model.bin", "no whole torch checkpoint"),
        holding("pytorch_model.bin", b"no checkpoint"),
    ),
    "truncated safetensors": Broken(("model.safetensors", "not a whole"), truncated, ALL),
    "truncated torch file": Broken(("pytorch_model.bin", "no whole"), truncated_bin),
    "a header of exabytes": Broken(
        ("model.safetensors", "not a whole"),
        holding("model.safetensors", b"\xff" * 7 + b"\x7f{}"),
        (GEN,),
    ),
    "LFS pointer for weights": Broken(
        ("model.safetensors is a Git LFS pointer", "git lfs pull"),
        holding("model.safetensors", LFS_POINTER),
        (*ALL,),
    ),
    "LFS pointer for a torch file": Broken(
        ("pytorch_model.bin is a Git LFS pointer",), holding("pytorch_model.bin", LFS_POINTER)
    ),
    "LFS pointer for config.json": Broken(
        ("config.json is a Git LFS pointer",), holding("config.json", LFS_POINTER), ALL
    ),
    "LFS pointer for the tokenizer": Broken(
        ("tokenizer.json is a Git LFS pointer",), holding("tokenizer.json", LFS_POINTER), (GEN, REF)
    ),
    "config.json is no JSON": Broken(
        ("config.json", "cannot be read as JSON"), holding("config.json", b"{"), ALL
    ),
    "config.json of another family": Broken(
        ("'t5'", "opt, bloom, llama"), changed(model_type="t5"), ALL
    ),
    "a size that is text": Broken(("ffn_dim is '1k'",), changed(ffn_dim="1k"), ALL),
    "a negative size": Broken(
        ("num_hidden_layers is -6", "from 1 to 1000"), changed(num_hidden_layers=-6), ALL
    ),
    "other shapes than config.json": Broken(
        ("fc1.weight has the shape [1024, 256]", "config.json implies [512, 256]"),
        changed(ffn_dim=512),
    ),
    "more layers than weights": Broken(
        ("holds 6 layers", "config.json implies 7"), changed(num_hidden_layers=7)
    ),
    "more weights than layers": Broken(
        ("holds model.decoder.layers.5", "config.json"), changed(num_hidden_layers=5)
    ),
    "layers without end": Broken(
        ("num_hidden_layers is 10000000", "to 1000"), changed(num_hidden_layers=10**7), ALL
    ),
    "a size without end": Broken(("ffn_dim", "to 2147483647"), changed(ffn_dim=10**30), ALL),
    "no weights": Broken(("neither model.safetensors nor pytorch_model.bin",), without_weights),
    "other tensors": Broken(("no tensor that begins with model.decoder",), other_tensors),
    "a missing shard": Broken(("lacks pytorch_model-00003-of-00003.bin",), missing_shard),
    "an index entry above its folder": Broken(
        ("'../up.safetensors'", "not a file of its own folder"), leaving("../up.safetensors")
    ),
    "an index entry elsewhere": Broken(
        ("elsewhere.safetensors'", "not a file of its own folder"), absolute
    ),
    "code in a pickle": Broken(("pytorch_model.bin", "tensors alone"), code_in_a_pickle),
    "token ids beyond the vocabulary": Broken(
        ("prompt 1: the text becomes token 4096, ' working'", "vocabulary ends at 4095"),
        large_ids,
        (GEN, REF),
    ),
    "a tokenizer that is none": Broken(
        ("the tokenizer cannot be read",), holding("tokenizer.json", b"{}"), (GEN, REF)
    ),
    "NaN weights": Broken(("layers.5.fc2.weight holds NaN",), with_nan, (GEN, CONVERT, REF)),
    "infinite weights": Broken(
        ("query_key_value.bias holds NaN or infinite",), with_infinite_bias, (GEN,)
    ),
}


@pytest.mark.parametrize(("start", "script", "case"), cases(CHECKPOINTS))
def test_checkpoints(start, script, case, tmp_path):
    folder = tmp_path / "model"
    case.make(folder)
    options = ()
    if script == CALIB:
        (tmp_path / "text").write_text("Some words of text. " * 200)
        options = ("--dataset", tmp_path / "text")
    assert_user_error(start(script, "--model-path", folder, *options), *case.words)
    assert not (folder / "it-ran").exists()


def test_a_converted_folder_is_not_for_the_reference_nor_converted_again(tmp_path):
    """It is compared with what it was made from."""
    done = call(CONVERT, *TINY, "--save", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for script, options, words in (
        (REF, (), "the reference reads Hugging Face's"),
        (GEN, ("--compare", "--reference", tmp_path / "out"), "the reference reads Hugging Face's"),
        (CONVERT, (), "already"),
    ):
        assert_user_error(call(script, "--model-path", tmp_path / "out", *options), words)
    done = call(GEN, "--model-path", tmp_path / "out", "--compare", "--max-gen-tokens", "1")
    assert done.stdout.count("agreement:  1 of 1 tokens") == 3, done.stderr


def test_the_calibration_of_another_model(tmp_path):
    path = tmp_path / "calibration.safetensors"
    assert call(CALIB, *TINY, "--model-name", "llama", "--save", path).returncode == 0
    done = call(GEN, *TINY, "--bitwidth", "8:tc", "--calib", path)
    assert_user_error(done, "of another model (llama-tiny)")
