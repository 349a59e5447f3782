"""Accuracies as a picture."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable
from pathlib import Path

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
