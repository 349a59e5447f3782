"""Creating a model whose random values are drawn only where no prediction takes their place.

Most of the time it takes to make a model goes into filling its parameters with random numbers. While a model is built
for a prediction, what would fill a tensor is therefore only noted down. It runs as soon as anything looks at the tensor
and else when the predictions are known, for the parameters without one. Values and buffers that stay are thus made by
the model's own code, in its order; only the random numbers of predicted parameters are never drawn, so the generator
stands elsewhere afterwards than after a plain creation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .ambient import plain_torch
from .assign import Prediction, Report, check_head, is_zero, predict_from_graph, write
from .finetune import check_preparation, prepare
from .graph import ComputationGraph, cache, trace

if TYPE_CHECKING:
    from .hypernet import GHN

# What gives a tensor its values, whatever they were before.
_FILLS = frozenset({
    torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.fill_, torch.Tensor.zero_,
    nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_,
})  # fmt: skip
_CONSTANT_FILLS = frozenset({torch.Tensor.fill_, torch.Tensor.zero_, nn.init.constant_})
# What follows a fill to shape its distribution.
_CHANGES = frozenset({
    torch.Tensor.mul_, torch.Tensor.div_, torch.Tensor.add_, torch.Tensor.sub_, torch.Tensor.erfinv_,
    torch.Tensor.clamp_,
})  # fmt: skip
# What may be done without a look at a tensor's values; everything else counts as one.
_BLIND = frozenset({
    "__get__", "__set__", "size", "dim", "numel", "stride", "element_size", "is_contiguous", "is_floating_point",
    "requires_grad_", "untyped_storage", "view", "detach", "narrow", "chunk", "unbind", "unsqueeze", "transpose", "t",
    "_set_grad_enabled", "empty", "zeros", "ones",
})  # fmt: skip


class DeferredFills(TorchFunctionMode):
    """While active in a thread, notes down what fills tensors instead of doing it; see the module's text."""

    def __init__(self) -> None:
        super().__init__()
        # Storage -> what is to be done with it, in order, each with its place in the order of all.
        self._pending: dict[int, list[tuple[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]]]] = {}
        self._count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in _BLIND:
            return func(*args, **kwargs)
        tensors = _tensors(args, kwargs)
        if len(tensors) == 1 and not tensors[0].is_meta and self._note(func, args, kwargs, tensors[0]):
            return tensors[0]
        if self._pending and tensors:
            self.run([_storage(tensor) for tensor in tensors])
        return func(*args, **kwargs)

    def _note(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensor: torch.Tensor
    ) -> bool:
        """Whether `func` is something to be done later."""
        if func not in _FILLS and func not in _CHANGES:
            return False
        storage = tensor.untyped_storage()
        if func in _FILLS:
            if tensor.numel() * tensor.element_size() == storage.nbytes():
                self._pending.pop(storage._cdata, None)
        elif storage._cdata not in self._pending:
            return False
        self._count += 1
        # The arguments hold the tensor, so the storage's address stays its own.
        self._pending.setdefault(storage._cdata, []).append((self._count, func, args, kwargs))
        return True

    def run(self, storages: Iterable[int] | None = None) -> None:
        """Does what was noted down for some storages, or for all, in the order in which it was asked for."""
        chosen = list(self._pending) if storages is None else dict.fromkeys(storages)
        noted = [call for storage in chosen for call in self._pending.pop(storage, ())]
        with torch.no_grad():
            for _, func, args, kwargs in sorted(noted, key=lambda call: call[0]):
                func(*args, **kwargs)

    def is_zero(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is all zero; it is made for that, unless it gets random numbers."""
        storage = _storage(tensor)
        if any(func not in _CONSTANT_FILLS for _, func, *_ in self._pending.get(storage, ())):
            return False
        self.run([storage])
        return is_zero(tensor)

    def forget(self, tensors: Iterable[torch.Tensor]) -> None:
        """Drops what was noted down for tensors that somebody is about to write as a whole."""
        for tensor in tensors:
            if tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes():
                self._pending.pop(_storage(tensor), None)


def _storage(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_meta else tensor.untyped_storage()._cdata


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among a function's arguments, in lists and dictionaries too."""
    found = []
    values = [*args, *kwargs.values()]
    while values:
        value = values.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            values.extend(value)
        elif isinstance(value, dict):
            values.extend(value.values())
    return found


def create_predicted(
    build: Callable[[], nn.Module],
    ghn: GHN,
    head: str = "auto",
    input_size: int | tuple[int, ...] | None = None,
    finetune: str | None = None,
    inputs: Any = None,
) -> tuple[nn.Module, Report]:
    """Builds a model and predicts its parameters, in less time than filling them at random would take.

    Args:
        build: Makes the model.
        ghn: What predicts.
        head: As for `timm_ghn.predict`.
        input_size: As for `timm_ghn.predict`.
        finetune: As for `timm_ghn.predict`.
        inputs: As for `timm_ghn.predict`.

    Returns:
        The model and the report of its prediction. If anything goes wrong there is no model, only the error.
    """
    check_preparation(finetune)
    model, prediction = build_unwritten(build, ghn, head, input_size, inputs)
    if finetune is not None:
        prediction = prepare(model, prediction, finetune)
    write(model, prediction)
    return model, prediction.report


def build_unwritten(
    build: Callable[[], nn.Module],
    ghn: GHN,
    head: str = "auto",
    input_size: int | tuple[int, ...] | None = None,
    inputs: Any = None,
) -> tuple[nn.Module, Prediction]:
    """`create_predicted` without its last step: predicted parameters are memory that nobody has written or touched."""
    check_head(head)
    fills = DeferredFills()
    started = time.perf_counter()
    try:
        with fills:
            model = build()
        built = time.perf_counter()
        parameters = dict(model.named_parameters())
        with plain_torch():  # the model is what its maker wants; the prediction is not theirs to change
            # What the graphs in the cache were traced on is a size.
            graph = _graph(model, input_size) if inputs is None else trace(model, input_size, inputs)
            traced = time.perf_counter()
            prediction = predict_from_graph(model, graph, ghn, head, fills.is_zero)
        fills.forget(parameters[name] for name in prediction)
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
    return model, prediction


def _graph(model: nn.Module, input_size: int | tuple[int, ...] | None) -> ComputationGraph:
    """From the cache, if this model's was traced before."""
    file = cache.locate(model, input_size)
    if file is None:
        return trace(model, input_size)
    graph = cache.load(file)
    if graph is None:
        graph = trace(model, input_size)
        cache.store(file, graph)
    return graph
