"""A network for anybody's classes without a gradient step: statistics of norms, and a classifier in closed form."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..graph import trace
from ..graph.meta_copy import meta_copy
from .batches import check_labels, described, images_and_labels
from .calibration import START, calibrate, device_of, has_statistics, modes_kept

HEADS = ("ridge", "prototype")

_RIDGES = torch.logspace(-8, 4, 25, dtype=torch.float64)  # relative to the features' mean variance
_MOST_KEPT = 4096  # rows of features that are left out one at a time, or as many as there are features
_ROUNDING = 1e-13  # of a sum of squares in float64
_SHARPNESS = (1e-3, 1e3)  # inverse temperatures to choose from, relative to the logits' deviation


@dataclass
class AdaptReport:
    """What `adapt` made.

    Attributes:
        head: "ridge" or "prototype".
        images: How many it was made from.
        features: Numbers that enter the classifier; of the first one, where a model has several.
        classes: Outputs of the classifier.
        missing: Classes without an image; they are never the answer.
        ridge: Penalty on the squared weights that leaving one out chose, for features as they are; 0 for prototypes.
        temperature: What the logits were divided by, so that their softmax says how sure the model is.
        accuracy: Share of images that are classified rightly when each is left out in turn; NaN where no class has two.
    """

    head: str
    images: int
    features: int
    classes: int
    missing: list[int]
    ridge: float
    temperature: float
    accuracy: float

    def __str__(self) -> str:
        missing = f", {len(self.missing)} without any" if self.missing else ""
        return (
            f"{self.head} head on {self.features} features from {self.images:,} images of {self.classes} classes"
            f"{missing}; {self.accuracy:.1%} right when each is left out in turn"
        )


def adapt(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], head: str = "ridge") -> AdaptReport:
    """Fits a model to labelled images in two passes over them, without a gradient step.

    The first pass gives norms their statistics (`calibrate`). In the second, what enters the classifier is gathered,
    and its weights follow in closed form: by ridge regression on the classes' indicators, with the penalty that is best
    when each image is left out in turn, or from the classes' mean features ("prototype"), for very few images. The
    classifier stays the layer that it was, with new values. Logits are scaled so that the softmax of those of images
    left out fits their labels best.

    Args:
        model: One of timm's, or any module that `trace` reads and whose output is that of a linear layer or 1x1
            convolution, its mean over positions, or the mean of several such.
        batches: Images, on which the model can be called, and labels [n]; can be gone through twice, as lists and
            loaders can.
        head: "ridge" or "prototype".

    Returns:
        What was made of how much, and an estimate of its accuracy.

    Raises:
        ValueError: If the batches are empty, can be gone through only once, or hold images or features that are not
            finite or labels that are not among the classifier's; or if the model's output is not that of linear layers,
            or their weights do not fit the model's type. The model is then as it was.
        TraceError: If the model cannot be traced.
    """
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}.")
    if iter(batches) is batches:
        raise ValueError("The batches can be gone through only once, but are needed twice; give a list or a loader.")
    statistics = [
        (buffer, buffer.clone())
        for module in model.modules()
        if has_statistics(module)
        for name, buffer in module.named_buffers(recurse=False)
        if name in START
    ]
    try:
        calibrate(model, batches)
        layers, moments = _gather(model, batches)
        solutions = [(_ridge if head == "ridge" else _prototypes)(each) for each in moments]
        written = [_fitting(layer, solution) for layer, solution in zip(layers, solutions, strict=True)]
    except BaseException:
        for buffer, before in statistics:
            buffer.copy_(before)
        raise
    with torch.no_grad():
        for parameter, value in (pair for pairs in written for pair in pairs):
            parameter.copy_(value)
    first, solution = moments[0], solutions[0]
    return AdaptReport(
        head=head,
        images=first.count,
        features=first.features,
        classes=first.classes,
        missing=(first.counts == 0).nonzero().flatten().tolist(),
        ridge=solution.ridge,
        temperature=solution.temperature,
        accuracy=solution.accuracy,
    )


# ---- what enters the classifier --------------------------------------------------------------------------------------


@torch.no_grad()
def _gather(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[_Layer], list[_Moments]]:
    """The model's classifiers, and moments of what enters each."""
    device = device_of(model)
    layers: list[_Layer] = []
    moments: list[_Moments] = []
    with modes_kept(model), contextlib.ExitStack() as hooks:
        model.eval()
        for batch in batches:
            images, labels = images_and_labels(batch)
            if not layers:
                layers = _classifiers(model, images.shape[1:])
                moments = [_Moments(layer.features, layer.classes, layer.bias is not None) for layer in layers]
                for layer in layers:
                    hooks.callback(layer.module.register_forward_pre_hook(layer.keep).remove)
            output = model(images.to(device))
            check_labels(images, labels, layers[0].classes)
            _check_output(output, layers)
            for layer, each in zip(layers, moments, strict=True):
                each.add(layer.entered.double(), labels.to(device, torch.int64))
    if not layers:
        raise ValueError("There are no batches to adapt to; give at least one.")
    return layers, moments


