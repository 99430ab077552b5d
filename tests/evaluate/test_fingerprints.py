"""Fingerprints change with what they stand for, and with nothing else."""

from __future__ import annotations

import hashlib
import shutil

from checkpoints import copy_of, rewritten, state_of
from conftest import tiny

from qllm.evaluate import fingerprints


def test_a_text_has_its_sha256():
    assert fingerprints.of_text("né") == hashlib.sha256(b"n\xc3\xa9").hexdigest()


def test_a_copy_is_the_same_and_another_weight_is_not(tmp_path):
    same = copy_of("opt", tmp_path / "copies" / "opt")
    assert fingerprints.of_model(same) == fingerprints.of_model(tiny("opt"))
    state = state_of("opt")
    state["model.decoder.layers.0.fc1.bias"][3] += 1
    other = rewritten("opt", tmp_path / "other", "safetensors", state)
    assert fingerprints.of_model(other) != fingerprints.of_model(same)
    changed = copy_of("opt", tmp_path / "changed", num_hidden_layers=5)
    assert fingerprints.of_model(changed) != fingerprints.of_model(same)


def test_every_shard_counts(tmp_path):
    folder = rewritten("opt", tmp_path / "shards", "safetensors-sharded")
    before = fingerprints.of_model(folder)
    paths = sorted(folder.glob("*.safetensors"))
    shutil.copyfile(paths[0], paths[2])
    assert fingerprints.of_model(folder) != before


def test_tokenizers():
    prints = {fingerprints.of_tokenizer(tiny(family)) for family in ("opt", "bloom", "llama")}
    assert len(prints) > 1
    assert all(len(each) == 64 for each in prints)


def test_versions_and_machine():
    found = fingerprints.versions()
    assert found["qllm"] and found["torch"] and found["python"]
    assert set(fingerprints.machine()) == {"system", "cpu", "cpus", "threads"}
