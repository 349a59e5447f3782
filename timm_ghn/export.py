"""Predicted weights in files, for models that need not fit in memory: one tensor at a time is made and written."""

from __future__ import annotations

from pathlib import Path

import timm
import torch

from .ambient import plain_torch
from .errors import GHNError
from .prediction import Report, write_files
from .predictor import Predictor
from .pretrained_cfg import label, save_config


@plain_torch()
def export(
    name: str,
    directory: Path,
    predictor: Predictor,
    tag: str,
    num_classes: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | None = None,
) -> tuple[Report, list[Path]]:
    """Writes what timm's ``create_model`` with a GHN would make as safetensors, with the config.json that timm reads.

    Memory is needed for the largest tensor; the model's own is reserved by the system but never touched. What is
    prepared for training is held in full.

    Args:
        name: Architecture.
        directory: Where the files go: ``model.safetensors``, which timm loads by ``checkpoint_path`` or ``local-dir:``,
            or shards with an index.
        predictor: What predicts, and how.
        tag: What the config calls the weights.
        num_classes: Classes of the model; timm's default if None.
        dtype: Of everything that is floating point.
        max_shard_size: Bytes of tensors in a file, unless a single tensor has more; one file if None.

    Returns:
        The prediction's report, and the files.

    Raises:
        GHNError: If there are weights in the directory already, or the disk has no room.
    """
    if present := sorted(directory.glob("*.safetensors")):
        raise GHNError(f"{present[0]} exists: give a directory without weights.")
    model, prediction = predictor.build(lambda: timm.create_model(name, num_classes=num_classes))
    label(model, tag, predictor.ghn.config.images, predictor.head != "keep")
    files = write_files(model, prediction, directory, dtype, max_shard_size)
    save_config(model, directory / "config.json")
    return prediction.report, files
