"""Files that are there whole or not at all, and the header that is written and read by hand."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from timm_ghn.files import (
    read_safetensors_header,
    remove_unfinished,
    safetensors_header,
    whole_directory,
    whole_file,
    whole_files,
)


def test_a_file_appears_when_all_of_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises(OSError, match="full"), whole_file(file) as part:
        part.write_text("ha")
        raise OSError("full")
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    with whole_file(file) as part:
        part.write_text("half")
        assert file.read_text() == "before"
    assert file.read_text() == "half" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("write", [whole_files, whole_directory])
def test_files_appear_when_all_of_them_are_written(
    write: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "folder"
    with pytest.raises(KeyboardInterrupt), write(folder) as unfinished:
        (unfinished / "one").write_text("1")
        raise KeyboardInterrupt
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    with write(folder) as unfinished:
        for name in ("one", "two"):
            (unfinished / name).write_text(name)
        assert not (folder / "one").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]
    assert stat.S_IMODE((folder / "one").stat().st_mode) == 0o644


@pytest.mark.parametrize("directories", [True, False])
def test_what_is_flushed_can_be(directories: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where directories can be opened, they too; Windows opens none, and flushes only files open for writing."""
    fcntl = pytest.importorskip("fcntl")
    flushed: list[tuple[bool, bool]] = []

    def fsync(descriptor: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        flushed.append((is_directory, bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR)))

    monkeypatch.setattr(os, "fsync", fsync)
    if not directories:
        monkeypatch.delattr(os, "O_DIRECTORY")
    with whole_directory(tmp_path / "folder") as unfinished:
        (unfinished / "one").write_text("1")
    assert flushed == [(False, True)] + directories * [(True, False)] * 2


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text("before")
    with whole_files(tmp_path) as unfinished:
        (unfinished / "one").write_text("after")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"one": "after", "two": "before"}


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    writing = whole_files(tmp_path)
    (writing.__enter__() / "one").write_text("1")
    (tmp_path / "other").write_text("")
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_the_header_is_that_of_safetensors(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64), "c": torch.empty(0, 2)}
    file = tmp_path / "file.safetensors"
    with file.open("wb") as stream:
        stream.write(safetensors_header((name, t.dtype, t.shape) for name, t in tensors.items()))
        for tensor in tensors.values():
            stream.write(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    loaded = load_file(file)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())

    save_file(tensors, file, metadata={"config": "{}"})
    with file.open("rb") as stream:
        header, start = read_safetensors_header(stream)
        assert header.keys() == tensors.keys() and header["a"]["shape"] == [2, 3]
        stream.seek(start + header["a"]["data_offsets"][0])
        assert torch.frombuffer(bytearray(stream.read(24)), dtype=torch.float32).tolist() == list(range(6))
