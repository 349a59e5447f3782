"""One forward pass on the meta device, and what autograd recorded of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import TraceError

Size = tuple[int, ...]


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
                empty = torch.empty_like(parameter, device="meta", dtype=torch.float32)
                memo[id(parameter)] = nn.Parameter(empty)
        plain = [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
        for tensor in [*module._buffers.values(), *plain]:
            if tensor is not None:
                memo.setdefault(id(tensor), tensor.detach().to("meta"))
    try:
        duplicate = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(f"{type(model).__name__} cannot be copied for tracing ({error}).") from error
    for module in list(duplicate.modules()):
        if isinstance(module, nn.RNNBase):
            module.__class__ = _single_step_class(type(module))
    return duplicate.eval()


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
    with torch.enable_grad():
        outputs = model(leaf.clone())  # a clone, since some models work in place and a leaf must not be changed
    return leaf, [tensor for tensor in _tensors(outputs) if tensor.grad_fn is not None]


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        yield outputs
    elif isinstance(outputs, dict):
        yield from _tensors(tuple(outputs.values()))
    elif isinstance(outputs, (tuple, list)):
        for output in outputs:
            yield from _tensors(output)
    elif hasattr(outputs, "__dict__"):
        yield from _tensors(tuple(vars(outputs).values()))


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
