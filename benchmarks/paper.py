"""What predicted weights are worth in steps of SGD, on real architectures: the tables of the GHN-2 paper, for timm.

Sections:

sgd         Accuracy of predicted weights, beside SGD from random weights after 1/10, 1/3, 1 and, for some networks, 5
            epochs, and how many steps of SGD it takes to get where predicted weights are.
ranking     Kendall's tau between the accuracy of predicted weights and that after 5 epochs, on small random networks of
            timm's kind; beside it what simpler things say: parameters, multiply-accumulates, shorter training.
properties  What a network's embedding (`timm_ghn.embed`) tells of its accuracy, of that under noise, of its speed and
            of how fast it learns, on the networks of "ranking", against simple counts.
transfer    Images that the GHN was not trained on (--transfer), 100 of each class: a head fitted by `timm_ghn.adapt`,
            and training from there (your_data.py).
catch-up    Whether random weights catch up in --steps steps of training: both starts, each with the rate that serves it
            best (random_vs_ghn.py).
dense       Segmentation with a predicted backbone (dense.py).

In "sgd" and "ranking", SGD has momentum 0.9, batches of 64, and for each length a cosine schedule and the best of
several learning rates: up to 1/3 of an epoch three are tried, and further ones as long as the best is the lowest or the
highest; in longer runs the best of the length before, and those within three points of it.
Rates are chosen on other images than accuracies are reported on; norms take their statistics from training images
before every measurement, whatever the weights. SGD computes in bfloat16 where the device is faster with it.

A run that was stopped goes on where it was: finished ones are kept in DIR/paper.jsonl. Those of SGD do not depend on
the GHN, and serve the next one too. Networks that are not finished are left out of the report, which says how many.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path

import comparison_report
import dense
import paper_report
import random_vs_ghn
import torch
import your_data
from graph_layer import machine
from paper_runs import BATCH, Images, Row, Run, Store, measure, prepare_worker
from tqdm import tqdm

from timm_ghn.command_line import (
    Parser,
    architecture_name,
    device_name,
    exit_status,
    integer,
    output_directory,
    positive,
)
from timm_ghn.evaluation.accuracy import ZOO
from timm_ghn.workers import process_pool

SECTIONS = ("sgd", "ranking", "properties", "transfer", "catch-up", "dense")
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FIRST_RATES = slice(2, 5)  # that are tried in any case
CLOSE = 3.0  # points on 1,000 images, within which the better of two is a matter of luck
EPOCHS = (0.1, 1 / 3, 1.0, 5.0)
LONG_NETWORKS = {"real": 2, "timm": 2, "deepnets test": 2}
"""The first ones of these groups are trained for the longest time in "sgd"; in "ranking" all are."""
RANKED_MACS = 6_000_000
VIT = "vit_tiny_patch16_224:patch_size=4"
GROUPS = {
    "real": [*ZOO, VIT],
    "timm": [f"timm:test:{index}" for index in range(60)],
    **{
        f"deepnets {split}": [f"deepnets:{split}:{index}" for index in range(20)]
        for split in ("test", "wide", "deep", "dense", "bnfree")
    },
}
"""Networks of the section "sgd", by kind: real ones, random ones of timm's classes, and DeepNets-1M's test splits."""
CATCH_UP = {"mobilenetv3_small_050": 3, "regnetx_002": 1, "resnet10t": 1}
"""Architectures of the section "catch-up", and seeds."""
SHOTS, FINETUNE, HELD_OUT = 100, 300, 1000
"""For "transfer": images of a class, steps, and images of each data set that are held out and measured on at most."""
RANKED = [f"timm:test:{index}:{RANKED_MACS}" for index in range(40)]


Table = list[list[str]]


@dataclass(frozen=True)
class Case:
    """A network, and the lengths of SGD that it is compared with, in epochs, the shortest first."""

    group: str
    network: str
    epochs: tuple[float, ...]


class Stopped(Exception):
    """The time is up."""


class Bench:
    """Measures what is not in the store yet, as long as there is time.

    Args:
        store: Of finished runs.
        pool: Processes to run in.
        epoch: Steps of an epoch.
        deadline: Begin nothing after this time, in seconds of `time.monotonic`.
    """

    def __init__(self, store: Store, pool: ProcessPoolExecutor, epoch: int, deadline: float):
        self.store, self.pool, self.epoch, self.deadline = store, pool, epoch, deadline

    def network(self, case: Case) -> Row | None:
        """Everything about a network; None if the time was up before it was complete."""
        try:
            predicted = self._run(Run(case.network))
            trained: dict[int, Row] = {}
            tried: dict[float, Row] = {}
            for epochs in case.epochs:
                steps = max(1, round(epochs * self.epoch))
                if epochs <= EPOCHS[1] or not tried:
                    tried = self._around_the_best(case.network, steps)
                else:
                    close = max(row["tuning"] for row in tried.values()) - CLOSE
                    rates = [rate for rate, row in tried.items() if row["tuning"] > close]
                    tried = {rate: self._run(Run(case.network, steps, rate)) for rate in rates}
                best, row = max(tried.items(), key=lambda item: item[1]["tuning"])
                trained[steps] = {**row, "rate": best}
        except Stopped:
            return None
        return {"group": case.group, "network": case.network, "predicted": predicted, "sgd": trained}

    def _around_the_best(self, network: str, steps: int) -> dict[float, Row]:
        """By rate, so many that those on both sides of the best are worse, as far as there are any."""
        low, high, _ = FIRST_RATES.indices(len(RATES))
        while True:
            found = {rate: self._run(Run(network, steps, rate)) for rate in RATES[low:high]}
            best = RATES.index(max(found, key=lambda rate: found[rate]["tuning"]))
            if best == low > 0:
                low -= 1
            elif best == high - 1 < len(RATES) - 1:
                high += 1
            else:
                return found

    def _run(self, run: Run) -> Row:
        if (row := self.store.get(run)) is not None:
            return row
        if time.monotonic() > self.deadline:
            raise Stopped
        return self.store.add(run, self.pool.submit(measure, run).result())


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="torch/cifar10", help="what the GHN was trained on (default: %(default)s)")
    parser.add_argument("--ghn", default="ghn2", help="tag, directory or .safetensors file (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="only these")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help='of "sgd"')
    parser.add_argument("--networks", type=integer(1), help="at most so many of each group, and of those ranked")
    parser.add_argument(
        "--epochs", nargs="+", type=positive, default=list(EPOCHS), help="lengths of SGD; the last is for few networks"
    )
    parser.add_argument(
        "--transfer", nargs="+", default=[], metavar="SOURCE:SIDE", help="images, as your_data.py takes them"
    )
    parser.add_argument("--steps", type=integer(5), default=10_000, help='of "catch-up" (default: %(default)s)')
    parser.add_argument("--models", nargs="+", type=architecture_name, help="for the last three sections")
    parser.add_argument(
        "--minutes", type=positive, default=math.inf, help='begin no run of "sgd" or "ranking" after so many'
    )
    parser.add_argument("--holdout", type=integer(1), default=5000, help="training images to hold out (%(default)s)")
    parser.add_argument("--images", type=integer(1), default=2000, help="held-out images to measure on (%(default)s)")
    parser.add_argument("--workers", type=integer(1), default=1, help="processes, of one thread each (%(default)s)")
    parser.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--download", action="store_true", help="let torch/… fetch what is missing")
    parser.add_argument(
        "--out", type=output_directory, default=str(Path(__file__).parent / "results" / "paper"), metavar="DIR"
    )
    arguments = parser.parse_args()
    if "transfer" in arguments.sections and not arguments.transfer:
        arguments.sections.remove("transfer")
    deadline = time.monotonic() + 60 * arguments.minutes
    images = Images(arguments.data, arguments.holdout, arguments.images, arguments.download)
    epoch = max(1, len(images.load("cpu")[0]) // BATCH)
    checkpoint = random_vs_ghn.hash_of(arguments.ghn)
    cases = list(chosen_cases(arguments))
    with process_pool(arguments.workers, prepare_worker, (images, arguments.ghn, arguments.device)) as pool:
        bench = Bench(Store(arguments.out / "paper.jsonl", images, checkpoint), pool, epoch, deadline)
        with ThreadPoolExecutor(arguments.workers) as drivers:
            rows = list(tqdm(drivers.map(bench.network, cases), "measuring", len(cases), unit="network"))
    others = []
    if "transfer" in arguments.sections:
        others.append((f"Other images, {SHOTS} of each class: top-1, %", transfer(arguments)))
    if "catch-up" in arguments.sections:
        others += catch_up(arguments)
    if "dense" in arguments.sections:
        others.append(("Segmentation of made scenes, %", segmentation(arguments)))
    result = {
        "machine": machine(),
        "command": {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)},
        "checkpoint": {"ghn": arguments.ghn, "sha256": checkpoint},
        "classes": images.load("cpu")[0].num_classes,
        "epoch": epoch,
        "wanted": Counter(case.group for case in cases),
        "rows": [row for row in rows if row],
        "others": others,
    }
    paper_report.write(result, arguments.out)


def chosen_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """What is to be measured: the ranked networks, then the groups' first ones, their second ones, and so on."""
    epochs = tuple(sorted(arguments.epochs))
    count = arguments.networks
    if {"ranking", "properties"} & set(arguments.sections):
        yield from (Case("ranked", network, epochs) for network in RANKED[:count])
    groups = [GROUPS[name][:count] for name in arguments.groups] if "sgd" in arguments.sections else []
    for place, networks in enumerate(zip_longest(*groups)):
        for group, network in zip(arguments.groups, networks, strict=True):
            if network is not None:
                yield Case(group, network, epochs if place < LONG_NETWORKS.get(group, 0) else epochs[:-1])


