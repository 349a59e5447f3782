"""What paper.py found, for people: tables on the terminal and as Markdown, JSON, pictures, one HTML page."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import html_page
import matplotlib
import numpy as np
from comparison_report import mean_error, plus_minus
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import RepeatedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from timm_ghn.command_line import print_table

NAME = "paper"
RANKED = "ranked"
FOLDS, REPEATS = 4, 25
SUBSETS, SUBSET_REPEATS = 60, 4
RESAMPLES = 1000
RANKED_COLOR, PREDICTED, TRAINED = "#1f77b4", "#d62728", "#333333"
PUBLISHED = {
    "deepnets test": "66.9; SGD: 46.9 after one epoch, 88.5 after fifty",
    "deepnets wide": "64.0",
    "deepnets deep": "60.5",
    "deepnets dense": "65.8",
    "deepnets bnfree": "36.8; SGD: 18.0 after one epoch",
}
"""GHN-2 on the networks of its own splits, CIFAR-10's test images, from its per-network results (arXiv 2110.13100)."""
PUBLISHED_TAU = "Published for GHN-2 on its own test split: predicted 0.26, one epoch of SGD 0.43, five epochs 0.64."

Row = dict[str, Any]
Cells = list[list[str]]


def write(result: Row, folder: Path) -> None:
    """Prints the tables, and writes paper.json, .md, .html and the pictures into a folder."""
    groups: dict[str, list[Row]] = {}
    for row in result["rows"]:
        groups.setdefault(row["group"], []).append(row)
    ranked = groups.get(RANKED, [])
    compared = {name: against_sgd(rows, result) for name, rows in groups.items()}
    result["summary"] = {
        "sgd": compared,
        "ranking": ranking(ranked) if len(ranked) > 2 else {},
        "properties": properties(ranked) if len(ranked) >= 3 * FOLDS else {},
    }
    tables = [
        ("Predicted against SGD", sgd_table(result)),
        ("Ranking: Kendall's tau with accuracy after the longest training", ranking_table(result)),
        ("Properties: Kendall's tau of what a ridge regression says of networks that it has not seen",
         properties_table(result)),
    ]  # fmt: skip
    tables = [(title, cells) for title, cells in (*tables, *result["others"]) if len(cells) > 1]
    lines = notes(result)
    for title, cells in tables:
        table = Table(*cells[0], title=title)
        for cell in cells[1:]:
            table.add_row(*cell)
        print_table(table)
    for line in lines:
        Console().print(line, highlight=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n")
    markdown = [f"**{title}**\n\n{html_page.markdown_table(cells)}\n" for title, cells in tables]
    (folder / f"{NAME}.md").write_text("\n".join([*markdown, *(f"- {line}" for line in lines), ""]))
    matplotlib.rcParams["svg.hashsalt"] = NAME  # the same figures give the same file
    pictures = {}
    if groups:
        pictures[NAME] = plot_sgd(groups, compared, result)
    if result["summary"]["ranking"]:
        pictures[f"{NAME}_ranking"] = plot_ranking(ranked, result["summary"]["ranking"])
    body = [html_page.table(title, cells) for title, cells in tables]
    for stem, figure in pictures.items():
        figure.savefig(folder / f"{stem}.png", dpi=110)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None})
        (folder / f"{stem}.svg").write_text(drawing.getvalue())
        body.append(html_page.picture(drawing.getvalue()))
    body.append(html_page.table("Each network", every_network(result)))
    page = html_page.page("What predicted weights are worth, in steps of SGD", body, lines, result["command"])
    (folder / f"{NAME}.html").write_text(page)


# --- predicted against SGD --------------------------------------------------------------------------------------------


