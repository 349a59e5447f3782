"""One forward pass on the meta device, and what autograd recorded of it."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import TraceError

Size = tuple[int, ...]

# What a class defines that has its own way of being copied.
_COPY_HOOKS = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
_CONSTANTS = (bool, int, float, str, type(None))


def meta_copy(model: nn.Module) -> nn.Module:
    """A structural copy of `model` in eval mode whose tensors live on the meta device and take no memory.

    The tensors are replaced through `copy.deepcopy`'s memo, so the original is only read: its device, mode, buffers
    and hooks stay as they are, and ties between parameters survive.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("A scripted model cannot be traced: pass the eager model and script it after its prediction.")
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, device="meta"))
        plain = [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
        for tensor in [*module._buffers.values(), *plain]:
            if tensor is not None:
                # As the parameters: in a model of another precision, both have to fit each other.
                dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                memo.setdefault(id(tensor), torch.empty(tensor.shape, device="meta", dtype=dtype))
    try:
        duplicate = _copy(model, memo)
    except Exception as error:
        raise TraceError(f"{type(model).__name__} cannot be copied for tracing ({error}).") from error
    for module in list(duplicate.modules()):
        if isinstance(module, nn.RNNBase):
            module.__class__ = _single_step_class(type(module))
    return duplicate.eval()


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(model, memo)``, in a fraction of its time.

    Most of what modules consist of are constants and a dozen empty dictionaries each, on which `deepcopy` spends
    itself. So modules that leave their copying to it get blank twins first, for it to find, and then their attributes.
    """
    twins = []
    for module in model.modules():
        cls = type(module)
        if all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in _COPY_HOOKS):
            memo[id(module)] = twin = cls.__new__(cls)
            twins.append((module, twin))
    for module, twin in twins:
        for name, value in module.__getstate__().items():
            if isinstance(value, dict) and type(value) in (dict, OrderedDict):
                vars(twin)[name] = type(value)((key, copy.deepcopy(item, memo)) for key, item in value.items())
            else:
                vars(twin)[name] = value if type(value) in _CONSTANTS else copy.deepcopy(value, memo)
    return copy.deepcopy(model, memo)


def _single_step_class(rnn_class: type[nn.RNNBase]) -> type[nn.RNNBase]:
    """A subclass of an RNN that reads each weight once, instead of once a time step.

    Unrolled over the sequence the same few weights would come back at every step, with sums between them; for the graph
    a recurrence is one step: input weight, its bias, hidden weight, its bias.
    """

    def forward(self: Any, x: torch.Tensor, hidden: Any = None) -> tuple[torch.Tensor, None]:
        for layer in range(self.num_layers):
            outputs = []
            for suffix in ("", "_reverse")[: 2 if self.bidirectional else 1]:
                state = x
                for kind in ("ih", "hh"):
                    weight = getattr(self, f"weight_{kind}_l{layer}{suffix}")
                    bias = getattr(self, f"bias_{kind}_l{layer}{suffix}") if self.bias else None
                    state = nn.functional.linear(state, weight, bias)[..., : self.hidden_size]
                outputs.append(state)
            x = torch.cat(outputs, dim=-1)
        return x, None

    return type(rnn_class.__name__, (rnn_class,), {"forward": forward})


def input_candidates(model: nn.Module, input_size: int | Size | None) -> Iterator[Size]:
    """Input sizes (without the batch dimension) to try, the most specific first."""
    if input_size is not None:
        yield (3, input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        return
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    declared = tuple(config.get("input_size") or ())
    spatial = declared[1:] or (224, 224)
    fixed = {
        tuple(size)
        for module in model.modules()
        if isinstance(size := getattr(module, "img_size", None), tuple) and len(size) == len(spatial)
    }
    sizes = [*fixed, spatial] if len(fixed) == 1 else [spatial]
    seen: set[Size] = set()
    for size in sizes:
        for depth in (channels, *declared[:1], 3):
            if (candidate := (depth, *size)) not in seen:
                seen.add(candidate)
                yield candidate


def run_on_meta(model: nn.Module, size: Size) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Runs a meta model on one sample of `size`; returns the input leaf and all outputs that have a graph."""
    leaf = torch.empty(1, *size, device="meta", requires_grad=True)
    with torch.enable_grad(), _autocast_on_meta(), _QuickShapes():
        outputs = model(leaf.clone())  # a clone, since some models work in place and a leaf must not be changed
    return leaf, [tensor for tensor in output_tensors(outputs) if tensor.grad_fn is not None]


class _Autocast(torch.autocast):
    """For the meta device, which autocast does not know, that of the CPU: it does nothing to meta tensors."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


@contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """Lets models switch autocast off for their tensors' device, as many do around what needs full precision."""
    with _autocast_lock:
        original = torch.autocast
        torch.autocast = torch.amp.autocast = _Autocast  # type: ignore[misc]
        try:
            yield
        finally:
            torch.autocast = torch.amp.autocast = original  # type: ignore[misc]


_autocast_lock = threading.RLock()


class _QuickShapes(TorchDispatchMode):
    """Tells the shapes of the most frequent functions itself: the meta device computes them in Python, in most of the
    time that a forward pass takes. Below autograd, so what is recorded is the same. Whatever is not plain to see, a
    mistake in the shapes too, goes to the meta device.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        handler = _QUICK.get(func)
        result = handler(*args) if handler else None
        return func(*args, **(kwargs or {})) if result is None else result


def _like_input(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _binary(x: torch.Tensor, y: Any) -> torch.Tensor | None:
    if not isinstance(y, torch.Tensor) or x.dtype != y.dtype or x.ndim < y.ndim:
        return None
    if x.shape == y.shape:
        return torch.empty_like(x) if x.stride() == y.stride() else None
    pairs = zip(reversed(x.shape), reversed(y.shape), strict=False)
    return torch.empty_like(x) if all(size == other or other == 1 for size, other in pairs) else None


def _addmm(bias: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
    return x.new_empty(x.shape[0], y.shape[1]) if x.shape[1] == y.shape[0] else None


def _batch_norm(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...] | None:
    if all(y is None or y.shape == x.shape[1:2] for y in args[:4]):
        return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
    return None


def _layer_norm(x: torch.Tensor, normalized: Any, *args: Any) -> tuple[torch.Tensor, ...] | None:
    if x.shape[x.ndim - len(normalized) :] == tuple(normalized):
        return x.new_empty(x.shape), x.new_empty(0), x.new_empty(0)
    return None


_aten = torch.ops.aten
_QUICK: dict[Any, Callable[..., Any]] = {
    _aten.relu.default: _like_input,
    _aten.gelu.default: _like_input,
    _aten.silu.default: _like_input,
    _aten.sigmoid.default: _like_input,
    _aten._softmax.default: _like_input,
    _aten._safe_softmax.default: _like_input,
    _aten.add.Tensor: _binary,
    _aten.mul.Tensor: _binary,
    _aten.addmm.default: _addmm,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_layer_norm.default: _layer_norm,
}


def output_tensors(outputs: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a model returned, whatever they are wrapped in."""
    if isinstance(outputs, torch.Tensor):
        yield outputs
    elif isinstance(outputs, dict):
        yield from output_tensors(tuple(outputs.values()))
    elif isinstance(outputs, (tuple, list)):
        for output in outputs:
            yield from output_tensors(output)
    elif hasattr(outputs, "__dict__"):
        yield from output_tensors(tuple(vars(outputs).values()))


class Function:
    """One function of the autograd graph.

    Attributes:
        op: Its name as autograd prints it, without the trailing overload number, e.g. ``"Convolution"``.
        name: The full name, e.g. ``"ConvolutionBackward0"``.
        inputs: Per input slot, the producing function's position in the tape, or None for a constant.
        variable: The leaf tensor, for leaves.
        shape: Shape of the (first) output.
        saved: The autograd node, to read ``_saved_…`` attributes from.
    """

    __slots__ = ("inputs", "name", "op", "saved", "shape", "variable")

    def __init__(self, node: Any, inputs: list[int | None]):
        self.name: str = node.name()
        self.op = self.name.rstrip("0123456789").removesuffix("Backward").removeprefix("torch::autograd::")
        self.inputs = inputs
        self.variable: torch.Tensor | None = getattr(node, "variable", None)
        metadata = node._input_metadata
        self.shape: Size = tuple(metadata[0].shape) if metadata else ()
        self.saved = node


def record(outputs: list[torch.Tensor]) -> list[Function]:
    """Every autograd function behind `outputs`, each after the functions it reads from."""
    order: list[Any] = []
    position: dict[Any, int] = {}
    stack: list[tuple[Any, bool]] = [(output.grad_fn, False) for output in reversed(outputs)]
    visited = set()
    while stack:  # depth first with an explicit stack: some models are thousands of functions deep
        node, done = stack.pop()
        if done:
            position[node] = len(order)
            order.append(node)
        elif node not in visited:
            visited.add(node)
            stack.append((node, True))
            stack.extend((source, False) for source, _ in reversed(node.next_functions) if source is not None)
    return [Function(n, [None if s is None else position[s] for s, _ in n.next_functions]) for n in order]
