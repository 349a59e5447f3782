"""``timm-ghn demo``: what is predicted, in what time, and what it sees in real images that come with the package."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..command_line import print_table
from ..evaluation.accuracy import create_model
from ..evaluation.calibration import calibrate
from ..hypernet import GHN
from ..predictor import Predictor
from ..training.data import ImageDataset

IMAGES = Path(__file__).parent / "cifar10"
"""200 of CIFAR-10's training images that `ghn2` was not trained on; `benchmarks/demo_images.py` chose them."""
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_ARCHITECTURES = (
    "resnet50",
    "regnety_016",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_small_patch16_224",
    "swin_s3_tiny_224",
)
_CLASSIFIERS = ("resnet18", "resnet50", "regnety_004", "efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224")
_MOST_IMAGES = 1_000
_BATCH = 250

console = Console()


def time_creation(tag: str, ghn: GHN) -> None:
    """Prints how long several architectures take to make, at random and by prediction."""
    table = Table("architecture", "parameters", "predicted", "random init", "by prediction", title=f"by {tag}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in _ARCHITECTURES:
        build = partial(timm.create_model, name, num_classes=ghn.config.num_classes)
        started = time.perf_counter()
        build()
        created = time.perf_counter()
        model, report = Predictor(ghn).create(build)
        predicted = time.perf_counter()
        size = sum(parameter.numel() for parameter in model.parameters())
        times = (f"{seconds:.2f} s" for seconds in (created - started, predicted - created))
        table.add_row(name, f"{size / 1e6:.1f} M", f"{report.predicted_fraction:.2%}", *times)
    print_table(table)
    console.print(
        "Random init takes its time for every parameter, a prediction for every layer, which is traced and read by the "
        "GHN: a small network of many layers can take longer than by random init."
    )
    console.print(f"\n{name}, in detail\n{report}", highlight=False, markup=False)


def classify(images: ImageDataset, ghn: GHN) -> tuple[dict[str, Tensor], ImageDataset]:
    """The classes that predicted networks see in every other image, and these images."""
    images = images.first(_MOST_IMAGES)
    rows = torch.arange(len(images))
    calibration, test = ([images.batch(part) for part in half.split(_BATCH)] for half in (rows[::2], rows[1::2]))
    labels = images.labels[rows[1::2]]
    table = Table("architecture", "right", "of", "top-1", title="Held-out images of CIFAR-10")
    for column in table.columns[1:]:
        column.justify = "right"
    predictions = {}
    for name in _CLASSIFIERS:
        build = partial(create_model, name, images.num_classes, images.image_size)
        model, _ = Predictor(ghn, head="predict").create(build)
        calibrate(model, calibration).eval()
        with torch.no_grad():
            predictions[name] = torch.cat([model(batch).argmax(1) for batch, _ in test])
        right = int((predictions[name] == labels).sum())
        share = right / len(labels)
        error = math.sqrt(share * (1 - share) / len(labels))
        table.add_row(name, str(right), str(len(labels)), f"{share:.0%} ± {error:.0%}")
    print_table(table)
    console.print(
        "Predicted weights, without any gradient step; chance is 10 %, ± the standard error. Batch norms took their "
        f"statistics from {len(rows[::2])} other images.",
        highlight=False,
    )
    return predictions, ImageDataset(images.images[rows[1::2]], labels, images.num_classes)


# --- the picture ------------------------------------------------------------------------------------------------------

_CELL, _GAP, _LINE, _MARGIN, _NAMES, _TOP = 96, 6, 22, 16, 190, 44  # pixels
_INK, _RIGHT, _WRONG, _PALE = "#1f2328", "#1a7f37", "#b3261e", "#fbeae9"


def draw(images: Tensor, labels: Tensor, predictions: Mapping[str, Tensor], caption: str) -> Image.Image:
    """Images, their labels, and what each network takes them for: white on green if right, red on pale if wrong.

    Args:
        images: uint8, [N, 3, H, W], ten of which make a row.
        labels: int64, [N].
        predictions: Such labels by network.
        caption: A line above it all.
    """
    columns = len(CLASSES)
    blocks = -(-len(images) // columns)
    height = _CELL + _LINE * (len(predictions) + 1) + 2 * _MARGIN
    font = ImageFont.load_default(13)
    picture = Image.new("RGB", (_NAMES + columns * (_CELL + _GAP) + _MARGIN, blocks * height + _TOP), "white")
    canvas = ImageDraw.Draw(picture)
    canvas.text((_NAMES, _TOP / 2), caption, _INK, ImageFont.load_default(16), anchor="lm")
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        block, column = divmod(number, columns)
        left, top = _NAMES + column * (_CELL + _GAP), _TOP + block * height
        pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.paste(pixels.resize((_CELL, _CELL), Image.Resampling.BICUBIC), (left, top))
        rows: Sequence[tuple[str, int, str, str]] = [
            ("label", label, _INK, "white"),
            *(
                (name, int(classes[number]), *(("white", _RIGHT) if classes[number] == label else (_WRONG, _PALE)))
                for name, classes in predictions.items()
            ),
        ]
        for line, (name, found, colour, background) in enumerate(rows):
            y = top + _CELL + _GAP + line * _LINE
            if column == 0:
                canvas.text((_NAMES - _GAP, y + _LINE / 2), name, _INK, font, anchor="rm")
            canvas.rectangle((left, y, left + _CELL, y + _LINE - 3), background)
            canvas.text((left + _CELL / 2, y + _LINE / 2 - 1), CLASSES[found], colour, font, anchor="mm")
    return picture
