"""What `adapt` makes of images that no GHN was trained on, from predicted weights and from random ones.

For each data set, number of images a class and architecture: the held-out accuracy of the network that
`timm_ghn.adapt` makes of predicted weights, and of random ones (their features are not nothing: the honest baseline),
and of a third that SGD trains from random weights for as many seconds as the predicted one took in all. With
--finetune, the adapted networks are trained on for so many steps of SGD. Each training has the rate that is best when
one half of its images is trained on and the other looked at. "pretrained" weights are timm's, where they can be had.
A GHN that is conditioned on tasks can be told of the images: "told" and "mistold" are predictions with their sketch
and with that of another one of the data sets. With several GHNs, each predicts.

Data sets are those of timm-ghn train, each with the side that its images are brought to behind a colon. Rows are kept
in DIR/your_data.json as they come, and not measured again; the table and the picture are of all that are there with the
same head, steps, images and seed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from graph_layer import machine
from matplotlib.figure import Figure
from random_vs_ghn import MODELS, arranged, few_shot, hash_of, update
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

import timm_ghn
from timm_ghn.checkpoints.load import load_ghn
from timm_ghn.command_line import (
    Parser,
    architecture_name,
    device_name,
    exit_status,
    integer,
    output_directory,
    positive,
)
from timm_ghn.devices import has_bf16
from timm_ghn.evaluation.accuracy import accuracy, create_model
from timm_ghn.evaluation.adaptation import HEADS
from timm_ghn.training.data import Batches, ImageDataset, load_dataset

PREDICTED = ("predicted", "told", "mistold")
STARTS = (*PREDICTED, "random", "sgd", "pretrained")
BATCH = 32
TEST_BATCH = 100


def train(model: nn.Module, data: ImageDataset, rate: float, steps: float, seconds: float, seed: int) -> nn.Module:
    """SGD with momentum until either is used up; the rate falls along a cosine of whichever is nearer its end."""
    device = data.images.device
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    model.train()
    started = time.perf_counter()
    for step in itertools.count():
        used = max(step / steps, (time.perf_counter() - started) / seconds)
        if used >= 1:
            break
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + torch.cos(torch.tensor(used * torch.pi)).item())
        update(model, optimizer, *data.sample(BATCH, generator), has_bf16(device))
    return model


class Comparison:
    """All that is measured of an architecture on some images of a data set."""

    def __init__(
        self, arguments: argparse.Namespace, name: str, data: ImageDataset, tests: Batches, other: ImageDataset
    ):
        self.arguments, self.name, self.data, self.tests, self.other = arguments, name, data, tests, other
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
        half = len(data) // 2
        # A learning rate is chosen on one half of the images by the accuracy on the other.
        self.tuning, self.judging = data.rows(order[:half]), Batches(data.rows(order[half:][:500]), TEST_BATCH)

    def build(self, pretrained: bool = False) -> nn.Module:
        options = {"pretrained": True} if pretrained else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.arguments.seed)
            model = create_model(self.name, self.data.num_classes, self.data.image_size, **options)
        return arranged(model, torch.device(self.arguments.device))

    def adapted(self, start: str, tag: str, data: ImageDataset) -> nn.Module:
        model = self.build(start == "pretrained")
        if start in PREDICTED:
            predictor = ghn(tag, self.arguments.device)
            told = {"told": data, "mistold": self.other}.get(start)
            task = None if told is None else timm_ghn.sketch(Batches(told, TEST_BATCH))
            timm_ghn.initialize(model, predictor, head="keep", task=task)
        timm_ghn.adapt(model, Batches(data, TEST_BATCH), self.arguments.head)
        return model

    def row(self, start: str, tag: str, seconds: float) -> dict[str, float]:
        """Accuracies in percent; "sgd" trains for `seconds`, the others are adapted, and then trained on if asked."""
        steps = self.arguments.finetune
        if start == "sgd":
            return self.best_trained(lambda data: self.build(), "top1", math.inf, seconds) | {"seconds": seconds}
        started = time.perf_counter()
        model = self.adapted(start, tag, self.data)
        row = {"seconds": time.perf_counter() - started, "top1": 100 * accuracy(model, self.tests)}
        if steps:
            row |= self.best_trained(functools.partial(self.adapted, start, tag), "finetuned", steps, math.inf)
        return row

    def best_trained(
        self, begin: Callable[[ImageDataset], nn.Module], name: str, steps: float, seconds: float
    ) -> dict[str, float]:
        """Accuracy after training at the better rate, and that rate."""

        def trained(data: ImageDataset, rate: float) -> nn.Module:
            return train(begin(data), data, rate, steps, seconds, self.arguments.seed)

        rates = self.arguments.rates
        rate = max(rates, key=lambda rate: accuracy(trained(self.tuning, rate), self.judging))
        return {name: 100 * accuracy(trained(self.data, rate), self.tests), f"{name}_rate": rate}


@functools.cache
def ghn(name: str, device: str) -> timm_ghn.GHN:
    return load_ghn(name, device)


def data_set(text: str) -> tuple[str, int]:
    source, _, size = text.rpartition(":")
    if not source or not size.isdigit() or int(size) < 8:
        raise argparse.ArgumentTypeError(f"{text!r} is not SOURCE:SIDE, such as photographs/:64")
    return source, int(size)


def counts(text: str) -> int | None:
    return None if text == "all" else integer(1)(text)


def main(argv: Sequence[str] | None = None) -> list[list[str]]:
    """Measures what is not measured yet, and returns the table of means, its first row the header."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=data_set, metavar="SOURCE:SIDE", help="what to adapt to")
    parser.add_argument(
        "--ghn", nargs="+", default=["ghn2"], help="tag, directory or .safetensors file (default: ghn2)"
    )
    parser.add_argument("--head", choices=HEADS, default="ridge")
    parser.add_argument("--models", nargs="+", type=architecture_name, default=MODELS, help="timm architectures")
    parser.add_argument(
        "--starts", nargs="+", choices=STARTS, default=("predicted", "random", "sgd"), help="weights to begin with"
    )
    parser.add_argument("--shots", nargs="+", type=counts, default=[5, 20, 100, None], help="images a class, or all")
    parser.add_argument("--finetune", type=integer(0), default=0, metavar="STEPS", help="train on for so many")
    parser.add_argument("--rates", nargs="+", type=positive, default=[0.005, 0.05], help="learning rates to try")
    parser.add_argument("--images", type=integer(1), default=1000, help="held-out images to measure on (%(default)s)")
    parser.add_argument("--holdout", type=integer(1), default=1000, help="images to hold out (%(default)s)")
    parser.add_argument("--seed", type=integer(0), default=0)
    parser.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=output_directory, default=str(Path(__file__).parent / "results"), metavar="DIR")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "your_data.json"
    torch.set_num_threads(1)
    # SGD gets the seconds that the first predicted one took.
    starts = [
        (start, tag)
        for start in sorted(arguments.starts, key=STARTS.index)
        for tag in (arguments.ghn if start in PREDICTED else [""])
        if start == "predicted" or tag == "" or ghn(tag, arguments.device).config.conditioned
    ]
    # A tag can come to mean other weights, of which nothing is measured then.
    checkpoints = {"": "", **{tag: f"{tag} {hash_of(tag)}" for tag in arguments.ghn}}
    setting = [arguments.head, arguments.finetune, arguments.images, arguments.holdout, arguments.seed]

    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    known = {json.dumps(row["of"]): row for row in rows}
    cases = itertools.product(arguments.data, arguments.shots, arguments.models)
    for (source, size), count, name in tqdm(list(cases), desc="measuring", unit="network"):
        train_images, held_out = images(source, size, arguments.holdout, arguments.device)
        tests = Batches(held_out.first(arguments.images), TEST_BATCH)
        another = arguments.data[arguments.data.index((source, size)) - 1]
        other = images(*another, arguments.holdout, arguments.device)[1]
        comparison = Comparison(arguments, name, few_shot(train_images, count, arguments.seed), tests, other)
        seconds = math.nan
        for start, tag in starts:
            label = f"{start} by {tag}" if len(arguments.ghn) > 1 and tag else start
            of = [Path(source).name.replace(".parquet", ""), size, count, name, label, checkpoints[tag], *setting]
            if (row := known.get(json.dumps(of))) is None:
                row = {"of": of, "machine": machine(), **comparison.row(start, tag, seconds)}
                rows.append(row)
                file.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            seconds = row["seconds"] if start == "predicted" and math.isnan(seconds) else seconds
    asked = [row for row in rows if row["of"][5] in checkpoints.values() and row["of"][-len(setting) :] == setting]
    return report(asked, arguments.out)


