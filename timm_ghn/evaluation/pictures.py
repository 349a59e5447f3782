"""Accuracies as a picture."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from .accuracy import Measured

logger = logging.getLogger("timm_ghn.evaluation")


def plot_histogram(results: Iterable[Measured], picture: Path) -> None:
    """Draws how the accuracies are distributed over the architectures, one histogram for each kind of weights."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning('no histogram is drawn: pip install "timm-ghn[plot]"')
        return
    from matplotlib.figure import Figure

    measured = [result for result in results if result.accuracy]
    kinds = list(dict.fromkeys(kind for result in measured for kind in result.accuracy))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for kind in kinds:
        axes.hist([100 * r.accuracy[kind] for r in measured if kind in r.accuracy], bins=20, alpha=0.6, label=kind)
    axes.set(xlabel="top-1, %", ylabel="architectures")
    axes.legend()
    figure.savefig(picture)


def plot_confusion(counts: Tensor, names: Sequence[str] | None, picture: Path) -> None:
    """Draws `counts` [classes, classes] of images by their class (rows) and the answer they get (columns)."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning('no confusion matrix is drawn: pip install "timm-ghn[plot]"')
        return
    from matplotlib.figure import Figure

    classes = len(counts)
    side = min(12.0, 4 + 0.25 * classes)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), vmin=0, vmax=100, cmap="Blues")
    figure.colorbar(image, label="of the class's images, %")
    if classes <= 40:
        ticks = list(names) if names else [str(label) for label in range(classes)]
        axes.set_xticks(range(classes), ticks, rotation=90)
        axes.set_yticks(range(classes), ticks)
    axes.set(xlabel="answer", ylabel="class")
    figure.savefig(picture)
