"""The graph layer in plain torch, on any device: the states of a level are updated at once.

What it computes is written down in `reference.py`; here

- a message depends on its sender alone, so each is computed once per node, not once per edge;
- the GRU's product with the state that a sweep finds is known before the sweep: one matrix product for all nodes;
- backward, everything that does not depend on the sweep's order (gate derivatives, weight gradients) is done for all
  nodes at once, before or after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    sent: Tensor  # 2d, each node's two messages; read as [2N, d], the message table


def empty_sweeps(h: Tensor) -> Tensor:
    """[2, 4N, d]: the one buffer that goes from forward to backward."""
    return h.new_empty(2, 4 * h.shape[0], h.shape[1])


def sweeps(saved: Tensor) -> list[Sweep]:
    """Views of the buffer's two sweeps."""
    nodes, d = saved.shape[1] // 4, saved.shape[2]
    return [Sweep(block[:nodes], block[nodes : 2 * nodes], block[2 * nodes :].view(nodes, 2 * d)) for block in saved]


class Mlps(NamedTuple):
    """Both message mlps as one that has their outputs side by side."""

    w0: Tensor  # [2 hidden, d]
    b0: Tensor
    w2: Tensor  # [2d, 2 hidden], block-diagonal
    b2: Tensor

    @classmethod
    def of(cls, weights: Weights) -> Mlps:
        return cls(
            torch.cat((weights.mlp0_w, weights.ve0_w)),
            torch.cat((weights.mlp0_b, weights.ve0_b)),
            torch.block_diag(weights.mlp2_w, weights.ve2_w),
            torch.cat((weights.mlp2_b, weights.ve2_b)),
        )


class Replay(NamedTuple):
    """What a sweep computed inside its nodes and did not keep, found again for all nodes at once: [N, ...]."""

    hidden: Tensor  # 2 hidden, the message mlps' hidden layers
    reset: Tensor  # d, the gate r
    update: Tensor  # d, the gate z
    gates: Tensor  # 3d, the derivative of a node's new state by what enters its three gates: it is diagonal

    @classmethod
    def of(cls, sweep: Sweep, after: Tensor, mlps: Mlps, weights: Weights) -> Replay:
        d = after.shape[1]
        by_message = torch.addmm(weights.gru_b_ih, sweep.message, weights.gru_w_ih.t())
        by_state = torch.addmm(weights.gru_b_hh, sweep.before, weights.gru_w_hh.t())
        r, z = (by_message[:, : 2 * d] + by_state[:, : 2 * d]).sigmoid_().split(d, 1)
        n = torch.addcmul(by_message[:, 2 * d :], r, by_state[:, 2 * d :]).tanh_()
        by_n = (1 - z) * (1 - n * n)
        by_z = (sweep.before - n) * z * (1 - z)
        by_r = by_n * by_state[:, 2 * d :] * r * (1 - r)
        return cls(torch.addmm(mlps.b0, after, mlps.w0.t()).relu_(), r, z, torch.cat((by_r, by_z, by_n), 1))


class Slopes(NamedTuple):
    """Gradients that a sweep's backward pass finds node by node: [N, ...] by position, before any activation."""

    gates: Tensor  # 3d, by the GRU's product with the message
    hidden: Tensor  # 2 hidden, by the message mlps' hidden layers
    sent: Tensor  # 2d, by the messages

    @classmethod
    def empty(cls, sweep: Sweep, replay: Replay) -> Slopes:
        """Room for them."""
        return cls(torch.empty_like(replay.gates), torch.empty_like(replay.hidden), torch.empty_like(sweep.sent))


_Split = tuple[Sequence[Tensor], list[int]]
"""Tensors, and how many of their rows each level has."""

_LEVELS_AT_A_TIME = 32


def _walk(descending: bool, *splits: _Split) -> Iterator[tuple[Tensor, ...]]:
    """Each level's share of the tensors, in the order of a sweep.

    Views are made for some levels at a time: thousands of them alive at once set off Python's garbage collector, which
    then visits everything that the process holds.
    """
    direction = slice(None, None, -1 if descending else 1)
    parts = []
    for tensors, sizes in splits:
        chunks = [sizes[i : i + _LEVELS_AT_A_TIME] for i in range(0, len(sizes), _LEVELS_AT_A_TIME)]
        parts += [zip(x.split([sum(chunk) for chunk in chunks]), chunks, strict=True) for x in tensors]
    for chunk in list(zip(*parts, strict=True))[direction]:
        yield from list(zip(*(x.split(sizes) for x, sizes in chunk), strict=True))[direction]


def _lists(
    ptr: Tensor, index: Tensor, distance: Tensor, levels: list[int], split: bool, like: Tensor
) -> tuple[_Split, _Split]:
    """Compressed lists as `_add_up` takes them; `split`: a node's real and virtual edges add up to separate rows."""
    bounds = ptr[[2 * position for position in levels]].tolist()
    starts = ptr[:-1] if split else ptr[:-1:2]
    sums = [(b - a) * (1 + split) for a, b in pairwise(levels)]
    first = torch.repeat_interleave(ptr.new_tensor(bounds[:-1]), ptr.new_tensor(sums))
    factor = distance.to(like.dtype).reciprocal()
    return ((index, factor), [b - a for a, b in pairwise(bounds)]), ((starts - first,), sums)


def _add_up(table: Tensor, rows: Tensor, factors: Tensor, starts: Tensor) -> Tensor:
    """Weighted sums of rows of a table, one sum from each start to the next: gather, product and sum in one op."""
    return torch.embedding_bag(table, rows, starts, per_sample_weights=factors)[0]