class _Layer:
    """A linear layer or 1x1 convolution that gives logits."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.weight = module.get_parameter("weight")
        self.bias = dict(module.named_parameters()).get("bias")
        self.classes, self.features = self.weight.shape[:2]
        self.entered = torch.empty(0)

    def keep(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Takes what enters, [n, d]: the mean over positions if there are some, which a linear layer commutes with."""
        entered = args[0]
        if isinstance(self.module, nn.Conv2d):
            self.entered = entered.flatten(2).mean(2)
        else:
            self.entered = entered.flatten(1, -2).mean(1) if entered.ndim > 2 else entered

    def logits(self) -> Tensor:
        """[n, classes]."""
        return nn.functional.linear(self.entered, self.weight.flatten(1), self.bias)


def _classifiers(model: nn.Module, input_size: torch.Size) -> list[_Layer]:
    """The layers whose outputs are the logits, as the model's graph has them."""
    owners = [name.rpartition(".")[0] for name in trace(meta_copy(model), tuple(input_size)).head]  # frozen ones too
    modules = [model.get_submodule(name) for name in dict.fromkeys(owners)]
    for module in modules:
        pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        if not pointwise and not isinstance(module, nn.Linear):
            raise ValueError(f"The classifier is a {type(module).__name__}; only a linear layer can be fitted.")
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no classifier; give it one, with num_classes or reset_classifier in timm."
        )
    return [_Layer(module) for module in modules]


def _check_output(output: object, layers: list[_Layer]) -> None:
    """Raises ValueError where other features are needed, or other layers."""
    if not all(layer.entered.isfinite().all() for layer in layers):
        raise ValueError("What enters the classifier is not finite for these images: nothing can be fitted to it.")
    expected = torch.stack([layer.logits() for layer in layers]).mean(0)
    tolerance = 100 * torch.finfo(expected.dtype).eps * float(expected.abs().amax())
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        found = described(output)
    elif torch.allclose(output, expected, rtol=0, atol=tolerance):
        return
    else:
        found = "something else"
    raise ValueError(f"The model's output is {found}, not the logits of its classifier {tuple(expected.shape)}.")


# ---- moments, a batch at a time --------------------------------------------------------------------------------------


class _Moments:
    """Sums over rows of features, float64, in memory that grows with d², not with the rows.

    At most max(d, 4096) rows are kept as well: all of them, or as many that are drawn evenly.
    """

    def __init__(self, features: int, classes: int, centred: bool):
        """Centred moments are those of a layer with a bias."""
        self.features, self.classes, self.centred = features, classes, centred
        self.count = 0
        self.most = max(features, _MOST_KEPT)
        self._generator = torch.Generator().manual_seed(0)

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Takes float64 [n, d] and int64 [n]."""
        if self.count == 0:
            # Sums about a mean lose no digits to one that is large.
            self.origin = rows.mean(0) if self.centred else rows.new_zeros(self.features)
            self.sums, self.counts = rows.new_zeros(self.classes, self.features), rows.new_zeros(self.classes)
            self.kept, self.kept_labels = rows.new_zeros(0, self.features), labels[:0]
            self.products: Tensor | None = None  # only once there are more rows than are kept
        rows = rows - self.origin
        self.sums.index_add_(0, labels, rows)
        self.counts += labels.bincount(minlength=self.classes)
        if self.products is None and self.count + len(rows) > self.most:
            self.products = self.kept.T @ self.kept
        if self.products is not None:
            self.products.addmm_(rows.T, rows)
        free = min(len(rows), self.most - len(self.kept))
        self.kept, self.kept_labels = torch.cat((self.kept, rows[:free])), torch.cat((self.kept_labels, labels[:free]))
        # Reservoir sampling: of all rows so far, each is kept with the same probability.
        for row in range(free, len(rows)):
            place = int(torch.randint(self.count + row + 1, (), generator=self._generator))
            if place < self.most:
                self.kept[place], self.kept_labels[place] = rows[row], labels[row]
        self.count += len(rows)

    def mean(self) -> Tensor:
        """[d], about the origin; zero if not centred."""
        return self.sums.sum(0) / self.count if self.centred else self.origin

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [r] above rounding, and eigenvectors [d, r], of the rows' products [d, d] about their mean."""
        mean = self.mean()
        if self.products is None:
            rows = self.kept - mean
            if len(rows) <= self.features:  # the dual form
                values, vectors = torch.linalg.eigh(rows @ rows.T)
                above = values > values[-1].clamp(min=0) * _ROUNDING
                return values[above], rows.T @ vectors[:, above] / values[above].sqrt()
            products = rows.T @ rows
        else:
            products = self.products - self.count * mean.outer(mean)
        values, vectors = torch.linalg.eigh(products)
        above = values > values[-1].clamp(min=0) * _ROUNDING
        return values[above], vectors[:, above]


