"""GHN-2's message passing over a batch of graphs, as one differentiable op: `timm_ghn::gated_gnn`.

What it computes is written down in `reference.py`. Here the same is done level by level (see `Topology`), and

- a message depends on its sender alone, so each is computed once per node, not once per edge;
- the GRU's product with the state that a sweep finds is known before the sweep: one matrix product for all nodes;
- backward, everything that does not depend on the sweep's order (gate derivatives, weight gradients) is done for all
  nodes at once, before or after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_ghn.ops.topology import Topology


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

    Computes in float32 or float64; under autocast, in float32.

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
    weights = {
        "mlp0_w": mlp0_w,
        "mlp0_b": mlp0_b,
        "mlp2_w": mlp2_w,
        "mlp2_b": mlp2_b,
        "ve0_w": ve0_w,
        "ve0_b": ve0_b,
        "ve2_w": ve2_w,
        "ve2_b": ve2_b,
        "gru_w_ih": gru_w_ih,
        "gru_w_hh": gru_w_hh,
        "gru_b_ih": gru_b_ih,
        "gru_b_hh": gru_b_hh,
    }
    _check(h, topology, weights)
    # A compiler wants the op itself, and torch.func the autograd function around it.
    op = torch.ops.timm_ghn.gated_gnn if torch.compiler.is_compiling() else _Traversal.apply
    out, _ = op(
        h,
        topology.order,
        topology.level_ptr,
        topology.graph_nodes,
        topology.graph_ptr,
        topology.in_ptr,
        topology.in_index,
        topology.in_distance,
        topology.out_ptr,
        topology.out_index,
        topology.out_distance,
        *weights.values(),
    )
    return out


def _check(h: Tensor, topology: Topology, weights: dict[str, Tensor]) -> None:
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
    d, hidden = h.shape[1], weights["mlp0_w"].shape[0]
    shapes = {"0_w": (hidden, d), "0_b": (hidden,), "2_w": (d, hidden), "2_b": (d,), "w": (3 * d, d), "b": (3 * d,)}
    for name, w in weights.items():
        shape = shapes[name[4] if name.startswith("gru") else name[-3:]]
        if tuple(w.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(w.shape)}; for states of width {d} give {shape}.")
        if w.device != h.device or (w.dtype != h.dtype and not autocast):
            raise ValueError(
                f"{name} is {w.dtype} on {w.device}, but h is {h.dtype} on {h.device}; make them the same."
            )


class _Sweep(NamedTuple):
    """What a sweep leaves behind for the backward pass: [N, ...] by position."""

    before: Tensor  # d, the states that the sweep finds
    message: Tensor  # d, the sum that reaches each node
    reset_update: Tensor  # 2d, the gates r and z
    candidate: Tensor  # d, n
    recurrent: Tensor  # d, the part of n that r scales
    hidden: Tensor  # 2 hidden, the message mlps' hidden layers
    sent: Tensor  # 2d, each node's two messages; read as [2N, d], the message table


def _saved_width(d: int, hidden: int) -> int:
    """Numbers per node in a sweep's block."""
    return 8 * d + 2 * hidden


def _sweeps(saved: Tensor, d: int) -> list[_Sweep]:
    """Views of both sweeps' blocks in `saved`, [2, N, width]: the one buffer that goes from forward to backward."""
    nodes, width = saved.shape[1:]
    widths = (d, d, 2 * d, d, d, width - 8 * d, 2 * d)
    return [
        _Sweep(*(part.view(nodes, w) for part, w in zip(block.split([nodes * w for w in widths]), widths, strict=True)))
        for block in saved.flatten(1)
    ]


class _Lists(NamedTuple):
    """For each level: the rows to add up, the factor of each, and where each sum starts."""

    rows: tuple[Tensor, ...]
    factor: tuple[Tensor, ...]
    start: tuple[Tensor, ...]

    @classmethod
    def cut(cls, ptr: Tensor, index: Tensor, distance: Tensor, levels: list[int], split: bool, like: Tensor) -> _Lists:
        """Cuts compressed lists into levels; `split`: a node's real and virtual edges add up to separate rows."""
        bounds = ptr[[2 * position for position in levels]].tolist()
        starts = ptr[:-1] if split else ptr[:-1:2]
        sizes = [(b - a) * (1 + split) for a, b in pairwise(levels)]
        first = torch.repeat_interleave(ptr.new_tensor(bounds[:-1]), ptr.new_tensor(sizes))
        entries = [b - a for a, b in pairwise(bounds)]
        factor = distance.to(like.dtype).reciprocal()
        return cls(index.split(entries), factor.split(entries), (starts - first).split(sizes))

    def add_up(self, table: Tensor, level: int) -> Tensor:
        """The level's weighted sums of rows: gather, product and segment sum in one op."""
        return torch.embedding_bag(table, self.rows[level], self.start[level], per_sample_weights=self.factor[level])[0]


