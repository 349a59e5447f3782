"""What random_vs_ghn.py found, for people: tables on the terminal, curves as PNG and SVG, one HTML page."""

from __future__ import annotations

import html
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import html_page
import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

NAME = "random_vs_ghn"
INTRODUCTION = (
    "Each architecture trains from different starts on the same images in the same order, with the same augmentation, "
    "optimiser and schedule; each start has the learning rate that serves it best, chosen on other images and another "
    "seed."
)
COLORS = {"random": "#777777", "predicted": "#1f77b4", "pretrained": "#9467bd"}
OTHER_COLORS = ("#2ca02c", "#d62728", "#ff7f0e", "#8c564b")

Row = dict[str, Any]


def write(result: Row, folder: Path) -> None:
    """Writes random_vs_ghn.json, .md, .html and, for each section, .png and .svg into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in result["sections"]:
        section["summary"] = summarise(section)
    (folder / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n")
    matplotlib.rcParams["svg.hashsalt"] = NAME  # the same figures give the same file
    pictures = []
    for section in result["sections"]:
        figure = plot(section)
        stem = NAME if section["name"] == "full" else f"{NAME}_{section['name']}"
        figure.savefig(folder / f"{stem}.png", dpi=110)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None})
        (folder / f"{stem}.svg").write_text(drawing.getvalue())
        pictures.append(drawing.getvalue())
    (folder / f"{NAME}.md").write_text("\n".join(markdown(section) for section in result["sections"]))
    (folder / f"{NAME}.html").write_text(page(result, pictures))


# --- figures ----------------------------------------------------------------------------------------------------------


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.mean(values), error


def summarise(section: Row) -> Row:
    """Per architecture and start: rate, accuracies, gain over random init, and how soon it gets where that ends."""
    runs: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for run in section["runs"]:
        runs[run["model"]][run["start"]].append(run)
    models: dict[str, dict[str, Row]] = {}
    for model, by_start in runs.items():
        random = by_start["random"]
        marks = sorted(map(int, random[0]["curve"]))
        goal = statistics.mean(at(run, marks[-1]) for run in random)
        models[model] = {}
        for start, its in by_start.items():
            reached = [found for run in its if (found := first_to_reach(run, goal)) is not None]
            whole = len(reached) == len(its)
            models[model][start] = {
                "rate": its[0]["rate"],
                "accuracy": {mark: mean_error([at(run, mark) for run in its]) for mark in marks},
                "gain": {
                    mark: mean_error([at(a, mark) - at(b, mark) for a, b in zip(its, random, strict=True)])
                    for mark in marks
                },
                "uncalibrated": mean_error([run["uncalibrated_accuracy"] for run in its]),
                "steps_to_goal": statistics.mean(step for step, _ in reached) if whole else None,
                "seconds_to_goal": statistics.mean(seconds for _, seconds in reached) if whole else None,
                "creation_seconds": statistics.median(run["creation_seconds"] for run in its),
                "diverged": sum(run["diverged"] for run in its),
            }
    starts = list(dict.fromkeys(run["start"] for run in section["runs"]))
    overall = {start: over_models({m: s for m, s in models.items() if start in s}, start) for start in starts}
    return {"models": models, "overall": overall}


def over_models(models: dict[str, dict[str, Row]], start: str) -> Row:
    """Means over the architectures, and on how many of them a start does what it is meant to."""
    rows = [(starts[start], starts["random"]) for starts in models.values()]
    marks = list(rows[0][0]["accuracy"])
    return {
        "models": len(rows),
        "accuracy": {mark: mean_error([own["accuracy"][mark][0] for own, _ in rows]) for mark in marks},
        "gain": {mark: mean_error([own["gain"][mark][0] for own, _ in rows]) for mark in marks},
        "ahead_always": sum(all(own["gain"][mark][0] > 0 for mark in marks) for own, _ in rows),
        "ahead_at_end": sum(own["gain"][marks[-1]][0] > 0 for own, _ in rows),
        "half_the_steps": sum(
            own["steps_to_goal"] is not None and own["steps_to_goal"] <= marks[-1] / 2 for own, _ in rows
        ),
    }


def at(run: Row, mark: int) -> float:
    """Accuracy in percent."""
    return 100 * float(run["curve"][str(mark)])


def first_to_reach(run: Row, goal: float) -> tuple[int, float] | None:
    """The first evaluation that reaches an accuracy: its step, and the seconds of creation and training till then."""
    for mark in sorted(map(int, run["curve"])):
        if at(run, mark) >= goal:
            return mark, run["creation_seconds"] + run["seconds"][str(mark)]
    return None


# --- terminal ---------------------------------------------------------------------------------------------------------


def show(result: Row) -> None:
    """Prints the tables."""
    console = Console()
    for section in result["sections"]:
        header, rows = accuracy_table(section)
        table = Table(title=f"{section['title']}: top-1, %")
        for position, column in enumerate(header):
            table.add_column(column, justify="left" if position < 2 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for line in verdicts(section):
            console.print(line, highlight=False)
    for line in notes(result):
        console.print(line, highlight=False)


def accuracy_table(section: Row) -> tuple[list[str], list[list[str]]]:
    summary = section["summary"]
    marks = list(next(iter(summary["overall"].values()))["accuracy"])
    header = ["architecture", "start", "rate", "0, as created", *map(str, marks)]
    header += ["gain", "steps to goal", "seconds", "created in"]
    rows = []
    for model, starts in summary["models"].items():
        for start, row in starts.items():
            rows.append([
                model, start, f"{row['rate']:g}", plus_minus(row["uncalibrated"]),
                *(plus_minus(row["accuracy"][mark]) for mark in marks),
                "" if start == "random" else signed(row["gain"][marks[-1]]),
                "never" if row["steps_to_goal"] is None else f"{row['steps_to_goal']:.0f}",
                "" if row["seconds_to_goal"] is None else f"{row['seconds_to_goal']:.1f} s",
                f"{row['creation_seconds']:.2f} s",
            ])  # fmt: skip
    for start, row in summary["overall"].items():
        rows.append([
            f"mean of {row['models']}", start, "", "", *(plus_minus(row["accuracy"][mark]) for mark in marks),
            "" if start == "random" else signed(row["gain"][marks[-1]]), "", "", "",
        ])  # fmt: skip
    return header, rows


def markdown(section: Row) -> str:
    """A section's table in brief, for a README: the first, a middle and the last evaluation, and the gain."""
    summary = section["summary"]
    lines: list[str] = []
    for model, starts in {**summary["models"], "mean": summary["overall"]}.items():
        for start, row in starts.items():
            marks = list(row["accuracy"])
            if not lines:
                shown = [marks[0], *(mark for mark in marks[1:-1] if mark in (10, 100)), marks[-1]]
                titles = ["architecture", "start", *(f"{mark} steps" for mark in shown), "gain at the end"]
                lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
            gain = "" if start == "random" else signed(row["gain"][marks[-1]])
            cells = [model, start, *(plus_minus(row["accuracy"][mark]) for mark in shown), gain]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"{section['title']}, {section['steps']} steps", "", *lines, "", *verdicts(section), ""])


