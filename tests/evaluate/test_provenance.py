"""Fingerprints change with what they stand for, and with nothing else."""

from __future__ import annotations

import hashlib
import shutil

import torch
from checkpoints import copy_of, rewritten, state_of
from conftest import tiny

from qllm.evaluate import provenance


def test_a_text_has_its_sha256():
    assert provenance.of_text("né") == hashlib.sha256(b"n\xc3\xa9").hexdigest()


def test_a_copy_is_the_same_and_another_weight_is_not(tmp_path):
    same = copy_of("opt", tmp_path / "copies" / "opt")
    assert provenance.of_model(same) == provenance.of_model(tiny("opt"))
    state = state_of("opt")
    state["model.decoder.layers.0.fc1.bias"][3] += 1
    other = rewritten("opt", tmp_path / "other", "safetensors", state)
    assert provenance.of_model(other) != provenance.of_model(same)
    changed = copy_of("opt", tmp_path / "changed", num_hidden_layers=5)
    assert provenance.of_model(changed) != provenance.of_model(same)


def test_every_shard_counts(tmp_path):
    folder = rewritten("opt", tmp_path / "shards", "safetensors-sharded")
    before = provenance.of_model(folder)
    paths = sorted(folder.glob("*.safetensors"))
    shutil.copyfile(paths[0], paths[2])
    assert provenance.of_model(folder) != before


def test_tokenizers():
    prints = {provenance.of_tokenizer(tiny(family)) for family in ("opt", "bloom", "llama")}
    assert len(prints) > 1
    assert all(len(each) == 64 for each in prints)


def test_versions_and_machine():
    found = provenance.versions()
    assert found["qllm"] and found["torch"] and found["python"]
    gpu = {"gpu"} if torch.cuda.is_available() else set()
    assert set(provenance.machine()) == {"system", "cpu", "cpus", "threads"} | gpu
