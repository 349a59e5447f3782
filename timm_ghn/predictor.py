"""From a model to its predicted parameters: the one pipeline, for a model that is there and for one that is made."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import derived
from .ambient import plain_torch
from .checkpoints.load import load_ghn
from .errors import PredictionError, RequestError
from .graph import ComputationGraph, cache, trace
from .graph.primitives import PRIMITIVES, WEIGHTS
from .hypernet import GHN
from .hypernet.tasks import check_task
from .lazy_init import DeferredFills
from .prediction import Prediction, Report, check, unwritable, write
from .preparation import check_preparation, prepare

HEADS = ("auto", "predict", "keep")

_IDLE = "zero, so that its branch adds nothing to other weights"


@dataclass(frozen=True)
class Predictor:
    """A GHN, and how it is to predict: `head`, `input_size`, `inputs` and `task` are those of `predict`.

    Attributes:
        ghn: What predicts.
        preparation: What `predict` calls `finetune`.

    Raises:
        ValueError: If there is no such `head` or `preparation`, or the `task` is no `timm_ghn.sketch`.
        RequestError: If the GHN has no use for the `head` or `task`.
    """

    ghn: GHN
    head: str = "auto"
    input_size: int | tuple[int, ...] | None = None
    preparation: str | None = None
    inputs: Any = None
    task: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _check_options(self.head, self.preparation)
        if self.head == "predict" and not self.ghn.config.predicts_head:
            raise RequestError(
                'head is "predict", but this GHN predicts no classification layer; fit one with `adapt`.'
            )
        if self.task is not None:
            if not self.ghn.config.conditioned:
                raise RequestError("A task is given, but this GHN predicts the same for all tasks; leave it out.")
            check_task(self.task)

    @plain_torch()
    def predict(self, model: nn.Module) -> Prediction:
        """Predicts a model's parameters without touching the model; errors as for `timm_ghn.predict`."""
        started = time.perf_counter()
        graph = trace(model, self.input_size, self.inputs)
        traced = time.perf_counter()
        prediction = self.from_graph(model, graph, derived.is_zero)
        for name in derived.copies(model, prediction.tiles).keys() & prediction.report.kept.keys():
            prediction.report.kept[name] = "copy of a predicted parameter: copy it again"
        prediction.report.seconds = {"trace": traced - started, "predict": time.perf_counter() - traced}
        return self._prepared(model, prediction)

    def create(self, build: Callable[[], nn.Module]) -> tuple[nn.Module, Report]:
        """Makes a model with predicted parameters, in less time than filling them at random would take.

        Args:
            build: Makes the model.

        Returns:
            The model and the report of its prediction. If anything goes wrong there is no model, only the error.
        """
        model, prediction = self.build(build)
        write(model, prediction)
        return model, prediction.report

    def build(self, build: Callable[[], nn.Module]) -> tuple[nn.Module, Prediction]:
        """`create` without its last step: predicted parameters are memory that nobody has written or touched."""
        fills = DeferredFills()
        started = time.perf_counter()
        try:
            with fills:
                model = build()
            built = time.perf_counter()
            with plain_torch():  # the model is what its maker wants; the prediction is not theirs to change
                graph = self._cached_graph(model)
                traced = time.perf_counter()
                prediction = self.from_graph(model, graph, fills.is_zero)
            fills.forget(model.get_parameter(name) for name in prediction)
        except Exception:
            fills.run()  # somebody else may hold a part of what was built
            raise
        predicted = time.perf_counter()
        fills.run()
        prediction.report.seconds = {
            "build": built - started,
            "trace": traced - built,
            "predict": predicted - traced,
            "fill": time.perf_counter() - predicted,
        }
        return model, self._prepared(model, prediction)

    def from_graph(
        self,
        model: nn.Module,
        graph: ComputationGraph,
        is_zero: Callable[[torch.Tensor], bool] = lambda parameter: False,
    ) -> Prediction:
        """Predicts the parameters of a model whose graph is known, and does not prepare them.

        `is_zero` says whether all values of a parameter are known to be zero.
        """
        parameters = dict(model.named_parameters())
        classes = self.ghn.config.num_classes
        fits = all(parameters[name].shape[0] == classes for name in graph.head)
        predict_head = self.ghn.config.predicts_head and (self.head == "predict" or (self.head == "auto" and fits))
        with torch.no_grad():
            (predicted,) = self.ghn([graph], predict_head, [self.task])

        known = graph.within(self.ghn.config.primitives)
        kept: dict[str, str] = {name: reason for name, reason in known.kept.items() if name not in predicted}
        if not predict_head:
            has = f"has {classes} classes" if self.ghn.config.predicts_head else "predicts none"
            reason = "head=keep" if self.head == "keep" else f"head: the checkpoint {has}"
            kept.update(dict.fromkeys(graph.head, reason))
        kept = unwritable(parameters) | _idle(graph, parameters, is_zero) | kept
        tiles = {name: tensor for name, tensor in predicted.items() if name in parameters and name not in kept}
        missing = parameters.keys() - tiles.keys() - kept.keys()
        if missing:
            raise PredictionError(
                f"No prediction and no reason for {sorted(missing)[0]}; please report this architecture."
            )
        for name, tensor in tiles.items():
            check(name, tensor, parameters[name])
        prediction = Prediction(tiles, {name: parameter.shape for name, parameter in parameters.items()}, kept, graph)
        return prediction.replaced(*derived.solve(model, prediction))

    def _cached_graph(self, model: nn.Module) -> ComputationGraph:
        """From the cache, if this model's was traced before; what graphs are kept by there is a size."""
        file = None if self.inputs is not None else cache.locate(model, self.input_size)
        graph = cache.load(file) if file else None
        if graph is None:
            graph = trace(model, self.input_size, self.inputs)
            if file:
                cache.store(file, graph)
        return graph

    @plain_torch()
    def _prepared(self, model: nn.Module, prediction: Prediction) -> Prediction:
        return prepare(model, prediction, self.preparation, self.ghn.config.bounded)


