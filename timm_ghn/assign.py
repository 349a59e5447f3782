"""From predicted tiles to a model's parameters: tile, check, copy; what is kept, and why."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses import FakeTensor

from . import derived
from .ambient import plain_torch
from .errors import PredictionError
from .finetune import check_preparation, prepare
from .graph import ComputationGraph, trace
from .graph.primitives import PRIMITIVES, WEIGHTS

if TYPE_CHECKING:
    from .hypernet import GHN

HEADS = ("auto", "predict", "keep")

_IDLE = "zero, so that its branch adds nothing to other weights"


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

    Only the tiles are held; a full tensor is made when it is asked for, contiguous and in memory of its own.
    """

    def __init__(
        self,
        tiles: Mapping[str, torch.Tensor],
        shapes: Mapping[str, torch.Size],
        kept: Mapping[str, str],
        graph: ComputationGraph,
    ):
        """Takes tiles by name, the shapes of all of the model's parameters, and the reasons of those without tile."""
        self.tiles = dict(tiles)
        self.shapes = shapes
        self.graph = graph
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        predicted = {name: size for name, size in sizes.items() if name in tiles}
        self.report = Report(
            predicted=predicted,
            kept={name: kept[name] for name in shapes if name not in tiles},
            predicted_fraction=sum(predicted.values()) / max(1, sum(sizes.values())),
        )

    def replaced(self, tensors: Mapping[str, torch.Tensor], kept: Mapping[str, str] | None = None) -> Prediction:
        """The same with other values for some parameters, and without those that are kept, for their reasons."""
        kept = {**self.report.kept, **(kept or {})}
        tiles = {name: tensor for name, tensor in self.tiles.items() if name not in kept}
        prediction = Prediction({**tiles, **tensors}, self.shapes, kept, self.graph)
        prediction.report.seconds = self.report.seconds
        return prediction

    def __getitem__(self, name: str) -> torch.Tensor:
        whole = self.tiles[name].new_empty(self.shapes[name])
        tile_into(whole, self.tiles[name])
        return whole

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
    inputs: Any = None,
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
        inputs: What the forward pass takes, instead of an `input_size`, where one image cannot drive it: a tensor, a
            tuple of positional or a dictionary of keyword arguments; see `timm_ghn.trace`.

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
    graph = trace(model, input_size, inputs)
    traced = time.perf_counter()
    prediction = predict_from_graph(model, graph, ghn, head, is_zero)
    for name in derived.copies(model, prediction.tiles).keys() & prediction.report.kept.keys():
        prediction.report.kept[name] = "copy of a predicted parameter: copy it again"
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
    model: nn.Module,
    graph: ComputationGraph,
    ghn: GHN,
    head: str = "auto",
    is_zero: Callable[[torch.Tensor], bool] = lambda parameter: False,
) -> Prediction:
    """Predicts the parameters of a model whose graph is known; see `predict`.

    `is_zero` says whether all values of a parameter are known to be zero.
    """
    parameters = dict(model.named_parameters())
    classes = [parameters[name].shape[0] for name in graph.head]
    predict_head = head == "predict" or (head == "auto" and all(size == ghn.config.num_classes for size in classes))
    with torch.no_grad():
        (predicted,) = ghn([graph], predict_head=predict_head)

    kept: dict[str, str] = {name: reason for name, reason in graph.kept.items() if name not in predicted}
    if not predict_head:
        reason = "head=keep" if head == "keep" else f"head: the checkpoint has {ghn.config.num_classes} classes"
        kept.update(dict.fromkeys(graph.head, reason))
    kept = _unwritable(parameters) | _idle(graph, parameters, is_zero) | kept
    tiles = {name: tensor for name, tensor in predicted.items() if name in parameters and name not in kept}
    missing = parameters.keys() - tiles.keys() - kept.keys()
    if missing:
        raise PredictionError(f"No prediction and no reason for {sorted(missing)[0]}; please report this architecture.")
    for name, tensor in tiles.items():
        _check(name, tensor, parameters[name])
    prediction = Prediction(tiles, {name: parameter.shape for name, parameter in parameters.items()}, kept, graph)
    return prediction.replaced(*derived.solve(model, prediction))


def is_zero(parameter: torch.Tensor) -> bool:
    """Whether all of a parameter's values are zero, as far as it has values."""
    if not derived.has_values(parameter):
        return False
    return not parameter[(0,) * parameter.ndim].item() and not parameter.any().item()


