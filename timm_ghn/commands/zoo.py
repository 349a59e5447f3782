"""Trace, predict and run every architecture of timm, and sum up the result."""

from __future__ import annotations

import argparse
import json

import timm
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..command_line import add_ghn_argument, integer, output_directory, print_table
from ..errors import GHNError
from ..evaluation import zoo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which architectures, what predicts them, and where the result goes."""
    parser.add_argument("filter", nargs="*", help="names or wildcards; all architectures if none is given")
    add_ghn_argument(parser)
    parser.add_argument("--workers", type=integer(1), default=1, help="processes to use (default: %(default)s)")
    parser.add_argument(
        "--images", metavar="DATA",
        help="also run each model on two images of a parquet file, a folder, torch/cifar10 or hfds/uoft-cs/cifar10",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=output_directory, default="zoo", metavar="DIR",
        help="where zoo.jsonl, zoo.json and zoo.md go; a sweep that was stopped goes on (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """A table by family, the exceptions, and the same in files."""
    console = Console()
    names = timm.list_models(args.filter or "")
    found = zoo.sweep(names, args.ghn, args.output / "zoo.jsonl", args.workers, args.images)
    summary = zoo.summarize(track(found, "examining", len(names), console=console))
    (args.output / "zoo.json").write_text(json.dumps(summary, indent=1) + "\n")
    (args.output / "zoo.md").write_text(zoo.markdown(summary))
    table = Table("family", *zoo.COLUMNS)
    for family, counts in summary["families"].items():
        table.add_row(family, *zoo.cells(counts))
    table.add_section()
    table.add_row("all", *zoo.cells(summary["all"]))
    print_table(table)
    for name, row in summary["exceptions"].items():
        console.print(f"{name}: {row['predicted_fraction']:.2%}; kept: {', '.join(row['kept'])}", highlight=False)
    for name, finding in summary["outputs"].items():
        console.print(f"{name}: output {finding}", highlight=False, markup=False)
    if summary["failed"]:
        name, error = next(iter(summary["failed"].items()))
        raise GHNError(f"{len(summary['failed'])} architectures failed, the first of them {name} ({error}).")
