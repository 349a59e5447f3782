"""Order architectures by the accuracy of their predicted weights.

Nothing is trained. Images of the GHN's classes are classified by predicted heads; for any others a head is fitted in
closed form, as by `timm-ghn adapt`. Each row goes to the terminal and the --output file as soon as it is measured.

Examples:
    timm-ghn rank 'resnet*' regnety_004 --data torch/cifar10 --download --top 20
    timm-ghn rank 'efficientnet*' --data my_images --image-size 64 --max-params 10M -o rows.csv
    timm-ghn rank '*_atto' 'vit_tiny*' --data cifar10-train.parquet --images 1000 --plot ranking.svg
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..command_line import (
    add_json_argument,
    add_measuring_arguments,
    architecture_patterns,
    count,
    integer,
    load_images,
    output_file,
    picture_file,
    print_json,
    print_table,
)
from ..errors import GHNError

if TYPE_CHECKING:
    from ..evaluation.ranking import Ranked

_COLUMNS = ("name", "top1", "parameters", "macs", "seconds", "predicted_fraction", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Candidates, images, limits, and where the result goes."""
    parser.add_argument(
        "patterns", nargs="+", type=architecture_patterns, help="names or wildcards of architectures, such as 'resnet*'"
    )
    add_measuring_arguments(parser, support=2000, images=1000)
    parser.add_argument(
        "--head", choices=("auto", "predict", "ridge", "prototype"), default="auto",
        help="predicted, or fitted to the images; auto predicts that of the GHN's classes (default: %(default)s)",
    )  # fmt: skip
    limits = parser.add_argument_group("limits, before anything is predicted")
    limits.add_argument("--max-params", type=count, metavar="N", help="most parameters, e.g. 25M")
    limits.add_argument("--max-macs", type=count, metavar="N", help="most multiply-accumulates of an image, e.g. 4G")
    parser.add_argument("--top", type=integer(1), metavar="N", help="print the best so many; all if not given")
    parser.add_argument(
        "-o", "--output", type=output_file(".csv", ".jsonl"), metavar="FILE", help="write all rows, as they come"
    )
    parser.add_argument("--plot", type=picture_file, metavar="FILE", help="draw accuracy over multiply-accumulates")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Rows as they come, then the best in order and how far to trust it."""
    from rich.console import Console
    from rich.progress import track

    from ..checkpoints.load import load_ghn
    from ..evaluation.pictures import plot_ranking
    from ..evaluation.ranking import Ranking, measured, trust
    from ..training.data import Batches

    logging.basicConfig(format="%(message)s")
    names = list(dict.fromkeys(name for found in args.patterns for name in found))
    ghn = load_ghn(args.ghn, args.device)
    support, test = load_images(args)
    head = args.head
    if head == "auto":
        head = "predict" if support.has_classes_of(ghn.config) else "ridge"
    candidates = measured(
        names, ghn, Batches(support, 100), Batches(test, 100), support.num_classes, head, args.max_params, args.max_macs
    )
    rows = []
    progress = Console(stderr=True)
    with _writer(args.output) as write:
        for row, _ in track(candidates, "measuring", len(names), console=progress):
            rows.append(row)
            write({**asdict(row), "top1": row.top1})
            line = "{:<28}  {}  {}  {}  {} s".format(*_cells(row))
            progress.print(line, highlight=False, markup=False, soft_wrap=True)
    if not rows:
        raise GHNError(f"None of {len(names)} architectures is within the limits.")
    ranking = Ranking(rows, trust(args.ghn))
    if args.plot:
        plot_ranking(ranking, args.plot)
    _print(args, ranking, head, len(names) - len(rows))
    if all(row.top1 is None for row in rows):
        raise GHNError(f"None of {len(rows)} networks could be measured; the first, {rows[0].name}: {rows[0].error}")


@contextlib.contextmanager
def _writer(file: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What appends a row to a file, if there is one, so that it stands there at once."""
    if file is None:
        yield lambda row: None
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, _COLUMNS, extrasaction="ignore")
        if file.suffix == ".csv":
            table.writeheader()

        def write(row: dict[str, Any]) -> None:
            if file.suffix == ".csv":
                table.writerow(row)
            else:
                stream.write(json.dumps({column: row[column] for column in _COLUMNS}) + "\n")
            stream.flush()

        yield write


def _cells(row: Ranked) -> list[str]:
    top1 = row.error or "" if row.top1 is None else f"{row.top1:.1%}"
    return [row.name, top1, f"{row.parameters / 1e6:.1f} M", f"{row.macs / 1e6:,.1f} M", f"{row.seconds:.1f}"]


def _print(args: argparse.Namespace, ranking: Any, head: str, left_out: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    best = ranking[: args.top]
    if args.json:
        rows = [{**asdict(row), "top1": row.top1} for row in best]
        trust = {**asdict(ranking.trust), "sentence": str(ranking.trust)}
        print_json({"ghn": args.ghn, "head": head, "beyond_limits": left_out, "trust": trust, "rows": rows})
        return
    table = Table("architecture", "top-1", "parameters", "multiply-accumulates", "seconds")
    for row in best:
        table.add_row(*map(escape, _cells(row)))
    print_table(table)
    console = Console()
    if left_out:
        console.print(f"{left_out} more are beyond the limits.", highlight=False)
    console.print(str(ranking.trust), highlight=False, markup=False)
