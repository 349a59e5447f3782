"""Architectures ordered by the accuracy of their predicted weights."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..checkpoints.catalog import CATALOG
from ..checkpoints.load import load_ghn
from ..graph.meta_copy import meta_copy
from ..hypernet import GHN
from ..lazy_init import on_meta
from ..prediction import write
from ..predictor import Predictor
from ..training.sampling import measured_cost
from . import adaptation
from .accuracy import Measured, accuracy, create_model, failures_noted
from .batches import Batches, check_labels, images_and_labels
from .calibration import calibrate, device_of

logger = logging.getLogger("timm_ghn.evaluation")

HEADS = ("auto", "predict", *adaptation.HEADS)

_PUBLISHED = (
    "That of the published GHN-2 is 0.26 on its own test split, where one epoch of SGD has 0.43 and five epochs 0.64"
)


@dataclass(frozen=True)
class Trust:
    """How far an order by predicted accuracy is that of trained accuracies; as text, a sentence that says so.

    Attributes:
        ghn: What predicted.
        tau: Kendall's tau between both, from -1 to 1, over networks of the GHN's test split; None if nobody has
            measured it.
        error: Its standard error.
        networks: How many it was measured on.
        source: Where the measurement is.
    """

    ghn: str
    tau: float | None = None
    error: float | None = None
    networks: int | None = None
    source: str | None = None

    def __str__(self) -> str:
        if self.tau is None:
            return (
                "How far this order is that of trained accuracies (Kendall's tau) has not been measured for "
                f"{self.ghn}. {_PUBLISHED}."
            )
        error = "" if self.error is None else f" ± {self.error:.2f}"
        return (
            f"How far this order is that of trained accuracies: Kendall's tau {self.tau:.2f}{error} for {self.ghn}, "
            f"over {self.networks} networks ({self.source}); 1 is the same order, 0 none. {_PUBLISHED}."
        )


def trust(ghn: str) -> Trust:
    """What is known of a GHN, by its tag."""
    pin = None if ghn in CATALOG.registered else CATALOG.published.get(ghn)
    return Trust(ghn, **(pin.ranking or {})) if pin else Trust(ghn)


@dataclass
class Ranked(Measured):
    """What was measured of a candidate.

    Its `accuracy` is that of "predicted" weights or, where a head was fitted to images, of "adapted" ones; beside the
    latter is that of images "left out" of the fit in turn.

    Attributes:
        macs: Multiply-accumulates of one image of the size that was measured on.
        seconds: Wall-clock time from its name to its accuracy.
    """

    macs: int = 0
    seconds: float = 0.0

    @property
    def top1(self) -> float | None:
        """The accuracy that counts, 0 to 1; None if it could not be measured."""
        return self.accuracy.get("predicted", self.accuracy.get("adapted"))


class Ranking(list[Ranked]):
    """Rows, the best first; those that could not be measured come last, with their `error`.

    Attributes:
        trust: How far to trust the order.
    """

    def __init__(self, rows: Iterable[Ranked], trust: Trust):
        super().__init__(sorted(rows, key=lambda row: -math.inf if row.top1 is None else row.top1, reverse=True))
        self.trust = trust


def rank(
    models: str | nn.Module | Iterable[str | nn.Module],
    batches: Batches,
    ghn: str | os.PathLike[str] | GHN = "ghn2",
    *,
    held_out: Batches | None = None,
    num_classes: int | None = None,
    head: str = "auto",
    max_params: int | None = None,
    max_macs: int | None = None,
) -> Ranking:
    """Orders architectures by the accuracy of their predicted weights, best first; nothing is trained.

    Images of the GHN's classes are classified by the predicted heads, after `calibrate`. For any others a head is
    fitted in closed form, as by `adapt`.

    Args:
        models: One or several: timm's names, which are created for the batches' size and classes, or modules, which
            are left as they are and go by the name of their class.
        batches: Images and labels. Norms take their statistics from them, and a head is fitted to them.
        ghn: A loaded GHN, or whatever `load_ghn` takes.
        held_out: Images and labels to measure on. If None, these are `batches` themselves for predicted heads; where
            a head is fitted, that is to one half of each batch's images, and the other is measured on.
        num_classes: Of the images; the GHN's if None.
        head: "auto" takes the predicted one where `num_classes` is the GHN's and "ridge" elsewhere; "predict", "ridge"
            or "prototype" decide it, "ridge" for other classes that happen to be as many.
        max_params: Leave out what has more parameter elements, before anything is predicted.
        max_macs: Leave out what takes more multiply-accumulates for an image, likewise.

    Returns:
        A row for each within the limits; `.trust` says how far to trust their order.

    Raises:
        CheckpointError: If the GHN cannot be loaded.
        ValueError: If there is no such head, there are no batches, one is empty or not finite, or labels are not one
            index for each image, of the classes where there are names among the models.
    """
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}.")
    hypernet = ghn if isinstance(ghn, GHN) else load_ghn(ghn)
    models = [models] if isinstance(models, str | nn.Module) else list(models)
    support = list(map(images_and_labels, batches))
    test = support if held_out is None else list(map(images_and_labels, held_out))
    if not support or not test:
        raise ValueError("There are no batches to rank on; give at least one.")
    classes = num_classes or hypernet.config.num_classes
    for images, labels in [*support, *(test if held_out is not None else ())]:
        check_labels(images, labels, classes if any(isinstance(model, str) for model in models) else None)
    if head == "auto":
        known = hypernet.config.predicts_head and classes == hypernet.config.num_classes
        head = "predict" if known else "ridge"
    if held_out is None and head != "predict":
        support, test = _halves(support)
        if not test:
            raise ValueError("Each batch is a single image: no head can be fitted to one and measured on another.")
    found = measured(models, hypernet, support, test, classes, head, max_params, max_macs)
    return Ranking((row for row, _ in found), trust(ghn) if isinstance(ghn, str) else Trust("this GHN"))


def _halves(batches: list[tuple[Tensor, Tensor]]) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Two halves of each batch, drawn at random, since labels may be in any order, and the same each time."""
    generator = torch.Generator().manual_seed(0)
    halves: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] = [], []
    for images, labels in batches:
        parts = torch.randperm(len(labels), generator=generator).tensor_split(2)
        for half, rows in zip(halves, parts, strict=True):
            if len(rows):
                half.append((images[rows.to(images.device)], labels[rows.to(labels.device)]))
    return halves


