"""Make a classifier of predicted weights and of images for its norms' statistics.

The head is the predicted one, for the classes that the GHN was trained on; `timm-ghn adapt` is for any others.

Examples:
    timm-ghn calibrate resnet18 --data torch/cifar10 --download -o calibrated/model.safetensors
    timm-ghn calibrate convnext_atto --data cifar10-train.parquet --support 500 --images 1000
"""

from __future__ import annotations

import argparse
import logging

from ..command_line import add_measuring_arguments, architecture_name, load_images
from ..errors import GHNError
from .adapt import add_saving_arguments, save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The architecture, images, and where the model goes."""
    parser.add_argument("name", type=architecture_name, help="architecture, as in timm.create_model")
    add_measuring_arguments(parser, support=2000, images=None)
    add_saving_arguments(parser, "calibrated/model.safetensors")


def run(args: argparse.Namespace) -> None:
    """The model in files, and its accuracy."""
    from rich.console import Console

    from ..checkpoints.load import load_ghn
    from ..evaluation.ranking import measured
    from ..training.data import Batches

    logging.basicConfig(format="%(message)s")
    ghn = load_ghn(args.ghn, args.device)
    support, held_out = load_images(args)
    if not support.has_classes_of(ghn.config):
        raise GHNError(
            f"{args.data} does not have the classes that {args.ghn} predicts, and there is no head for others: fit one "
            "with `timm-ghn adapt`."
        )
    test = Batches(held_out, 100)
    ((row, model),) = measured([args.name], ghn, Batches(support, 100), test, support.num_classes, "predict")
    if row.top1 is None or model is None:
        raise GHNError(f"{args.name} cannot be measured: {row.error}")
    if not args.json:
        share = f"{row.top1:.1%} of {len(held_out):,} held-out images right"
        Console().print(f"{share}, statistics from {len(support):,} others", highlight=False)
    save(args, [row], row, model, support, test)