def against_sgd(rows: list[Row], result: Row) -> Row:
    """Means over the networks of a group, and on how many of them predicted weights are ahead."""
    steps = sorted({int(step) for row in rows for step in row["sgd"]})
    # What takes longer than all are trained has no place among networks of which few are trained for longer.
    common = min(max(row["sgd"]) for row in rows)
    reached = [steps_to_reach(row, result["classes"]) for row in rows]
    reached = [None if found is None or found > common else found for found in reached]
    return {
        "networks": len(rows),
        "predicted": mean_error([row["predicted"]["test"] for row in rows]),
        "sgd": {step: mean_error([row["sgd"][step]["test"] for row in trained(rows, step)]) for step in steps},
        "trained": {step: len(trained(rows, step)) for step in steps},
        "ahead": {
            step: sum(row["predicted"]["test"] >= row["sgd"][step]["test"] for row in trained(rows, step))
            for step in steps
        },
        "steps": quartiles([math.inf if found is None else found for found in reached]),
        "common": common,
        "beyond": sum(found is None for found in reached),
        "times": quartiles([times_as_long(row, found) for row, found in zip(rows, reached, strict=True)]),
    }


def trained(rows: list[Row], steps: int) -> list[Row]:
    return [row for row in rows if steps in row["sgd"]]


def steps_to_reach(row: Row, classes: int) -> float | None:
    """Steps of SGD that reach the accuracy of predicted weights; None if the longest training does not.

    Between lengths, accuracy is taken to grow with the logarithm of the steps; it begins at chance.
    """
    goal, before, accuracy = row["predicted"]["test"], 0, 100 / classes
    if goal <= accuracy:
        return 0.0
    for steps in sorted(row["sgd"]):
        now = row["sgd"][steps]["test"]
        if now >= goal:
            share = (goal - accuracy) / (now - accuracy)
            reached = math.expm1(math.log1p(before) + share * (math.log1p(steps) - math.log1p(before)))
            return min(reached, float(steps))  # a rounding more would be beyond
        before, accuracy = steps, max(now, accuracy)
    return None


def times_as_long(row: Row, steps: float | None) -> float:
    """How many times as long as the prediction it takes SGD to get there."""
    if steps is None:
        return math.inf
    return seconds_to_reach(row, steps) / float(row["predicted"]["seconds"])


def seconds_to_reach(row: Row, steps: float) -> float:
    """As long as so many steps of SGD take."""
    return steps * float(row["predicted"]["step_seconds"])


def quartiles(values: list[float]) -> list[float | None]:
    """The quartiles; None where they are beyond what was measured."""
    # Those of the order, since there is no mean of what is finite and what is not.
    order = sorted(values)
    found = [order[round(share * (len(order) - 1))] for share in (0.25, 0.5, 0.75)]
    return [None if math.isinf(value) else value for value in found]


def length(steps: int, result: Row) -> str:
    return f"{steps / result['epoch']:.2g} ep. ({steps})"


def sgd_table(result: Row) -> Cells:
    groups = result["summary"]["sgd"]
    every = sorted({steps for found in groups.values() for steps in found["sgd"]})
    header = ["networks", "of", "predicted", *(length(steps, result) for steps in every)]
    header += ["ahead of each", "steps to reach it", "times as long", "published GHN-2"]
    cells = [header]
    for name, found in groups.items():
        means = [plus_minus(found["sgd"][steps]) if steps in found["sgd"] else "" for steps in every]
        means = [
            f"{mean} of {found['trained'][steps]}" if 0 < found["trained"].get(steps, 0) < found["networks"] else mean
            for steps, mean in zip(every, means, strict=True)
        ]
        ahead = ", ".join(f"{found['ahead'][steps]}/{found['trained'][steps]}" for steps in found["ahead"])
        cells.append([
            name, f"{found['networks']} of {result['wanted'].get(name, found['networks'])}",
            plus_minus(found["predicted"]), *means, ahead,
            spread(found["steps"], f"over {found['common']}"), spread(found["times"], "more"), PUBLISHED.get(name, ""),
        ])  # fmt: skip
    return cells


