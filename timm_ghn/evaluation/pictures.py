"""Results as pictures."""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from torch import Tensor

from ..errors import GHNError
from ..files import whole_file
from .accuracy import Measured
from .embedding import principal_plane
from .ranking import Ranking, pareto_front

logger = logging.getLogger("timm_ghn.evaluation")

_PAPER, _INK, _FAINT, _ACCENT = "#ffffff", "#24292f", "#8c959f", "#d1242f"
# What a reader with a dark screen sees instead, in SVG. Hues are the same ones, lighter.
_DARK = {_PAPER: "#0d1117", _INK: "#e6edf3", _FAINT: "#7d8590", _ACCENT: "#ff7b72"}
# Told apart by those who see few colours, and on white as on black (Okabe and Ito 2008, without yellow and black).
_HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_SHAPES = ("o", "^")


def plot_histogram(results: Iterable[Measured], picture: Path) -> None:
    """Draws how the accuracies are distributed over the architectures, one histogram for each kind of weights."""
    if not _can_draw("histogram"):
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
    _save(figure, picture, {})


def plot_confusion(counts: Tensor, names: Sequence[str] | None, picture: Path) -> bool:
    """Draws `counts` [classes, classes] of images by their class (rows) and the answer they get (columns).

    Returns:
        Whether there is anything to draw with.
    """
    if not _can_draw("confusion matrix"):
        return False
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
    _save(figure, picture, {})
    return True


def plot_ranking(ranking: Ranking, picture: Path) -> None:
    """Draws accuracy over multiply-accumulates, with the front of those that none is both cheaper and better than.

    In an SVG, a point's name and figures are shown when the pointer is on it, and colours follow the reader's screen.

    Raises:
        GHNError: If matplotlib is missing.
    """
    figure, axes = _figure((8, 5.5))
    known = [row for row in ranking if row.top1 is not None]
    front = pareto_front(known)
    titles = {}
    for number, row in enumerate(known):
        best = row in front
        titles[f"point{number}"] = f"{row.name}: {row.top1:.1%}, {row.macs / 1e6:,.1f} M, {row.parameters / 1e6:.1f} M"
        axes.plot(
            max(row.macs, 1), 100 * (row.top1 or 0), "o", ms=7 if best else 5, color=_ACCENT if best else _FAINT,
            mec="none", zorder=3 if best else 2, gid=f"point{number}",
        )  # fmt: skip
    costs, shares = [max(row.macs, 1) for row in front], [100 * (row.top1 or 0) for row in front]
    axes.plot(costs, shares, drawstyle="steps-post", color=_ACCENT, lw=1, alpha=0.6, zorder=1)
    axes.set(xscale="log", xlabel="multiply-accumulates of one image", ylabel="top-1 of predicted weights, %")
    axes.margins(0.05, 0.12)
    left, right = axes.get_xlim()
    axes.set_xlim(left * (left / right) ** 0.25, right)  # the cheapest one's name is to the left of it
    lowest, begins = math.inf, 1.0
    for row, cost, share in reversed(list(zip(front, costs, shares, strict=True))):
        # Nothing is above and to the left of the front. Of names that would cover each other the better one's is there.
        across, up = axes.transAxes.inverted().transform(axes.transData.transform((cost, share)))
        if lowest - up > 0.035 or across < begins:
            place = {"xytext": (-5, 4), "textcoords": "offset points", "ha": "right"}
            axes.annotate(row.name, (cost, share), fontsize=9, color=_INK, **place)
            lowest, begins = up, across - 0.01 * len(row.name)  # of the axes' width, for each letter
    axes.set_title(textwrap.fill(str(ranking.trust), 110), fontsize=8, loc="left", color=_INK)
    _save(figure, picture, titles)


def plot_embeddings(embeddings: Tensor, names: Sequence[str], families: Sequence[str], picture: Path, ghn: str) -> None:
    """Draws embeddings [n, d] on the plane in which they vary most, coloured by family.

    In an SVG, a network's name is shown when the pointer is on it, and colours follow the reader's screen. The largest
    families have a colour and a shape of their own; all others share one.

    Raises:
        GHNError: If matplotlib is missing.
    """
    figure, axes = _figure((9, 6))
    coordinates, shares = principal_plane(embeddings)
    largest = [family for family, _ in Counter(families).most_common(len(_HUES) * len(_SHAPES))]
    titles = {}
    for index, (name, family) in enumerate(zip(names, families, strict=True)):
        rank = largest.index(family) if family in largest else None
        colour = _FAINT if rank is None else _HUES[rank % len(_HUES)]
        shape = "." if rank is None else _SHAPES[rank // len(_HUES)]
        titles[f"point{index}"] = f"{name} ({family})"
        axes.plot(
            *coordinates[index].tolist(), shape, ms=5, color=colour, mec="none", alpha=0.85, gid=f"point{index}",
            zorder=1 if rank is None else 2,
        )  # fmt: skip
    for rank, family in enumerate(largest):
        axes.plot([], [], _SHAPES[rank // len(_HUES)], color=_HUES[rank % len(_HUES)], mec="none", label=family)
    if len(set(families)) > len(largest):
        axes.plot([], [], ".", color=_FAINT, mec="none", label=f"{len(set(families)) - len(largest)} other families")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, labelcolor=_INK)
    axes.set(
        xlabel=f"first principal component, {shares[0]:.0%} of the variance",
        ylabel=f"second, {shares[1]:.0%}",
    )
    axes.set_title(f"{len(names)} networks as {ghn} sees them", loc="left", color=_INK, fontsize=11)
    _save(figure, picture, titles)


def _can_draw(what: str) -> bool:
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    logger.warning('no %s is drawn: pip install "timm-ghn[plot]"', what)
    return False


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure with one pair of axes, in the colours that `_save` knows."""
    if importlib.util.find_spec("matplotlib") is None:
        raise GHNError('Pictures are drawn by matplotlib: pip install "timm-ghn[plot]".')
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor=_PAPER)
    axes = figure.subplots()
    axes.set_facecolor(_PAPER)
    axes.tick_params(which="both", colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    for side, spine in axes.spines.items():
        spine.set_color(_INK)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _save(figure: Any, picture: Path, titles: Mapping[str, str]) -> None:
    """Writes a picture; an SVG shows an id's title under the pointer, and has other colours on a dark screen."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(picture) as part:
        if picture.suffix != ".svg":
            figure.savefig(part, format=picture.suffix[1:], dpi=150)
            return
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None})
        style = "".join(
            f'[style*="{paint}: {light}"] {{ {paint}: {dark} !important }}\n'
            for light, dark in _DARK.items()
            for paint in ("fill", "stroke")
        )

        def with_title(tag: re.Match[str]) -> str:
            title = titles.get(tag[1])
            return tag[0] if title is None else f"{tag[0]}<title>{escape(title)}</title>"

        text = re.sub(r'<g id="(\w+)">', with_title, drawing.getvalue())
        text = text.replace("<defs>", f"<style>@media (prefers-color-scheme: dark) {{\n{style}}}</style>\n <defs>", 1)
        part.write_text(text, encoding="utf-8")
