"""The whole zoo: traces and predicts every architecture of timm on the meta device, and sums up what came out."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch

from .assign import predict_from_graph
from .errors import GHNError
from .graph import trace
from .hub import load_ghn
from .hypernet import GHN

Row = dict[str, Any]
EXPECTED_FRACTION = 0.99
HIGH_FRACTION = 0.999

_ghn: GHN  # of a worker process


def examine(name: str, ghn: GHN) -> Row:
    """Traces one architecture and predicts all of it, the head too; nothing is raised, an error is part of the row."""
    row: Row = {"name": name, "family": timm.model_entrypoint(name).__module__.rpartition(".")[2]}
    started = time.perf_counter()
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
        parameters = dict(model.named_parameters())
        graph = trace(model)
        # Raises if a prediction is not finite, does not fit, or a parameter has neither a prediction nor a reason.
        report = predict_from_graph(parameters, graph, ghn, head="predict").report
    except Exception as error:  # whatever a model's code raises
        return {**row, "error": f"{type(error).__name__}: {error}"}
    kept: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for parameter, reason in report.kept.items():
        kept[reason][0] += 1
        kept[reason][1] += parameters[parameter].numel()
    return {
        **row,
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "tensors": len(parameters),
        "nodes": len(graph),
        "edges": len(graph.edges),
        "predicted_fraction": report.predicted_fraction,
        "kept": dict(kept),  # reason -> tensors, elements
        "seconds": round(time.perf_counter() - started, 4),
    }


def sweep(names: Iterable[str], source: str, rows_file: Path, workers: int = 1) -> Iterator[Row]:
    """Examines architectures, each row also a line of `rows_file`; those that stand there without an error come first.

    Args:
        names: Architectures.
        source: The GHN, as for `load_ghn`.
        rows_file: JSON lines; appended to, so that a sweep that was stopped goes on where it was.
        workers: Processes to use.
    """
    setting = {"ghn": source, "timm": timm.__version__, "torch": torch.__version__}
    names = list(dict.fromkeys(names))
    done = {row["name"]: row for row in _read(rows_file) if row["setting"] == setting and "error" not in row}
    yield from (done[name] for name in names if name in done)
    todo = [name for name in names if name not in done]
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    with rows_file.open("a") as lines:
        for row in _examine_all(todo, source, workers):
            row["setting"] = setting
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            yield row


def _read(rows_file: Path) -> Iterator[Row]:
    for line in rows_file.read_text().splitlines() if rows_file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the line that was being written when a sweep was stopped
            continue
        if {"name", "setting"} <= row.keys():
            yield row


def _examine_all(names: list[str], source: str, workers: int) -> Iterator[Row]:
    ghn = load_ghn(source)
    if workers == 1:
        yield from (examine(name, ghn) for name in names)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (source,)) as pool:
        for future in as_completed([pool.submit(_examine_in_worker, name) for name in names]):
            yield future.result()


def _start_worker(source: str) -> None:
    global _ghn
    torch.set_num_threads(1)
    _ghn = load_ghn(source)


def _examine_in_worker(name: str) -> Row:
    return examine(name, _ghn)


def summarise(rows: Iterable[Row]) -> dict[str, Any]:
    """Counts over all rows, the exceptions by name, what is kept and why, and the same by family."""
    rows = sorted(rows, key=lambda row: row["name"])
    if not rows:
        raise GHNError("No architecture was examined: the filter matches none of timm's.")
    failed = [row for row in rows if "error" in row]
    good = [row for row in rows if "error" not in row]
    architectures, tensors, elements = Counter[str](), Counter[str](), Counter[str]()
    for row in good:
        architectures.update(row["kept"].keys())
        tensors.update({reason: counts[0] for reason, counts in row["kept"].items()})
        elements.update({reason: counts[1] for reason, counts in row["kept"].items()})
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[row["family"]].append(row)
    return {
        "machine": _machine(),
        "all": _counts(rows),
        "failed": {row["name"]: row["error"] for row in failed},
        "exceptions": {
            row["name"]: {
                "predicted_fraction": row["predicted_fraction"],
                "kept": {reason: counts[1] / row["parameters"] for reason, counts in row["kept"].items()},
            }
            for row in good
            if row["predicted_fraction"] < EXPECTED_FRACTION
        },
        "kept": {
            reason: {
                "architectures": architectures[reason],
                "tensors": tensors[reason],
                "share": elements[reason] / sum(row["parameters"] for row in good),
            }
            for reason in sorted(elements, key=lambda reason: -elements[reason])
        },
        "families": {family: _counts(families[family]) for family in sorted(families)},
        "architectures": {
            row["name"]: {key: row[key] for key in ("parameters", "nodes", "predicted_fraction")} for row in good
        },
    }


def _counts(rows: list[Row]) -> dict[str, Any]:
    good = [row for row in rows if "error" not in row]
    fractions = [row["predicted_fraction"] for row in good]
    return {
        "architectures": len(rows),
        "predicted": len(good),
        "tensors": sum(row["tensors"] for row in good),
        f"at_least_{EXPECTED_FRACTION}": sum(fraction >= EXPECTED_FRACTION for fraction in fractions),
        f"at_least_{HIGH_FRACTION}": sum(fraction >= HIGH_FRACTION for fraction in fractions),
        "least_fraction": min(fractions, default=None),
        "median_nodes": statistics.median([row["nodes"] for row in good]) if good else None,
        "median_seconds": statistics.median([row["seconds"] for row in good]) if good else None,
    }


def _machine() -> str:
    return (
        f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"timm {timm.__version__}, huggingface_hub {huggingface_hub.__version__}, {datetime.date.today().isoformat()}"
    )


def markdown(summary: dict[str, Any]) -> str:
    """The summary as a page."""
    lines = ["# Every architecture of timm", "", summary["machine"], ""]
    lines += _table(["", *COLUMNS], [["all", *cells(summary["all"])]])
    lines += ["", f"## Below {EXPECTED_FRACTION:.0%}", ""]
    lines += _table(
        ["architecture", "predicted", "kept"],
        [
            [name, f"{row['predicted_fraction']:.2%}", "; ".join(f"{k} {v:.2%}" for k, v in row["kept"].items())]
            for name, row in summary["exceptions"].items()
        ],
    )
    if summary["failed"]:
        lines += ["", "## Failed", "", *_table(["architecture", "error"], [list(x) for x in summary["failed"].items()])]
    lines += ["", "## Kept, and why", ""]
    lines += _table(
        ["reason", "architectures", "tensors", "share of all parameters"],
        [
            [reason, str(row["architectures"]), str(row["tensors"]), f"{row['share']:.4%}"]
            for reason, row in summary["kept"].items()
        ],
    )
    lines += ["", "## By family", ""]
    lines += _table(["family", *COLUMNS], [[name, *cells(row)] for name, row in summary["families"].items()])
    return "\n".join(lines) + "\n"


COLUMNS = [
    "architectures", "predicted", f"≥ {EXPECTED_FRACTION}", f"≥ {HIGH_FRACTION}", "least", "median nodes",
    "median seconds",
]  # fmt: skip


def cells(counts: dict[str, Any]) -> list[str]:
    """One row of a table of `_counts`; what is not known without a single prediction is left blank."""
    least, nodes, seconds = counts["least_fraction"], counts["median_nodes"], counts["median_seconds"]
    cells = [str(counts[key]) for key in ("architectures", "predicted", *(k for k in counts if k[:8] == "at_least"))]
    return [*cells, *(["", "", ""] if least is None else [f"{least:.4f}", f"{nodes:g}", f"{seconds:.2f}"])]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]
