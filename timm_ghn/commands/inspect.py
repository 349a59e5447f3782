"""Say what each layer of a predicted network got, what it makes of images, and what looks wrong.

Without --data only the weights are looked at.

Examples:
    timm-ghn inspect resnet50
    timm-ghn inspect vgg16 --data torch/cifar10 --download
    timm-ghn inspect davit_tiny --data my_images --image-size 224 --images 8 --json
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..command_line import (
    add_data_arguments,
    add_ghn_argument,
    add_json_argument,
    architecture_name,
    integer,
    load_data,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from ..evaluation.inspection import Inspection

_NAMED = 3  # layers of a finding; JSON has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The architecture, what predicts it, and images."""
    parser.add_argument("name", type=architecture_name, help="architecture, as in timm.create_model")
    add_ghn_argument(parser)
    add_data_arguments(parser)
    parser.set_defaults(data=None)
    parser.add_argument(
        "--images", type=integer(2), default=32, help="look at so many held-out images (default: %(default)s)"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Two tables and the findings."""
    from rich.console import Console

    from ..evaluation.inspection import inspect

    images = None
    if args.data is not None:
        data = load_data(args, "val").first(args.images)
        images, _ = next(data.batches(len(data)))
    found = inspect(args.name, args.ghn, images)
    if args.json:
        lists = ("parameters", "activations", "findings")
        rows = {name: [asdict(row) for row in getattr(found, name)] for name in lists}
        print_json({"architecture": args.name, "ghn": args.ghn, "output": found.output, **rows})
        return
    _print_tables(found)
    console = Console()
    console.print(f"{found.report.predicted_fraction:.2%} predicted", highlight=False)
    if found.output:
        console.print(f"output: {found.output}", highlight=False, markup=False)
    for finding in found.findings:
        more = len(finding.where) - _NAMED
        where = ", ".join(finding.where[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        console.print(f"\n{finding.what}", style="bold", highlight=False, markup=False)
        console.print(f"in {where}\n{finding.cause}", highlight=False, markup=False)


def _print_tables(found: Inspection) -> None:
    from rich.table import Table

    table = Table("parameter", "shape", "what", "copies", "scale", "timm's", "rank")
    for row in found.parameters:
        rank = "" if row.rank is None else f"{row.rank:.0f}/{row.full_rank}"
        what = f"kept: {row.kept}" if row.kept else (row.role or "constant").replace("_", " ")
        shape, copies = "×".join(map(str, row.shape)), f"{row.tiles:.3g}" if row.tiles else ""
        table.add_row(row.name, shape, what, copies, f"{row.scale:.2g}", f"{row.init_scale:.2g}", rank)
    print_table(table)
    if found.activations:
        table = Table("layer", "output", "scale", "largest", "dead", "copies", "differs")
        for layer in found.activations:
            found_shares = (layer.dead, layer.alike, layer.difference)
            shares = ("" if math.isnan(share) else f"{share:.0%}" for share in found_shares)
            shape = "×".join(map(str, layer.shape))
            table.add_row(f"{layer.name} {layer.kind}", shape, f"{layer.scale:.2g}", f"{layer.largest:.2g}", *shares)
        print_table(table)
