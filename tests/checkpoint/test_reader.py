"""Reading checkpoints: every form a folder may have, and files that were made to do harm."""

from __future__ import annotations

import json
import mmap
import pickle
import re
import struct

import pytest
import torch
from checkpoints import FORMS, LFS_POINTER, change_json, rewritten, state_of
from conftest import examples, tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qllm.checkpoint import tensor_files
from qllm.checkpoint.reader import Checkpoint, read_json, weight_files
from qllm.checkpoint.tensor_files import SafetensorsFile, TorchFile
from qllm.checkpoint.weights import Weights
from qllm.errors import UserError


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file written by hand: length of the header, header, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F16") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_tensors(form, tmp_path):
    checkpoint = Checkpoint(rewritten("opt", tmp_path / "model", form))
    state = state_of("opt")
    assert set(checkpoint.tensors) == set(state)
    for name, expected in state.items():
        for mapped in (False, True):
            assert torch.equal(checkpoint.read(name, mapped=mapped), expected)


def test_a_read_tensor_is_ones_own(tmp_path):
    """Writing to it, or to a mapped one, changes no file."""
    folder = rewritten("opt", tmp_path / "model", "safetensors")
    before = (folder / "model.safetensors").read_bytes()
    checkpoint = Checkpoint(folder)
    for mapped in (False, True):
        checkpoint.read("model.decoder.final_layer_norm.weight", mapped=mapped).zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_by_hand(tmp_path):
    """Offsets count from the end of the header, and need not follow the names' order."""
    path = tmp_path / "x.safetensors"
    header = {"b": entry(2, 6, [2]), "a": entry(0, 2, []), "__metadata__": {"format": "pt"}}
    path.write_bytes(safetensors_bytes(header, struct.pack("<3e", 1.5, -2.0, 0.25)))
    file = SafetensorsFile(path)
    for read in (file.read, file.map):
        assert read("a").item() == 1.5
        assert read("b").tolist() == [-2.0, 0.25]


def test_a_tensor_at_an_odd_offset_is_read(tmp_path):
    """Such a one cannot be viewed in the mapped file."""
    path = tmp_path / "x.safetensors"
    header = {"a": entry(0, 1, [1], "U8"), "b": entry(1, 5, [1], "F32")}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(safetensors_bytes(text, b"\1" + struct.pack("<f", 0.5)))
    assert SafetensorsFile(path).map("b").tolist() == [0.5]


def test_a_file_larger_than_memory_can_be_mapped(tmp_path):
    """Mapping must not ask the system for memory to hold the file."""
    import psutil

    size = 2 * (psutil.virtual_memory().total + psutil.swap_memory().total)
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"a": entry(0, size, [size], "U8")}))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)  # sparse: it takes no space
    mapped = SafetensorsFile(path).map("a")
    assert len(mapped) == size
    assert mapped[-1] == 0


