"""The containers that published checkpoints come in: torch.save's zip and its older format, and joblib's streams."""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .pickles import Buildable, Bytes, StateDict, Stream, natural, of, rebuild_tensor, run

_LINE = 256  # the longest names in a pickle are a tenth of this
# Random weights compress by a tenth, so a file that expands a hundredfold holds something else.
_EXPANSION = 100
_DIRECTORY = 16 << 20  # bytes of a zip's directory or of its pickle; the largest published ones have 50 kB
_ZIP, _ZLIB, _PICKLE = b"PK\x03\x04", b"\x78", b"\x80"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = b"\x80\x02\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little")

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
}
_TORCH: dict[str, Any] = {
    "collections.OrderedDict": StateDict,
    "argparse.Namespace": StateDict,  # the arguments of a training run, which are not looked at
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch.cuda.{name}": dtype for name, dtype in _DTYPES.items()},
}


def read(path: Path) -> tuple[Any, int]:
    """What a checkpoint file describes, and how many bytes of it there are, uncompressed; nothing in it is executed.

    Raises:
        ValueError: If the file is none of the known formats, or holds more than tensors and plain values. Malformed
            files raise others as well.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_START))
        file.seek(0)
        if start.startswith(_ZIP):
            return _read_zip(path, size), size
        if start == _LEGACY_START:
            return _read_legacy(_File(file, size)), size
        if start.startswith(_PICKLE):
            plain = _File(file, size)
            content = run(plain, _JOBLIB)
            plain.expect_end()
            return content, size
        if start.startswith(_ZLIB):
            inflated = _Inflated(file, size)
            content = run(inflated, _JOBLIB)
            inflated.expect_end()
            return content, inflated.given
    raise ValueError("it is neither torch's format nor joblib's, plain or compressed by zlib")


class _File:
    """A stream of known size; a length that promises more is refused before memory is taken for it."""

    def __init__(self, file: BinaryIO, size: int):
        self._file = file
        self.left = size

    def read(self, size: int, /) -> bytes:
        self._take(size)
        data = self._file.read(size)
        if len(data) != size:
            raise ValueError("it is truncated")
        return data

    def readinto(self, target: memoryview) -> None:
        self._take(len(target))
        if self._file.readinto(target) != len(target):  # type: ignore[attr-defined]
            raise ValueError("it is truncated")

    def readline(self) -> bytes:
        return _line(self)

    def expect_end(self) -> None:
        if self.left:
            raise ValueError(f"it goes on for {self.left} bytes behind its end")

    def _take(self, size: int) -> None:
        if size > self.left:
            raise ValueError(f"it is truncated, or lies about a length: {size} bytes where {self.left} are left")
        self.left -= size


class _Inflated:
    """The contents of a zlib stream, which must not be a hundred times its size.

    Attributes:
        given: Bytes read so far.
    """

    def __init__(self, file: BinaryIO, size: int):
        self._file = file
        self._inflater = zlib.decompressobj()
        self._limit = _EXPANSION * size
        self.given = 0

    def read(self, size: int, /) -> bytes:
        if self.given + size > self._limit:
            raise ValueError(f"it expands to more than {_EXPANSION} times its size, or lies about a length")
        self.given += size
        parts = []
        while size:
            compressed = self._inflater.unconsumed_tail or self._file.read(1 << 16)
            part = self._inflater.decompress(compressed, min(size, 1 << 24))
            if not part and (self._inflater.eof or not compressed):
                raise ValueError("it is truncated, or lies about a length")
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readline(self) -> bytes:
        return _line(self)

    def expect_end(self) -> None:
        """The end carries a checksum, which is compared when it is reached."""
        while not self._inflater.eof:
            compressed = self._inflater.unconsumed_tail or self._file.read(1 << 16)
            if self._inflater.decompress(compressed, 1) or not compressed:
                raise ValueError("it is truncated, or goes on behind its end")
        if self._inflater.unused_data or self._file.read(1):
            raise ValueError("it goes on behind its end")


def _line(stream: Stream) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        if len(line) == _LINE:
            raise ValueError("a name in its pickle is longer than any")
        line += stream.read(1)
    return line


def _read_zip(path: Path, size: int) -> Any:
    """torch.save's format since version 1.6: a pickle, and one uncompressed member for each storage."""
    with _Directory(path) as file, zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise ValueError("it is compressed, which torch.save never does")
        if sum(info.file_size for info in archive.infolist()) > size:
            raise ValueError("its members overlap")
        if damaged := archive.testzip():
            raise ValueError(f"its member {damaged[:80]!r} is damaged")
        folder = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None)
        if folder is None or members[f"{folder}data.pkl"].file_size > _DIRECTORY:
            raise ValueError("it has no data.pkl of a reasonable size, so it is not torch's")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its tensors are big-endian")
        pickle = archive.read(f"{folder}data.pkl")
        # The file itself serves as memory, so that a checkpoint is not held twice.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

        def storage(dtype: torch.dtype, key: str, count: int) -> torch.Tensor:
            member = members[f"{folder}data/{key}"]
            if member.file_size != count * dtype.itemsize:
                raise ValueError(f"its storage {key[:80]!r} has {member.file_size} bytes for {count} elements")
            # A local header: 26 bytes, the lengths of the name and of an extra field, these two, and then the data.
            name, extra = struct.unpack_from("<HH", mapped, member.header_offset + 26)
            start = member.header_offset + 30 + name + extra
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)
            return flat if start % dtype.itemsize == 0 else flat.clone()

        return run(_File(io.BytesIO(pickle), len(pickle)), _TORCH, storage)


