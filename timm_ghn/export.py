"""Predicted weights in files, for models that need not fit in memory: one tensor at a time is made and written."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from .ambient import plain_torch
from .assign import Report, tile_into
from .creation import build_unwritten
from .errors import GHNError
from .hypernet import GHN
from .plugin import label, save_config

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class _Entry:
    """A tensor of a file: how large it is, and how to make it."""

    def __init__(self, name: str, tensor: torch.Tensor, dtype: torch.dtype, predicted: torch.Tensor | None):
        self.name = name
        self.shape = tensor.shape
        self.dtype = dtype if tensor.is_floating_point() else tensor.dtype
        self.bytes = tensor.numel() * self.dtype.itemsize
        self._tensor, self._predicted = tensor, predicted

    def make(self) -> torch.Tensor:
        if self._predicted is None:
            return self._tensor.to(self.dtype).contiguous()
        whole = torch.empty(self.shape, dtype=self.dtype)
        tile_into(whole, self._predicted)
        return whole


@plain_torch()
def export(
    name: str,
    directory: Path,
    ghn: GHN,
    tag: str,
    num_classes: int | None = None,
    head: str = "auto",
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | None = None,
) -> tuple[Report, list[Path]]:
    """Writes what timm's ``create_model`` with a GHN would make as safetensors, with the config.json that timm reads.

    Memory is needed for the largest tensor; the model's own is reserved by the system but never touched.

    Args:
        name: Architecture.
        directory: Where the files go: ``model.safetensors``, which timm loads by ``checkpoint_path`` or ``local-dir:``,
            or shards with an index.
        ghn: What predicts.
        tag: What the config calls the weights.
        num_classes: Classes of the model; timm's default if None.
        head: As for `timm_ghn.predict`.
        dtype: Of everything that is floating point.
        max_shard_size: Bytes of tensors in a file, unless a single tensor has more; one file if None.

    Returns:
        The prediction's report, and the files.

    Raises:
        GHNError: If there are weights in the directory already, or the disk has no room.
    """
    if present := sorted(directory.glob("*.safetensors")):
        raise GHNError(f"{present[0]} exists: give a directory without weights.")
    model, prediction = build_unwritten(lambda: timm.create_model(name, num_classes=num_classes), ghn, head)
    label(model, tag, ghn.config.images, head != "keep")
    started = time.perf_counter()
    tiles = {id(parameter): prediction.tiles.get(key) for key, parameter in model.named_parameters()}
    state = model.state_dict(keep_vars=True)
    entries = [_Entry(key, tensor.detach(), dtype, tiles.get(id(tensor))) for key, tensor in state.items()]

    directory.mkdir(parents=True, exist_ok=True)
    total, free = sum(entry.bytes for entry in entries), shutil.disk_usage(directory).free
    if total > free:
        raise GHNError(f"{name} takes {total:,} bytes, and {directory} has room for {free:,}.")
    shards: list[list[_Entry]] = [[]]
    for entry in entries:
        if max_shard_size and shards[-1] and sum(e.bytes for e in shards[-1]) + entry.bytes > max_shard_size:
            shards.append([])
        shards[-1].append(entry)
    files: dict[Path, list[_Entry]] = {}
    for index, shard in enumerate(shards, 1):
        suffix = f"-{index:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        files[directory / f"model{suffix}.safetensors"] = shard
    for file, shard in files.items():
        _whole(file, lambda part, shard=shard: _write_safetensors(part, shard))  # type: ignore[misc]
    if len(shards) > 1:
        weight_map = {entry.name: file.name for file, shard in files.items() for entry in shard}
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        _whole(directory / "model.safetensors.index.json", lambda part: part.write_text(index_text))
    save_config(model, directory / "config.json")
    prediction.report.seconds["write"] = time.perf_counter() - started
    return prediction.report, list(files)


def _whole(file: Path, write: Callable[[Path], object]) -> None:
    """Lets a file appear only when it is complete."""
    part = file.with_name(f"{file.name}.part")
    try:
        write(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _write_safetensors(file: Path, entries: list[_Entry]) -> None:
    """A safetensors file: the header's length in eight bytes, the header, then the tensors one after the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    # Those of wide types first, so that each lies at a multiple of its own size.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    for entry in entries:
        offsets = [position, position := position + entry.bytes]
        header[entry.name] = {"dtype": _DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            stream.write(entry.make().view(-1).view(torch.uint8).numpy().data)