def _stack(mlp0_w: Tensor, mlp2_w: Tensor, ve0_w: Tensor, ve2_w: Tensor) -> tuple[Tensor, Tensor]:
    """The two message mlps' layers as one mlp with both outputs side by side."""
    return torch.cat((mlp0_w, ve0_w)), torch.block_diag(mlp2_w, ve2_w)


@torch.library.custom_op("timm_ghn::gated_gnn", mutates_args=())
def _gated_gnn(
    h: Tensor,
    order: Tensor,
    level_ptr: Tensor,
    graph_nodes: Tensor,
    graph_ptr: Tensor,
    in_ptr: Tensor,
    in_index: Tensor,
    in_distance: Tensor,
    out_ptr: Tensor,
    out_index: Tensor,
    out_distance: Tensor,
    mlp0_w: Tensor,
    mlp0_b: Tensor,
    mlp2_w: Tensor,
    mlp2_b: Tensor,
    ve0_w: Tensor,
    ve0_b: Tensor,
    ve2_w: Tensor,
    ve2_b: Tensor,
    gru_w_ih: Tensor,
    gru_w_hh: Tensor,
    gru_b_ih: Tensor,
    gru_b_hh: Tensor,
) -> tuple[Tensor, Tensor]:
    """The portable implementation, on any device: the updated states, and `saved` for the backward pass."""
    d = h.shape[1]
    levels = level_ptr.tolist()
    sizes = [b - a for a, b in pairwise(levels)]
    saved = h.new_empty(2, h.shape[0], _saved_width(d, mlp0_w.shape[0]))
    up, down = _sweeps(saved, d)
    torch.index_select(h, 0, order, out=up.before)
    after = torch.empty_like(up.before)

    w0, w2 = _stack(mlp0_w, mlp2_w, ve0_w, ve2_w)
    w0, w2, w_ih = w0.t(), w2.t(), gru_w_ih.t()
    b0, b2 = torch.cat((mlp0_b, ve0_b)), torch.cat((mlp2_b, ve2_b))
    ascending = range(len(sizes))
    for sweep, states, schedule, lists in (
        (up, down.before, ascending, _Lists.cut(in_ptr, in_index, in_distance, levels, False, h)),
        (down, after, ascending[::-1], _Lists.cut(out_ptr, out_index, out_distance, levels, False, h)),
    ):
        gates = torch.addmm(gru_b_hh, sweep.before, gru_w_hh.t())
        sweep.recurrent.copy_(gates[:, 2 * d :])
        gates[:, 2 * d :] = 0
        gates += gru_b_ih
        table = sweep.sent.view(-1, d)
        reset, update = sweep.reset_update.split(d, 1)
        parts = (gates, gates[:, : 2 * d], gates[:, 2 * d :], *sweep, reset, update, states)
        views = list(zip(*(part.split(sizes) for part in parts), strict=True))
        for level in schedule:
            pre, pre_ru, pre_n, before, message, ru, n, recurrent, hidden, sent, r, z, state = views[level]
            message.copy_(lists.add_up(table, level))
            pre.addmm_(message, w_ih)
            torch.sigmoid(pre_ru, out=ru)
            torch.addcmul(pre_n, r, recurrent, out=n).tanh_()
            torch.lerp(n, before, z, out=state)
            torch.addmm(b0, state, w0, out=hidden).relu_()
            torch.addmm(b2, hidden, w2, out=sent).relu_()

    return torch.empty_like(after).index_copy_(0, order, after), saved