def every_network(result: Row) -> Cells:
    every = sorted({steps for row in result["rows"] for steps in row["sgd"]})
    header = ["network", "group", "parameters", "predicted", *(length(steps, result) for steps in every)]
    cells = [[*header, "steps to reach it", "predicted in", "SGD gets there in"]]
    for row in result["rows"]:
        reached = steps_to_reach(row, result["classes"])
        cells.append([
            row["network"], row["group"], f"{row['predicted']['parameters']:,}",
            f"{row['predicted']['test']:.1f}",
            *(f"{row['sgd'][steps]['test']:.1f}" if steps in row["sgd"] else "" for steps in every),
            "beyond" if reached is None else f"{reached:.0f}",
            f"{row['predicted']['seconds']:.2f} s",
            "beyond" if reached is None else f"{seconds_to_reach(row, reached):.0f} s",
        ])  # fmt: skip
    return cells


def spread(found: list[float | None], beyond: str) -> str:
    low, middle, high = (beyond if value is None else f"{value:.0f}" for value in found)
    return f"{middle} ({low} to {high})"


# --- ranking and properties -------------------------------------------------------------------------------------------


def ranking(rows: list[Row]) -> Row:
    """Kendall's tau of what there is before the longest training with what comes out of it, and its error."""
    *shorter, longest = sorted(rows[0]["sgd"])
    goal = [row["sgd"][longest]["test"] for row in rows]
    fields = {"predicted weights": "test", "parameters": "parameters", "multiply-accumulates": "macs"}
    indicators = {name: [row["predicted"][field] for row in rows] for name, field in fields.items()}
    indicators |= {f"{steps} steps of SGD": [row["sgd"][steps]["test"] for row in rows] for steps in shorter}
    return {name: tau_error(values, goal) for name, values in indicators.items()}


