"""Pickles that run code, take memory or time, or describe impossible tensors, in each container that holds a pickle."""

from __future__ import annotations

import builtins
import codecs
import io
import os
import pickle
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

_MAGIC = 0x1950A86A20F9469CFC6C


def pickles(canary: str) -> dict[str, bytes]:
    """Every payload in every container."""
    payloads = {**_code(canary), **_bombs(), **_tensors(), **_structures()}
    attacks = {
        f"{name}, {container.__name__}": container(payload)
        for name, payload in payloads.items()
        for container in (plain, compressed, zipped, legacy, nested)
    }
    return {**attacks, **_arrays()}


# Containers


def plain(payload: bytes) -> bytes:
    """As joblib writes it."""
    return payload


def compressed(payload: bytes) -> bytes:
    return zlib.compress(payload)


def zipped(payload: bytes) -> bytes:
    """As torch.save writes it, with one storage of six floats."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ghn/data.pkl", payload)
        archive.writestr("ghn/byteorder", "little")
        archive.writestr("ghn/data/0", bytes(24))
        archive.writestr("ghn/version", "3\n")
    return buffer.getvalue()


def legacy(payload: bytes) -> bytes:
    """As torch.save wrote it before 1.6."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    header = b"".join(pickle.dumps(part, protocol=2) for part in (_MAGIC, 1001, system))
    return header + payload + pickle.dumps(["0"], protocol=2) + struct.pack("<q", 6) + bytes(24)


def nested(payload: bytes) -> bytes:
    """In the bytes of a storage, as joblib's files hold torch's."""
    data = legacy(payload)
    return assemble(
        b"}", text("w"), name("torch._utils _rebuild_tensor_v2"), b"(", name("torch.storage _load_from_bytes"),
        b"B", struct.pack("<I", len(data)), data, b"\x85R", b"K\x00K\x06\x85K\x01\x85\x89}t", b"Rs.",
    )  # fmt: skip


# An assembler for pickles


def assemble(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts)


def name(qualified: str) -> bytes:
    return b"c" + qualified.replace(" ", "\n").encode() + b"\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def state(value: bytes) -> bytes:
    """A state dict with one entry."""
    return assemble(b"}", text("embed.weight"), value, b"s.")


# Payloads

# 64 lists, each the next one twice: 2^64 to whoever prints, copies or compares it.
SHARED = b"]" + b"".join(b"q" + bytes([i]) + b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(64))


class _Call:
    def __init__(self, function: Callable[..., Any], *args: Any):
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def _code(canary: str) -> dict[str, bytes]:
    touch = f"open({canary!r}, 'w')"
    calls = {
        "os.system": _Call(os.system, f"touch {canary}"),
        "subprocess.Popen": _Call(subprocess.Popen, ["touch", canary]),
        "builtins.exec": _Call(builtins.exec, touch),
        "builtins.eval": _Call(builtins.eval, touch),
        "builtins.open": _Call(builtins.open, canary, "w"),
        "builtins.getattr": _Call(builtins.getattr, "", "format"),
        "builtins.__import__": _Call(builtins.__import__, "antigravity"),
        "pickle.loads": _Call(pickle.loads, pickle.dumps(_Call(os.system, f"touch {canary}"))),
        "codecs.encode": _Call(codecs.encode, "x", "rot13"),
    }
    attacks = {what: pickle.dumps({"embed.weight": call}, protocol=2) for what, call in calls.items()}
    system = name("posix system"), b"(", text(f"touch {canary}"), b"tR"
    attacks |= {
        "second pickle": pickle.dumps({}, protocol=2) + assemble(*system, b"."),
        "stack global": state(text("posix") + text("system") + b"\x93" + text(f"touch {canary}") + b"\x85R"),
        "stack global of numbers": state(b"K\x01K\x02\x93)R"),
        "INST": state(b"(" + text(f"touch {canary}") + b"iposix\nsystem\n"),
        "OBJ": state(b"(" + name("posix system") + text(f"touch {canary}") + b"o"),
        "NEWOBJ": state(name("posix system") + text(f"touch {canary}") + b"\x85\x81"),
        "NEWOBJ_EX": state(name("posix system") + text(f"touch {canary}") + b"\x85}\x92"),
        "EXT1": state(b"\x82\x01"),
        "dotted name": state(text("torch.storage") + text("_load_from_bytes.__globals__") + b"\x93"),
        "rebuild of a class": state(name("torch._utils _rebuild_parameter") + b"(" + name("posix system") + b"tR"),
        "text persistent id": state(b"Pposix.system\n"),
        "persistent id": state(text("posix.system") + b"Q"),
        "BUILD on a function": state(
            name("torch._utils _rebuild_tensor_v2") + b"N}" + text("__code__") + b"Ns\x86b"
        ),
        "BUILD on a class": state(name("collections OrderedDict") + b"}" + text("update") + b"Nsb"),
        "call of a number": state(b"K\x01)R"),
        "call of a string": state(text("os.system") + b")R"),
        "call of a storage type": state(name("torch FloatStorage") + number(1 << 40) + b"\x85R"),
        "call without a tuple": state(name("collections OrderedDict") + b"}R"),
        "OrderedDict of code": state(name("collections OrderedDict") + name("posix system") + b"\x85R"),
        "namespace": state(name("argparse Namespace") + b")\x81}" + text("system") + name("posix system") + b"sb"),
    }  # fmt: skip
    return attacks


