"""Safetensors files whose header lies, and configs whose module cannot be built."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from .samples import samples

Header = dict[str, Any]


def headers() -> dict[str, bytes]:
    honest = samples()["safetensors"]
    first, second = [key for key in _header(honest) if key != "__metadata__"][:2]
    config = json.loads(_header(honest)["__metadata__"]["config"])

    def edited(change: Callable[[Header], Any]) -> bytes:
        header = _header(honest)
        change(header)
        return _with_header(honest, json.dumps(header).encode())

    def tensor(**fields: Any) -> bytes:
        return edited(lambda header: header[first].update(fields))

    def configured(**fields: Any) -> bytes:
        text = json.dumps({**config, **fields})
        return edited(lambda header: header["__metadata__"].update(config=text))

    twice = (
        json.dumps(_header(honest))[:-1] + f', "{first}": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}}}'
    )
    start, end = _header(honest)[first]["data_offsets"]
    shape = _header(honest)[first]["shape"]
    return {
        "header of 2^60 bytes": struct.pack("<Q", 1 << 60) + honest[8:],
        "header of 200 MB": struct.pack("<Q", 200 << 20) + honest[8:],
        "header of -1 bytes": struct.pack("<q", -1) + honest[8:],
        "empty header": struct.pack("<Q", 0) + honest[8:],
        "header of nested lists": _with_header(honest, b"[" * 100_000),
        "header of nested dictionaries": _with_header(honest, b'{"a":' * 100_000),
        "header that is a list": _with_header(honest, b"[]"),
        "header that is not text": _with_header(honest, b"\xff" * 100),
        "header that is a pickle": _with_header(honest, b"\x80\x02cposix\nsystem\n)R."),
        "tensor in another's place": edited(lambda h: h[first].update(data_offsets=h[second]["data_offsets"])),
        "overlapping tensors": edited(lambda h: h[second].update(data_offsets=[start, end])),
        "reversed offsets": tensor(data_offsets=[end, start]),
        "negative offsets": tensor(data_offsets=[-8, 8]),
        "offsets beyond the end": tensor(data_offsets=[1 << 40, (1 << 40) + end - start]),
        "offsets of 2^64": tensor(data_offsets=[(1 << 64) - 1, (1 << 64) - 1]),
        "one offset": tensor(data_offsets=[0]),
        "shape of 2^66 elements": tensor(shape=[1 << 33, 1 << 33]),
        "negative shape": tensor(shape=[-1 for _ in shape]),
        "another shape": tensor(shape=[end - start, 1]),
        "no shape": tensor(shape=None),
        "another type": tensor(dtype="F16", shape=[*shape[:-1], shape[-1] * 2]),
        "unknown type": tensor(dtype="PICKLE"),
        "two entries for a tensor": _with_header(honest, twice.encode()),
        "missing tensor": edited(lambda h: h.pop(first)),
        "hole between tensors": edited(lambda h: [h.pop(first), h["__metadata__"].update(config="{}")]),
        "metadata that is not text": edited(lambda h: h.update(__metadata__={"config": 1})),
        "config of nested lists": edited(lambda h: h["__metadata__"].update(config="[" * 100_000)),
        "config that is a list": edited(lambda h: h["__metadata__"].update(config="[[1, 2]]")),
        "config with a million layers": configured(hypernet="graphormer", layers=1_000_000),
        "config of 2^80 elements": configured(max_shape=[1 << 20] * 4),
        "config of 2^80 elements, mlp": configured(max_shape=[1 << 20] * 4, decoder="mlp"),
        "config of 2^64 elements": configured(max_shape=[1 << 16] * 4, decoder="mlp"),
        "config of large widths": configured(hid=1 << 30),
        "config of a billion classes": configured(num_classes=1 << 30),
        "config of more heads than width": configured(hypernet="graphormer", heads=3),
        "config with text for a size": configured(hid="4"),
        "config with a fraction for a size": configured(hid=4.0),
        "config with a huge number": configured(hid=10**1000),
        "config with nan": configured(hid=float("nan")),
        "config with a list for a size": configured(hid=[4]),
        "config with three sizes": configured(max_shape=[4, 4, 1]),
        "config with a word for a shape": configured(max_shape="4411"),
        "config with a word for a switch": configured(weight_norm="no"),
        "config with another decoder": configured(decoder="lowrank"),
        "config with code": configured(hypernet="__import__('os').system('true')"),
        "config with infinite scale": configured(branch_scale=float("inf")),
        "config with a word for a scale": configured(branch_scale="1"),
        "config with a bias that is not a number": configured(position_bias=float("nan")),
        "config with a list for a bias": configured(position_bias=[0.0]),
    }  # fmt: skip


def _header(data: bytes) -> Header:
    (length,) = struct.unpack("<Q", data[:8])
    header: Header = json.loads(data[8 : 8 + length])
    return header


def _with_header(data: bytes, header: bytes) -> bytes:
    """The same tensors behind another header."""
    (length,) = struct.unpack("<Q", data[:8])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]