@torch.library.custom_op("timm_ghn::gated_gnn_backward", mutates_args=())
def _gated_gnn_backward(
    grad: Tensor,
    out: Tensor,
    saved: Tensor,
    order: Tensor,
    level_ptr: Tensor,
    graph_nodes: Tensor,
    graph_ptr: Tensor,
    in_ptr: Tensor,
    in_index: Tensor,
    in_distance: Tensor,
    out_ptr: Tensor,
    out_index: Tensor,
    out_distance: Tensor,
    mlp0_w: Tensor,
    mlp2_w: Tensor,
    ve0_w: Tensor,
    ve2_w: Tensor,
    gru_w_ih: Tensor,
    gru_w_hh: Tensor,
) -> list[Tensor]:
    """Gradients of `h` and of the twelve weights, in the order of the forward op's arguments."""
    d, hid = out.shape[1], mlp0_w.shape[0]
    levels = level_ptr.tolist()
    sizes = [b - a for a, b in pairwise(levels)]
    up, down = _sweeps(saved, d)
    w0, w2 = _stack(mlp0_w, mlp2_w, ve0_w, ve2_w)
    grad = grad[order]
    total: list[Tensor] = []
    ascending = range(len(sizes))
    for sweep, after, schedule, lists in (
        (down, out[order], ascending, _Lists.cut(in_ptr, in_index // 2, in_distance, levels, True, out)),
        (up, down.before, ascending[::-1], _Lists.cut(out_ptr, out_index // 2, out_distance, levels, True, out)),
    ):
        # The derivative of a node's new state by what enters its three gates is diagonal and known from the forward
        # pass; so is what the ReLUs let through.
        r, z = sweep.reset_update.split(d, 1)
        n = sweep.candidate
        by_n = (1 - z) * (1 - n * n)
        by_z = (sweep.before - n) * z * (1 - z)
        by_r = by_n * sweep.recurrent * r * (1 - r)
        slope = torch.stack((by_r, by_z, by_n), 1)
        sent_on, hidden_on = ((x > 0).to(x.dtype) for x in (sweep.sent, sweep.hidden))

        grad_message, grad_gates = torch.empty_like(grad), torch.empty_like(slope)
        grad_hidden, grad_sent = torch.empty_like(hidden_on), torch.empty_like(sent_on)
        masks, wide = (sent_on, hidden_on), (grad[:, None], slope, grad_gates)
        parts = (grad, *masks, *wide, grad_gates.flatten(1), grad_message, grad_hidden, grad_sent)
        views = list(zip(*(part.split(sizes) for part in parts), strict=True))
        for level in schedule:
            g, s_on, h_on, g_wide, by, g_gates, g_gates_flat, g_message, g_hidden, g_sent = views[level]
            torch.mul(lists.add_up(grad_message, level).view_as(s_on), s_on, out=g_sent)
            torch.mm(g_sent, w2, out=g_hidden).mul_(h_on)
            g.addmm_(g_hidden, w0)
            torch.mul(g_wide, by, out=g_gates)
            torch.mm(g_gates_flat, gru_w_ih, out=g_message)

        by_ih = grad_gates.flatten(1)
        by_hh = torch.cat((by_ih[:, : 2 * d], by_ih[:, 2 * d :] * r), 1)
        grads = []
        for g_sent, g_hidden, hidden in zip(
            grad_sent.split(d, 1), grad_hidden.split(hid, 1), sweep.hidden.split(hid, 1), strict=True
        ):
            grads += [g_hidden.t() @ after, g_hidden.sum(0), g_sent.t() @ hidden, g_sent.sum(0)]
        grads += [by_ih.t() @ sweep.message, by_hh.t() @ sweep.before, by_ih.sum(0), by_hh.sum(0)]
        total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads
        grad = torch.addmm(grad * z, by_hh, gru_w_hh)

    return [torch.empty_like(grad).index_copy_(0, order, grad), *total]


@_gated_gnn.register_fake
def _(h: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
    mlp0_w = args[10]
    return torch.empty_like(h, memory_format=torch.contiguous_format), h.new_empty(
        2, h.shape[0], _saved_width(h.shape[1], mlp0_w.shape[0])
    )


@_gated_gnn_backward.register_fake
def _(grad: Tensor, out: Tensor, *args: Tensor) -> list[Tensor]:
    w0, w2, v0, v2, w_ih, w_hh = args[-6:]
    shapes = (out, w0, w0[:, 0], w2, w2[:, 0], v0, v0[:, 0], v2, v2[:, 0], w_ih, w_hh, w_ih[:, 0], w_hh[:, 0])
    return [out.new_empty(x.shape) for x in shapes]


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    topology, weights = inputs[1:11], inputs[11:]
    matrices = [w for w in weights if w.ndim == 2]
    ctx.save_for_backward(*output, *topology, *matrices)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None, _: None, op: Callable[..., Sequence[Tensor]] = _gated_gnn_backward
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 23
    by_h, *by_weights = op(grad, *ctx.saved_tensors)
    return by_h, *(None,) * 10, *by_weights


class _Traversal(torch.autograd.Function):
    """The op once more, in the form that the transforms of `torch.func` ask for and registration does not give."""

    @staticmethod
    def forward(*args: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = torch.ops.timm_ghn.gated_gnn(*args)
        return out

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad, _, _TraversalBackward.apply)


class _TraversalBackward(torch.autograd.Function):
    """`torch.func` records the backward pass too, although its derivative is not to be had."""

    @staticmethod
    def forward(*args: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.timm_ghn.gated_gnn_backward(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError("gated_gnn has no second derivative; use gated_gnn_reference for one.")


_gated_gnn.register_autograd(_backward, setup_context=_setup_context)
for _device in ("cpu", "cuda"):
    _gated_gnn.register_autocast(_device, torch.float32)
    _gated_gnn_backward.register_autocast(_device, torch.float32)