def plus_minus(value: tuple[float, float]) -> str:
    """Without an error where that is of a single value."""
    return f"{value[0]:.1f} ± {value[1]:.1f}" if value[1] else f"{value[0]:.1f}"


def signed(value: tuple[float, float]) -> str:
    return f"{value[0]:+.1f} ± {value[1]:.1f}"


def verdicts(section: Row) -> list[str]:
    """A sentence for each start: where it wins, and where it does not; and what becomes of it at each rate."""
    sentences = []
    for start, row in section["summary"]["overall"].items():
        if start != "random":
            sentences.append(
                f"{start}: ahead of random init at every evaluation on {row['ahead_always']} of {row['models']} "
                f"architectures, at the end on {row['ahead_at_end']}; at random's final accuracy in half the steps or "
                f"fewer on {row['half_the_steps']}."
            )
    return sentences + by_rate(section)


def by_rate(section: Row) -> list[str]:
    """A sentence for each start: what the short runs that choose a rate reach with each."""
    reached: dict[str, dict[float, list[float]]] = {}
    for run in section["tuning"]:
        at_end = 100 * list(run["curve"].values())[-1]
        reached.setdefault(run["start"], {}).setdefault(run["rate"], []).append(at_end)
    steps = section["tuning"][0]["steps"] if section["tuning"] else 0
    return [
        f"{start}, by learning rate, after {steps} steps: "
        + ", ".join(f"{statistics.mean(found):.1f} % at {rate:g}" for rate, found in sorted(rates.items()))
        + "."
        for start, rates in reached.items()
    ]


def notes(result: Row) -> list[str]:
    """What the figures mean, and what they belong to."""
    lines = [
        f"machine: {result['machine']}",
        f"checkpoint: {result['checkpoint']['ghn']}, sha256 {result['checkpoint']['sha256']}",
        "columns of numbers: top-1 in percent after so many steps, batch norms calibrated on training images before "
        "every evaluation but the first (0, as created); mean ± standard error over seeds (in the means: over "
        "architectures)",
        "gain: at the end, over random init with the same seed; goal: the accuracy at which random init ends, on "
        "average; steps and seconds: till the first evaluation that reaches it, the model's creation included",
    ]
    if result["unavailable"]:
        model, reason = next(iter(result["unavailable"].items()))
        count = len(result["unavailable"])
        lines.append(f"timm's pretrained weights could not be had for {count} architectures ({model}: {reason})")
    return lines


# --- pictures and page ------------------------------------------------------------------------------------------------


def plot(section: Row) -> Figure:
    """A panel for each architecture: accuracy over steps, with bands of one standard error."""
    models = section["summary"]["models"]
    columns = min(4, len(models))
    lines = -(-len(models) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.6, 2.7 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    starts = list(section["summary"]["overall"])
    others = iter(OTHER_COLORS)
    colors = {start: COLORS.get(start) or next(others) for start in starts}
    for axes, (model, by_start) in zip(grid.flat, models.items(), strict=False):
        for start, row in by_start.items():
            marks = list(row["accuracy"])
            means = [row["accuracy"][mark][0] for mark in marks]
            errors = [row["accuracy"][mark][1] for mark in marks]
            axes.plot(marks, means, marker=".", color=colors[start], label=start)
            low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
            axes.fill_between(marks, low, high, color=colors[start], alpha=0.2, linewidth=0)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(0, None)
        axes.set_title(model, fontsize=9)
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(models) :]:
        axes.set_axis_off()
    figure.supxlabel("steps of training", fontsize=9)
    figure.supylabel("top-1, %", fontsize=9)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def page(result: Row, pictures: list[str]) -> str:
    """The whole report as one HTML file that needs nothing else."""
    body = [f"<p>{INTRODUCTION}</p>"]
    for section, picture in zip(result["sections"], pictures, strict=True):
        header, rows = accuracy_table(section)
        body.append(
            f"<h2>{html.escape(section['title'])}</h2>"
            f"<p>{section['steps']} steps of {result['batch']} images.</p>"
            f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in verdicts(section))}</ul>"
            f"{html_page.picture(picture)}{html_page.table('', [header, *rows])}"
        )
    return html_page.page("Predicted weights against random init", body, notes(result), result["command"])
