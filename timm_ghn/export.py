"""Predicted weights in files, for models that need not fit in memory: one tensor at a time is made and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_model
from torch import nn

from .ambient import plain_torch
from .errors import GHNError
from .files import whole_files
from .hypernet import Images
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
    with whole_files(directory) as part:
        files = write_files(model, prediction, part, dtype, max_shard_size)
        save_config(model, part / "config.json")
    return prediction.report, [directory / file.name for file in files]


def save_weights(model: nn.Module, file: Path) -> None:
    """Writes a model's weights as one safetensors file, in a folder that is made where there is none."""
    with whole_files(file.parent) as part:
        save_model(model, str(part / file.name))


def save_classifier(model: nn.Module, file: Path, tag: str, images: Images) -> Path:
    """Writes a timm model that has a head for the images it was measured on, as timm reads it.

    Args:
        model: What is saved; its cfg says afterwards whose weights it has and what images they are for.
        file: The weights.
        tag: The GHN's.
        images: What the model is for, with the size that it was made for.

    Returns:
        The config.json beside the weights, with which timm makes the model of the folder.
    """
    label(model, tag, images, has_head=True)
    cfg: Any = model.pretrained_cfg
    cfg["input_size"] = images.input_size
    with whole_files(file.parent) as part:
        save_model(model, str(part / file.name))
        save_config(model, part / "config.json")
    return file.with_name("config.json")
