"""Files and folders that appear whole or not at all, and the streaming safetensors writers."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qllm.checkpoint.reader import Checkpoint
from qllm.checkpoint.tensor_files import DTYPES, SafetensorsFile
from qllm.checkpoint.tensors import TensorInfo
from qllm.checkpoint.writer import SafetensorsWriter, ShardWriter, new_file, new_folder


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_what_is_written_is_what_the_library_reads(tmp_path):
    """Every type, and shapes with no element, one element, and prime sizes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        for shape in ((), (0, 3), (1,), (7, 11), (2, 3, 5)):
            raw = torch.randint(0, 2, shape, generator=generator)
            tensors[f"{name}.{len(tensors)}"] = raw.to(dtype)
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    path = tmp_path / "x.safetensors"
    writer = SafetensorsWriter(path, infos, {"format": "pt", "of": "a test"})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    ours = SafetensorsFile(path)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(ours.read(name), tensor)


def test_tensors_begin_on_a_cache_line(tmp_path):
    path = tmp_path / "x.safetensors"
    for length in range(1, 70):  # the header's length must not matter
        info = {"n" * length: TensorInfo((4,), torch.float16)}
        writer = SafetensorsWriter(path, info, {})
        writer.write("n" * length, torch.ones(4, dtype=torch.float16))
        writer.close()
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert (8 + header) % 64 == 0
        assert load_file(path)["n" * length].tolist() == [1, 1, 1, 1]


def test_a_matrix_that_lies_transposed_is_written_in_order(tmp_path):
    matrix = torch.arange(6.0).view(2, 3).t()
    path = tmp_path / "x.safetensors"
    writer = SafetensorsWriter(path, {"a": TensorInfo((3, 2), torch.float32)}, {})
    writer.write("a", matrix)
    writer.close()
    assert torch.equal(load_file(path)["a"], matrix)


def tensors_of_every_type() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{name}.{len(shape)}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
        for shape in ((), (0, 3), (7, 11), (2, 3, 5))
    }


