"""The whole zoo: traces and predicts every architecture of timm on the meta device, and sums up what came out.

With images, each model is also made and run on two of them.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.load import load_ghn
from ..devices import has_bf16
from ..errors import GHNError
from ..graph import trace
from ..graph.record import input_candidates, output_tensors
from ..hypernet import GHN
from ..lazy_init import on_meta
from ..predictor import Predictor
from ..tiling import tile
from ..training.data import load_dataset
from ..workers import process_pool
from .calibration import calibrate
from .inspection import judge

Row = dict[str, Any]
EXPECTED_FRACTION = 0.99
HIGH_FRACTION = 0.999
RUN_PARAMETERS = 1_500_000_000
"""Models with more are not run: their weights would not fit into common memory beside another worker's."""

_OF_EACH = ("parameters", "nodes", "predicted_fraction", "output")
_worker: tuple[GHN, Tensor | None]  # what a worker process examines with


def examine(name: str, ghn: GHN, images: Tensor | None = None) -> Row:
    """Traces one architecture and predicts all of it, the head too; nothing is raised, an error is part of the row.

    Args:
        name: The architecture.
        ghn: What predicts.
        images: Two images [2, 3, H, W]; if given, the model is made and run on them, and the row says how it went.
    """
    row: Row = {"name": name, "family": timm.model_entrypoint(name).__module__.rpartition(".")[2]}
    started = time.perf_counter()
    try:
        model = on_meta(partial(timm.create_model, name))
        parameters = dict(model.named_parameters())
        graph = trace(model)
        # Raises if a prediction is not finite, does not fit, or a parameter has neither a prediction nor a reason.
        report = _predictor(ghn).from_graph(model, graph).report
        row["seconds"] = round(time.perf_counter() - started, 4)
        size = sum(parameter.numel() for parameter in parameters.values())
        if images is not None:
            row["output"] = _run(name, ghn, images) if size <= RUN_PARAMETERS else f"skipped: {size:,} parameters"
            row["run_seconds"] = round(time.perf_counter() - started - row["seconds"], 4)
    except Exception as error:  # whatever a model's code raises
        return {**row, "error": f"{type(error).__name__}: {error}"}
    kept: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for parameter, reason in report.kept.items():
        kept[reason][0] += 1
        kept[reason][1] += parameters[parameter].numel()
    return {
        **row,
        "parameters": size,
        "tensors": len(parameters),
        "nodes": len(graph),
        "edges": len(graph.edges),
        "predicted_fraction": report.predicted_fraction,
        "kept": dict(kept),  # reason -> tensors, elements
    }


def _predictor(ghn: GHN) -> Predictor:
    """With a head for whatever classes, where the GHN has one."""
    return Predictor(ghn, head="predict" if ghn.config.predicts_head else "auto")


def _run(name: str, ghn: GHN, images: Tensor) -> str:
    """Makes a model with predicted weights and runs it on two images: "ok", or what is wrong with its output.

    In bfloat16 where that is faster; what fails or looks wrong then is run again in float32, whose word counts.
    """
    model, _ = _predictor(ghn).create(partial(timm.create_model, name))
    model.eval()
    finding = ""
    for bf16 in (True, False) if has_bf16(torch.device("cpu")) else (False,):
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                finding = judge(_outputs(model, images))
        except Exception as error:  # whatever a model's code raises
            finding = f"{type(error).__name__}: {error}"
        if finding == "ok":
            break
    return finding


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    """All that a model says of images of the size it wants, a row for each image."""
    problem: Exception | None = None
    for size in input_candidates(model, None):
        batch = tile(F.interpolate(images, size[1:], mode="bilinear", antialias=True), (len(images), *size))
        try:
            calibrate(model, [batch])  # batch norms have seen no data yet
            outputs = [tensor for tensor in output_tensors(model(batch)) if tensor.is_floating_point()]
            return torch.cat([tensor.flatten(1).double() for tensor in outputs], dim=1)
        except Exception as error:  # whatever a model raises on a size that is not its own
            problem = problem or error
    assert problem is not None
    raise problem


def sweep(
    names: Iterable[str], source: str, rows_file: Path, workers: int = 1, images: str | None = None
) -> Iterator[Row]:
    """Examines architectures, each row also a line of `rows_file`; what stands there and is in order comes first.

    Args:
        names: Architectures.
        source: The GHN, as for `load_ghn`.
        rows_file: JSON lines; appended to, so that a sweep that was stopped goes on where it was.
        workers: Processes to use.
        images: A data set, as for `load_dataset`; models are then run on two of its images.
    """
    ghn = load_ghn(source)
    setting = {"ghn": ghn.fingerprint(), "timm": timm.__version__, "torch": torch.__version__, "images": images}
    pair = None
    if images is not None:
        pair, _ = load_dataset(images, "val", holdout=2, image_size=256).batch(torch.arange(2))
    names = list(dict.fromkeys(names))
    done = {row["name"]: row for row in _read(rows_file) if row["setting"] == setting and _in_order(row)}
    yield from (done[name] for name in names if name in done)
    todo = [name for name in names if name not in done]
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    with rows_file.open("a+") as lines:
        if lines.tell() and not rows_file.read_bytes().endswith(b"\n"):  # a sweep was stopped in the middle of a line
            lines.write("\n")
        for row in _examine_all(todo, ghn, pair, workers):
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


def _in_order(row: Row) -> bool:
    return "error" not in row and row.get("output", "ok").startswith(("ok", "skipped"))


def _examine_all(names: list[str], ghn: GHN, images: Tensor | None, workers: int) -> Iterator[Row]:
    if workers == 1:
        yield from (examine(name, ghn, images) for name in names)
        return
    with process_pool(workers, _start_worker, (ghn, images)) as pool:
        for future in as_completed([pool.submit(_examine_in_worker, name) for name in names]):
            yield future.result()


def _start_worker(ghn: GHN, images: Tensor | None) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = ghn, images


def _examine_in_worker(name: str) -> Row:
    ghn, images = _worker
    return examine(name, ghn, images)


def summarize(rows: Iterable[Row]) -> dict[str, Any]:
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
        "outputs": {row["name"]: row["output"] for row in good if row.get("output", "ok") != "ok"},
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
        "architectures": {row["name"]: {key: row[key] for key in _OF_EACH if key in row} for row in good},
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
        "outputs_ok": sum(row.get("output") == "ok" for row in good) if any("output" in row for row in good) else None,
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
    if summary["outputs"]:
        lines += ["", "## Run on two images, and not ok", ""]
        lines += _table(["architecture", "output"], [list(x) for x in summary["outputs"].items()])
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
    "architectures", "predicted", f"≥ {EXPECTED_FRACTION}", f"≥ {HIGH_FRACTION}", "output ok", "least", "median nodes",
    "median seconds",
]  # fmt: skip


def cells(counts: dict[str, Any]) -> list[str]:
    """One row of a table of `_counts`; what is not known without a single prediction is left blank."""
    least, nodes, seconds = counts["least_fraction"], counts["median_nodes"], counts["median_seconds"]
    keys = ("architectures", "predicted", *(key for key in counts if key.startswith("at_least")), "outputs_ok")
    cells = ["" if counts[key] is None else str(counts[key]) for key in keys]
    return [*cells, *(["", "", ""] if least is None else [f"{least:.4f}", f"{nodes:g}", f"{seconds:.2f}"])]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]
