"""Building modules without drawing what will be overwritten.

Most of the time it takes to make a model goes into filling its parameters with random numbers. While a model is built
for a prediction, what would fill a tensor is therefore only noted down (`DeferredFills`). It runs as soon as anything
looks at the tensor and else when the predictions are known, for the parameters without one. Values and buffers that
stay are thus made by the model's own code, in its order; only the random numbers of predicted parameters are never
drawn, so the generator stands elsewhere afterwards than after a plain creation.

A model that is only to be looked at, on the meta device, needs no values at all (`NoInitialisation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from . import derived

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
    "__get__", "size", "dim", "numel", "stride", "element_size", "is_contiguous", "is_floating_point",
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
        return derived.is_zero(tensor)

    def forget(self, tensors: Iterable[torch.Tensor]) -> None:
        """Drops what was noted down for tensors that somebody is about to write as a whole."""
        for tensor in tensors:
            if tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes():
                self._pending.pop(_storage(tensor), None)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A model that is only to be looked at: on the meta device, or with memory that nobody has written."""
    try:
        with torch.device("meta"), NoInitialisation():
            return build()
    except NotImplementedError:  # older RegNets look at tensors to know their widths
        with DeferredFills():
            return build()


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


# What constructors call to fill a parameter. Without memory behind it there is nothing to fill, yet each call passes
# through the decompositions of torch's meta kernels, up to milliseconds for a clamp.
_INITIALISERS = frozenset(
    [
        getattr(torch.Tensor, name)
        for name in ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "clamp_", "mul_", "add_")
    ]
    + [nn.init.kaiming_normal_, nn.init.kaiming_uniform_, nn.init.xavier_uniform_]
    + [nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_, nn.init.constant_, nn.init.ones_, nn.init.zeros_]
)


class NoInitialisation(TorchFunctionMode):
    """While active in a thread, nothing fills tensors; for models on the meta device, which have nothing to fill."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func in _INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
