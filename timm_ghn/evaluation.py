"""What predicted weights are worth: accuracy without training, next to random weights and to a few steps of SGD."""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .assign import initialize
from .hub import load_ghn
from .hypernet import GHN

logger = logging.getLogger("timm_ghn.evaluation")

Batches = Iterable["tuple[Tensor, Tensor]"]

ZOO = (
    "resnet18", "resnet34", "resnet26", "resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d", "seresnet50",
    "vgg11_bn", "vgg16_bn", "densenet121", "densenet169", "regnetx_004", "regnetx_016", "regnety_004", "regnety_016",
    "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv3_small_100", "efficientnet_b0", "efficientnet_b1",
    "efficientnetv2_rw_t", "convnext_atto", "convnext_femto", "convnext_tiny", "vit_tiny_patch16_224",
    "vit_small_patch16_224", "mixer_s32_224", "mixer_s16_224", "poolformer_s12", "poolformer_s24", "poolformerv2_s12",
)  # fmt: skip
"""Real architectures of ten families, to evaluate on."""


def calibrate(model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> nn.Module:
    """Gives batch norms the statistics of data; predicted weights come without.

    A running mean and variance become the average over the batches, each normalised by its own, deeper layers seeing
    what shallower ones make of it. Weights, modes and everything else stay as they are.

    Args:
        model: Any module; one without batch norms is left alone.
        batches: Images, or tuples that start with them.

    Returns:
        The model.

    Raises:
        ValueError: If there are no batches.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        return model
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    before = {norm: {name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms}
    device = next(model.parameters()).device
    seen = 0
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
        with torch.no_grad():
            for batch in batches:
                model((batch if isinstance(batch, Tensor) else batch[0]).to(device))
                seen += 1
        if not seen:
            raise ValueError("There are no batches to calibrate with; give at least one.")
    except BaseException:
        for norm in norms:
            for name, value in before[norm].items():
                norm.get_buffer(name).copy_(value)
        raise
    finally:
        for norm in norms:
            norm.momentum = momenta[norm]
        for module, training in modes.items():
            module.training = training
    return model


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of the images whose class the model, in eval mode, gives the largest logit; its mode is left as it was.

    Raises:
        ValueError: If there are no images.
    """
    device, training = next(model.parameters()).device, model.training
    right = total = 0
    model.eval()
    try:
        for images, labels in batches:
            right += int((model(images.to(device)).argmax(1) == labels.to(device)).sum())
            total += len(labels)
    finally:
        model.train(training)
    if not total:
        raise ValueError("There are no images to measure the accuracy on; give at least one batch.")
    return right / total


def sgd(model: nn.Module, sample: Callable[[], tuple[Tensor, Tensor]], steps: int) -> nn.Module:
    """Trains a model in place for some steps of SGD with momentum, at a constant rate.

    Args:
        model: What to train.
        sample: Makes a batch of images and labels, on the model's device.
        steps: How many batches.
    """
    training = model.training
    model.train()
    # How the authors of DeepNets-1M train a single network.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4)
    for _ in range(steps):
        images, labels = sample()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    return model.train(training)


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


def measure(
    name: str,
    build: Callable[[], nn.Module],
    ghn: GHN,
    calibration: Batches,
    test: Batches,
    *,
    random: bool = False,
    sample: Callable[[], tuple[Tensor, Tensor]] | None = None,
    sgd_steps: int = 0,
    input_size: tuple[int, ...] | None = None,
) -> Measured:
    """Accuracy of one architecture with predicted weights, and with others if asked for.

    Args:
        name: How to call it.
        build: Makes the module, with the same random weights each time.
        ghn: Predicts.
        calibration: Batches for `calibrate`, before each measurement.
        test: Batches for `accuracy`; like those for `calibrate`, gone through several times.
        random: Measure the random weights too.
        sample: Makes a training batch for `sgd`.
        sgd_steps: Measure after so many steps of SGD from the random weights too.
        input_size: For `initialize`.

    Returns:
        The accuracies, or, if the architecture cannot be built, traced or run on these images, the error.
    """
    result = Measured(name)
    try:
        model = build()
        result.parameters = sum(parameter.numel() for parameter in model.parameters())
        if random:
            result.accuracy["random"] = accuracy(calibrate(model, calibration), test)
        report = initialize(model, ghn, input_size=input_size)
        result.predicted_fraction = report.predicted_fraction
        result.accuracy["predicted"] = accuracy(calibrate(model, calibration), test)
        if sgd_steps and sample is not None:
            model = sgd(build(), sample, sgd_steps)
            result.accuracy["sgd"] = accuracy(calibrate(model, calibration), test)
    except Exception as error:  # whatever an architecture raises on images of this size: the others are still of use
        result.error = f"{type(error).__name__}: {error}"
        logger.warning("%s cannot be measured: %s", name, result.error)
    return result


def rank(models: Iterable[str | nn.Module], batches: Batches, ghn: str | GHN = "ghn2") -> list[Measured]:
    """Orders architectures by the accuracy of their predicted weights, best first; nothing is trained.

    Args:
        models: timm's names, which are created for the batches' size and the GHN's classes, or modules, which are left
            as they are and go by the name of their class.
        batches: Images and labels to measure on; batch norms take their statistics from the same images.
        ghn: A loaded GHN, or whatever `load_ghn` takes.

    Returns:
        A row for each; those that cannot be measured come last, with their `error`.

    Raises:
        CheckpointError: If the GHN cannot be loaded.
    """
    hypernet = load_ghn(ghn) if isinstance(ghn, str) else ghn
    kept = list(batches)
    if not kept:
        raise ValueError("There are no batches to rank on; give at least one.")
    rows = []
    for model in models:
        if isinstance(model, str):
            name, build = model, _creator(model, hypernet.config.num_classes, kept[0][0].shape[-1])
        else:
            name, build = type(model).__name__, _copier(model)
        rows.append(measure(name, build, hypernet, kept, kept))
    return sorted(rows, key=lambda row: -row.accuracy.get("predicted", -math.inf))


def _creator(name: str, num_classes: int, image_size: int) -> Callable[[], nn.Module]:
    return lambda: create_model(name, num_classes, image_size)


def _copier(model: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(model)


def create_model(name: str, num_classes: int, image_size: int, **options: Any) -> nn.Module:
    """A timm model for images of a size; those with a table of positions are told the size.

    Its weights are random unless the `options`, which are timm's, say otherwise.
    """
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


def plot_histogram(results: Iterable[Measured], picture: Path) -> None:
    """Draws how the accuracies are distributed over the architectures, one histogram for each kind of weights."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning('no histogram is drawn: pip install "timm-ghn[plot]"')
        return
    from matplotlib.figure import Figure

    measured = [result for result in results if result.accuracy]
    kinds = list(dict.fromkeys(kind for result in measured for kind in result.accuracy))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for kind in kinds:
        axes.hist([100 * r.accuracy[kind] for r in measured if kind in r.accuracy], bins=20, alpha=0.6, label=kind)
    axes.set(xlabel="top-1, %", ylabel="architectures")
    axes.legend()
    figure.savefig(picture)


def seeded(build: Callable[[], nn.Module], seed: int, device: torch.device | str = "cpu") -> Callable[[], nn.Module]:
    """A builder that makes the same random weights each time, and leaves the caller's random state alone."""

    def build_seeded() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build().to(device)

    return build_seeded
