"""Honest checkpoints in every format that is read, as bytes, and ways to damage them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import joblib
import torch
from safetensors.torch import save

from timm_ghn.checkpoints.convert import convert_file
from timm_ghn.checkpoints.load import load_ghn
from timm_ghn.errors import CheckpointError
from timm_ghn.hypernet import GHN, GHNConfig
from timm_ghn.hypernet.config import PUBLISHED_PRIMITIVES

TINY = {"num_classes": 2, "max_shape": (4, 4, 1, 1), "hid": 4, "heads": 2, "primitives": PUBLISHED_PRIMITIVES}


def samples(**config: Any) -> dict[str, bytes]:
    """One GHN in every format; the safetensors file has its config inside."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ghn = GHN(GHNConfig(**{**TINY, **config}))
    state = ghn.state_dict()
    checkpoint = {"state_dict": state, "config": published_config(ghn.config), "epoch": 3}
    return {
        "zip": torch_bytes(checkpoint),
        "legacy": torch_bytes(checkpoint, _use_new_zipfile_serialization=False),
        "joblib": joblib_bytes(state),
        "joblib-zlib": joblib_bytes(state, compress=3),
        "joblib-numpy": joblib_bytes({name: tensor.numpy() for name, tensor in state.items()}),
        "safetensors": save(dict(state), metadata={"config": json.dumps(ghn.config.to_dict())}),
    }


def published_config(config: GHNConfig) -> dict[str, Any]:
    """The config as ppuda writes it: only the keys it knows, the shape as a tuple."""
    names = ("max_shape", "num_classes", "hypernet", "decoder", "weight_norm", "ve", "layernorm", "hid")
    return {name: getattr(config, name) for name in names}


def torch_bytes(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def joblib_bytes(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    joblib.dump(content, buffer, **options)
    return buffer.getvalue()


def attempt(data: bytes, folder: Path) -> list[CheckpointError | GHN]:
    """What each loader makes of the bytes: the converter, the loader of a file, and that of a directory."""
    (folder / "attack.pt").write_bytes(data)
    (folder / "attack.safetensors").write_bytes(data)
    (folder / "directory").mkdir(exist_ok=True)
    (folder / "directory" / "model.safetensors").write_bytes(data)
    (folder / "directory" / "config.json").write_text(json.dumps({**TINY, "hypernet": "gatedgnn"}))

    def converted() -> GHN:
        return load_ghn(convert_file(folder / "attack.pt", folder / "converted"))

    outcomes: list[CheckpointError | GHN] = []
    for load in (
        converted,
        lambda: load_ghn(folder / "attack.safetensors"),
        lambda: load_ghn(folder / "directory"),
    ):
        try:
            outcomes.append(load())
        except CheckpointError as error:
            outcomes.append(error)
    return outcomes


Edit = tuple[str, int, bytes]
EDITS = ("replace", "insert", "delete", "flip", "truncate", "repeat")


def damaged(data: bytes, edits: Iterable[Edit]) -> bytes:
    """The bytes after some edits: what to do, where (counted from the end if negative), and with what."""
    for kind, where, what in edits:
        where = where % (len(data) + 1)
        size = len(what)
        if kind == "flip":
            data = data[:where] + bytes(byte ^ (1 << size % 8) for byte in data[where : where + 1]) + data[where + 1 :]
        elif kind == "truncate":
            data = data[:where]
        elif kind == "insert":
            data = data[:where] + what + data[where:]
        elif kind == "replace":
            data = data[:where] + what + data[where + size :]
        elif kind == "delete":
            data = data[:where] + data[where + size :]
        elif kind == "repeat":
            data = data[: where + 2 * size] + data[where:]
    return data
