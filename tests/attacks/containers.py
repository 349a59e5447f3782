"""Zip and zlib bombs, members that overlap, lie or are missing, and honest files cut short or with bits flipped."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import struct
import zipfile
import zlib

from .pickles import SHARED, assemble, legacy, name, text
from .samples import damaged, samples


def containers() -> dict[str, bytes]:
    honest = samples()
    attacks = {**_zips(honest["zip"]), **_streams(honest), **_legacy()}
    for format, data in honest.items():
        for size in (0, 1, 8, 9):
            attacks[f"{format} cut to {size} bytes"] = data[:size]
        for size in (len(data) // 2, 22, 1):  # the name is a test's: compressed, not all runs get the same length
            attacks[f"{format} without {'half' if size > 22 else size} of its bytes"] = data[:-size]
        if format != "zip":  # a zip is found from its end
            attacks[f"{format} with more behind it"] = data + b"more"
    for format in ("zip", "joblib-zlib"):  # these have checksums
        data = honest[format]
        attacks[f"{format} with a flipped bit in a tensor"] = damaged(data, [("flip", len(data) // 2, b"\0\0")])
    return attacks


def _zips(honest: bytes) -> dict[str, bytes]:
    def rewritten(compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(honest)) as source, zipfile.ZipFile(buffer, "w", compression) as target:
            folder = source.namelist()[0].split("/")[0]
            for member in source.namelist():
                target.writestr(member, more.pop(member.split("/")[-1].replace(".", "_"), source.read(member)))
            for member, data in more.items():
                target.writestr(f"{folder}/{member}", data)
        return buffer.getvalue()

    def with_pickle(pickled: bytes) -> bytes:
        return rewritten(data_pkl=pickled)

    directory = 20 << 20
    return {
        "deflated": rewritten(zipfile.ZIP_DEFLATED),
        "zip bomb": rewritten(zipfile.ZIP_DEFLATED, bomb=bytes(300 << 20)),
        "zip bomb for a pickle": rewritten(zipfile.ZIP_DEFLATED, data_pkl=bytes(300 << 20)),
        "pickle of 17 MB": with_pickle(b"\x80\x02" + b"N" * (17 << 20)),
        "pickle of nothing": with_pickle(b""),
        "pickle of a zip": with_pickle(honest),
        "big-endian": rewritten(byteorder=b"big"),
        "empty zip": b"PK\x03\x04" + bytes(26) + b"PK\x05\x06" + bytes(18),
        "zip of something else": rewritten_names(honest, "data.pkl", "atad.pkl"),
        "overlapping members": overlapping(honest),
        "zip with a directory of 20 MB": b"PK\x03\x04"
        + bytes(directory)
        + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, directory, 4, 0),
        "zip in a zip": rewritten_names(honest, "/data/0", "/data/."),
    }


def rewritten_names(data: bytes, old: str, new: str) -> bytes:
    """Both in the local headers and in the directory."""
    return data.replace(old.encode(), new.encode())


def overlapping(honest: bytes) -> bytes:
    """A thousand names for the largest member: what they hold adds up to far more than the file."""
    buffer = io.BytesIO(honest)
    with zipfile.ZipFile(buffer, "a") as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        for i in range(1000):
            alias = zipfile.ZipInfo(largest.filename[:-1] + f"x{i}")
            for field in ("header_offset", "CRC", "compress_size", "file_size", "compress_type"):
                setattr(alias, field, getattr(largest, field))
            archive.filelist.append(alias)
            archive.NameToInfo[alias.filename] = alias
        archive._didModify = True  # type: ignore[attr-defined]
    return buffer.getvalue()


def _streams(honest: dict[str, bytes]) -> dict[str, bytes]:
    stored = zlib.decompress(honest["joblib-zlib"])
    zeros = bytes(300 << 20)
    bomb = assemble(b"}", text("w"), b"B", struct.pack("<I", len(zeros)), zeros, b"s.")
    return {
        "zlib bomb": zlib.compress(bomb, 9),
        "zlib bomb in many small objects": zlib.compress(assemble(b"(" + b"}" * (30 << 20) + b"t.")),
        "zlib bomb behind the end": zlib.compress(stored + zeros, 9),
        "zlib of zlib": zlib.compress(honest["joblib-zlib"]),
        "zlib with a wrong checksum": honest["joblib-zlib"][:-4] + b"\0\0\0\0",
        "two zlib streams": honest["joblib-zlib"] * 2,
        "gzip": gzip.compress(stored),
        "bzip2": bz2.compress(stored),
        "xz": lzma.compress(stored),
        "safetensors in zlib": zlib.compress(honest["safetensors"]),
        "text": b"this is not a checkpoint\n" * 100,
        "zeros": bytes(1000),
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }


def _legacy() -> dict[str, bytes]:
    """Older torch files whose parts contradict each other."""
    storage = b"(" + text("storage") + name("torch FloatStorage") + text("0") + text("cpu") + b"K\x06tQ"
    tensor = name("torch._utils _rebuild_tensor_v2") + b"(" + storage + b"K\x00K\x06\x85K\x01\x85\x89}tR"
    whole = legacy(assemble(b"}", text("embed.weight"), tensor, b"s."))
    keys = pickle.dumps(["0"], protocol=2)
    first, second = whole.split(keys)
    return {
        "keys that are missing": first + pickle.dumps([], protocol=2) + second,
        "keys that are not there": first + pickle.dumps(["0", "1"], protocol=2) + second,
        "keys that are numbers": first + pickle.dumps([0], protocol=2) + second,
        "keys that are twice there": first + pickle.dumps(["0", "0"], protocol=2) + second * 2,
        "keys of shared lists": first + assemble(b"](", SHARED, SHARED, b"e.") + second,
        "another count": first + keys + struct.pack("<q", 1 << 40) + second[8:],
        "a negative count": first + keys + struct.pack("<q", -1) + second[8:],
        "one tensor only": whole,
    }
