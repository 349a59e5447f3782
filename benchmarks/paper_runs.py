"""What paper.py measures of a network: a run of SGD from random weights or a prediction; and where results are kept."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from random_vs_ghn import arranged, held_out_rows, update
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import timm_ghn
from timm_ghn.checkpoints.load import load_ghn
from timm_ghn.devices import has_bf16
from timm_ghn.evaluation.accuracy import accuracy, create_model
from timm_ghn.evaluation.calibration import calibrate
from timm_ghn.prediction import Prediction, write
from timm_ghn.predictor import Predictor
from timm_ghn.training.architectures import SPLITS, architecture
from timm_ghn.training.data import ImageDataset, load_dataset
from timm_ghn.training.sampling import measured_cost

BATCH = 64
TEST_BATCH = 250
CALIBRATION = 2  # batches of TEST_BATCH training images that norms take their statistics from, whatever the weights
TURNS = 5  # that seconds are the medians of
NOISE = 0.08  # standard deviation of what is added to pixels of 0 to 1, as in arXiv 2110.13100, §4.3

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One measurement of a network.

    Attributes:
        network: What `build` takes.
        steps: Of SGD from random weights; 0 for predicted weights, of which there is no training.
        rate: The peak learning rate.
    """

    network: str
    steps: int = 0
    rate: float = 0.0


@dataclass(frozen=True)
class Images:
    """Where images come from, and how many are held out and measured on."""

    data: str
    holdout: int
    images: int
    download: bool

    def load(self, device: str) -> tuple[ImageDataset, ImageDataset]:
        """To train on, and held out."""
        return _load(self, device)


@functools.cache
def _load(of: Images, device: str) -> tuple[ImageDataset, ImageDataset]:
    train, val = (load_dataset(of.data, half, holdout=of.holdout, download=of.download) for half in ("train", "val"))
    return train.to(device), val.to(device)


class Store:
    """Finished runs, a JSON line each, under what they were made with; several programs may add to one file."""

    def __init__(self, file: Path, images: Images, checkpoint: str):
        self._file, self._lock = file, threading.Lock()
        self._setting = [Path(images.data).name, images.holdout, images.images, timm.__version__]
        self._checkpoint = checkpoint
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text().splitlines() if file.exists() else []
        self._rows: dict[str, Row] = {line["key"]: line["row"] for line in map(json.loads, lines)}

    def _key(self, run: Run) -> str:
        return json.dumps([*asdict(run).values(), *self._setting, "" if run.steps else self._checkpoint])

    def get(self, run: Run) -> Row | None:
        return self._rows.get(self._key(run))

    def add(self, run: Run, row: Row) -> Row:
        key = self._key(run)
        with self._lock, self._file.open("a") as lines:
            self._rows[key] = row
            lines.write(json.dumps({"key": key, "row": row}) + "\n")
        return row


# --- networks ---------------------------------------------------------------------------------------------------------


def build(network: str, num_classes: int, image_size: int) -> nn.Module:
    """A network with random weights.

    Args:
        network: ``"resnet18"``, a name in timm, with arguments behind it as in ``"vit_tiny_patch16_224:patch_size=4"``,
            or ``"timm:test:17"`` for a random one of a split, ``"timm:test:17:6000000"`` for one of so many
            multiply-accumulates at most.
        num_classes: Of the classifier.
        image_size: Side of the images.
    """
    name, *rest = network.split(":")
    if name in SPLITS:
        split, index, *limit = rest
        found = architecture(name, split, int(index), max_macs=int(limit[0]) if limit else None, image_size=image_size)
        return found.build(num_classes, image_size=image_size)
    options = {key: int(value) for key, _, value in (option.partition("=") for option in rest)}
    model: nn.Module = create_model(name, num_classes, image_size, **options)
    return model


# --- in a worker ------------------------------------------------------------------------------------------------------

_worker: tuple[Images, str, str]


def prepare_worker(images: Images, ghn: str, device: str) -> None:
    global _worker
    _worker = images, ghn, device
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a CPU is slow on numbers next to nothing, such as old momenta
    os.environ["TIMM_GHN_CACHE"] = "0"  # a prediction takes as long as the first one of a network
    load_ghn(ghn, device)  # once, so that it is in no run's time


