"""Checkpoints that were made to hang, to fill memory or to break what reads them.

Each is refused in one line, before anything of the size that it claims is made.
"""

from __future__ import annotations

import io
import json
import os
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import change_json, copy_of

from qllm.checkpoint.convert import convert
from qllm.checkpoint.load import outline
from qllm.checkpoint.reader import Checkpoint, read_raw_config
from qllm.checkpoint.tensor_files import TorchFile
from qllm.checkpoint.weights import Weights
from qllm.config import QuantPlan
from qllm.errors import UserError
from qllm.hub import ModelFolder
from qllm.huggingface import load_reference
from qllm.models import read_config
from qllm.random_model import calibrate_random
from qllm.tokenizer import Tokenizer

LARGE = 2**31 - 1
CONFIGS = {
    "sizes of all heads": ("bloom", {"hidden_size": LARGE, "n_head": LARGE}, "has the shape"),
    "vocabulary": ("opt", {"vocab_size": LARGE}, "has the shape"),
    "layers": ("llama", {"num_hidden_layers": LARGE}, "num_hidden_layers is 2147483647"),
    "more layers than there are": ("llama", {"num_hidden_layers": 1000}, "holds 6 layers"),
    "heads of a size": ("llama", {"head_dim": LARGE - 1}, "larger than any memory|has the shape"),
    "inner size": ("llama", {"intermediate_size": LARGE}, "has the shape"),
    "window": ("opt", {"max_position_embeddings": LARGE}, "has the shape"),
    "a family that is a list": ("opt", {"model_type": ["opt"]}, "model_type is"),
    "a factor": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 1e300}},
        "factor is 1e[+]300",
    ),
    "an epsilon that is infinite": ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_sizes_and_settings(case, tmp_path):
    family, changes, message = CONFIGS[case]
    folder = copy_of(family, tmp_path / "m", **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=message):
        Weights(Checkpoint(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize("family", ["opt", "bloom", "llama"])
def test_statistics_of_random_input_for_sizes_that_no_memory_holds(family, tmp_path):
    sizes = {"hidden_size": LARGE, "num_attention_heads": LARGE, "n_head": LARGE, "head_dim": 2}
    folder = copy_of(family, tmp_path / "m", weights=False, **sizes, num_key_value_heads=LARGE)
    with pytest.raises(UserError, match="of memory"):
        calibrate_random(read_config(read_raw_config(folder)), 1, 128, 0)


def archive(compression: int, grown: int = 0) -> bytes:
    """A torch file packed anew, its elements followed by zeros."""
    whole, packed = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(4)}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(packed, "w") as new:
        for record in old.infolist():
            more = bytes(grown if record.filename.endswith("data/0") else 0)
            new.writestr(record.filename, old.read(record) + more, compression)
    return packed.getvalue()


def saved(value: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def endless(legacy: bool) -> bytes:
    """One element, which a stride of 0 repeats."""
    tensor = torch.zeros(1).expand(LARGE, 2**20)
    return saved({"a": tensor}, _use_new_zipfile_serialization=not legacy)


TORCH_FILES = {
    "compressed": lambda: archive(zipfile.ZIP_DEFLATED, 1 << 26),
    "an element without end": lambda: endless(False),
    "an element without end, legacy": lambda: endless(True),
    "a matrix under many names": lambda: saved(dict.fromkeys(map(str, range(9)), torch.ones(999))),
    "an array of any length": lambda: saved({"a": bytearray(9)}),
}


@pytest.mark.parametrize("case", TORCH_FILES)
def test_torch_files(case, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(TORCH_FILES[case]())
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        TorchFile(path)


def test_an_archive_that_was_packed_anew_is_read(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(archive(zipfile.ZIP_STORED))
    assert TorchFile(path).read("a").tolist() == [0.0] * 4


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*q_proj": {}}}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["re:.*q_proj"],
    "config_groups": {"a": {"targets": ["re:.*"], "weights": {"group_size": 128, "num_bits": 4}}},
}
RULES = {"op_type_dict": {"Lin.*": {"weight": {"bits": 4}}}}


@pytest.mark.parametrize("value", [GPTQ, COMPRESSED, {".*": 4}, RULES])
def test_patterns_have_a_limit_of_time_wherever_they_are(value, tmp_path, monkeypatch):
    monkeypatch.setattr("qllm.patterns.SECONDS", 0.0)
    folder, path = copy_of("llama", tmp_path / "m"), tmp_path / "plan.json"
    plan = "16"
    if "quant_method" in value:
        change_json(folder / "config.json", quantization_config=value)
    else:
        path.write_text(json.dumps(value))
        plan = str(path)
    with pytest.raises(UserError, match=r"\.json.*takes too long"):
        outline(folder, QuantPlan.parse(plan))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize(
    "name", ["merges.txt", "chat_template.jinja", "additional_chat_templates/rag.jinja"]
)
def test_what_is_copied_or_given_to_transformers_is_a_file(name, make, tmp_path):
    """A pipe would be waited for, and a device copied until the disk is full."""
    folder = copy_of("opt", tmp_path / "m")
    (folder / name).parent.mkdir(exist_ok=True)
    make(folder / name)
    for read in (
        lambda: convert(ModelFolder(folder, "m"), tmp_path / "out", overwrite=False),
        lambda: load_reference(folder),
        lambda: Tokenizer.load(folder),
    ):
        with pytest.raises(UserError, match=rf"{Path(name).name} is a (named pipe|device)"):
            read()
    assert not (tmp_path / "out").exists()
