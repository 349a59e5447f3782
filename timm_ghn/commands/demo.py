"""Predict several architectures, and classify images with some.

The images are 200 of CIFAR-10's that the embedded GHNs were not trained on, which come with the package.

Examples:
    timm-ghn demo
    timm-ghn demo --data cifar10-train.parquet -o demo.png
"""

from __future__ import annotations

import argparse

from ..command_line import add_ghn_argument, output_file
from ..errors import GHNError

_DRAWN = 2  # images of each class


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What predicts, on which images, and where the picture goes."""
    add_ghn_argument(parser)
    parser.add_argument(
        "--data", metavar="FILE",
        help="more images: 1,000 that are held out of a parquet file in the schema of the Hub's uoft-cs/cifar10",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=output_file(".png"), default="demo.png", metavar="FILE",
        help="where images, labels and predictions are drawn (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Tables of times and accuracies, and the picture."""
    import torch
    from rich.console import Console

    from ..checkpoints.load import load_ghn
    from ..demo import CLASSES, IMAGES, classify, draw, time_creation
    from ..files import whole_file
    from ..training.data import load_dataset

    console = Console()
    ghn = load_ghn(args.ghn)
    images = load_dataset(args.data, "val") if args.data else load_dataset(str(IMAGES), "all")
    if images.num_classes != len(CLASSES):
        raise GHNError(f"{args.data} has {images.num_classes} classes, not CIFAR-10's {len(CLASSES)}.")
    time_creation(args.ghn, ghn)
    if not images.has_classes_of(ghn.config):
        others = f"{ghn.config.num_classes} classes, not CIFAR-10's"
        predicted = others if ghn.config.predicts_head else "no classification layer"
        console.print(f"\n{args.ghn} predicts {predicted}: it is shown no images.")
        return
    predictions, test = classify(images, ghn)
    # The first ones of each class: nobody chose those that look good.
    drawn = torch.cat([(test.labels == label).nonzero()[:_DRAWN] for label in range(len(CLASSES))], 1).flatten()
    shown = {name: classes[drawn] for name, classes in predictions.items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    caption = f"Held-out images of CIFAR-10, and what networks see in them whose weights were predicted by {args.ghn}"
    with whole_file(args.output) as part:
        draw(test.images[drawn], test.labels[drawn], shown, caption).save(part, "PNG")
    told = f"\n{len(drawn)} of the images and what each network sees in them: {args.output}"
    console.print(told, highlight=False, markup=False, soft_wrap=True)  # which breaks no path