@functools.cache
def images(source: str, size: int, holdout: int, device: str) -> tuple[ImageDataset, ImageDataset]:
    train, held_out = (load_dataset(source, split, holdout=holdout, image_size=size) for split in ("train", "val"))
    return train.to(device), held_out.to(device)


def report(rows: list[dict[str, Any]], directory: Path) -> list[list[str]]:
    """Means over the architectures, printed as a table, which is returned, and drawn as a picture."""
    top1: dict[tuple[str, int, int | None], dict[str, dict[str, float]]] = {}
    for row in rows:
        source, size, count, name, start = row["of"][:5]
        top1.setdefault((source, size, count), {}).setdefault(start, {})[name] = row["top1"]
        if "finetuned" in row:
            top1[source, size, count].setdefault(f"{start}, trained on", {})[name] = row["finetuned"]
    top1 = dict(sorted(top1.items(), key=lambda item: (*item[0][:2], item[0][2] or math.inf)))
    columns = list(dict.fromkeys(start for found in top1.values() for start in found))
    first = next((start for start in columns if start.startswith("predicted")), "")
    cells = [["images", "side", "of a class", *columns, f"{first} ahead of random"]]
    for (source, size, count), found in top1.items():
        means = [f"{statistics.mean(found[start].values()):.1f}" if start in found else "" for start in columns]
        predicted, random = found.get(first, {}), found.get("random", {})
        both = predicted.keys() & random.keys()
        ahead = f"{sum(predicted[name] > random[name] for name in both)} of {len(both)}"
        cells.append([source, str(size), str(count or "all"), *means, ahead])
    table = Table(*cells[0])
    for line in cells[1:]:
        table.add_row(*line)
    Console(width=120).print(f"{machine()}; top-1, %, mean over architectures", table)

    sources = list(dict.fromkeys((source, size) for source, size, _ in top1))
    figure = Figure(figsize=(4.5 * len(sources), 4), layout="constrained")
    for axes, (source, size) in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources, strict=True):
        of_source = {count: found for (*which, count), found in top1.items() if which == [source, size]}
        places = range(len(of_source))
        for start in columns:
            tops = [found.get(start, {"": math.nan}).values() for found in of_source.values()]
            axes.plot(places, [statistics.mean(top) for top in tops], marker="o", label=start)
        axes.set(title=f"{source}, {size} pixels", xlabel="images of a class", ylabel="top-1, %")
        axes.set_xticks(places, [str(count or "all") for count in of_source])
    axes.legend()
    figure.savefig(directory / "your_data.png")
    return cells


if __name__ == "__main__":
    sys.exit(exit_status("your_data.py", main))