def tau_error(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Kendall's tau (b), and its standard error by resampling the networks."""
    pairs, generator = np.array([a, b]), np.random.default_rng(0)
    draws = (pairs[:, generator.integers(len(a), size=len(a))] for _ in range(RESAMPLES))
    return float(kendalltau(*pairs)[0]), float(np.nanstd([kendalltau(*draw)[0] for draw in draws]))


def properties(rows: list[Row]) -> Row:
    """Tau of what a ridge regression on embeddings, and on counts, says of a network, with what is measured.

    Within each quarter of the networks that the regression has not seen: over all of them at once, the folds' means,
    which lie opposite to what is held out, would count as an order.
    """
    shortest, *_, longest = sorted(rows[0]["sgd"])
    last = [row["sgd"][longest] for row in rows]
    targets = {
        "accuracy": [found["test"] for found in last],
        "accuracy under noise": [found["noisy"] for found in last],
        "images a second": [1 / row["predicted"]["ms"] for row in rows],
        "speed of learning": [row["sgd"][shortest]["test"] / row["sgd"][longest]["test"] for row in rows],
    }
    counts = [[math.log(row["predicted"][name]) for name in ("parameters", "macs", "nodes")] for row in rows]
    inputs = {
        "embedding": [row["predicted"]["embedding"] for row in rows],
        "parameters, multiply-accumulates and nodes": counts,
    }
    return {
        target: {name: held_out_tau(np.array(features), np.array(values)) for name, features in inputs.items()}
        for target, values in targets.items()
    }


def held_out_tau(features: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The mean over divisions, and its standard error by leaving out a quarter of the networks (a jackknife).

    Networks drawn with replacement, as for `tau_error`, would be among those that are known and those that are new.
    """
    count, generator = len(values), np.random.default_rng(0)
    left_out = count // 4
    taus = []
    for _ in range(SUBSETS):
        rows = generator.choice(count, count - left_out, replace=False)
        taus.append(divided_tau(features[rows], values[rows], SUBSET_REPEATS))
    error = math.sqrt((count - left_out) / left_out) * float(np.std(taus))
    return divided_tau(features, values, REPEATS), error


def divided_tau(features: np.ndarray[Any, Any], values: np.ndarray[Any, Any], repeats: int) -> float:
    folds = RepeatedKFold(n_splits=FOLDS, n_repeats=repeats, random_state=0)
    taus = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tau of constants is not a number
        for known, new in folds.split(features):
            model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 13)))
            taus.append(kendalltau(model.fit(features[known], values[known]).predict(features[new]), values[new])[0])
    return float(np.nanmean(taus))


def ranking_table(result: Row) -> Cells:
    taus = result["summary"]["ranking"].items()
    return [
        ["what networks are ordered by", "tau"],
        *([name, f"{tau:.2f} ± {error:.2f}"] for name, (tau, error) in taus),
    ]


def properties_table(result: Row) -> Cells:
    found = result["summary"]["properties"]
    names = list(next(iter(found.values()), ()))
    rows = ([target, *(f"{tau:.2f} ± {error:.2f}" for tau, error in taus.values())] for target, taus in found.items())
    return [["property", *names], *rows]


# --- words and pictures -----------------------------------------------------------------------------------------------


def notes(result: Row) -> list[str]:
    """What the figures mean, and what they belong to."""
    return [
        f"machine: {result['machine']}",
        f"checkpoint: {result['checkpoint']['ghn']}, sha256 {result['checkpoint']['sha256']}",
        f"top-1 in percent on {result['command']['images']} held-out images, mean ± standard error over networks; an "
        f"epoch is {result['epoch']} steps; each length of SGD has its own cosine schedule and learning rate: the best "
        "of three, or of more where that is the lowest or the highest; beyond 1/3 of an epoch, of the best at the "
        "length before and those within three points of it",
        "ahead of each: on how many networks predicted weights are at least as good, for each length; steps to reach "
        "it, and how many times as long as the prediction they take: median and quartiles over networks; seconds are "
        "medians of a prediction and of a step, in turns",
        "networks that are not finished are left out: of how many there are to be is in the second column",
        "tau ± standard error, by resampling the networks (ranking) or leaving out a quarter of them (properties). "
        + PUBLISHED_TAU,
    ]


def plot_sgd(groups: dict[str, list[Row]], compared: dict[str, Row], result: Row) -> Figure:
    """A panel for each group: SGD's accuracy over steps, and that of predicted weights."""
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(max(5.0, 3.4 * columns + 0.4), 2.8 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, (name, rows) in zip(grid.flat, groups.items(), strict=False):
        found = compared[name]
        for row in rows:
            steps = sorted(row["sgd"])
            axes.plot(steps, [row["sgd"][s]["test"] for s in steps], color=TRAINED, alpha=0.15, linewidth=0.8)
        # A mean over other networks at another length would look like progress.
        whole = [s for s in found["sgd"] if found["trained"][s] == len(rows)]
        means, errors = zip(*(found["sgd"][s] for s in whole), strict=True)
        axes.errorbar(whole, means, errors, color=TRAINED, marker="o", markersize=4, label="SGD from random weights")
        mean, error = found["predicted"]
        axes.axhline(mean, color=PREDICTED, label="predicted, no step")
        axes.axhspan(mean - error, mean + error, color=PREDICTED, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_title(f"{name} ({len(rows)} networks)", fontsize=9)
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(groups) :]:
        axes.set_axis_off()
    figure.supxlabel(f"steps of SGD ({result['epoch']} are an epoch)", fontsize=9)
    figure.supylabel("top-1, %", fontsize=9)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def plot_ranking(rows: list[Row], taus: Row) -> Figure:
    """Accuracy of predicted weights against that after the longest training, and tau beside simpler things."""
    longest = max(rows[0]["sgd"])
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x, y = ([row["predicted"]["test"] for row in rows], [row["sgd"][longest]["test"] for row in rows])
    left.scatter(x, y, s=18, color=RANKED_COLOR)
    left.set(xlabel="predicted weights, top-1, %", ylabel=f"after {longest} steps of SGD, top-1, %")
    left.grid(alpha=0.3)
    names = list(taus)[::-1]
    values, errors = zip(*(taus[name] for name in names), strict=True)
    colors = [PREDICTED if name == "predicted weights" else RANKED_COLOR for name in names]
    right.barh(names, values, xerr=errors, color=colors, ecolor=TRAINED)
    right.set(xlabel="Kendall's tau", title=f"{len(rows)} networks")
    right.axvline(0, color=TRAINED, linewidth=0.8)
    return figure