def test_where_nothing_can_be_mapped_it_is_copied(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no memory to map with")

    monkeypatch.setattr(mmap, "mmap", refuse)
    file = SafetensorsFile(tiny("opt") / "model.safetensors")
    name = "model.decoder.final_layer_norm.weight"
    assert torch.equal(file.map(name), state_of("opt")[name])


HOSTILE = {
    "empty": b"",
    "shorter than its length": b"\1\0",
    "text": b"this is no checkpoint at all, but some text",
    "length beyond the file": safetensors_bytes(b"{}", length=1 << 62),
    "length of all bits": safetensors_bytes(b"{}", length=(1 << 64) - 1),
    "header is no JSON": safetensors_bytes(b"{'a': 1}"),
    "header is a list": safetensors_bytes([]),
    "header nested without end": safetensors_bytes(b"[" * 100_000),
    "offsets overlap": safetensors_bytes({"a": entry(0, 4, [2]), "b": entry(2, 6, [2])}, bytes(6)),
    "offsets leave a gap": safetensors_bytes(
        {"a": entry(0, 2, [1]), "b": entry(4, 6, [1])}, bytes(6)
    ),
    "offsets backwards": safetensors_bytes({"a": entry(4, 0, [2])}, bytes(4)),
    "offsets beyond the file": safetensors_bytes({"a": entry(0, 4000, [2000])}, bytes(4)),
    "bytes after the tensors": safetensors_bytes({"a": entry(0, 2, [1])}, bytes(100)),
    "shape and offsets differ": safetensors_bytes({"a": entry(0, 4, [3])}, bytes(4)),
    "shape overflows": safetensors_bytes({"a": entry(0, 4, [1 << 63, 1 << 63])}, bytes(4)),
    "negative shape": safetensors_bytes({"a": entry(0, 4, [-2])}, bytes(4)),
    "unknown type": safetensors_bytes({"a": entry(0, 4, [2], "Q4")}, bytes(4)),
    "a type torch weights do not have": safetensors_bytes({"a": entry(0, 8, [1], "C64")}, bytes(8)),
    "no offsets": safetensors_bytes({"a": {"dtype": "F16", "shape": [2]}}, bytes(4)),
    "LFS pointer": LFS_POINTER,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_safetensors_are_refused(data, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        SafetensorsFile(path)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    whole = safetensors_bytes({"a": entry(0, 8, [4])}, struct.pack("<4e", 1, 2, 3, 4))
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole)
    assert SafetensorsFile(path).read("a").tolist() == [1, 2, 3, 4]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            SafetensorsFile(path)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    whole = safetensors_bytes({"a": entry(0, 8, [4])}, bytes(8))
    path.write_bytes(whole)
    file = SafetensorsFile(path)
    path.write_bytes(whole[:-4])
    with pytest.raises(UserError, match="became shorter"):
        file.read("a")


@given(data=st.data())
@examples(150)
def test_damaged_safetensors_are_read_or_refused(data, tmp_path_factory):
    """A byte changed anywhere gives a UserError or tensors of the sizes that are said."""
    whole = bytearray(
        safetensors_bytes({"a": entry(0, 4, [2]), "b": entry(4, 16, [3], "F32")}, bytes(16))
    )
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    path.write_bytes(whole)
    try:
        file = SafetensorsFile(path)
    except UserError:
        return
    for name, info in file.tensors.items():
        assert file.read(name).shape == file.map(name).shape == info.shape


class Payload:
    """Unpickling one runs a command, which leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_does_not_run(legacy, tmp_path):
    path, mark = tmp_path / "pytorch_model.bin", tmp_path / "it-ran"
    state = {"a": torch.zeros(2), "b": Payload(mark)}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="no whole torch checkpoint of tensors alone"):
        TorchFile(path)
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(UserError, match="no whole torch checkpoint of tensors alone"):
        TorchFile(path)
    assert not mark.exists()


NOT_TENSORS = {
    "a list": [torch.zeros(2)],
    "a nested dictionary": {"model": {"a": torch.zeros(2)}},
    "a number": {"a": torch.zeros(2), "step": 3},
    "names that are numbers": {0: torch.zeros(2)},
    "a sparse tensor": {"a": torch.eye(3).to_sparse()},
    "complex numbers": {"a": torch.zeros(3, dtype=torch.complex64)},
    "a meta tensor": {"a": torch.empty(3, device="meta")},
}


@pytest.mark.parametrize("value", NOT_TENSORS.values(), ids=NOT_TENSORS)
def test_torch_files_of_other_things_are_refused(value, tmp_path):
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        TorchFile(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_torch_files_are_read_or_refused(legacy, tmp_path):
    """Cut off at any tenth, or with any of some bytes changed: a UserError or the right shapes."""
    path = tmp_path / "pytorch_model.bin"
    torch.save(
        {"a": torch.ones(4), "b": torch.ones(3, 5)}, path, _use_new_zipfile_serialization=not legacy
    )
    whole = path.read_bytes()
    damaged = [whole[: len(whole) * tenth // 10] for tenth in range(10)]
    for place in range(0, len(whole), max(1, len(whole) // 25)):
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        damaged.append(bytes(changed))
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            file = TorchFile(path)
            for name, info in file.tensors.items():
                assert file.read(name).shape == info.shape
        except UserError as error:
            refused += 1
            assert "pytorch_model.bin" in str(error)
    assert refused >= 10


def test_parameters_and_views_become_plain_tensors(tmp_path):
    """A .bin may hold parameters, and matrices that lie transposed in their storage."""
    matrix = torch.arange(6.0).view(2, 3)
    torch.save({"p": torch.nn.Parameter(matrix), "t": matrix.t()}, tmp_path / "m.bin")
    file = TorchFile(tmp_path / "m.bin")
    assert not file.read("p").requires_grad
    file.read("p").mul_(2)
    assert torch.equal(file.read("p"), matrix)
    assert file.read("t").is_contiguous()
    assert torch.equal(file.read("t"), matrix.t())


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/b", "", ".", "..", "x/", "x\0y", "x" * 5000, 7, ["x"]],
)
def test_an_index_entry_that_is_no_file_of_the_folder(name, tmp_path):
    (tmp_path / "x.safetensors").touch()
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"not a file of its own folder|lacks"):
        weight_files(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["x"]}, []])
def test_an_index_without_names(index, tmp_path):
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json"):
        weight_files(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    folder = rewritten("opt", tmp_path / "model", "safetensors-sharded")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-00003\.safetensors, one of 3"):
        Checkpoint(folder)


def test_the_index_says_which_file_a_tensor_is_read_from(tmp_path):
    folder = rewritten("opt", tmp_path / "model", "safetensors-sharded")
    first, second = (folder / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    name, tensor = next(iter(load_file(first).items()))
    # A second copy that is another, and one that nobody asks for.
    save_file(load_file(second) | {name: tensor + 1, "unindexed": tensor}, second)
    checkpoint = Checkpoint(folder)
    assert checkpoint.path(name) == first
    assert torch.equal(checkpoint.read(name), tensor)
    assert "unindexed" not in checkpoint.tensors
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"holds .*, as model-00001-of-00003\.safetensors does"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "names",
    [
        ["gptq_model-4bit-128g.safetensors", "other.safetensors"],
        ["model-00001-of-00002.safetensors"],
        ["model-00001-of-00002.safetensors", "other-00002-of-00002.safetensors"],
        ["pytorch_model-00001-of-00001.bin", "gptq_model.bin"],
    ],
)
def test_files_of_which_nobody_says_what_they_hold(names, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"holds {re.escape(', '.join(sorted(names)))}: neither"):
        weight_files(tmp_path)


def test_which_files_are_taken(tmp_path):
    """safetensors before torch, a whole file before shards, transformers' names before others."""
    (tmp_path / "adapter_model.safetensors").touch()
    names = [
        "gptq_model-4bit-128g.bin",
        "gptq_model-4bit-128g.safetensors",
        "other.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "model.safetensors",
    ]
    (tmp_path / "shard").touch()
    for name in names:
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a": "shard"}}))
        expected = "shard" if name.endswith(".json") else name
        assert weight_files(tmp_path) == [tmp_path / expected]


def test_a_byte_order_mark_is_no_part_of_json(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "config.json") == {"a": 1}


def test_float64_is_read_as_float32(tmp_path):
    """CPU kernels know no float64."""
    state = {name: tensor.double() for name, tensor in state_of("opt").items()}
    folder = rewritten("opt", tmp_path / "model", "safetensors", state)
    found = Checkpoint(folder).read("model.decoder.final_layer_norm.weight")
    assert found.dtype == torch.float32
    change_json(folder / "config.json", dtype=None)
    assert Weights(Checkpoint(folder)).default_dtype() == torch.float32


NO_JSON = {
    "empty": b"",
    "text": b"no json",
    "a list": b"[]",
    "nested without end": b"[" * 100_000,
    "a number too long to read": b'{"a": ' + b"1" * 10_000 + b"}",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "LFS pointer": LFS_POINTER,
}


@pytest.mark.parametrize("data", NO_JSON.values(), ids=NO_JSON)
def test_a_file_that_is_no_json_object(data, tmp_path):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(UserError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_values_that_are_not_finite_are_refused(value, form, tmp_path):
    state = state_of("opt")
    name = "model.decoder.layers.3.fc1.weight"
    state[name][5, 7] = value
    checkpoint = Checkpoint(rewritten("opt", tmp_path / "model", form, state))
    for mapped in (False, True):
        with pytest.raises(UserError, match=rf"{name} holds NaN or infinite"):
            checkpoint.read(name, mapped=mapped)


def test_integers_are_no_weights(tmp_path):
    state = state_of("opt")
    name = "model.decoder.layers.0.fc1.weight"
    state[name] = state[name].to(torch.int8)
    checkpoint = Checkpoint(rewritten("opt", tmp_path / "model", "safetensors", state))
    with pytest.raises(UserError, match="weights are floating point here"):
        checkpoint.read(name)


def test_mapped_torch_files_give_their_memory_back(tmp_path, monkeypatch):
    """After enough bytes the file is closed; what is read later is the same."""
    monkeypatch.setattr(tensor_files, "RELEASE_BYTES", 1_000_000)
    checkpoint = Checkpoint(rewritten("llama", tmp_path / "model", "bin"))
    for name, expected in state_of("llama").items():
        assert torch.equal(checkpoint.read(name), expected)