def measured(
    models: Iterable[str | nn.Module],
    ghn: GHN,
    support: Batches,
    test: Batches,
    num_classes: int,
    head: str,
    max_params: int | None = None,
    max_macs: int | None = None,
) -> Iterator[tuple[Ranked, nn.Module | None]]:
    """Measures candidates one after the other, each when it is asked for; `rank` says what the arguments are.

    Yields:
        A row for each candidate within the limits, and the model with the weights and statistics that were measured,
        on the GHN's device if it was made from a name; None if it cannot be built, traced or run on these images.
    """
    size = next(iter(test))[0].shape[1:]
    predictor = Predictor(ghn, "predict" if head == "predict" else "keep")
    for candidate in models:
        row, model = Ranked(candidate if isinstance(candidate, str) else type(candidate).__name__), None
        started = time.perf_counter()
        with failures_noted(row):
            if isinstance(candidate, str):
                build, device = partial(create_model, candidate, num_classes, tuple(size[-2:])), device_of(ghn)
                skeleton = on_meta(build)
            else:
                build, device, skeleton = partial(copy.deepcopy, candidate), device_of(candidate), candidate
            cost = measured_cost(meta_copy(skeleton), torch.empty(1, *size, device="meta"))
            row.parameters, row.macs = cost.params, cost.macs
            if cost.params > (max_params or math.inf) or cost.macs > (max_macs or math.inf):
                logger.info("%s is beyond the limits: %s", row.name, cost)
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # for what is not predicted
                made, prediction = predictor.build(build)
                write(made, prediction)
            made.to(device)
            row.predicted_fraction = prediction.report.predicted_fraction
            if head == "predict":
                row.accuracy["predicted"] = accuracy(calibrate(made, support), test)
            else:
                left_out = adaptation.adapt(made, support, head).accuracy
                row.accuracy = {"adapted": accuracy(made, test), "left out": left_out}
            model = made
        row.seconds = time.perf_counter() - started
        yield row, model


def pareto_front(rows: Iterable[Ranked]) -> list[Ranked]:
    """The rows that no other one is both cheaper (in multiply-accumulates) and better than, from the cheapest on."""
    front: list[Ranked] = []
    known = [row for row in rows if row.top1 is not None]
    for row in sorted(known, key=lambda row: (row.macs, -(row.top1 or 0))):
        if not front or (row.top1 or 0) > (front[-1].top1 or 0):
            front.append(row)
    return front
