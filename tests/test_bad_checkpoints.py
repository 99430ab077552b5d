"""Checkpoints that cannot work, given to every script that reads one.

Each case says how its checkpoint is made, and what the one line of the mistake must name.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from bad_input import ALL, CALIB, CONVERT, GEN, REF, TINY, cases
from checkpoints import LFS_POINTER, change_json, copy_of, legacy_bin, rewritten, state_of
from conftest import assert_user_error, tiny
from inside import call

# What could end a process, or run in it; and of what only the words differ, one.
PROCESSES = {
    *("text for safetensors", "truncated safetensors", "truncated torch file"),
    *("LFS pointer for weights", "NaN weights", "code in a pickle"),
}


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


@pytest.mark.parametrize(("start", "script", "case"), cases(CHECKPOINTS, PROCESSES))
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
