"""Write a model's predicted weights to files, however large it is."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

from ..checkpoints.catalog import list_ghns
from ..checkpoints.load import load_ghn
from ..command_line import add_ghn_argument, architecture_name, file_size, integer, output_directory
from ..export import export
from ..predictor import HEADS, Predictor
from ..preparation import PREPARATIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The architecture, what predicts it, and what the files are like."""
    parser.add_argument("name", type=architecture_name, help="architecture, as in timm.create_model")
    parser.add_argument("-o", "--output", type=output_directory, required=True, metavar="DIR", help="for the files")
    add_ghn_argument(parser)
    parser.add_argument("--num-classes", type=integer(0), help="classes of the model; timm's default if not given")
    parser.add_argument("--head", default="auto", choices=HEADS, help="the classification layer (default: %(default)s)")
    parser.add_argument("--finetune", choices=PREPARATIONS, help="prepare the weights for training in this way")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--max-shard-size", type=file_size, metavar="SIZE",
        help="begin another file beyond, e.g. 5GB; timm itself loads only one file",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Prints the report of the prediction, and the files."""
    console = Console()
    predictor = Predictor(load_ghn(args.ghn), args.head, preparation=args.finetune)
    tag = args.ghn if args.ghn in list_ghns() else "ghn"
    dtype = getattr(torch, args.dtype)
    report, files = export(args.name, args.output, predictor, tag, args.num_classes, dtype, args.max_shard_size)
    console.print(f"{args.name} by {args.ghn}", style="bold")
    console.print(str(report), highlight=False, markup=False)
    for file in files:
        console.print(f"{file.stat().st_size:>15,} bytes  {file}", highlight=False, markup=False)
