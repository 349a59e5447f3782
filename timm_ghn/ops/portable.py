"""The graph layer in plain torch, on any device: the states of a level are updated at once.

What it computes is written down in `reference.py`; here

- a message depends on its sender alone, so each is computed once per node, not once per edge;
- the GRU's product with the state that a sweep finds is known before the sweep: one matrix product for all nodes;
- backward, everything that does not depend on the sweep's order (gate derivatives, weight gradients) is done for all
  nodes at once, before or after it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from timm_ghn.ops.topology import Topology


class Weights(NamedTuple):
    """The layer's weights; the two message mlps' hidden layers are equally wide."""

    mlp0_w: Tensor
    mlp0_b: Tensor
    mlp2_w: Tensor
    mlp2_b: Tensor
    ve0_w: Tensor
    ve0_b: Tensor
    ve2_w: Tensor
    ve2_b: Tensor
    gru_w_ih: Tensor
    gru_w_hh: Tensor
    gru_b_ih: Tensor
    gru_b_hh: Tensor


class Sweep(NamedTuple):
    """What a sweep leaves behind for the backward pass: [N, ...] by position."""

    before: Tensor  # d, the states that the sweep finds
    message: Tensor  # d, the sum that reaches each node
    reset_update: Tensor  # 2d, the gates r and z
    candidate: Tensor  # d, n
    recurrent: Tensor  # d, the part of n that r scales
    hidden: Tensor  # 2 hidden, the message mlps' hidden layers
    sent: Tensor  # 2d, each node's two messages; read as [2N, d], the message table


class Slopes(NamedTuple):
    """Gradients that a sweep's backward pass finds node by node: [N, ...] by position, before any activation."""

    gates: Tensor  # 3d, by the GRU's product with the message
    hidden: Tensor  # 2 hidden
    sent: Tensor  # 2d


def empty_sweeps(h: Tensor, hidden: int) -> Tensor:
    """[2, N, width]: the one buffer that goes from forward to backward."""
    return h.new_empty(2, h.shape[0], 8 * h.shape[1] + 2 * hidden)