def transfer(arguments: argparse.Namespace) -> Table:
    options = {
        "shots": SHOTS,
        "finetune": FINETUNE,
        "holdout": min(arguments.holdout, HELD_OUT),
        "images": min(arguments.images, HELD_OUT),
    }
    return your_data.main([*arguments.transfer, *told(arguments, ["ghn", "device", "out", "models"], options)])


def catch_up(arguments: argparse.Namespace) -> Iterator[tuple[str, Table]]:
    names = ["data", "ghn", "holdout", "images", "device", "workers", "download"]
    for seeds, group in groupby(arguments.models or CATCH_UP, key=lambda model: CATCH_UP.get(model, 1)):
        options = {
            "sections": "long",
            "starts": ["random", "predicted"],
            "steps": arguments.steps // 5,  # the section is five times as long as others
            "models": list(group),
            "seeds": seeds,
            "out": arguments.out / f"catch_up_{seeds}_seeds",
        }
        (section,) = random_vs_ghn.main(told(arguments, names, options))["sections"]
        header, rows = comparison_report.accuracy_table(section)
        yield f"Does random init catch up? {seeds} seeds: top-1, %", [header, *rows]


def segmentation(arguments: argparse.Namespace) -> Table:
    return dense.main(told(arguments, ["data", "ghn", "holdout", "device", "download", "out", "models"], {}))


def told(arguments: argparse.Namespace, names: Iterable[str], options: Mapping[str, object]) -> list[str]:
    """The arguments of another benchmark: some of this one's, and options of its own."""
    words: list[str] = []
    for name, value in {**{name: getattr(arguments, name) for name in names}, **options}.items():
        if value not in (None, False):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return words


if __name__ == "__main__":
    sys.exit(exit_status("paper.py", main))
