"""GHN-2's message passing over a batch of graphs as one differentiable op, `timm_ghn::gated_gnn`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from timm_ghn.ops import native, portable
from timm_ghn.ops.portable import Weights
from timm_ghn.ops.topology import Topology

_logger = logging.getLogger("timm_ghn.ops")


def gated_gnn(
    h: Tensor,
    topology: Topology,
    mlp0_w: Tensor,
    mlp0_b: Tensor,
    mlp2_w: Tensor,
    mlp2_b: Tensor,
    ve0_w: Tensor | None,
    ve0_b: Tensor | None,
    ve2_w: Tensor | None,
    ve2_b: Tensor | None,
    gru_w_ih: Tensor,
    gru_w_hh: Tensor,
    gru_b_ih: Tensor,
    gru_b_hh: Tensor,
) -> Tensor:
    """One round of message passing, forward then backward over every graph of the batch.

    Computes in float32 or float64; under autocast, what is narrower in float32. Has a first derivative, not a second.

    Args:
        h: [N, d] states of all nodes of the batch, graph after graph.
        topology: the batch's edges.
        mlp0_w: [hidden, d] first layer of the messages over real edges, as in `torch.nn.Linear`.
        mlp0_b: [hidden]
        mlp2_w: [d, hidden] second layer.
        mlp2_b: [d]
        ve0_w: the same four for virtual edges; all None for a GHN without them.
        ve0_b: see `ve0_w`.
        ve2_w: see `ve0_w`.
        ve2_b: see `ve0_w`.
        gru_w_ih: [3d, d] the GRU cell's weights, as in `torch.nn.GRUCell`.
        gru_w_hh: [3d, d]
        gru_b_ih: [3d]
        gru_b_hh: [3d]

    Returns:
        [N, d] the updated states, in the order of `h`.

    Raises:
        ValueError: a tensor has the wrong shape, dtype or device.
    """
    if ve0_w is None or ve0_b is None or ve2_w is None or ve2_b is None:
        if any(w is not None for w in (ve0_w, ve0_b, ve2_w, ve2_b)):
            raise ValueError("some of ve0_w, ve0_b, ve2_w, ve2_b are None; give all four, or none: no virtual edges.")
        # An mlp of zeros sends zeros, so the op needs no second form.
        ve0_w, ve0_b, ve2_w, ve2_b = (torch.zeros_like(w) for w in (mlp0_w, mlp0_b, mlp2_w, mlp2_b))
    weights = Weights(
        mlp0_w, mlp0_b, mlp2_w, mlp2_b, ve0_w, ve0_b, ve2_w, ve2_b, gru_w_ih, gru_w_hh, gru_b_ih, gru_b_hh
    )
    _check(h, topology, weights)
    if torch.is_autocast_enabled(h.device.type):  # not within the op, whose backward pass needs what it computed with
        dtype = torch.promote_types(h.dtype, torch.float32)
        h, weights = h.to(dtype), Weights(*(w.to(dtype) for w in weights))
    # A compiler wants the op itself, and torch.func the autograd function around it.
    op = torch.ops.timm_ghn.gated_gnn if torch.compiler.is_compiling() else _Traversal.apply
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (h, *weights))
    out: Tensor
    out, _ = op(native.wanted(differentiated), h, *(getattr(topology, name) for name in _TOPOLOGY), *weights)
    return out


def _check(h: Tensor, topology: Topology, weights: Weights) -> None:
    """Raises ValueError for what the op would otherwise read wrongly."""
    if h.ndim != 2 or h.shape[0] != topology.num_nodes:
        raise ValueError(
            f"h has shape {tuple(h.shape)}; give [{topology.num_nodes}, d]: a row per node of the topology."
        )
    if topology.order.device != h.device:
        raise ValueError(f"the topology is on {topology.order.device} and h on {h.device}; use topology.to(h.device).")
    autocast = torch.is_autocast_enabled(h.device.type)
    if h.dtype not in (torch.float32, torch.float64) and not (autocast and h.is_floating_point()):
        raise ValueError(f"h is {h.dtype}; convert it to torch.float32 or torch.float64, or use autocast.")
    d, hidden = h.shape[1], weights.mlp0_w.shape[0]
    shapes = {"0_w": (hidden, d), "0_b": (hidden,), "2_w": (d, hidden), "2_b": (d,), "w": (3 * d, d), "b": (3 * d,)}
    for name, w in weights._asdict().items():
        shape = shapes[name[4] if name.startswith("gru") else name[-3:]]
        if tuple(w.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(w.shape)}; for states of width {d} give {shape}.")
        if w.device != h.device or (w.dtype != h.dtype and not autocast):
            raise ValueError(
                f"{name} is {w.dtype} on {w.device}, but h is {h.dtype} on {h.device}; make them the same."
            )


_TOPOLOGY = [field.name for field in fields(Topology)]
_ARGUMENTS = ", ".join(f"Tensor {name}" for name in (*_TOPOLOGY, *Weights._fields))


def _unpack(arguments: tuple[Tensor, ...]) -> tuple[Topology, Weights]:
    return Topology(*arguments[: len(_TOPOLOGY)]), Weights(*arguments[len(_TOPOLOGY) :])


def _forward(compiled: bool, h: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    topology, weights = _unpack(arguments)
    computed: tuple[Tensor, Tensor] = _native_or_portable(compiled, h, weights).forward(h, topology, weights)
    return computed


def _backward(compiled: bool, grad: Tensor, out: Tensor, saved: Tensor, *arguments: Tensor) -> list[Tensor]:
    topology, weights = _unpack(arguments)
    implementation = _native_or_portable(compiled, out, weights)
    gradients: list[Tensor] = implementation.backward(grad, out, saved, topology, weights)
    return gradients


def _native_or_portable(compiled: bool, h: Tensor, weights: Weights) -> ModuleType:
    return native if compiled and h.is_cpu and native.can_compute(h, weights) else portable


_forward_op = torch.library.custom_op(
    "timm_ghn::gated_gnn",
    _forward,
    mutates_args=(),
    schema=f"(bool compiled, Tensor h, {_ARGUMENTS}) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "timm_ghn::gated_gnn_backward",
    _backward,
    mutates_args=(),
    schema=f"(bool compiled, Tensor grad, Tensor out, Tensor saved, {_ARGUMENTS}) -> Tensor[]",
)


def _fused_or_portable(direction: str, *arguments: Any) -> Any:
    """One launch; where it cannot be compiled, the portable implementation, and one warning."""
    global _fused_works
    if _fused_works:
        try:
            from timm_ghn.ops import kernels

            return getattr(kernels, direction)(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _fused_works = False
            _logger.warning(
                "the graph layer's kernel cannot run here (%s: %s); its portable implementation gives the same "
                "results, slower. Triton and a C compiler make the kernel available.",
                type(error).__name__,
                error,
            )
    return getattr(portable, direction)(*arguments)


_fused_works = True


@_forward_op.register_kernel("cuda")
def _(compiled: bool, h: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _fused_or_portable("forward", h, *_unpack(arguments))
    return result


@_backward_op.register_kernel("cuda")
def _(compiled: bool, grad: Tensor, out: Tensor, saved: Tensor, *arguments: Tensor) -> list[Tensor]:
    result: list[Tensor] = _fused_or_portable("backward", grad, out, saved, *_unpack(arguments))
    return result


@_forward_op.register_fake
def _(compiled: bool, h: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), portable.empty_sweeps(h)


@_backward_op.register_fake
def _(compiled: bool, grad: Tensor, out: Tensor, saved: Tensor, *arguments: Tensor) -> list[Tensor]:
    _, weights = _unpack(arguments)
    return [out.new_empty(x.shape) for x in (out, *weights)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.compiled, _, *arguments = inputs
    ctx.save_for_backward(*output, *arguments)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, _: None, op: Callable[..., Sequence[Tensor]] = _backward_op
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * (2 + len(_TOPOLOGY) + len(Weights._fields))
    by_h, *by_weights = op(ctx.compiled, grad, *ctx.saved_tensors)
    return None, by_h, *(None for _ in _TOPOLOGY), *by_weights


_forward_op.register_autograd(_differentiate, setup_context=_setup_context)


class _Traversal(torch.autograd.Function):
    """The op once more, in the form that the transforms of `torch.func` ask for and registration does not give."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = torch.ops.timm_ghn.gated_gnn(*args)
        return result

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grad, _, _TraversalBackward.apply)


class _TraversalBackward(torch.autograd.Function):
    """`torch.func` records the backward pass too, although its derivative is not to be had."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.timm_ghn.gated_gnn_backward(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError("gated_gnn has no second derivative; gated_gnn_reference has one.")
