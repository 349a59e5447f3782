"""Architectures ordered by the accuracy of their predicted weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

from torch import nn

from ..checkpoints.load import load_ghn
from ..hypernet import GHN
from .accuracy import Measured, create_model, measure
from .batches import Batches, check_images, check_labels


def rank(models: Iterable[str | nn.Module], batches: Batches, ghn: str | GHN = "ghn2") -> list[Measured]:
    """Orders architectures by the accuracy of their predicted weights, best first; nothing is trained.

    Args:
        models: timm's names, which are created for the batches' size and the GHN's classes, or modules, which are left
            as they are and go by the name of their class.
        batches: Images and labels to measure on; batch norms take their statistics from the same images.
        ghn: A loaded GHN, or whatever `load_ghn` takes.

    Returns:
        A row for each; those that cannot be measured come last, with their `error`.

    Raises:
        CheckpointError: If the GHN cannot be loaded.
        ValueError: If there are no batches, one is empty or not finite, or labels are not one index for each image, of
            the GHN's classes where there are names among the models.
    """
    hypernet = load_ghn(ghn) if isinstance(ghn, str) else ghn
    models, kept = list(models), list(batches)
    if not kept:
        raise ValueError("There are no batches to rank on; give at least one.")
    classes = hypernet.config.num_classes if any(isinstance(model, str) for model in models) else None
    for images, labels in kept:
        check_images(images)
        check_labels(images, labels, classes)
    rows = []
    for model in models:
        if isinstance(model, str):
            name, build = model, _creator(model, hypernet.config.num_classes, kept[0][0].shape[-1])
        else:
            name, build = type(model).__name__, _copier(model)
        rows.append(measure(name, build, hypernet, kept, kept))
    return sorted(rows, key=lambda row: -row.accuracy.get("predicted", -math.inf))


def _creator(name: str, num_classes: int, image_size: int) -> Callable[[], nn.Module]:
    return lambda: create_model(name, num_classes, image_size)


def _copier(model: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(model)
