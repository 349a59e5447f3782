"""Predict a model's weights, say what was predicted, save them if asked."""

from __future__ import annotations

import argparse

import timm
from rich.console import Console
from safetensors.torch import save_model

from ..checkpoints.load import load_ghn
from ..command_line import add_ghn_argument, architecture_name, integer, output_file
from ..files import whole_file
from ..predictor import initialize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The architecture, what predicts it, and where the weights go."""
    parser.add_argument("name", type=architecture_name, help="architecture, as in timm.create_model")
    add_ghn_argument(parser)
    parser.add_argument("--num-classes", type=integer(0), help="classes of the model; timm's default if not given")
    parser.add_argument(
        "--output", type=output_file(".safetensors"), metavar="FILE", help="save the weights to this .safetensors file"
    )


def run(args: argparse.Namespace) -> None:
    """Prints the report of the prediction."""
    console = Console()
    ghn = load_ghn(args.ghn)
    model = timm.create_model(args.name, num_classes=args.num_classes)
    report = initialize(model, ghn)
    console.print(f"{args.name} by {args.ghn}", style="bold")
    console.print(str(report), highlight=False, markup=False)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(args.output) as part:
            save_model(model, str(part))
        console.print(f"saved to {args.output}", highlight=False, markup=False)
