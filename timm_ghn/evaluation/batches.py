"""Batches of images and labels: what is refused before anything is measured on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Batches = Iterable["tuple[Tensor, Tensor]"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """The two parts of a batch.

    Raises:
        ValueError: If it has not two parts, or the first is no batch of images.
    """
    try:
        images, labels = batch
    except (TypeError, ValueError) as error:
        raise ValueError(f"A batch is a tuple of images and labels, not {described(batch)}.") from error
    check_images(images)
    return images, labels


def check_images(images: object) -> None:
    """Raises ValueError for what is no batch of images that a result can be computed from."""
    if not isinstance(images, Tensor) or images.ndim == 0:
        raise ValueError(f"A batch of images is a tensor, one image after the other, not {described(images)}.")
    if not len(images):
        raise ValueError("A batch has no images; leave it out.")
    if not images.isfinite().all():
        raise ValueError("A batch of images has values that are NaN or infinite; nothing can be measured on them.")


def check_labels(images: Tensor, labels: object, classes: int | None = None) -> None:
    """Raises ValueError for labels that are not an index below `classes` for each image."""
    if not isinstance(labels, Tensor) or labels.shape != (len(images),) or labels.dtype not in _INTEGERS:
        raise ValueError(
            f"Labels are the index of each image's class, integers of shape ({len(images)},) here, not "
            f"{described(labels)}."
        )
    if classes is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        raise ValueError(f"Label {int(wrong)} is none of the {classes} classes, which are 0 to {classes - 1}.")


def described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
