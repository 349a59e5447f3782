"""Predicted weights in files, for models that need not fit in memory: one tensor at a time is made and written."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import timm
import torch
from huggingface_hub import split_state_dict_into_shards_factory

from .ambient import plain_torch
from .assign import Report
from .creation import build_unwritten
from .errors import GHNError
from .files import safetensors_header, whole_file
from .hypernet import GHN
from .pretrained_cfg import label, save_config
from .tiling import tile_into


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
    entries = {key: _Entry(key, tensor.detach(), dtype, tiles.get(id(tensor))) for key, tensor in state.items()}

    directory.mkdir(parents=True, exist_ok=True)
    total, free = sum(entry.bytes for entry in entries.values()), shutil.disk_usage(directory).free
    if total > free:
        raise GHNError(f"{name} takes {total:,} bytes, and {directory} has room for {free:,}.")
    shards = split_state_dict_into_shards_factory(
        entries, get_storage_size=lambda entry: entry.bytes, filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size or total,
    )  # fmt: skip
    files = [directory / name for name in shards.filename_to_tensors]
    for file in files:
        with whole_file(file) as part:
            _write_safetensors(part, [entries[key] for key in shards.filename_to_tensors[file.name]])
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        with whole_file(directory / "model.safetensors.index.json") as part:
            part.write_text(json.dumps(index, indent=2))
    save_config(model, directory / "config.json")
    prediction.report.seconds["write"] = time.perf_counter() - started
    return prediction.report, files


def _write_safetensors(file: Path, entries: list[_Entry]) -> None:
    """A safetensors file, of which one tensor is in memory at a time."""
    # Those of wide types first, so that each lies at a multiple of its own size.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    with file.open("wb") as stream:
        stream.write(safetensors_header((entry.name, entry.dtype, entry.shape) for entry in entries))
        for entry in entries:
            stream.write(entry.make().view(-1).view(torch.uint8).numpy().data)
