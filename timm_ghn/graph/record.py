"""One forward pass on the meta device, and what autograd recorded of it."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..errors import TraceError

Size = tuple[int, ...]


def input_candidates(model: nn.Module, input_size: int | Size | None) -> Iterator[Size]:
    """Input sizes (without the batch dimension) to try, the most specific first.

    Raises:
        ValueError: If `input_size` is no size.
    """
    if input_size is not None:
        yield _checked(input_size)
        return
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    stated = getattr(model, "_model_args", {})  # where timm notes what create_model was given
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    declared = tuple(config.get("input_size") or ())
    spatial = declared[1:] or (224, 224)
    fixed = {
        tuple(size)
        for module in model.modules()
        if isinstance(size := getattr(module, "img_size", None), tuple) and len(size) == len(spatial)
    }
    sizes = [*fixed, spatial] if len(fixed) == 1 else [spatial]
    if "img_size" in stated:
        sizes.insert(0, _checked(stated["img_size"])[-len(spatial) :])
    seen: set[Size] = set()
    for size in sizes:
        for depth in (stated.get("in_chans", channels), channels, *declared[:1], 3):
            if (candidate := (depth, *size)) not in seen:
                seen.add(candidate)
                yield candidate


def _checked(input_size: Any) -> Size:
    size = input_size if isinstance(input_size, (tuple, list)) else (3, input_size, input_size)
    try:
        numbers = tuple(operator.index(side) for side in size if not isinstance(side, bool))
    except TypeError:
        numbers = ()
    if len(numbers) == len(size) > 0 and min(numbers) > 0:
        return numbers
    raise ValueError(
        f"input_size is {input_size!r}; it must be a side length or a size without the batch dimension, such as 224 or "
        "(3, 224, 224)."
    )


@dataclass
class Run:
    """What one forward pass on the meta device left behind.

    Attributes:
        leaves: The inputs that autograd follows.
        outputs: The outputs that have a graph.
        calls: The arguments of every function that ran, with whether autograd recorded it.
    """

    leaves: list[torch.Tensor]
    outputs: list[torch.Tensor]
    calls: list[tuple[tuple[Any, ...], bool]]

    def uses(self, tensor: torch.Tensor) -> set[bool]:
        """Whether autograd recorded what was computed from a tensor, for each time; empty if nothing was."""
        return {
            recorded
            for args, recorded in self.calls
            if any(arg is tensor or (type(arg) is list and any(item is tensor for item in arg)) for arg in args)
        }


def run_on_meta(model: nn.Module, inputs: Any, originals: Iterable[torch.Tensor] = ()) -> Run:
    """Runs a meta model once.

    Args:
        model: A `meta_copy`.
        inputs: A tensor, a sequence of positional or a dictionary of keyword arguments; of the tensors in it only the
            shapes are used, and whether they are floating-point.
        originals: Tensors of the model that was copied, which the copy must not touch.

    Raises:
        TraceError: If it touches them all the same.
    """
    leaves: list[torch.Tensor] = []

    def on_meta(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if not value.is_floating_point():
            return torch.empty_like(value, device="meta")
        leaves.append(torch.empty(value.shape, device="meta", requires_grad=True))
        return leaves[-1].clone()  # since some models work in place and a leaf must not be changed

    watch = _Watch(originals)
    with torch.enable_grad(), _autocast_on_meta():
        inputs = tree_map(on_meta, inputs)
        with watch:
            if isinstance(inputs, dict):
                outputs = model(**inputs)
            else:
                outputs = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    outputs = [tensor for tensor in output_tensors(outputs) if tensor.grad_fn is not None]
    return Run(leaves, outputs, watch.calls)


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


class _Watch(TorchDispatchMode):
    """Sees every function of a forward pass before it runs.

    It tells the shapes of the most frequent functions itself: the meta device computes them in Python, in most of the
    time that a forward pass takes. Below autograd, so what is recorded is the same. Whatever is not plain to see, a
    mistake in the shapes too, goes to the meta device.
    """

    def __init__(self, originals: Iterable[torch.Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.originals = {id(tensor) for tensor in originals}
        self.calls: list[tuple[tuple[Any, ...], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        tensors = args[0] if args and type(args[0]) is list else args  # a list's are those of a concatenation
        if not self.originals.isdisjoint(map(id, tensors)):
            raise TraceError(
                "The forward pass reaches the model itself past the copy that is traced, through something that cannot "
                "be copied: predict before you wrap or patch the model."
            )
        self.calls.append((args, torch.is_grad_enabled()))
        handler = _QUICK.get(func)
        result = handler(*args) if handler else None
        return func(*args, **(kwargs or {})) if result is None else result


def _like_input(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _binary(x: torch.Tensor, y: Any) -> torch.Tensor | None:
    if not isinstance(y, torch.Tensor) or x.dtype != y.dtype or x.ndim < y.ndim or not x.is_meta or not y.is_meta:
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
        outputs: Per input slot, which of that function's outputs comes in.
        variable: The leaf tensor, for leaves.
        shape: Shape of the (first) output.
        saved: The autograd node, to read ``_saved_…`` attributes from.
    """

    __slots__ = ("inputs", "name", "op", "outputs", "saved", "shape", "variable")

    def __init__(self, node: Any, inputs: list[int | None]):
        self.name: str = node.name()
        self.op = self.name.rstrip("0123456789").removesuffix("Backward").removeprefix("torch::autograd::")
        self.inputs = inputs
        self.outputs: list[int] = [output for _, output in node.next_functions]
        self.variable: torch.Tensor | None = getattr(node, "variable", None)
        metadata = node._input_metadata
        self.shape: Size = tuple(metadata[0].shape) if metadata else ()
        self.saved = node


class Tape:
    """What autograd recorded of a run, next to the model that ran.

    Attributes:
        run: The run.
        functions: Every function behind its outputs, each after the functions it reads from.
        readers: For each function, those that read from it.
        names: For each function, the parameter that it is the leaf of.
        inputs: The leaves that are the run's inputs.
        model: The module that ran.
        parameters: Its parameters, by name.
        owners: The modules that they belong to.
    """

    def __init__(self, model: nn.Module, run: Run):
        self.run, self.model = run, model
        self.functions = _functions(run.outputs)
        self.readers: list[list[int]] = [[] for _ in self.functions]
        for index, function in enumerate(self.functions):
            for source in function.inputs:
                if source is not None:
                    self.readers[source].append(index)
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.owners: dict[str, nn.Module] = {}
        for prefix, module in model.named_modules():
            for name in module._parameters:
                self.owners.setdefault(f"{prefix}.{name}" if prefix else name, module)
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.names = [None if f.variable is None else names.get(id(f.variable)) for f in self.functions]
        leaves = {id(leaf) for leaf in run.leaves}
        self.inputs = {index for index, function in enumerate(self.functions) if id(function.variable) in leaves}


def _functions(outputs: list[torch.Tensor]) -> list[Function]:
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
