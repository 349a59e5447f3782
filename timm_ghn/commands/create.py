"""Predict a model's weights, say what was predicted, save them if asked.

Examples:
    timm-ghn create resnet50 --num-classes 10
    timm-ghn create vit_tiny_patch16_224 --ghn ghn2_split -o vit.safetensors
"""

from __future__ import annotations

import argparse

from ..command_line import (
    add_ghn_argument,
    add_json_argument,
    architecture_name,
    integer,
    output_file,
    print_report,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The architecture, what predicts it, and where the weights go."""
    parser.add_argument("name", type=architecture_name, help="architecture, as in timm.create_model")
    add_ghn_argument(parser)
    parser.add_argument("--num-classes", type=integer(0), help="classes of the model; timm's default if not given")
    parser.add_argument(
        "-o", "--output", type=output_file(".safetensors"), metavar="FILE",
        help="save the weights to this .safetensors file",
    )  # fmt: skip
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the report of the prediction."""
    import timm

    from ..checkpoints.load import load_ghn
    from ..export import save_weights
    from ..predictor import initialize

    ghn = load_ghn(args.ghn)
    model = timm.create_model(args.name, num_classes=args.num_classes)
    report = initialize(model, ghn)
    if args.output:
        save_weights(model, args.output)
    print_report(args, report, [args.output] if args.output else [])
