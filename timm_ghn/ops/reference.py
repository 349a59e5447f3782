"""What `gated_gnn` computes, edge by edge: the specification that the fast versions are tested against."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ghn.graph.shortest_paths import MAX_DISTANCE


def gated_gnn_reference(
    h: Tensor,
    edges: Tensor,
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
    """One round of message passing: a sweep over the nodes in topological order, then one in the reverse order.

    Args:
        h: [N, d] node states, nodes in topological order.
        edges: [E, 3] source, target, distance.
        mlp0_w: [hidden, d], and so on: the two layers that turn a state into a message over a real edge.
        mlp0_b: see `mlp0_w`.
        mlp2_w: see `mlp0_w`.
        mlp2_b: see `mlp0_w`.
        ve0_w: the same for virtual edges; all four None: no virtual edges.
        ve0_b: see `ve0_w`.
        ve2_w: see `ve0_w`.
        ve2_b: see `ve0_w`.
        gru_w_ih: [3d, d], and so on: the GRU cell, as in `torch.nn.GRUCell`.
        gru_w_hh: see `gru_w_ih`.
        gru_b_ih: see `gru_w_ih`.
        gru_b_hh: see `gru_w_ih`.

    Returns:
        [N, d] the updated states.
    """

    def mlp(x: Tensor, *layers: Any) -> Tensor:
        w0, b0, w2, b2 = layers
        return F.relu(F.linear(F.relu(F.linear(x, w0, b0)), w2, b2))

    predecessors, successors = defaultdict(list), defaultdict(list)
    for source, target, distance in edges.tolist():
        predecessors[target].append((source, distance))
        successors[source].append((target, distance))

    states = list(h.unbind(0))
    nodes = range(len(states))
    for sweep, neighbours in ((nodes, predecessors), (reversed(nodes), successors)):
        for v in sweep:
            message = torch.zeros_like(states[v])
            for u, distance in neighbours[v]:
                if distance == 1:
                    message = message + mlp(states[u], mlp0_w, mlp0_b, mlp2_w, mlp2_b)
                if ve0_w is not None and distance <= MAX_DISTANCE:
                    message = message + mlp(states[u], ve0_w, ve0_b, ve2_w, ve2_b) / distance
            states[v] = torch.gru_cell(message[None], states[v][None], gru_w_ih, gru_w_hh, gru_b_ih, gru_b_hh)[0]
    return torch.stack(states) if states else h.clone()
