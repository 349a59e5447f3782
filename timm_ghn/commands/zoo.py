"""Trace, predict and run every architecture of timm, and sum up the result.

Examples:
    timm-ghn zoo 'resnet*' 'vit*' -o zoo
    timm-ghn zoo --data tiny-imagenet-20k.parquet --workers 8
"""

from __future__ import annotations

import argparse
import json

from ..command_line import (
    add_ghn_argument,
    add_json_argument,
    integer,
    output_directory,
    print_json,
    print_table,
)
from ..errors import GHNError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which architectures, what predicts them, and where the result goes."""
    parser.add_argument("patterns", nargs="*", help="names or wildcards of architectures; all if none is given")
    add_ghn_argument(parser)
    parser.add_argument("--workers", type=integer(1), default=1, help="processes to use (default: %(default)s)")
    parser.add_argument(
        "--data", help="also run each model on two images of a parquet file, image folder, torch/NAME or hfds/REPO"
    )
    parser.add_argument(
        "-o", "--output", type=output_directory, default="zoo", metavar="DIR",
        help="where zoo.jsonl, zoo.json and zoo.md go; a sweep that was stopped goes on (default: %(default)s)",
    )  # fmt: skip
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """A table by family, the exceptions, and the same in files."""
    import timm
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from ..evaluation import zoo
    from ..files import whole_file

    names = timm.list_models(args.patterns or "")
    found = zoo.sweep(names, args.ghn, args.output / "zoo.jsonl", args.workers, args.data)
    summary = zoo.summarize(track(found, "examining", len(names), console=Console(stderr=True)))
    for name, text in (("zoo.json", json.dumps(summary, indent=1) + "\n"), ("zoo.md", zoo.markdown(summary))):
        with whole_file(args.output / name) as part:
            part.write_text(text)
    if args.json:
        print_json(summary)
    else:
        console = Console()
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
