"""Files that are there whole or not at all, their hashes, and the header of a safetensors file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

_UNFINISHED = ".unfinished-"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def sha256_of(file: Path) -> str:
    """The hash of a file's contents, in hexadecimal digits."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Where to write what takes the place of `file` when all of it is written.

    Whoever looks at `file` meanwhile sees what was there before, and so it remains if writing fails. Several processes
    can write the same file: the last one counts. It is not flushed to the disk, so a power failure can still cut it
    short; `whole_files` is for what must survive one.
    """
    part = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A directory for files that replace those of the same names in `folder`, once all of them are on the disk."""
    with _unfinished(folder) as unfinished:
        yield unfinished
        _flush_all(unfinished)
        for file in sorted(unfinished.iterdir(), reverse=True):
            os.replace(file, folder / file.name)
        _flush(folder)


@contextlib.contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill, which is called `directory` once all that is in it is on the disk."""
    with _unfinished(directory.parent) as unfinished:
        yield unfinished
        _flush_all(unfinished)
        os.rename(unfinished, directory)
        _flush(directory.parent)


def remove_unfinished(folder: Path) -> None:
    """Removes what processes left in a folder that were killed while writing to it; none may be doing so now."""
    for left_over in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(left_over, ignore_errors=True)


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _flush_all(unfinished: Path) -> None:
    for path in (*unfinished.iterdir(), unfinished):
        path.chmod(0o755 if path.is_dir() else 0o644)  # temporary ones are private, what comes of them is not
        _flush(path)


def _flush(path: Path) -> None:
    directory = path.is_dir()
    if directory and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens none, and keeps the names in it by itself
    descriptor = os.open(path, os.O_RDONLY if directory else os.O_RDWR)  # it flushes only what may be written to
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- safetensors: the header's length in eight bytes, the header as JSON, then the tensors ----------------------------


def safetensors_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """All that comes before the tensors in a file, for their names, types and shapes in the order they come in."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        offsets = [position, position := position + torch.Size(shape).numel() * dtype.itemsize]
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_safetensors_header(stream: BinaryIO) -> tuple[dict[str, dict[str, Any]], int]:
    """What the header says of each tensor, and where in the file the first of them begins."""
    length = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length