def _unwritable(parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Parameters that values cannot be written into, each with the reason."""
    found: dict[str, str] = {}
    sharing: dict[tuple[int, int], list[str]] = {}
    for name, parameter in parameters.items():
        cls = type(parameter)
        if not issubclass(cls, FakeTensor) and cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise PredictionError(
                f"{name} is a {cls.__name__}, which is not written to as tensors are; predict before the model is "
                "sharded or quantized."
            )
        if parameter.numel() == 0:
            found[name] = "empty"
        elif not parameter.is_floating_point():
            found[name] = f"{parameter.dtype}, while predictions are real floating-point numbers"
        elif parameter.layout is not torch.strided:
            found[name] = f"{parameter.layout}, while predictions are dense"
        elif _overlaps(parameter):
            found[name] = "an expanded view: its elements share memory"
        elif not parameter.is_meta:
            place = parameter.untyped_storage()._cdata, parameter.element_size()
            sharing.setdefault(place, []).append(name)
    for (_, size), names in sharing.items():
        if len(names) > 1:  # slices of one tensor, or a tie that is no tie between parameters
            taken = torch.zeros(parameters[names[0]].untyped_storage().nbytes() // size, dtype=torch.bool)
            for name in names:
                parameter = parameters[name]
                part = taken.as_strided(parameter.size(), parameter.stride(), parameter.storage_offset())
                if part.any():
                    found[name] = "shares memory with another parameter"
                part.fill_(True)
    return found


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements of a tensor lie in the same place."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _idle(
    graph: ComputationGraph, parameters: Mapping[str, nn.Parameter], is_zero: Callable[[torch.Tensor], bool]
) -> dict[str, str]:
    """Weights that somebody set to zero so that the branch they end adds nothing to other weights, as in an adapter.

    Zeros in the last weight of a residual branch, or in the classification layer, are no such wish: they are where
    training from random weights begins well.
    """
    weights = {node for node, op in enumerate(graph.ops) if op in WEIGHTS}
    zero = {node for node in weights if is_zero(parameters[graph.names[node]])}
    if not zero:
        return {}
    is_adapted = any(not parameter.requires_grad and parameter.ndim > 1 for parameter in parameters.values())
    sources: list[list[int]] = [[] for _ in graph.ops]
    targets: list[list[int]] = [[] for _ in graph.ops]
    for source, target in graph.edges[graph.edges[:, 2] == 1, :2].tolist():
        sources[target].append(source)
        targets[source].append(target)

    def before(nodes: list[int], through: Container[str] = PRIMITIVES) -> set[int]:
        """All nodes that lead to some, directly or through others of the given primitives, and these themselves."""
        found: set[int] = set()
        pending = list(nodes)
        while pending:
            if (node := pending.pop()) not in found:
                found.add(node)
                if graph.ops[node] in through:
                    pending.extend(sources[node])
        return found

    found: dict[str, str] = {}
    for node in zero:
        ends = [node]
        while len(targets[ends[-1]]) == 1 and graph.ops[targets[ends[-1]][0]] == "bias":
            ends += targets[ends[-1]]
        sums = targets[ends[-1]]
        if not sums or any(graph.ops[target] != "sum" for target in sums):
            continue
        behind = before(sources[node])
        beside = (before(sums, {"sum", "bias"}) & weights) - zero - behind
        if is_adapted or any(behind.issuperset(sources[other]) for other in beside):
            names = [graph.names[end] for end in ends]
            found |= {name: _IDLE for name in names if is_zero(parameters[name])}
    return found


def _check(name: str, tensor: torch.Tensor, parameter: nn.Parameter) -> None:
    trailing = parameter.shape[tensor.ndim :]
    if tensor.ndim > parameter.ndim or (tensor.ndim and trailing.numel() > 1) or tensor.numel() == 0:
        raise PredictionError(f"{name} has shape {tuple(parameter.shape)}, its prediction {tuple(tensor.shape)}.")
    if not torch.isfinite(tensor).all():
        raise PredictionError(f"The prediction for {name} is not finite; the GHN's weights are damaged or too large.")
    if parameter.dtype != tensor.dtype and not torch.isfinite(tensor.to(parameter.dtype).to(tensor.dtype)).all():
        raise PredictionError(f"The prediction for {name} is too large for {parameter.dtype}; use a wider type.")


def initialize(
    model: nn.Module,
    ghn: str | GHN = "ghn2",
    head: str = "auto",
    input_size: int | tuple[int, ...] | None = None,
    finetune: str | None = None,
    inputs: Any = None,
) -> Report:
    """Predicts a model's parameters and writes them in place: all or, if anything is wrong, none.

    Device, dtype, mode and buffers of the model stay as they are, but for buffers that were computed from a parameter
    (vectors of a spectral norm, the range of a quantizer, copies), which follow it. Arguments and errors are those of
    `predict`.
    """
    prediction = predict(model, ghn, head, input_size, finetune, inputs)
    write(model, prediction)
    return prediction.report


@plain_torch()
def write(model: nn.Module, prediction: Prediction) -> None:
    """Writes a prediction into the model it was made for, and corrects its report by what cannot be written."""
    started = time.perf_counter()
    report = prediction.report
    parameters = dict(model.named_parameters())
    for name in list(report.predicted):
        if parameters[name].is_meta or isinstance(parameters[name], FakeTensor):
            report.kept[name] = "nothing was written: it is on the meta device, which holds no values"
            del report.predicted[name]
    with torch.no_grad():
        # First, since there may be no memory for them.
        tiles = {name: prediction.tiles[name].to(parameters[name].device) for name in report.predicted}
        copies = derived.copies(model, tiles)
        for name, tile_of_it in tiles.items():
            # What was made in inference mode can only be changed in it.
            with torch.inference_mode(parameters[name].is_inference()), torch.no_grad():
                tile_into(parameters[name], tile_of_it)
        for name in copies.keys() & dict(model.named_buffers()).keys():
            model.get_buffer(name).copy_(parameters[copies[name]])
        derived.refresh(model, tiles)
    sizes = [parameter.numel() for parameter in parameters.values()]
    report.predicted_fraction = sum(report.predicted.values()) / max(1, sum(sizes))
    report.seconds["assign"] = time.perf_counter() - started
