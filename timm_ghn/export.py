"""Predicted weights in files, for models that need not fit in memory: one tensor at a time is made and written."""

from __future__ import annotations

from pathlib import Path

import timm
import torch

from .ambient import plain_torch
from .errors import GHNError
from .hypernet import GHN
from .prediction import Report, write_files
from .predictor import Predictor
from .pretrained_cfg import label, save_config


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
    model, prediction = Predictor(ghn, head).build(lambda: timm.create_model(name, num_classes=num_classes))
    label(model, tag, ghn.config.images, head != "keep")
    files = write_files(model, prediction, directory, dtype, max_shard_size)
    save_config(model, directory / "config.json")
    return prediction.report, files