def measure(run: Run) -> Row:
    """Trains, or predicts, one network.

    Returns:
        Accuracies in percent on the images that rates are chosen on ("tuning"), on others ("test") and on these with
        noise ("noisy"); and, of a prediction, "seconds", "step_seconds" of SGD beside it, "parameters", "macs" (of an
        image), "ms" (of a batch, on one thread), "nodes" of its graph and its "embedding".
    """
    source, ghn, device = _worker
    train, held_out = source.load(device)
    make = functools.partial(build, run.network, train.num_classes, train.image_size)
    torch.manual_seed(0)

    def predicted() -> tuple[nn.Module, Prediction]:
        model, prediction = Predictor(load_ghn(ghn, device), "predict").build(make)
        write(model, prediction)
        return model.to(device), prediction

    if run.steps:
        model = _trained(arranged(make(), torch.device(device)), run, train)
        row: Row = {}
    else:
        model, prediction = predicted()
        row = _side_by_side(predicted, arranged(make(), torch.device(device)), train)
    generator = torch.Generator(device).manual_seed(0)
    calibrate(model, [train.sample(TEST_BATCH, generator)[0] for _ in range(CALIBRATION)])
    tuning, test = held_out_rows(len(held_out), source.images)
    std = torch.tensor(train.std, device=device).view(3, 1, 1)

    def batches(rows: Tensor, noise: float = 0.0) -> Iterator[tuple[Tensor, Tensor]]:
        for part in rows.to(device).split(TEST_BATCH):
            images, labels = held_out.batch(part)
            if noise:
                drawn = torch.randn(images.shape, generator=generator, device=device)
                images = images + noise / std * drawn
            yield images, labels

    row |= {
        "tuning": 100 * accuracy(model, batches(tuning)),
        "test": 100 * accuracy(model, batches(test)),
        "noisy": 100 * accuracy(model, batches(test, NOISE)),
    }
    if not run.steps:
        cost = measured_cost(model.eval(), train.batch(torch.arange(1, device=device))[0])
        row |= {"parameters": cost.params, "macs": cost.macs, "ms": _milliseconds(model, next(batches(test))[0])}
        (embedding,) = timm_ghn.embed([prediction.graph], load_ghn(ghn, device)).tolist()
        row |= {"nodes": len(prediction.graph), "embedding": embedding}
    return row


def _trained(model: nn.Module, run: Run, train: ImageDataset) -> nn.Module:
    """SGD with momentum over so many batches of shuffled epochs, its rate falling along a cosine of this length.

    In bfloat16 where the device is faster with it.
    """
    generator = torch.Generator(train.images.device).manual_seed(0)
    optimizer = _sgd(model, run.rate)
    schedule = CosineLRScheduler(optimizer, run.steps, warmup_t=run.steps // 20, t_in_epochs=False)
    epochs = itertools.chain.from_iterable(train.batches(BATCH, generator) for _ in itertools.count())
    model.train()
    bf16 = has_bf16(train.images.device)
    for step, (images, labels) in enumerate(itertools.islice(epochs, run.steps)):
        schedule.step_update(step + 1)  # the first rate would be 0
        if not math.isfinite(update(model, optimizer, images, labels, bf16)):
            break
    return model


def _sgd(model: nn.Module, rate: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)


def _side_by_side(predict: Callable[[], object], model: nn.Module, train: ImageDataset) -> Row:
    """Median seconds of a prediction and of a step of SGD, in turns: both have what else the machine does."""
    optimizer = _sgd(model.train(), 0.01)
    images, labels = train.sample(BATCH, torch.Generator(train.images.device).manual_seed(0))
    bf16 = has_bf16(images.device)
    work = {"seconds": predict, "step_seconds": lambda: update(model, optimizer, images, labels, bf16)}
    times = [[_seconds(done, images.is_cuda) for done in work.values()] for _ in range(TURNS + 1)]
    return dict(zip(work, map(statistics.median, zip(*times[1:], strict=True)), strict=True))  # the first warms up


@torch.no_grad()
def _milliseconds(model: nn.Module, images: Tensor) -> float:
    return 1000 * statistics.median(_seconds(lambda: model(images), images.is_cuda) for _ in range(TURNS))


def _seconds(work: Callable[[], object], cuda: bool) -> float:
    started = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
