"""Make a network for the classes of a folder of images, without training.

Its weights are predicted; norms take their statistics from the images, and the classifier is fitted to them in closed
form. Of several candidates the best on held-out images is kept.

Examples:
    timm-ghn adapt resnet18 --data my_images --image-size 64 -o adapted/model.safetensors
    timm-ghn adapt --candidates 'resnet*,regnety_00*' --data torch/cifar10 --download
    timm-ghn adapt mobilenetv3_small_050 --data my_images --image-size 64 --holdout 50 --head prototype
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..command_line import (
    add_json_argument,
    add_measuring_arguments,
    architecture_name,
    architecture_patterns,
    load_images,
    output_file,
    print_json,
    print_table,
)
from ..errors import GHNError

if TYPE_CHECKING:
    from torch import nn

    from ..evaluation.ranking import Ranked
    from ..training.data import Batches, ImageDataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, networks to try, and where the best goes."""
    parser.add_argument("name", nargs="?", type=architecture_name, help="architecture, as in timm.create_model")
    parser.add_argument(
        "--candidates", type=architecture_patterns, default=[], metavar="PATTERNS",
        help="try several and keep the best: names or wildcards with commas between, such as 'resnet*,regnety_00*'",
    )  # fmt: skip
    add_measuring_arguments(parser, support=None, images=None)
    parser.add_argument(
        "--head", choices=("ridge", "prototype"), default="ridge",
        help="how it is fitted; prototype is for very few images (default: %(default)s)",
    )  # fmt: skip
    add_saving_arguments(parser, "adapted/model.safetensors")


def add_saving_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Where the model goes."""
    parser.add_argument(
        "-o", "--output", type=output_file(".safetensors"), default=default, metavar="FILE",
        help="the model's weights, with config.json and confusion.png beside them (default: %(default)s)",
    )  # fmt: skip
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """A row for each network, then the best in files."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from ..checkpoints.load import load_ghn
    from ..evaluation.ranking import measured
    from ..training.data import Batches

    logging.basicConfig(format="%(message)s")
    names = list(dict.fromkeys([*([args.name] if args.name else []), *args.candidates]))
    if not names:
        raise GHNError("No architecture is named; give one, or --candidates.")
    ghn = load_ghn(args.ghn, args.device)
    support, held_out = load_images(args)
    test = Batches(held_out, 100)
    found = measured(names, ghn, Batches(support, 100), test, support.num_classes, args.head)

    rows, best, model = [], None, None
    table = Table("architecture", "parameters", "top-1, each left out", "top-1, held out", "seconds")
    for row, made in track(found, "adapting", len(names), console=Console(stderr=True), disable=len(names) == 1):
        rows.append(row)
        size, seconds = f"{row.parameters / 1e6:.1f} M", f"{row.seconds:.1f}"
        if row.top1 is None:
            table.add_row(row.name, size, "failed", "failed", seconds)
            continue
        table.add_row(row.name, size, f"{row.accuracy['left out']:.1%}", f"{row.top1:.1%}", seconds)
        if best is None or row.top1 > (best.top1 or 0):
            best, model = row, made
    if best is None or model is None:
        raise GHNError(f"None of {len(names)} networks could be adapted; the first, {names[0]}: {rows[0].error}")
    if not args.json:
        print_table(table)
    save(args, rows, best, model, support, test)


def save(
    args: argparse.Namespace, rows: list[Ranked], best: Ranked, model: nn.Module, support: ImageDataset, test: Batches
) -> None:
    """The best model as timm reads it, a picture of what it confuses, and what can be done next."""
    from rich.console import Console

    from ..checkpoints.catalog import CATALOG
    from ..evaluation.accuracy import confusion
    from ..evaluation.pictures import plot_confusion
    from ..export import save_classifier

    config = save_classifier(model, args.output, CATALOG.tag_of(args.ghn), support.described())
    picture = args.output.with_name("confusion.png")
    drawn = plot_confusion(confusion(model, test), support.names, picture)
    name, file, classes, size = best.name, shlex.quote(str(args.output)), support.num_classes, support.image_size
    arguments, options = f"num_classes={classes}", f"--model {name} --num-classes {classes} --img-size {size}"
    if "img_size" in json.loads(config.read_text()).get("model_args", {}):  # it has a table of positions
        arguments += f", img_size={size}"
        options += f" --model-kwargs img_size={size}"
    created = f'timm.create_model("{name}", {arguments}, checkpoint_path="{args.output}")'
    if args.json:
        result: dict[str, Any] = {"ghn": args.ghn, "architectures": [{**asdict(row), "top1": row.top1} for row in rows]}
        print_json({**result, "best": name, "output": args.output, "create": created})
        return
    console = Console()
    confused = f"; what it confuses is in {picture}" if drawn else ""
    console.print(f"{name} is in {args.output}{confused}. Use it:", highlight=False, markup=False, soft_wrap=True)
    for line in (
        f"  {created}",
        f"  python inference.py {options} --checkpoint {file}",
        "Train on from it, at a tenth of the usual learning rate:",
        f"  python train.py {options} --initial-checkpoint {file} --lr 0.005",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
