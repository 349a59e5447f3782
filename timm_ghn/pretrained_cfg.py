"""What timm's pretrained cfgs say of predicted weights: whose they are, and how images were prepared for them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from .hypernet import Images

# What a pretrained cfg says about the weights it was made for, which predicted weights are not.
WEIGHTS_FIELDS = (
    "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "label_offset", "license", "description",
    "origin_url", "paper_name", "paper_ids", "notes", "label_names", "label_descriptions",
)  # fmt: skip


def prepared(images: Images | None) -> dict[str, Any]:
    """The fields of a timm cfg that say how to prepare images.

    The size is not among them: there it says what the architecture takes, and decides which size a model gets.
    """
    if images is None:
        return {}
    fields = {"mean": images.mean, "std": images.std, "crop_pct": images.crop_pct, "test_crop_pct": None}
    return fields if images.interpolation is None else {**fields, "interpolation": images.interpolation}


def label(model: nn.Module, tag: str, images: Images | None, has_head: bool) -> None:
    """Makes a model's cfg say that its weights are a GHN's, and nothing of those it was written for.

    Args:
        model: A timm model.
        tag: The GHN's.
        images: What it was trained with; None leaves what the cfg says of images.
        has_head: Whether the classification layer is predicted, if it has the GHN's classes, whose names then hold.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict):  # default_cfg is the same object
        for field in WEIGHTS_FIELDS:
            cfg.pop(field, None)
        cfg.update(tag=tag, custom_load=False, **prepared(images))
        if cfg.get("test_crop_pct", "") is None:
            del cfg["test_crop_pct"]
        names = images.label_names if images and has_head else None
        if names and len(names) == getattr(model, "num_classes", None):
            cfg.update(num_classes=len(names), label_names=names)


def save_config(model: nn.Module, file: Path) -> None:
    """Writes the config.json with which timm makes the model from a directory or a repository."""
    importlib.import_module("timm.models._hub").save_config_for_hf(model, file)