def _bombs() -> dict[str, bytes]:
    return {
        "bytearray": state(name("builtins bytearray") + number(1 << 36) + b"\x85R"),
        "memo index": state(b"K\x01r" + struct.pack("<I", (1 << 32) - 1)),
        "length of bytes": state(b"\x8e" + struct.pack("<Q", 1 << 60)),
        "length of text": state(b"\x8d" + struct.pack("<Q", 1 << 60)),
        "length of bytes, 4 GB": state(b"B" + struct.pack("<I", (1 << 32) - 1)),
        "length of a frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + state(b"N")[2:],
        "long integer": state(b"\x8b" + struct.pack("<i", (1 << 31) - 1)),
        "decimal integer": state(b"I" + b"9" * 100_000 + b"\n"),
        "name without end": state(b"c" + b"a" * 100_000),
        "nested tuples": state(b")" + b"\x85" * 90_000),
        "nested tuples as a key": assemble(b"}", b")" + b"\x85" * 90_000, b"K\x01s."),
        "shared tuples as a key": assemble(b"}", b")" + b"q\x00h\x00\x86" * 64, b"K\x01s."),
        "nested tuples as a key of an OrderedDict": state(
            name("collections OrderedDict") + b"(((" + b")" + b"\x85" * 90_000 + b"K\x01tttR"
        ),
        "nested tuples as a dtype": state(name("numpy dtype") + b"(" + b")" + b"\x85" * 90_000 + b"tR"),
        "shared lists as a config": assemble(
            b"}(", text("state_dict"), b"}", text("config"), b"}", text("hypernet"), SHARED, b"su."
        ),
        "nested lists": state(b"]" * 90_000 + b"a" * 89_999),
        "many objects": state(b"(" + b"}" * 110_000 + b"t"),
        "duplicates": state(b"]" + b"2" * 110_000),
        "list that holds itself": state(b"]q\x00h\x00a"),
        "dictionary that holds itself": assemble(b"}q\x00", text("embed.weight"), b"h\x00s."),
        "nothing": b"\x80\x02",
        "stop": b"\x80\x02.",
        "too many pops": assemble(b"ttt."),
        "pop across a mark": assemble(b"K\x01(\x86t."),
        "unknown opcode": assemble(b"\xff."),
        "memo before it is filled": assemble(b"h\x07."),
    }


