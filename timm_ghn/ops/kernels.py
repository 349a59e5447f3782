"""The graph layer in Triton: one launch per direction of differentiation, a program per graph.

A program walks its graph's nodes in the order of the sweep, all states and messages in global memory (so in the cache),
the weights in registers where they fit. At each node the entries of its list are spread over the program's threads, and
every product is a matrix-vector product whose orientation alternates, so that one product's result lies as the next
one's operand must. Nodes of one level do not wait for each other; between levels the program synchronises. Each sum has
a fixed order, so the same input gives the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from timm_ghn.ops.portable import Mlps, Replay, Slopes, Weights, empty_sweeps, sweeps, weight_gradients
from timm_ghn.ops.topology import Topology

_RESIDENT_BYTES = 256
"""Up to this size of a state, a program's threads hold all weights in registers."""


def forward(h: Tensor, topology: Topology, weights: Weights) -> tuple[Tensor, Tensor]:
    """As `portable.forward`."""
    saved = empty_sweeps(h)
    up, down = sweeps(saved)
    torch.index_select(h, 0, topology.order, out=up.before)
    after = torch.empty_like(up.before)
    mlps = Mlps.of(weights)
    gru = (weights.gru_w_ih, weights.gru_w_hh, weights.gru_b_ih, weights.gru_b_hh)
    _launch(_forward, topology, mlps, *up, *down, after, *mlps, *(w.contiguous() for w in gru))
    return torch.empty_like(after).index_copy_(0, topology.order, after), saved


def backward(grad: Tensor, out: Tensor, saved: Tensor, topology: Topology, weights: Weights) -> list[Tensor]:
    """As `portable.backward`."""
    mlps = Mlps.of(weights)
    up, down = sweeps(saved)
    grad, after = grad[topology.order], out[topology.order]
    replays = Replay.of(up, down.before, mlps, weights), Replay.of(down, after, mlps, weights)
    slopes = Slopes.empty(up, replays[0]), Slopes.empty(down, replays[1])
    by_up, by_down, by_message = (torch.empty_like(grad) for _ in range(3))
    _launch(
        _backward,
        topology,
        mlps,
        *(grad, by_down, by_up, by_message),
        *(up.sent, *(x.contiguous() for x in replays[0]), *slopes[0]),
        *(down.sent, *(x.contiguous() for x in replays[1]), *slopes[1]),
        *(mlps.w0, mlps.w2, weights.gru_w_ih.contiguous(), weights.gru_w_hh.contiguous()),
    )
    by_h = torch.empty_like(grad).index_copy_(0, topology.order, by_up)
    shares = (
        weight_gradients(up, down.before, replays[0], slopes[0]),
        weight_gradients(down, after, replays[1], slopes[1]),
    )
    return [by_h, *(a + b for a, b in zip(*shares, strict=True))]