# ---- closed forms ----------------------------------------------------------------------------------------------------


@dataclass
class _Solution:
    weight: Tensor  # float64 [classes, d]
    bias: Tensor  # [classes]
    ridge: float
    temperature: float
    accuracy: float


def _ridge(moments: _Moments) -> _Solution:
    """Minimises Σ ‖y − Wx − b‖² + λ‖W‖² for indicators y of the classes, with the λ that leaving one out finds best."""
    mean = moments.mean()
    priors = moments.counts / moments.count if moments.centred else torch.zeros_like(moments.counts)
    values, vectors = moments.spectrum()
    cross = vectors.T @ (moments.sums - moments.counts[:, None] * mean).T  # [r, classes]
    rows = (moments.kept - mean) @ vectors
    wanted = nn.functional.one_hot(moments.kept_labels, moments.classes).double()
    others = moments.counts[moments.kept_labels] > 1  # nobody can know the class of its only image

    def left_out(ridge: Tensor) -> Tensor:
        """Each kept row's logits by the weights that all other rows give."""
        scaled = rows / (values + ridge)
        leverage = (rows * scaled).sum(1) + (1 / moments.count if moments.centred else 0)
        return wanted - (wanted - priors - scaled @ cross) / (1 - leverage).clamp(min=_ROUNDING)[:, None]

    variance = values.sum() / moments.features if len(values) else values.new_ones(())
    ridges = _RIDGES.to(values.device) * variance
    ridge = variance  # where each class has a single image
    if others.any():
        errors = torch.stack([(left_out(ridge) - wanted)[others].square().sum() for ridge in ridges])
        ridge = ridges[errors.argmin()]
    logits, labels = left_out(ridge)[others], moments.kept_labels[others]
    weight = (vectors @ (cross / (values + ridge)[:, None])).T
    return _Solution(weight, priors - weight @ (mean + moments.origin), float(ridge), *_sureness(logits, labels))


def _prototypes(moments: _Moments) -> _Solution:
    """The class whose mean feature is nearest: logits are minus half the squared distance, but for a common part."""
    if not moments.centred:
        raise ValueError("Prototypes need a classifier with a bias, and this one has none; choose the ridge head.")
    mean, counts = moments.mean(), moments.counts[:, None]
    sums = moments.sums - counts * mean
    prototypes = sums / counts.clamp(min=1)
    others = moments.counts[moments.kept_labels] > 1
    rows, labels = (moments.kept - mean)[others], moments.kept_labels[others]
    offsets = -prototypes.square().sum(1) / 2
    offsets[moments.counts == 0] = 100 * offsets.min() - 1  # farther than any image
    logits = rows @ prototypes.T + offsets
    without = (sums[labels] - rows) / (counts[labels] - 1)
    logits[torch.arange(len(labels)), labels] = (rows * without).sum(1) - without.square().sum(1) / 2
    return _Solution(prototypes, offsets - prototypes @ (mean + moments.origin), 0.0, *_sureness(logits, labels))


def _sureness(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """The temperature with the least cross-entropy on images that were left out, and the share that is right."""
    if not len(labels):
        return 1.0, math.nan
    own = logits.gather(1, labels[:, None])
    right = float((logits.argmax(1) == labels).double().mean())
    size = float(logits.std(correction=0)) or 1.0
    low, high = (math.log(bound / size) for bound in _SHARPNESS)
    for _ in range(50):  # the cross-entropy is convex in the sharpness
        middle = (low + high) / 2
        slope = ((math.exp(middle) * logits).softmax(1) * logits).sum(1, keepdim=True) - own
        low, high = (low, middle) if float(slope.mean()) > 0 else (middle, high)
    return math.exp(-low), right


def _fitting(layer: _Layer, solution: _Solution) -> list[tuple[Tensor, Tensor]]:
    """Parameters with their new values, at the solution's temperature and in the parameters' shape and type."""
    pairs = [(layer.weight, solution.weight / solution.temperature)]
    if layer.bias is not None:
        pairs.append((layer.bias, solution.bias / solution.temperature))
    fitting: list[tuple[Tensor, Tensor]] = []
    for parameter, value in pairs:
        value = value.view(parameter.shape).to(parameter.dtype)
        if not value.isfinite().all():
            raise ValueError(f"The classifier's new weights are not finite in {parameter.dtype}; use a wider type.")
        fitting.append((parameter, value))
    return fitting
