"""What predicted weights are worth: accuracy without training, next to random weights and to a few steps of SGD."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hypernet import GHN
from ..predictor import initialize
from .batches import Batches, check_images, check_labels, described
from .calibration import calibrate, device_of, modes_kept

logger = logging.getLogger("timm_ghn.evaluation")

ZOO = (
    "resnet18", "resnet34", "resnet26", "resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d", "seresnet50",
    "vgg11_bn", "vgg16_bn", "densenet121", "densenet169", "regnetx_004", "regnetx_016", "regnety_004", "regnety_016",
    "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv3_small_100", "efficientnet_b0", "efficientnet_b1",
    "efficientnetv2_rw_t", "convnext_atto", "convnext_femto", "convnext_tiny", "vit_tiny_patch16_224",
    "vit_small_patch16_224", "mixer_s32_224", "mixer_s16_224", "poolformer_s12", "poolformer_s24", "poolformerv2_s12",
)  # fmt: skip
"""Real architectures of ten families, to evaluate on."""


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of the images whose class the model, in eval mode, gives the largest logit; its mode is left as it was.

    An image that the model answers with NaN counts as wrong.

    Raises:
        ValueError: If there are no images, a batch is empty or not finite, labels are not one index of the model's
            classes for each image, or the model's output is not one logit for each class.
    """
    labels, answers, _ = _answers(model, batches)
    return int((labels == answers).sum()) / len(labels)


def confusion(model: nn.Module, batches: Batches) -> Tensor:
    """int64 [classes, classes]: how many images of each class (rows) the model gives each answer (columns).

    Images that it answers with NaN are not among them. Raises what `accuracy` raises.
    """
    labels, answers, classes = _answers(model, batches)
    labels, answers = labels[answers >= 0], answers[answers >= 0]
    return (labels * classes + answers).bincount(minlength=classes**2).view(classes, classes)


@torch.no_grad()
def _answers(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor, int]:
    """Each image's label, the class with the largest logit or -1 for NaN, and how many classes there are."""
    device = device_of(model)
    found: list[tuple[Tensor, Tensor]] = []
    classes = 0
    with modes_kept(model):
        model.eval()
        for images, labels in batches:
            check_images(images)
            check_labels(images, labels)
            logits = model(images.to(device))
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
                raise ValueError(
                    f"Accuracy needs a logit for each class, an output of shape ({len(images)}, classes), not "
                    f"{described(logits)}."
                )
            classes = logits.shape[1]
            check_labels(images, labels, classes)
            answers = logits.argmax(1).masked_fill(logits.isnan().any(1), -1)
            found.append((labels.to("cpu", torch.int64), answers.cpu()))
    if not found:
        raise ValueError("There are no images to measure the accuracy on; give at least one batch.")
    every_label, every_answer = (torch.cat(parts) for parts in zip(*found, strict=True))
    return every_label, every_answer, classes


def sgd(model: nn.Module, sample: Callable[[], tuple[Tensor, Tensor]], steps: int) -> nn.Module:
    """Trains a model in place for some steps of SGD with momentum, at a constant rate.

    Args:
        model: What to train.
        sample: Makes a batch of images and labels, on the model's device.
        steps: How many batches.
    """
    with modes_kept(model):
        model.train()
        # How the authors of DeepNets-1M train a single network.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4)
        for _ in range(steps):
            images, labels = sample()
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
    return model


@dataclass
class Measured:
    """What was measured of an architecture.

    Attributes:
        name: Its name.
        accuracy: Top-1, 0 to 1, by kind of weights: "predicted", and whatever it is compared with.
        parameters: Number of parameter elements.
        predicted_fraction: Share of them that was predicted.
        error: Why nothing could be measured; None if it could.
    """

    name: str
    accuracy: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    predicted_fraction: float = 0.0
    error: str | None = None


@contextmanager
def failures_noted(result: Measured) -> Iterator[None]:
    """Makes whatever an architecture raises on images of a size its `error`: the others are still of use."""
    try:
        yield
    except Exception as error:
        # Checks may say nothing; the last line outside torch then says what they checked.
        lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
        result.error = f"{type(error).__name__}: {str(error) or lines[-1]}"
        logger.warning("%s cannot be measured: %s", result.name, result.error)


def measure(
    name: str,
    build: Callable[[], nn.Module],
    ghn: GHN,
    calibration: Batches,
    test: Batches,
    *,
    sample: Callable[[], tuple[Tensor, Tensor]] | None = None,
    sgd_steps: int = 0,
) -> Measured:
    """Accuracy of one architecture with random and with predicted weights, and after steps of SGD if asked for.

    Args:
        name: How to call it.
        build: Makes the module, with the same random weights each time.
        ghn: Predicts.
        calibration: Batches for `calibrate`, before each measurement.
        test: Batches for `accuracy`; like those for `calibrate`, gone through several times.
        sample: Makes a training batch for `sgd`.
        sgd_steps: Measure after so many steps of SGD from the random weights too.

    Returns:
        The accuracies, or, if the architecture cannot be built, traced or run on these images, the error.
    """
    result = Measured(name)
    with failures_noted(result):
        model = build()
        result.parameters = sum(parameter.numel() for parameter in model.parameters())
        result.accuracy["random"] = accuracy(calibrate(model, calibration), test)
        report = initialize(model, ghn)
        result.predicted_fraction = report.predicted_fraction
        result.accuracy["predicted"] = accuracy(calibrate(model, calibration), test)
        if sgd_steps and sample is not None:
            model = sgd(build(), sample, sgd_steps)
            result.accuracy["sgd"] = accuracy(calibrate(model, calibration), test)
    return result


def create_model(name: str, num_classes: int, image_size: int | tuple[int, ...], **options: Any) -> nn.Module:
    """A timm model for images of a size, a side or (height, width); those with a table of positions are told the size.

    Its weights are random unless the `options`, which are timm's, say otherwise.
    """
    if not isinstance(image_size, int) and len(set(image_size)) == 1:
        (image_size,) = set(image_size)  # some models take nothing else
    model: nn.Module
    try:
        model = timm.create_model(name, num_classes=num_classes, img_size=image_size, **options)
    except TypeError:  # there is no such argument: any size will do
        model = timm.create_model(name, num_classes=num_classes, **options)
    return model


@dataclass(frozen=True)
class Summary:
    """Of one kind of weights over all architectures: mean, its standard error, smallest and largest, and how many."""

    mean: float
    error: float
    smallest: float
    largest: float
    count: int


def summarize(results: Iterable[Measured], kind: str = "predicted") -> Summary:
    """Summary of an accuracy over the architectures it was measured on."""
    values = torch.tensor([r.accuracy[kind] for r in results if kind in r.accuracy], dtype=torch.float64)
    count = len(values)
    if not count:
        return Summary(math.nan, math.nan, math.nan, math.nan, 0)
    error = values.std().item() / math.sqrt(count) if count > 1 else math.nan
    return Summary(values.mean().item(), error, values.min().item(), values.max().item(), count)


def seeded(build: Callable[[], nn.Module], seed: int, device: torch.device | str = "cpu") -> Callable[[], nn.Module]:
    """A builder that makes the same random weights each time, and leaves the caller's random state alone."""

    def build_seeded() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build().to(device)

    return build_seeded
