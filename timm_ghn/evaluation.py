"""What predicted weights are worth: accuracy without training, next to random weights and to a few steps of SGD."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hub import load_ghn
from .hypernet import GHN
from .predictor import initialize

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
    """Gives norms with running statistics those of data; predicted weights come without.

    Batch norms, instance norms and timm's EvoNorms keep them. A running mean and variance become the average over the
    batches, each normalised by its own, deeper layers seeing what shallower ones make of it. Weights, modes and
    everything else stay as they are. A batch norm without running statistics normalises each batch by its own in
    evaluation too; there is nothing to calibrate, and a warning says so.

    Args:
        model: Any module; one without such norms is left alone.
        batches: Images, or tuples that start with them. They are moved to the model's device.

    Returns:
        The model.

    Raises:
        ValueError: If there are no batches, one is empty or not finite, or a statistic comes out not finite; the model
            is then as it was.
    """
    norms = {name: module for name, module in model.named_modules() if _has_statistics(module)}
    without = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and name not in norms
    ]
    if without:
        names = ", ".join(name or type(model).__name__ for name in without[:3]) + (", …" if len(without) > 3 else "")
        logger.warning("no running statistics in %s: the output for an image depends on its whole batch", names)
    if not norms:
        return model
    momenta = {norm: norm.momentum for norm in norms.values()}
    before = {norm: {name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms.values()}
    calls = dict.fromkeys(norms.values(), 0)

    def average(norm: Any, _: object) -> None:
        calls[norm] += 1
        norm.momentum = 1 / calls[norm]  # the average over all calls so far

    hooks = [norm.register_forward_pre_hook(average) for norm in calls]
    measured: set[nn.Module] = set()
    try:
        with _modes_kept(model), torch.no_grad():
            model.eval()
            for norm in calls:
                norm.training = True
                for name, value in _START.items():
                    if name in before[norm]:
                        norm.get_buffer(name).fill_(value)
            seen = 0
            for batch in batches:
                images = batch if isinstance(batch, Tensor) else batch[0]
                _check_images(images)
                model(images.to(_device(model)))
                seen += 1
        if not seen:
            raise ValueError("There are no batches to calibrate with; give at least one.")
        for name, norm in norms.items():
            if not all(norm.get_buffer(key).isfinite().all() for key in _START if key in before[norm]):
                raise ValueError(f"The statistics of {name} are not finite: its input for these images is too large.")
        measured = {norm for norm in calls if calls[norm]}
    finally:
        for hook in hooks:
            hook.remove()
        for norm in calls:
            norm.momentum = momenta[norm]
            for name, value in before[norm].items() if norm not in measured else ():
                norm.get_buffer(name).copy_(value)
    return model


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Gives every module its mode back, however the models' own `train` would have spread it."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# Running statistics before there are any.
_START = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_var", None), Tensor) and hasattr(module, "momentum")


def _device(model: nn.Module) -> torch.device:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _check_images(images: object) -> None:
    """Raises ValueError for what is no batch of images that a result can be computed from."""
    if not isinstance(images, Tensor) or images.ndim == 0:
        raise ValueError(f"A batch of images is a tensor, one image after the other, not {_described(images)}.")
    if not len(images):
        raise ValueError("A batch has no images; leave it out.")
    if not images.isfinite().all():
        raise ValueError("A batch of images has values that are NaN or infinite; nothing can be measured on them.")


def _check_labels(images: Tensor, labels: object, classes: int | None = None) -> None:
    """Raises ValueError for labels that are not an index below `classes` for each image."""
    if not isinstance(labels, Tensor) or labels.shape != (len(images),) or labels.dtype not in _INTEGERS:
        raise ValueError(
            f"Labels are the index of each image's class, integers of shape ({len(images)},) here, not "
            f"{_described(labels)}."
        )
    if classes is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        raise ValueError(f"Label {int(wrong)} is none of the {classes} classes, which are 0 to {classes - 1}.")


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of the images whose class the model, in eval mode, gives the largest logit; its mode is left as it was.

    An image that the model answers with NaN counts as wrong.

    Raises:
        ValueError: If there are no images, a batch is empty or not finite, labels are not one index of the model's
            classes for each image, or the model's output is not one logit for each class.
    """
    device = _device(model)
    right = total = 0
    with _modes_kept(model):
        model.eval()
        for images, labels in batches:
            _check_images(images)
            _check_labels(images, labels)
            logits = model(images.to(device))
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
                raise ValueError(
                    f"Accuracy needs a logit for each class, an output of shape ({len(images)}, classes), not "
                    f"{_described(logits)}."
                )
            _check_labels(images, labels, logits.shape[1])
            answered = ~logits.isnan().any(1)
            right += int(((logits.argmax(1) == labels.to(device)) & answered).sum())
            total += len(labels)
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
    with _modes_kept(model):
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
        ValueError: If there are no batches, one is empty or not finite, or labels are not one index for each image, of
            the GHN's classes where there are names among the models.
    """
    hypernet = load_ghn(ghn) if isinstance(ghn, str) else ghn
    models, kept = list(models), list(batches)
    if not kept:
        raise ValueError("There are no batches to rank on; give at least one.")
    classes = hypernet.config.num_classes if any(isinstance(model, str) for model in models) else None
    for images, labels in kept:
        _check_images(images)
        _check_labels(images, labels, classes)
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