def _launch(kernel: Any, topology: Topology, mlps: Mlps, *tensors: Tensor) -> None:
    """Runs a kernel over all graphs."""
    graphs = len(topology.graph_ptr) - 1
    if not graphs:
        return
    hidden, d = mlps.w0.shape
    block = triton.next_power_of_2(d)
    with torch.cuda.device_of(mlps.w0):
        kernel[(graphs,)](
            *(getattr(topology, name) for name in _TOPOLOGY),
            *tensors,
            d,
            hidden,
            D=block,
            H=triton.next_power_of_2(hidden),
            E=max(8, 2048 // block),
            RESIDENT=block * mlps.w0.element_size() <= _RESIDENT_BYTES,
            num_warps=4 if block <= 32 else 8,
        )


_TOPOLOGY = ("groups", "graph_ptr", "in_ptr", "in_index", "in_distance", "out_ptr", "out_index", "out_distance")


@triton.jit
def _matrix(base, row_stride, rows, row_bound, column_stride, columns, column_bound):
    """A matrix, or its transpose, padded with zeros."""
    return tl.load(
        base + rows[:, None] * row_stride + columns[None, :] * column_stride,
        mask=(rows < row_bound)[:, None] & (columns < column_bound)[None, :],
        other=0.0,
    )


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit  # type: ignore[untyped-decorator]
def _gather(index, distance, first, last, shift, table, d, columns, E: tl.constexpr, D: tl.constexpr):
    """Sum of the table's rows that a list names (their numbers shifted right), each divided by its distance."""
    total = tl.zeros((E, D), table.dtype.element_ty)
    for start in range(first, last, E):
        entries = start + tl.arange(0, E)
        listed = entries < last
        row = tl.load(index + entries, mask=listed, other=0) >> shift
        divisor = tl.load(distance + entries, mask=listed, other=1).to(table.dtype.element_ty)
        mask = listed[:, None] & (columns < d)[None, :]
        total += tl.load(table + row[:, None] * d + columns[None, :], mask=mask, other=0.0) / divisor[:, None]
    return tl.sum(total, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    groups,
    graph_ptr,
    in_ptr,
    in_index,
    in_distance,
    out_ptr,
    out_index,
    out_distance,
    up_before,
    up_message,
    up_sent,
    down_before,
    down_message,
    down_sent,
    after,
    w0,
    b0,
    w2,
    b2,
    w_ih,
    w_hh,
    b_ih,
    b_hh,
    d,
    hidden_width,
    D: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    c, s, k = tl.arange(0, D), tl.arange(0, 2 * D), tl.arange(0, H)
    in_d, in_s, in_h = c < d, s < 2 * d, k < hidden_width
    b_r = tl.load(b_ih + c, mask=in_d, other=0.0) + tl.load(b_hh + c, mask=in_d, other=0.0)
    b_z = tl.load(b_ih + d + c, mask=in_d, other=0.0) + tl.load(b_hh + d + c, mask=in_d, other=0.0)
    b_in = tl.load(b_ih + 2 * d + c, mask=in_d, other=0.0)
    b_hn = tl.load(b_hh + 2 * d + c, mask=in_d, other=0.0)
    b_0, b_2 = tl.load(b0 + k, mask=in_h, other=0.0), tl.load(b2 + s, mask=in_s, other=0.0)
    part = d * d
    if RESIDENT:
        w_ir, w_hr = _matrix(w_ih, d, c, d, 1, c, d), _matrix(w_hh, d, c, d, 1, c, d)
        w_iz, w_hz = _matrix(w_ih + part, d, c, d, 1, c, d), _matrix(w_hh + part, d, c, d, 1, c, d)
        w_in, w_hn = _matrix(w_ih + 2 * part, d, c, d, 1, c, d), _matrix(w_hh + 2 * part, d, c, d, 1, c, d)
        w_0 = _matrix(w0, 1, c, d, d, k, hidden_width)  # transposed
        w_2 = _matrix(w2, hidden_width, s, 2 * d, 1, k, hidden_width)

    first_group, end_group = tl.load(graph_ptr + tl.program_id(0)), tl.load(graph_ptr + tl.program_id(0) + 1)
    for down in tl.static_range(2):
        if down:
            ptr, index, distance = out_ptr, out_index, out_distance
            before, message, sent, states = down_before, down_message, down_sent, after
        else:
            ptr, index, distance = in_ptr, in_index, in_distance
            before, message, sent, states = up_before, up_message, up_sent, down_before
        for step in range(first_group, end_group):
            group = first_group + end_group - 1 - step if down else step
            for p in range(tl.load(groups + 2 * group), tl.load(groups + 2 * group + 1)):
                if not RESIDENT:
                    w_ir, w_hr = _matrix(w_ih, d, c, d, 1, c, d), _matrix(w_hh, d, c, d, 1, c, d)
                h = tl.load(before + p * d + c, mask=in_d, other=0.0)
                m = _gather(index, distance, tl.load(ptr + 2 * p), tl.load(ptr + 2 * p + 2), 0, sent, d, c, E, D)
                r = tl.sigmoid(tl.sum(w_ir * m[None, :] + w_hr * h[None, :], 1) + b_r)
                if not RESIDENT:
                    w_iz, w_hz = _matrix(w_ih + part, d, c, d, 1, c, d), _matrix(w_hh + part, d, c, d, 1, c, d)
                z = tl.sigmoid(tl.sum(w_iz * m[None, :] + w_hz * h[None, :], 1) + b_z)
                if not RESIDENT:
                    w_in, w_hn = _matrix(w_ih + 2 * part, d, c, d, 1, c, d), _matrix(w_hh + 2 * part, d, c, d, 1, c, d)
                n = tl.sum(w_in * m[None, :], 1) + b_in + r * (tl.sum(w_hn * h[None, :], 1) + b_hn)
                n = 2 * tl.sigmoid(2 * n) - 1  # tanh
                state = n + z * (h - n)
                if not RESIDENT:
                    w_0 = _matrix(w0, 1, c, d, d, k, hidden_width)
                hidden = _relu(tl.sum(w_0 * state[:, None], 0) + b_0)
                if not RESIDENT:
                    w_2 = _matrix(w2, hidden_width, s, 2 * d, 1, k, hidden_width)
                out = _relu(tl.sum(w_2 * hidden[None, :], 1) + b_2)
                tl.store(sent + 2 * p * d + s, out, mask=in_s)
                tl.store(states + p * d + c, state, mask=in_d)
                tl.store(message + p * d + c, m, mask=in_d)
            # What this level sent is in memory before the next one reads it.
            tl.debug_barrier()


@triton.jit  # type: ignore[untyped-decorator]
def _backward(
    groups,
    graph_ptr,
    in_ptr,
    in_index,
    in_distance,
    out_ptr,
    out_index,
    out_distance,
    grad,
    by_down,
    by_up,
    by_message,
    up_sent,
    up_hidden,
    up_reset,
    up_update,
    up_gates,
    up_by_gates,
    up_by_hidden,
    up_by_sent,
    down_sent,
    down_hidden,
    down_reset,
    down_update,
    down_gates,
    down_by_gates,
    down_by_hidden,
    down_by_sent,
    w0,
    w2,
    w_ih,
    w_hh,
    d,
    hidden_width,
    D: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    c, k = tl.arange(0, D), tl.arange(0, H)
    in_d, in_h = c < d, k < hidden_width
    part = d * d
    # All transposed but the first layers.
    if RESIDENT:
        w_ir, w_hr = _matrix(w_ih, 1, c, d, d, c, d), _matrix(w_hh, 1, c, d, d, c, d)
        w_iz, w_hz = _matrix(w_ih + part, 1, c, d, d, c, d), _matrix(w_hh + part, 1, c, d, d, c, d)
        w_in, w_hn = _matrix(w_ih + 2 * part, 1, c, d, d, c, d), _matrix(w_hh + 2 * part, 1, c, d, d, c, d)
        w_0 = _matrix(w0, d, k, hidden_width, 1, c, d)
        w_real = _matrix(w2, 1, k, hidden_width, hidden_width, c, d)
        w_virtual = _matrix(w2 + d * hidden_width, 1, k, hidden_width, hidden_width, c, d)

    first_group, end_group = tl.load(graph_ptr + tl.program_id(0)), tl.load(graph_ptr + tl.program_id(0) + 1)
    for up in tl.static_range(2):
        if up:
            ptr, index, distance = out_ptr, out_index, out_distance
            by_after, by_before = by_down, by_up
            sent, hidden, reset, update, gates = up_sent, up_hidden, up_reset, up_update, up_gates
            by_gates, by_hidden, by_sent = up_by_gates, up_by_hidden, up_by_sent
        else:
            ptr, index, distance = in_ptr, in_index, in_distance
            by_after, by_before = grad, by_down
            sent, hidden, reset, update, gates = down_sent, down_hidden, down_reset, down_update, down_gates
            by_gates, by_hidden, by_sent = down_by_gates, down_by_hidden, down_by_sent
        for step in range(first_group, end_group):
            group = first_group + end_group - 1 - step if up else step
            for p in range(tl.load(groups + 2 * group), tl.load(groups + 2 * group + 1)):
                here, real_row, virtual_row = p * d + c, 2 * p * d + c, (2 * p + 1) * d + c
                first, middle, last = tl.load(ptr + 2 * p), tl.load(ptr + 2 * p + 1), tl.load(ptr + 2 * p + 2)
                by_real = _gather(index, distance, first, middle, 1, by_message, d, c, E, D)
                by_real = tl.where(tl.load(sent + real_row, mask=in_d, other=0.0) > 0, by_real, 0.0)
                by_virtual = _gather(index, distance, middle, last, 1, by_message, d, c, E, D)
                by_virtual = tl.where(tl.load(sent + virtual_row, mask=in_d, other=0.0) > 0, by_virtual, 0.0)
                if not RESIDENT:
                    w_real = _matrix(w2, 1, k, hidden_width, hidden_width, c, d)
                    w_virtual = _matrix(w2 + d * hidden_width, 1, k, hidden_width, hidden_width, c, d)
                by_k = tl.sum(w_real * by_real[None, :] + w_virtual * by_virtual[None, :], 1)
                by_k = tl.where(tl.load(hidden + p * hidden_width + k, mask=in_h, other=0.0) > 0, by_k, 0.0)
                if not RESIDENT:
                    w_0 = _matrix(w0, d, k, hidden_width, 1, c, d)
                g = tl.load(by_after + here, mask=in_d, other=0.0) + tl.sum(w_0 * by_k[:, None], 0)
                by_r = g * tl.load(gates + 3 * p * d + c, mask=in_d, other=0.0)
                by_z = g * tl.load(gates + (3 * p + 1) * d + c, mask=in_d, other=0.0)
                by_n = g * tl.load(gates + (3 * p + 2) * d + c, mask=in_d, other=0.0)
                if not RESIDENT:
                    w_ir, w_iz = _matrix(w_ih, 1, c, d, d, c, d), _matrix(w_ih + part, 1, c, d, d, c, d)
                    w_in = _matrix(w_ih + 2 * part, 1, c, d, d, c, d)
                by_m = tl.sum(w_ir * by_r[None, :] + w_iz * by_z[None, :] + w_in * by_n[None, :], 1)
                tl.store(by_message + here, by_m, mask=in_d)

                tl.store(by_sent + real_row, by_real, mask=in_d)
                tl.store(by_sent + virtual_row, by_virtual, mask=in_d)
                tl.store(by_hidden + p * hidden_width + k, by_k, mask=in_h)
                tl.store(by_gates + 3 * p * d + c, by_r, mask=in_d)
                tl.store(by_gates + (3 * p + 1) * d + c, by_z, mask=in_d)
                tl.store(by_gates + (3 * p + 2) * d + c, by_n, mask=in_d)
                by_hn = by_n * tl.load(reset + here, mask=in_d, other=0.0)
                if not RESIDENT:
                    w_hr, w_hz = _matrix(w_hh, 1, c, d, d, c, d), _matrix(w_hh + part, 1, c, d, d, c, d)
                    w_hn = _matrix(w_hh + 2 * part, 1, c, d, d, c, d)
                by_h = tl.sum(w_hr * by_r[None, :] + w_hz * by_z[None, :] + w_hn * by_hn[None, :], 1)
                by_h += g * tl.load(update + here, mask=in_d, other=0.0)
                tl.store(by_before + here, by_h, mask=in_d)
            # What this level passes on is in memory before the next one reads it.
            tl.debug_barrier()