def forward(h: Tensor, topology: Topology, weights: Weights) -> tuple[Tensor, Tensor]:
    """The updated states, and the buffer for `backward`."""
    d = h.shape[1]
    levels = topology.level_ptr.tolist()
    sizes = [b - a for a, b in pairwise(levels)]
    saved = empty_sweeps(h)
    up, down = sweeps(saved)
    torch.index_select(h, 0, topology.order, out=up.before)
    after = torch.empty_like(up.before)

    mlps = Mlps.of(weights)
    w0, w2, w_ih = mlps.w0.t(), mlps.w2.t(), weights.gru_w_ih.t()
    incoming = _lists(topology.in_ptr, topology.in_index, topology.in_distance, levels, False, h)
    outgoing = _lists(topology.out_ptr, topology.out_index, topology.out_distance, levels, False, h)
    for sweep, states, lists in ((up, down.before, incoming), (down, after, outgoing)):
        gates = torch.addmm(weights.gru_b_hh, sweep.before, weights.gru_w_hh.t())
        recurrent = gates[:, 2 * d :].clone()
        gates[:, 2 * d :] = 0
        gates += weights.gru_b_ih
        hidden = mlps.b0.repeat(len(h), 1)
        sweep.sent.copy_(mlps.b2)
        table = sweep.sent.view(-1, d)
        parts = (*sweep, states, hidden, gates, gates[:, : 2 * d], *gates.split(d, 1), recurrent)
        for views in _walk(sweep is down, *lists, (parts, sizes)):
            rows, factors, starts, before, message, sent, state, inner, pre, reset_update, r, z, n, hn = views
            message.copy_(_add_up(table, rows, factors, starts))
            pre.addmm_(message, w_ih)
            reset_update.sigmoid_()
            n.addcmul_(r, hn).tanh_()
            torch.lerp(n, before, z, out=state)
            sent.addmm_(inner.addmm_(state, w0).relu_(), w2).relu_()

    return torch.empty_like(after).index_copy_(0, topology.order, after), saved


def backward(grad: Tensor, out: Tensor, saved: Tensor, topology: Topology, weights: Weights) -> list[Tensor]:
    """Gradients of the states and of the twelve weights."""
    levels = topology.level_ptr.tolist()
    sizes = [b - a for a, b in pairwise(levels)]
    mlps = Mlps.of(weights)
    up, down = sweeps(saved)
    incoming = _lists(topology.in_ptr, topology.in_index // 2, topology.in_distance, levels, True, out)
    outgoing = _lists(topology.out_ptr, topology.out_index // 2, topology.out_distance, levels, True, out)
    grad = grad[topology.order]
    by_weights = []
    for sweep, after, lists in ((down, out[topology.order], incoming), (up, down.before, outgoing)):
        replay = Replay.of(sweep, after, mlps, weights)
        slopes = Slopes.empty(sweep, replay)
        by_message = torch.empty_like(grad)
        hidden_on, sent_on = ((x > 0).to(x.dtype) for x in (replay.hidden, sweep.sent))
        three = (len(grad), 3, grad.shape[1])
        known = (grad, grad[:, None], replay.gates.view(three), hidden_on, sent_on)
        found = (by_message, slopes.gates.view(three), *slopes)
        for views in _walk(sweep is up, *lists, ((*known, *found), sizes)):
            rows, factors, starts, g, g_wide, gates, h_on, s_on, g_message, g_gates_wide, g_gates, g_hidden, g_sent = (
                views
            )
            torch.mul(_add_up(by_message, rows, factors, starts).view_as(s_on), s_on, out=g_sent)
            torch.mm(g_sent, mlps.w2, out=g_hidden).mul_(h_on)
            g.addmm_(g_hidden, mlps.w0)
            torch.mul(g_wide, gates, out=g_gates_wide)
            torch.mm(g_gates, weights.gru_w_ih, out=g_message)
        by_weights.append(weight_gradients(sweep, after, replay, slopes))
        grad = torch.addmm(grad * replay.update, recurrent_slopes(slopes, replay), weights.gru_w_hh)

    by_h = torch.empty_like(grad).index_copy_(0, topology.order, grad)
    return [by_h, *(a + b for a, b in zip(*by_weights, strict=True))]


def recurrent_slopes(slopes: Slopes, replay: Replay) -> Tensor:
    """[N, 3d] gradients by the GRU's product with the state: as by the other product, but r scales the last part."""
    d = replay.reset.shape[1]
    reset_update, candidate = slopes.gates.split((2 * d, d), 1)
    return torch.cat((reset_update, candidate * replay.reset), 1)


def weight_gradients(sweep: Sweep, after: Tensor, replay: Replay, slopes: Slopes) -> list[Tensor]:
    """A sweep's share of the twelve weights' gradients."""
    grads = []
    by_sents, by_hiddens, hiddens = (x.tensor_split(2, 1) for x in (slopes.sent, slopes.hidden, replay.hidden))
    for by_sent, by_hidden, hidden in zip(by_sents, by_hiddens, hiddens, strict=True):
        grads += [by_hidden.t() @ after, by_hidden.sum(0), by_sent.t() @ hidden, by_sent.sum(0)]
    by_hh = recurrent_slopes(slopes, replay)
    return [*grads, slopes.gates.t() @ sweep.message, by_hh.t() @ sweep.before, slopes.gates.sum(0), by_hh.sum(0)]