def _check_options(head: str, preparation: str | None) -> None:
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}.")
    check_preparation(preparation)


def predict(
    model: nn.Module,
    ghn: str | os.PathLike[str] | GHN = "ghn2",
    head: str = "auto",
    input_size: int | tuple[int, ...] | None = None,
    finetune: str | None = None,
    inputs: Any = None,
    task: torch.Tensor | None = None,
) -> Prediction:
    """Predicts a model's parameters without touching the model.

    Args:
        model: Any eager module; timm's know their input size, others take ``(3, 224, 224)`` unless `input_size` says
            otherwise.
        ghn: A loaded GHN, or whatever `load_ghn` takes.
        head: ``"auto"`` predicts the classification layer if its classes are the checkpoint's; ``"predict"`` forces it
            (class rows are repeated or cut), ``"keep"`` leaves it to the model.
        input_size: Input size without the batch dimension; None for the one that the model declares.
        finetune: How to prepare the weights for training, see `timm_ghn.preparation.prepare`; None leaves them as they
            are predicted.
        inputs: What the forward pass takes, instead of an `input_size`, where one image cannot drive it: a tensor, a
            tuple of positional or a dictionary of keyword arguments; see `timm_ghn.trace`.
        task: What the network is to be good at, as `timm_ghn.sketch` tells it from images, for a GHN that is
            conditioned on tasks.

    Raises:
        ValueError: If there is no such `head` or `finetune`, the `task` is none, or the GHN has no use for them.
        TraceError: If the model cannot be traced.
        PredictionError: If a predicted tensor does not fit its parameter or is not finite.
        CheckpointError: If the GHN cannot be loaded.
    """
    _check_options(head, finetune)  # first, so that a mistake costs no time
    started = time.perf_counter()
    loaded = ghn if isinstance(ghn, GHN) else load_ghn(ghn)
    seconds = time.perf_counter() - started
    prediction = Predictor(loaded, head, input_size, finetune, inputs, task).predict(model)
    prediction.report.seconds = {"load": seconds, **prediction.report.seconds}
    return prediction


def initialize(
    model: nn.Module,
    ghn: str | os.PathLike[str] | GHN = "ghn2",
    head: str = "auto",
    input_size: int | tuple[int, ...] | None = None,
    finetune: str | None = None,
    inputs: Any = None,
    task: torch.Tensor | None = None,
) -> Report:
    """Predicts a model's parameters and writes them in place: all or, if anything is wrong, none.

    Device, dtype, mode and buffers of the model stay as they are, but for buffers that were computed from a parameter
    (vectors of a spectral norm, the range of a quantizer, copies), which follow it. Arguments and errors are those of
    `predict`.
    """
    prediction = predict(model, ghn, head, input_size, finetune, inputs, task)
    write(model, prediction)
    return prediction.report


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
    sources = graph.sources
    targets: list[list[int]] = [[] for _ in graph.ops]
    for source, target in graph.real_edges:
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