class _Directory(io.FileIO):
    """A file of which no piece is read that is larger than any zip directory of a checkpoint."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(_DIRECTORY + 1 if size is None or size < 0 else min(size, _DIRECTORY + 1))
        if len(data) > _DIRECTORY:
            raise ValueError("its directory is larger than any checkpoint's")
        return data


def _read_legacy(stream: _File) -> Any:
    """torch.save's format before version 1.6, in which joblib's files hold each storage: five pickles, then data."""
    magic, version, system = (run(stream, {}) for _ in range(3))
    if (magic, version) != (_LEGACY_MAGIC, 1001) or system.get("little_endian") is not True:
        raise ValueError("its header is not torch's")
    storages: dict[str, torch.Tensor] = {}
    promised = 0

    def storage(dtype: torch.dtype, key: str, count: int) -> torch.Tensor:
        nonlocal promised
        if key not in storages:
            promised += count * dtype.itemsize
            if promised > stream.left:
                raise ValueError(f"it is truncated: {promised} bytes of tensors where {stream.left} are left")
            storages[key] = torch.empty(count, dtype=dtype)
        if (storages[key].dtype, len(storages[key])) != (dtype, count):
            raise ValueError(f"it describes its storage {key[:80]!r} in two ways")
        return storages[key]

    content = run(stream, _TORCH, storage)
    keys = [of(str, key) for key in run(stream, {})]
    if sorted(keys) != sorted(storages):
        raise ValueError("its list of storages is not that of its tensors")
    for key in keys:
        if int.from_bytes(stream.read(8), "little") != len(storages[key]):
            raise ValueError(f"its storage {key[:80]!r} does not have the size of its tensors")
        stream.readinto(storages[key].view(torch.uint8).numpy().data)
    stream.expect_end()
    return content


def _load_from_bytes(data: Bytes) -> torch.Tensor:
    content = data.take()
    storage = _read_legacy(_File(io.BytesIO(content), len(content)))
    if not isinstance(storage, torch.Tensor):
        raise ValueError("the bytes of a storage hold something else")
    return storage


class _DType(Buildable):
    """A numpy dtype: the little-endian floating-point ones."""

    def __init__(self, name: str, *_: object):
        self.dtype = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}[of(str, name)]

    def build(self, state: Any, stream: Stream) -> _DType:
        if state[1] != "<":
            raise ValueError("its arrays are big-endian")
        return self


class _Array(Buildable):
    """joblib's stand-in for an array whose data lies in the stream, right behind the stand-in's state."""

    def build(self, state: Any, stream: Stream) -> torch.Tensor:
        if state["numpy_array_alignment_bytes"]:
            stream.read(stream.read(1)[0])
        shape = [natural(size) for size in state["shape"]]
        dtype = state["dtype"].dtype
        data = bytearray(stream.read(math.prod(shape) * dtype.itemsize))
        array = torch.frombuffer(data, dtype=dtype)
        if state["order"] == "F":
            return array.view(shape[::-1]).permute(*reversed(range(len(shape))))
        return array.view(shape)


# joblib pickles a torch tensor as torch's own reduction says, and writes numpy arrays into the stream itself.
_JOBLIB: dict[str, Any] = {
    "collections.OrderedDict": StateDict,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.storage._load_from_bytes": _load_from_bytes,
    "joblib.numpy_pickle.NumpyArrayWrapper": _Array,
    "numpy.ndarray": None,
    "numpy.dtype": _DType,
}
