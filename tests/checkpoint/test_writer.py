"""Files and folders that appear whole or not at all, and the streaming safetensors writer."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qllm.checkpoint.reader import DTYPES, SafetensorsFile, TensorInfo
from qllm.checkpoint.writer import SafetensorsWriter, new_file, new_folder


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
        pytest.raises(OSError, match=r"No space left on device: '.*target'"),
        new(tmp_path / "target"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