def sweeps(saved: Tensor, d: int) -> list[Sweep]:
    """Views of the buffer's two sweeps."""
    nodes, width = saved.shape[1:]
    widths = (d, d, 2 * d, d, d, width - 8 * d, 2 * d)
    return [
        Sweep(*(part.view(nodes, w) for part, w in zip(block.split([nodes * w for w in widths]), widths, strict=True)))
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


def forward(h: Tensor, topology: Topology, weights: Weights) -> tuple[Tensor, Tensor]:
    """The updated states, and the buffer for `backward`."""
    d = h.shape[1]
    levels = topology.level_ptr.tolist()
    sizes = [b - a for a, b in pairwise(levels)]
    saved = empty_sweeps(h, weights.mlp0_w.shape[0])
    up, down = sweeps(saved, d)
    torch.index_select(h, 0, topology.order, out=up.before)
    after = torch.empty_like(up.before)

    # Both message mlps as one with the outputs side by side.
    w0 = torch.cat((weights.mlp0_w, weights.ve0_w)).t()
    w2 = torch.block_diag(weights.mlp2_w, weights.ve2_w).t()
    b0, b2 = torch.cat((weights.mlp0_b, weights.ve0_b)), torch.cat((weights.mlp2_b, weights.ve2_b))
    w_ih = weights.gru_w_ih.t()
    incoming = _Lists.cut(topology.in_ptr, topology.in_index, topology.in_distance, levels, False, h)
    outgoing = _Lists.cut(topology.out_ptr, topology.out_index, topology.out_distance, levels, False, h)
    ascending = range(len(sizes))
    for sweep, states, schedule, lists in (
        (up, down.before, ascending, incoming),
        (down, after, ascending[::-1], outgoing),
    ):
        gates = torch.addmm(weights.gru_b_hh, sweep.before, weights.gru_w_hh.t())
        sweep.recurrent.copy_(gates[:, 2 * d :])
        gates[:, 2 * d :] = 0
        gates += weights.gru_b_ih
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

    return torch.empty_like(after).index_copy_(0, topology.order, after), saved


def backward(grad: Tensor, out: Tensor, saved: Tensor, topology: Topology, weights: Weights) -> list[Tensor]:
    """Gradients of the states and of the twelve weights."""
    d = out.shape[1]
    levels = topology.level_ptr.tolist()
    sizes = [b - a for a, b in pairwise(levels)]
    up, down = sweeps(saved, d)
    w0 = torch.cat((weights.mlp0_w, weights.ve0_w))
    w2 = torch.block_diag(weights.mlp2_w, weights.ve2_w)
    incoming = _Lists.cut(topology.in_ptr, topology.in_index // 2, topology.in_distance, levels, True, out)
    outgoing = _Lists.cut(topology.out_ptr, topology.out_index // 2, topology.out_distance, levels, True, out)
    ascending = range(len(sizes))
    grad = grad[topology.order]
    slopes = []
    for sweep, schedule, lists in ((down, ascending, incoming), (up, ascending[::-1], outgoing)):
        # The derivative of a node's new state by what enters its three gates is diagonal and known from the forward
        # pass; so is what the ReLUs let through.
        r, z = sweep.reset_update.split(d, 1)
        n = sweep.candidate
        by_n = (1 - z) * (1 - n * n)
        by_z = (sweep.before - n) * z * (1 - z)
        by_r = by_n * sweep.recurrent * r * (1 - r)
        by_gates = torch.stack((by_r, by_z, by_n), 1)
        sent_on, hidden_on = ((x > 0).to(x.dtype) for x in (sweep.sent, sweep.hidden))

        gates, message = torch.empty_like(by_gates), torch.empty_like(grad)
        found = Slopes(gates.flatten(1), torch.empty_like(hidden_on), torch.empty_like(sent_on))
        parts = (grad, grad[:, None], by_gates, sent_on, hidden_on, message, gates, *found)
        views = list(zip(*(part.split(sizes) for part in parts), strict=True))
        for level in schedule:
            g, g_wide, by, s_on, h_on, g_message, g_gates_wide, g_gates, g_hidden, g_sent = views[level]
            torch.mul(lists.add_up(message, level).view_as(s_on), s_on, out=g_sent)
            torch.mm(g_sent, w2, out=g_hidden).mul_(h_on)
            g.addmm_(g_hidden, w0)
            torch.mul(g_wide, by, out=g_gates_wide)
            torch.mm(g_gates, weights.gru_w_ih, out=g_message)
        slopes.append(found)
        grad = torch.addmm(grad * z, recurrent_slopes(found, sweep), weights.gru_w_hh)

    return [
        torch.empty_like(grad).index_copy_(0, topology.order, grad),
        *weight_gradients(((up, down.before, slopes[1]), (down, out[topology.order], slopes[0]))),
    ]


def recurrent_slopes(slopes: Slopes, sweep: Sweep) -> Tensor:
    """[N, 3d] gradients by the GRU's product with the state: those by the other product, but r scales the last part."""
    d = sweep.before.shape[1]
    reset_update, candidate = slopes.gates.split((2 * d, d), 1)
    return torch.cat((reset_update, candidate * sweep.reset_update[:, :d]), 1)


def weight_gradients(passes: tuple[tuple[Sweep, Tensor, Slopes], ...]) -> list[Tensor]:
    """Gradients of the weights, from each sweep's record, the states after it and the slopes found in it."""
    total: list[Tensor] = []
    for sweep, after, slopes in passes:
        grads = []
        hidden = sweep.hidden.shape[1] // 2
        for by_sent, by_hidden, h in zip(
            slopes.sent.chunk(2, 1), slopes.hidden.split(hidden, 1), sweep.hidden.split(hidden, 1), strict=True
        ):
            grads += [by_hidden.t() @ after, by_hidden.sum(0), by_sent.t() @ h, by_sent.sum(0)]
        by_hh = recurrent_slopes(slopes, sweep)
        grads += [slopes.gates.t() @ sweep.message, by_hh.t() @ sweep.before, slopes.gates.sum(0), by_hh.sum(0)]
        total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads
    return total
