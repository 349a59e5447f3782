"""Make a network for the classes of a folder of images, without training."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import time
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_model
from torch import nn

from ..checkpoints.load import load_ghn
from ..command_line import (
    add_data_arguments,
    add_ghn_argument,
    architecture_name,
    architecture_patterns,
    device_name,
    integer,
    load_data,
    output_file,
    print_table,
)
from ..errors import GHNError
from ..evaluation.accuracy import accuracy, confusion, create_model
from ..evaluation.adaptation import HEADS, adapt
from ..evaluation.pictures import plot_confusion
from ..files import whole_file
from ..hypernet import sketch
from ..predictor import initialize
from ..pretrained_cfg import label, save_config
from ..training.data import Batches, ImageDataset

_BATCH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, networks to try, and where the best goes."""
    parser.add_argument("name", nargs="?", type=architecture_name, help="architecture, as in timm.create_model")
    parser.add_argument(
        "--candidates", type=architecture_patterns, default=[], metavar="PATTERNS",
        help="try several and keep the best: names or wildcards with commas between, such as 'resnet*,regnety_00*'",
    )  # fmt: skip
    add_data_arguments(parser)
    add_ghn_argument(parser)
    parser.add_argument("--head", choices=HEADS, default="ridge", help="prototype is for very few images")
    parser.add_argument("--images", type=integer(1), help="adapt to the first so many; all if not given")
    parser.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "-o", "--output", type=output_file(".safetensors"), default="adapted/model.safetensors", metavar="FILE",
        help="the model's weights, with config.json and confusion.png beside them (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """A row for each network, then the best in files."""
    logging.basicConfig(format="%(message)s")
    names = list(dict.fromkeys([*([args.name] if args.name else []), *args.candidates]))
    if not names:
        raise GHNError("No architecture is named; give one, or --candidates.")
    ghn = load_ghn(args.ghn, args.device)
    train, held_out = (load_data(args, split).to(args.device) for split in ("train", "val"))
    if args.images is not None:
        rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: args.images].to(args.device)
        train = replace(train, images=train.images[rows], labels=train.labels[rows])
    size, tests = train.image_size, Batches(held_out, _BATCH)
    task = sketch(Batches(train, _BATCH)) if ghn.config.conditioned else None

    best: tuple[float, str, nn.Module] | None = None
    table = Table("architecture", "parameters", "top-1, each left out", "top-1, held out", "seconds")
    for name in track(names, "adapting", console=Console(stderr=True), disable=len(names) == 1):
        started = time.perf_counter()
        model = create_model(name, train.num_classes, size).to(args.device)
        initialize(model, ghn, head="keep", input_size=(3, size, size), task=task)
        report = adapt(model, Batches(train, _BATCH), args.head)
        top1 = accuracy(model, tests)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        seconds = time.perf_counter() - started
        table.add_row(name, f"{parameters / 1e6:.1f} M", f"{report.accuracy:.1%}", f"{top1:.1%}", f"{seconds:.1f}")
        if best is None or top1 > best[0]:
            best = top1, name, model
    assert best is not None
    print_table(table)
    _save(args, *best[1:], train, tests)


def _save(args: argparse.Namespace, name: str, model: nn.Module, train: ImageDataset, tests: Batches) -> None:
    """The model as timm reads it, a picture of what it confuses, and what can be done next."""
    label(model, args.ghn, train.described(), has_head=True)
    size = train.image_size
    cfg: Any = model.pretrained_cfg
    cfg["input_size"] = (3, size, size)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(args.output) as part:
        save_model(model, str(part))
    config = args.output.parent / "config.json"
    save_config(model, config)
    picture = args.output.parent / "confusion.png"
    plot_confusion(confusion(model, tests), train.names, picture)
    file, classes = shlex.quote(str(args.output)), train.num_classes
    arguments, options = f"num_classes={classes}", f"--model {name} --num-classes {classes} --img-size {size}"
    if "img_size" in json.loads(config.read_text()).get("model_args", {}):  # it has a table of positions
        arguments += f", img_size={size}"
        options += f" --model-kwargs img_size={size}"
    console = Console()
    console.print(
        f"{name} is in {args.output}; what it confuses is in {picture}. Use it:", highlight=False, markup=False
    )
    for line in (
        f'  timm.create_model("{name}", {arguments}, checkpoint_path="{args.output}")',
        f"  python inference.py {options} --checkpoint {file}",
        "Train on from it, at a tenth of the usual learning rate:",
        f"  python train.py {options} --initial-checkpoint {file} --lr 0.005",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