def _tensors() -> dict[str, bytes]:
    storage = b"(" + text("storage") + name("torch FloatStorage") + text("0") + text("cpu") + b"K\x06tQ"

    def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, of: bytes = storage) -> bytes:
        shape, steps = (b"(" + b"".join(map(number, sizes)) + b"t" for sizes in (size, stride))
        return state(name("torch._utils _rebuild_tensor_v2") + b"(" + of + number(offset) + shape + steps + b"\x89}tR")

    def storage_of(kind: str, key: str, count: int) -> bytes:
        return b"(" + text("storage") + name(f"torch {kind}") + text(key) + text("cpu") + number(count) + b"tQ"

    return {
        "tensor larger than its storage": tensor((7,), (1,)),
        "tensor of 2^60 elements": tensor((1 << 30, 1 << 30), (1 << 30, 1)),
        "tensor of 2^80 elements": tensor((1 << 40, 1 << 40), (1 << 40, 1)),
        "expanded tensor": tensor((1 << 40,), (0,)),
        "negative size": tensor((-1, -6), (1, 1)),
        "negative stride": tensor((6,), (-1,), 5),
        "negative offset": tensor((6,), (1,), -1),
        "offset beyond the end": tensor((1,), (1,), 6),
        "strides beyond the end": tensor((2, 3), (6, 1)),
        "more sizes than strides": tensor((2, 3), (1,)),
        "a thousand dimensions": tensor((1,) * 1000, (1,) * 1000),
        "tensor without storage": tensor((1,), (1,), of=b"N"),
        "tensor of a string": tensor((1,), (1,), of=text("0")),
        "storage that is missing": tensor((1,), (1,), of=storage_of("FloatStorage", "1", 1)),
        "storage on another path": tensor((1,), (1,), of=storage_of("FloatStorage", "../data.pkl", 1)),
        "storage larger than its data": tensor((1,), (1,), of=storage_of("FloatStorage", "0", 1 << 40)),
        "storage of 2^70 elements": tensor((1,), (1,), of=storage_of("FloatStorage", "0", 1 << 70)),
        "storage of -1 elements": tensor((1,), (1,), of=storage_of("FloatStorage", "0", -1)),
        "storage of another type": tensor((6,), (1,), of=storage_of("DoubleStorage", "0", 6)),
        "storage of objects": tensor((6,), (1,), of=storage_of("ObjectStorage", "0", 6)),
        "storage of integers": tensor((6,), (1,), of=storage_of("LongStorage", "0", 3)),
    }


def _structures() -> dict[str, bytes]:
    """Honest pickles of something that is not a state dict."""
    contents: dict[str, Any] = {
        "a number": 1,
        "a string": "embed.weight",
        "an empty dictionary": {},
        "a list": [{}],
        "numbers as names": {1: 2},
        "a number for a tensor": {"embed.weight": 1},
        "a list for a state dict": {"state_dict": []},
        "no state dict": {"state_dict": None, "config": None},
        "a string for a config": {"state_dict": {}, "config": "hid"},
    }
    return {name: pickle.dumps(content, protocol=2) for name, content in contents.items()}


def _arrays() -> dict[str, bytes]:
    """What joblib writes for numpy arrays, whose reader in joblib unpickles arrays of objects."""

    def array(shape: bytes = b"K\x02\x85", dtype: str = "f4", order: str = "C", align: int = 16) -> bytes:
        dtype_ = name("numpy dtype") + text(dtype) + b"\x89\x88\x87R(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffK\x00tb"
        fields = {"subclass": name("numpy ndarray"), "shape": shape, "order": text(order), "dtype": dtype_}
        items = b"".join(text(key) + value for key, value in fields.items())
        wrapper = name("joblib.numpy_pickle NumpyArrayWrapper") + b")\x81}(" + items
        wrapper += text("numpy_array_alignment_bytes") + number(align) + b"ub"
        return state(wrapper + b"\x00" + bytes(8))

    return {
        "array of objects": array(dtype="O8"),
        "array of structures": array(dtype="V8"),
        "array of complex numbers": array(dtype="c8"),
        "array of 2^60 elements": array(shape=number(1 << 60) + b"\x85"),
        "array of 2^80 elements": array(shape=number(1 << 40) + number(1 << 40) + b"\x86"),
        "array of negative size": array(shape=number(-2) + b"\x85"),
        "array whose shape is a string": array(shape=text("2")),
        "array that is not a state dict": array(),
        "wrapper without state": state(name("joblib.numpy_pickle NumpyArrayWrapper") + b")\x81Nb"),
        "wrapper that is never built": state(name("joblib.numpy_pickle NumpyArrayWrapper") + b")\x81"),
        "big-endian dtype": state(name("numpy dtype") + text("f4") + b"\x89\x88\x87R(K\x03" + text(">") + b"tb"),
        "class of joblib": state(name("joblib.numpy_pickle_compat NDArrayWrapper") + b")\x81"),
    }
