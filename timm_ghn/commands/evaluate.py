"""Accuracy of predicted weights over architectures.

Examples:
    timm-ghn evaluate --data torch/cifar10 --download --images 1000 --architectures 60
    timm-ghn evaluate --data cifar10-train.parquet --source zoo --names resnet18,convnext_atto
    timm-ghn evaluate --data cifar10-train.parquet --source deepnets --split wide --sgd-steps 100
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from ..command_line import (
    add_data_arguments,
    add_device_argument,
    add_ghn_argument,
    add_json_argument,
    architecture_names,
    family_names,
    integer,
    load_data,
    output_directory,
    print_json,
    print_table,
)
from ..errors import GHNError

if TYPE_CHECKING:
    from torch import nn

    from ..evaluation.accuracy import Measured

_BATCH = 250
_CALIBRATION_BATCHES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, networks, and where the result goes."""
    add_data_arguments(parser)
    add_ghn_argument(parser)
    parser.add_argument(
        "--source", choices=("timm", "deepnets", "zoo"), default="timm",
        help="random networks, or (zoo) real ones of timm (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--split", default="test",
        help="of random networks: val, test; deepnets: also wide, deep, dense, bnfree (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--families", help="draw random networks of these only, with commas between; or of all up to a tier (0 to 3)"
    )
    parser.add_argument(
        "--architectures", type=integer(1), default=100, help="measure the first so many (default: %(default)s)"
    )
    parser.add_argument(
        "--names", type=architecture_names,
        help="of real networks, with commas between; some of ten families if not given",
    )  # fmt: skip
    parser.add_argument(
        "--data-split", choices=("val", "test"), default="val",
        help="measure on held-out training images, or on the source's test images (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=integer(1), default=5000, help="measure on so many of them (default: %(default)s)"
    )
    parser.add_argument(
        "--sgd-steps", type=integer(0), default=0, help="also measure so many steps of SGD from random weights"
    )
    add_device_argument(parser)
    parser.add_argument(
        "-o", "--output", type=output_directory, default="evaluation", metavar="DIR",
        help="where results.json and histogram.png go (default: %(default)s)",
    )  # fmt: skip
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Measures one network after the other and sums up."""
    import timm
    import torch
    from rich.console import Console
    from rich.progress import track

    from ..checkpoints.load import load_ghn
    from ..evaluation.accuracy import measure, seeded
    from ..training.architectures import SPLITS

    logging.basicConfig(format="%(message)s")
    if args.source != "zoo" and args.names:
        raise GHNError(f"--names are names in timm, but the networks of --source {args.source} are random: choose zoo.")
    if args.source != "zoo" and args.split not in SPLITS[args.source]:
        raise GHNError(f"{args.source} has no split {args.split!r}; choose from {', '.join(SPLITS[args.source])}.")
    if args.source == "zoo" and args.families:
        raise GHNError("--families are of random networks, not of real ones: choose --source timm or deepnets.")
    try:
        drawn_from = family_names(args.source, args.families) if args.families else None
    except argparse.ArgumentTypeError as error:
        raise GHNError(f"--families: {error}.") from None
    ghn = load_ghn(args.ghn, args.device)
    train, data = (load_data(args, split).to(args.device) for split in ("train", args.data_split))
    if not ghn.config.predicts_head:
        raise GHNError(f"{args.ghn} predicts no classification layer; measure what timm-ghn adapt makes with it.")
    data = data.first(args.images)
    if data.num_classes != ghn.config.num_classes:
        raise GHNError(
            f"{args.data} has {data.num_classes} classes, {args.ghn} predicts {ghn.config.num_classes}; choose a GHN "
            "trained for as many."
        )
    test = list(data.batches(_BATCH))
    generator = torch.Generator(args.device).manual_seed(0)
    calibration = [train.sample(_BATCH, generator) for _ in range(_CALIBRATION_BATCHES)]

    results = []
    builders = _builders(args, drawn_from, data.num_classes, data.image_size)
    for seed, (name, build) in enumerate(track(builders.items(), "measuring", console=Console(stderr=True))):
        sample = partial(train.sample, 64, generator) if args.sgd_steps else None
        build = seeded(build, seed, args.device)
        results.append(measure(name, build, ghn, calibration, test, sample=sample, sgd_steps=args.sgd_steps))
    _report(args, {"ghn": ghn.fingerprint(), "timm": timm.__version__, "torch": torch.__version__}, results)


def _builders(
    args: argparse.Namespace, drawn_from: list[str] | None, num_classes: int, image_size: int
) -> dict[str, Callable[[], nn.Module]]:
    """What makes each network, by name."""
    from ..evaluation.accuracy import ZOO, create_model
    from ..training.architectures import SPLITS, architecture

    if args.source == "zoo":
        names = args.names or ZOO[: args.architectures]
        return {name: partial(create_model, name, num_classes, image_size) for name in names}
    builders: dict[str, Callable[[], nn.Module]] = {}
    for index in range(min(args.architectures, SPLITS[args.source][args.split].size)):
        found = architecture(args.source, args.split, index, families=drawn_from, image_size=image_size)
        builders[f"{index} {found.family}"] = partial(found.build, num_classes, image_size=image_size)
    return builders


def _report(args: argparse.Namespace, setting: dict[str, str], results: list[Measured]) -> None:
    """Tables on the terminal, a JSON file and a picture in the directory."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..evaluation.accuracy import summarize
    from ..evaluation.pictures import plot_histogram
    from ..files import whole_file

    if len(results) <= 40 and not args.json:
        table = Table("architecture", "parameters", "predicted", "top-1")
        for result in results:
            top1 = f"{result.accuracy['predicted']:.2%}" if result.error is None else escape(result.error)
            table.add_row(result.name, f"{result.parameters / 1e6:.1f} M", f"{result.predicted_fraction:.1%}", top1)
        print_table(table)
    summaries = {}
    table = Table("weights", "mean top-1", "standard error", "range", "architectures")
    for kind, label in (("predicted", args.ghn), ("random", "random"), ("sgd", f"{args.sgd_steps} steps of SGD")):
        summary = summarize(results, kind)
        if summary.count:
            single = summary.count == 1  # which has no standard error
            summaries[kind] = {**asdict(summary), "error": None if single else summary.error}
            bounds = f"{summary.smallest:.2%} to {summary.largest:.2%}"
            error = "" if single else f"{summary.error:.2%}"
            table.add_row(label, f"{summary.mean:.2%}", error, bounds, str(summary.count))
    kinds = (str, int, list, type(None))
    told = {name: value for name, value in vars(args).items() if isinstance(value, kinds) and name != "json"}
    rows = [asdict(result) for result in results]
    everything = {"arguments": told, "setting": setting, "summary": summaries, "architectures": rows}
    args.output.mkdir(parents=True, exist_ok=True)
    with whole_file(args.output / "results.json") as part:
        part.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    if summaries:
        plot_histogram(results, args.output / "histogram.png")
    if args.json:
        print_json(everything)
    else:
        print_table(table)
        Console().print(f"written to {args.output}", highlight=False, markup=False, soft_wrap=True)
    if "predicted" not in summaries:
        first = results[0]
        raise GHNError(f"None of {len(results)} networks could be measured; the first, {first.name}: {first.error}")
