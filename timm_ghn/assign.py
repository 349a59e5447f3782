"""From predicted tiles to a model's parameters: tile, check, copy; what is kept, and why."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses import FakeTensor

from .ambient import plain_torch
from .errors import PredictionError
from .finetune import check_preparation, prepare
from .graph import ComputationGraph, trace

if TYPE_CHECKING:
    from .hypernet import GHN

HEADS = ("auto", "predict", "keep")


@dataclass
class Report:
    """What a prediction did to a model.

    Attributes:
        predicted: Names of the parameters that were predicted, with their number of elements.
        kept: Names of the parameters left alone, each with the reason.
        predicted_fraction: Share of the model's parameter elements that were predicted.
        seconds: Wall time per stage.
    """

    predicted: dict[str, int]
    kept: dict[str, str]
    predicted_fraction: float
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"predicted  {len(self.predicted)} parameters, {sum(self.predicted.values()):,} elements "
            f"({self.predicted_fraction:.2%})",
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"kept       {names[0]}{more}: {reason}")
        lines.append("seconds    " + ", ".join(f"{stage} {taken:.3f}" for stage, taken in self.seconds.items()))
        return "\n".join(lines)


class Prediction(Mapping[str, torch.Tensor]):
    """Predicted parameters by name, each in the parameter's full shape; `.report` says what is not among them.

    Only the tiles are held; a full tensor is made when it is asked for.
    """

    def __init__(
        self, tiles: dict[str, torch.Tensor], shapes: dict[str, torch.Size], report: Report, graph: ComputationGraph
    ):
        self.tiles = tiles
        self.shapes = shapes
        self.report = report
        self.graph = graph

    def replaced(self, tensors: Mapping[str, torch.Tensor]) -> Prediction:
        """The same with other values for some parameters."""
        return Prediction({**self.tiles, **tensors}, self.shapes, self.report, self.graph)

    def __getitem__(self, name: str) -> torch.Tensor:
        return tile(self.tiles[name], self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tiles)

    def __len__(self) -> int:
        return len(self.tiles)


def tile(source: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Repeats `source` along every dimension until `shape` is covered, and cuts what is over; differentiable.

    Dimensions that `source` lacks at the end count as 1: a constant fits all, a matrix fits a 1x1 convolution.
    """
    source = _with_dims(source, len(shape))
    if source.shape == tuple(shape):
        return source
    repeats = [-(-wanted // have) for wanted, have in zip(shape, source.shape, strict=True)]
    return source.repeat(repeats)[tuple(slice(wanted) for wanted in shape)]


def tile_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """Writes ``tile(source, target.shape)`` into `target`, each element once and without a temporary of its size."""
    source = _with_dims(source, target.ndim)
    segments = []
    for wanted, have in zip(target.shape, source.shape, strict=True):
        whole = wanted // have * have
        segments.append([(0, whole)] * (whole > 0) + [(whole, wanted - whole)] * (wanted > whole))
    for block in itertools.product(*segments):
        view, part = target, source
        for dim in reversed(range(len(block))):
            start, length = block[dim]
            have = min(source.shape[dim], length)
            view = view.narrow(dim, start, length).unflatten(dim, (length // have, have))
            part = part.narrow(dim, 0, have).unsqueeze(dim)
        view.copy_(part)


def _with_dims(source: torch.Tensor, dims: int) -> torch.Tensor:
    return source.view((*source.shape, *(1,) * (dims - source.ndim)))


@plain_torch()
def predict(
    model: nn.Module,
    ghn: str | GHN = "ghn2",
    head: str = "auto",
    input_size: int | tuple[int, ...] | None = None,
    finetune: str | None = None,
) -> Prediction:
    """Predicts a model's parameters without touching the model.

    Args:
        model: Any eager module; timm's know their input size, others take ``(3, 224, 224)`` unless `input_size` says
            otherwise.
        ghn: A loaded GHN, or whatever `load_ghn` takes.
        head: ``"auto"`` predicts the classification layer if its classes are the checkpoint's; ``"predict"`` forces it
            (class rows are repeated or cut), ``"keep"`` leaves it to the model.
        input_size: Input size without the batch dimension.
        finetune: How to prepare the weights for training, see `timm_ghn.finetune.prepare`; None leaves them as they
            are predicted.

    Raises:
        TraceError: If the model cannot be traced.
        PredictionError: If a predicted tensor does not fit its parameter or is not finite.
        CheckpointError: If the GHN cannot be loaded.
    """
    check_head(head)
    check_preparation(finetune)
    started = time.perf_counter()
    if isinstance(ghn, str):
        from .hub import load_ghn

        ghn = load_ghn(ghn)
    loaded = time.perf_counter()
    graph = trace(model, input_size)
    traced = time.perf_counter()
    prediction = predict_from_graph(dict(model.named_parameters()), graph, ghn, head)
    prediction.report.seconds = {
        "load": loaded - started,
        "trace": traced - loaded,
        "predict": time.perf_counter() - traced,
    }
    return prediction if finetune is None else prepare(model, prediction, finetune)


def check_head(head: str) -> None:
    """Raises ValueError for a `head` that `predict` does not know."""
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}.")


def predict_from_graph(
    parameters: Mapping[str, nn.Parameter], graph: ComputationGraph, ghn: GHN, head: str = "auto"
) -> Prediction:
    """Predicts named parameters whose graph is known; see `predict`."""
    classes = [parameters[name].shape[0] for name in graph.head]
    predict_head = head == "predict" or (head == "auto" and all(size == ghn.config.num_classes for size in classes))
    with torch.no_grad():
        (predicted,) = ghn([graph], predict_head=predict_head)

    kept = {name: reason for name, reason in graph.kept.items() if name not in predicted}
    if not predict_head:
        reason = "head=keep" if head == "keep" else f"head: the checkpoint has {ghn.config.num_classes} classes"
        kept.update(dict.fromkeys(graph.head, reason))
    tiles = {name: tensor for name, tensor in predicted.items() if name in parameters and name not in kept}
    for name, tensor in tiles.items():
        _check(name, tensor, parameters[name])
    missing = parameters.keys() - tiles.keys() - kept.keys()
    if missing:
        raise PredictionError(f"No prediction and no reason for {sorted(missing)[0]}; please report this architecture.")
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    report = Report(
        predicted={name: sizes[name] for name in parameters if name in tiles},
        kept={name: kept[name] for name in parameters if name in kept},
        predicted_fraction=sum(sizes[name] for name in tiles) / max(1, sum(sizes.values())),
    )
    return Prediction(tiles, {name: parameters[name].shape for name in tiles}, report, graph)


def _check(name: str, tensor: torch.Tensor, parameter: nn.Parameter) -> None:
    if not parameter.is_floating_point():
        raise PredictionError(f"{name} is {parameter.dtype}; only floating-point parameters can be predicted.")
    trailing = parameter.shape[tensor.ndim :]
    if tensor.ndim > parameter.ndim or (tensor.ndim and trailing.numel() > 1) or tensor.numel() == 0:
        raise PredictionError(f"{name} has shape {tuple(parameter.shape)}, its prediction {tuple(tensor.shape)}.")
    if not torch.isfinite(tensor).all():
        raise PredictionError(f"The prediction for {name} is not finite; the GHN's weights are damaged or too large.")


def initialize(
    model: nn.Module,
    ghn: str | GHN = "ghn2",
    head: str = "auto",
    input_size: int | tuple[int, ...] | None = None,
    finetune: str | None = None,
) -> Report:
    """Predicts a model's parameters and writes them in place: all or, if anything is wrong, none.

    Device, dtype, mode and buffers of the model stay as they are. Arguments and errors are those of `predict`.
    """
    prediction = predict(model, ghn, head, input_size, finetune)
    write(model, prediction)
    return prediction.report


@plain_torch()
def write(model: nn.Module, prediction: Prediction) -> None:
    """Writes a prediction into the model it was made for, and corrects its report by what cannot be written."""
    started = time.perf_counter()
    report = prediction.report
    parameters = dict(model.named_parameters())
    for name in list(report.predicted):
        parameter = parameters[name]
        if parameter.is_meta or isinstance(parameter, FakeTensor):
            report.kept[name] = "nothing was written: it is on the meta device, which holds no values"
            del report.predicted[name]
            continue
        # What was made in inference mode can only be changed in it.
        with torch.inference_mode(parameter.is_inference()), torch.no_grad():
            tile_into(parameter, prediction.tiles[name].to(parameter.device))
    sizes = [parameter.numel() for parameter in parameters.values()]
    report.predicted_fraction = sum(report.predicted.values()) / max(1, sum(sizes))
    report.seconds["assign"] = time.perf_counter() - started