def write_shards(
    folder: Path, tensors: dict[str, torch.Tensor], limit: int, header_bytes: int = 0
) -> int:
    header_bytes = header_bytes or 200 * len(tensors)
    writer = ShardWriter(folder, limit=limit, header_bytes=header_bytes)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    return writer.finish()


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors by the safetensors library; the index says which file has which."""
    shards = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    if len(shards) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        found = {name: file for file, tensors in shards.items() for name in tensors}
        assert index["weight_map"] == found
        sizes = (t.nbytes for tensors in shards.values() for t in tensors.values())
        assert index["metadata"] == {"total_size": sum(sizes)}
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


@pytest.mark.parametrize("limit", [1, 100, 500, 10**9])
def test_shards_are_what_the_library_reads(limit, tmp_path):
    tensors = tensors_of_every_type()
    total = write_shards(tmp_path / "model", tensors, limit)
    assert total == sum(tensor.nbytes for tensor in tensors.values())
    read = read_shards(tmp_path / "model")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    count = len(list((tmp_path / "model").glob("*.safetensors")))
    assert names(tmp_path / "model") == ["model.safetensors"] if limit == 10**9 else count > 3
    (tmp_path / "model" / "config.json").write_text("{}")
    ours = Checkpoint(tmp_path / "model")
    for name, tensor in tensors.items():
        assert torch.equal(ours.read_any(name), tensor)
        assert torch.equal(ours.read_any(name, mapped=True), tensor)


def test_a_shard_is_full_when_the_next_tensor_does_not_fit(tmp_path):
    sizes = (4, 6, 10, 1, 11, 3, 7, 25, 2)  # of bytes; one has more than the limit
    tensors = {f"t{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    write_shards(tmp_path / "model", tensors, 10)
    parts = [
        [tensor.numel() for tensor in load_file(path).values()]
        for path in sorted((tmp_path / "model").glob("*.safetensors"))
    ]
    assert [sorted(part) for part in parts] == [[4, 6], [10], [1], [11], [3, 7], [25], [2]]
    assert sorted(names(tmp_path / "model")) == [
        *(f"model-{i + 1:05}-of-00007.safetensors" for i in range(7)),
        "model.safetensors.index.json",
    ]


def test_a_shard_is_full_when_its_header_is(tmp_path):
    tensors = {f"a long name of a tensor, number {i:04}": torch.full((2,), i) for i in range(200)}
    write_shards(tmp_path / "model", tensors, 10**9, header_bytes=4096)
    read = read_shards(tmp_path / "model")
    assert len(names(tmp_path / "model")) > 4
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_shards_begin_on_a_page(tmp_path):
    write_shards(tmp_path / "model", {"a": torch.ones(5), "b": torch.ones(3)}, 20)
    for path in (tmp_path / "model").glob("*.safetensors"):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert (8 + header) % 4096 == 0
        with path.open("rb") as file:
            file.seek(8)
            assert json.loads(file.read(header))["__metadata__"] == {"format": "pt"}


def test_a_single_element_may_have_any_stride(tmp_path):
    one = torch.arange(40, dtype=torch.int32).view(4, 10)[1:2, 2:3].as_strided((1, 1), (7, 4))
    one_value = one.item()
    write_shards(tmp_path / "model", {"one": one}, 10**9)
    assert read_shards(tmp_path / "model")["one"].tolist() == [[one_value]]


def test_shards_take_what_does_not_lie_in_one_piece(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    tensors = {"t": whole.t(), "rows": whole[1:3], "columns": whole[:, ::2]}
    write_shards(tmp_path / "model", tensors, 100)
    assert all(torch.equal(read_shards(tmp_path / "model")[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("limit", [1, 60, 10**9])
def test_shards_are_gone_on_with_from_any_state(limit, tmp_path):
    """What a run wrote behind the state that it left is gone; the bytes are the same."""
    tensors = {f"t{i}": torch.full((i,), float(i)) for i in range(1, 9)}
    write_shards(tmp_path / "whole", tensors, limit)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    options = {"limit": limit, "header_bytes": 200 * len(tensors)}
    for kept in range(len(tensors) + 1):
        folder = tmp_path / str(kept)
        first = ShardWriter(folder, **options)
        for name, tensor in list(tensors.items())[:kept]:
            first.write(name, tensor)
        state = json.loads(json.dumps(first.sync()))
        for name, tensor in list(tensors.items())[kept:]:
            first.write(name, tensor * 7)
        if kept < len(tensors):
            first.write("more", torch.ones(50))
        first.sync()
        if kept == len(tensors):
            first.finish()
        (folder / "config.json").touch()
        second = ShardWriter(folder, **options, state=state)
        assert not (folder / "config.json").exists()
        for name, tensor in list(tensors.items())[kept:]:
            second.write(name, tensor)
        second.finish()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


def test_a_write_that_fails_names_the_folder(tmp_path):
    writer = ShardWriter(tmp_path / "model", limit=100, header_bytes=10)
    writer.write("a", torch.ones(3))

    class Full:
        def write(self, data: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer._file.close()
    writer._file = Full()
    with pytest.raises(OSError, match=r"model cannot be written \(No space left on device\)"):
        writer.write("b", torch.ones(3))


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    with new_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename within one file system
    assert path.read_text() == "new"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), new_file(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "folder"
    for content in ("first", "second"):
        with new_folder(path) as temporary:
            (temporary / content).touch()
        assert names(path) == [content]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder(error, tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(error), new_folder(path) as temporary:
        (temporary / "new").touch()
        raise error
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    """Temporary files and folders are made for their owner alone; these are not temporary."""
    before = os.umask(0o022)
    try:
        with new_file(tmp_path / "file"):
            pass
        with new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_a_full_disk_names_the_file(new, tmp_path):
    """The system's error has no name in it when a write fails."""
    with (
        pytest.raises(OSError, match=r"target cannot be written \(No space left on device\)"),
        new(tmp_path / "target"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
