"""The shape of a batch of graphs, laid out for a sweep over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from timm_ghn.graph.shortest_paths import MAX_DISTANCE

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Topology:
    """A batch of graphs, ready for `gated_gnn`.

    Nodes are renumbered: *positions* count them level by level over the whole batch, a node's level being the longest
    path that leads to it. No edge joins two nodes of one level, so a level is updated at once, and as positions are
    contiguous within a level, its states are a slice. Descending levels serve the backward sweep just as well.

    A message table has two rows per node: row 2p is position p's message over real edges, row 2p + 1 the one over
    virtual edges. `in_*` lists, for every row, the rows of the table that flow into it (predecessors), `out_*` the same
    for successors. A real edge is therefore listed twice, once under either row.

    Attributes:
        order: [N] the node at each position.
        level_ptr: [levels + 1] the first position of each level; always on the CPU, where the loop over levels runs.
        groups: [groups, 2] first position and the one after the last of each graph's share of each level; a graph's
            groups follow one another, levels ascending.
        graph_ptr: [graphs + 1] where each graph starts in `groups`.
        in_ptr: [2N + 1] where each row's list starts in `in_index`.
        in_index: [entries] row of the message table.
        in_distance: [entries] length of the edge, the divisor of its message.
        out_ptr: as `in_ptr`, for successors.
        out_index: as `in_index`, for successors.
        out_distance: as `in_distance`, for successors.
    """

    order: Tensor
    level_ptr: Tensor
    groups: Tensor
    graph_ptr: Tensor
    in_ptr: Tensor
    in_index: Tensor
    in_distance: Tensor
    out_ptr: Tensor
    out_index: Tensor
    out_distance: Tensor

    @classmethod
    def from_edges(cls, edges: Tensor, sizes: Sequence[int]) -> Topology:
        """Lays out a batch whose graphs' nodes are numbered one graph after the other.

        Args:
            edges: [E, 3] integers: source, target, distance; real edges have distance 1, and those longer than
                `MAX_DISTANCE` are left out. Sources come before their targets.
            sizes: number of nodes of each graph.

        Returns:
            The topology, on the device of `edges`.

        Raises:
            ValueError: the edges are not those of a batch of DAGs in topological order.
        """
        if edges.ndim != 2 or edges.shape[1] != 3:
            raise ValueError(f"edges have shape {tuple(edges.shape)}; give [E, 3]: source, target, distance.")
        if edges.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"edges are {edges.dtype}; give them as torch.int64.")
        if any(size < 0 for size in sizes):
            raise ValueError(f"graph sizes are {list(sizes)}; a graph cannot have fewer than 0 nodes.")

        graph_sizes = np.array(sizes, dtype=np.int64)
        nodes, width = int(graph_sizes.sum()), int(graph_sizes.max(initial=0))
        graph_of = np.repeat(np.arange(len(graph_sizes)), graph_sizes)
        rows = np.ascontiguousarray(edges.cpu().numpy().T, dtype=np.int64)
        source, target, distance = rows
        _check_edges(source, target, distance, graph_of)
        if distance.max(initial=0) > MAX_DISTANCE:
            source, target, distance = rows = rows[:, distance <= MAX_DISTANCE]

        real = distance == 1
        level = _levels(source[real], target[real], nodes)
        if (flat := level[source] >= level[target]).any():
            u, v, s = rows[:, flat][:, 0]
            raise ValueError(f"edge {u} -> {v} has distance {s}, but no path of edges of distance 1 leads there.")

        order = np.argsort(level, kind="stable")
        position = np.empty_like(order)
        position[order] = np.arange(nodes)
        start = _pointers(graph_sizes)[graph_of]  # of the graph of each node
        lists = [
            _compress(*ends, distance, width, start, order, position) for ends in ((target, source), (source, target))
        ]

        share = level[order] * len(graph_sizes) + graph_of[order]
        bounds = np.flatnonzero(np.diff(share, prepend=-1, append=-1))
        graph_of_group = graph_of[order[bounds[:-1]]]
        groups = np.stack((bounds[:-1], bounds[1:]), 1)[np.argsort(graph_of_group, kind="stable")]
        arrays = (
            order,
            _pointers(np.bincount(level)),
            groups,
            _pointers(np.bincount(graph_of_group, minlength=len(graph_sizes))),
            *lists[0],
            *lists[1],
        )
        return cls(*map(torch.from_numpy, arrays)).to(edges.device)

    @property
    def num_nodes(self) -> int:
        """Number of nodes in the batch."""
        return self.order.shape[0]

    def to(self, device: torch.device | str) -> Topology:
        """The same topology on another device."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return Topology(**{**moved, "level_ptr": self.level_ptr})


def _check_edges(source: Array, target: Array, distance: Array, graph_of: Array) -> None:
    """Raises ValueError for the first edge that cannot be one, and says why."""
    nodes = len(graph_of)
    for wrong, reason in (
        ((source < 0) | (target >= nodes), f"names a node outside 0...{nodes - 1}"),
        (source >= target, "closes a cycle or is out of order: number the nodes so that sources precede targets"),
        (distance < 1, "has a distance below 1"),
    ):
        if wrong.any():
            u, v, s = (x[wrong][0] for x in (source, target, distance))
            raise ValueError(f"edge {u} -> {v} (distance {s}) {reason}.")
    end = np.searchsorted(graph_of, graph_of, side="right")
    across = target >= end[source]
    if across.any():
        u, v = source[across][0], target[across][0]
        raise ValueError(f"edge {u} -> {v} joins graphs {graph_of[u]} and {graph_of[v]} of the batch.")


def _levels(source: Array, target: Array, nodes: int) -> Array:
    """Length of the longest path to each node."""
    level = [0] * nodes
    by_target = np.argsort(target, kind="stable")
    for u, v in zip(source[by_target].tolist(), target[by_target].tolist(), strict=True):
        level[v] = max(level[v], level[u] + 1)
    return np.array(level, dtype=np.int64)


def _pointers(counts: Array) -> Array:
    """Where each of consecutive runs starts, and the end of the last."""
    return np.concatenate(([0], counts.cumsum()))


def _compress(
    node: Array, neighbour: Array, distance: Array, width: int, start: Array, order: Array, position: Array
) -> tuple[Array, Array, Array]:
    """Lists for both rows of each position: where they start, the rows of the message table that they name, distances.

    Goes through a table of bytes, which is filled and read in a fraction of the time that sorting takes.

    Args:
        node: [E] whose lists they are.
        neighbour: [E] nodes to list.
        distance: [E], at most `MAX_DISTANCE`.
        width: nodes of the largest graph, and so of the table, where each graph's first node is column 0.
        start: [N] the first node of the graph of each node.
        order: [N] the node at each position.
        position: [N] of each node.
    """
    nodes = len(order)
    table = np.zeros((nodes, 2, width), np.uint8)
    virtual_row = (2 * position + 1) * width - start
    table.reshape(-1)[virtual_row[node] + neighbour] = distance.astype(np.uint8)
    table[:, 0] = table[:, 1] == 1
    entries = np.flatnonzero(table != 0)
    ptr = np.searchsorted(entries, np.arange(2 * nodes + 1) * width)
    counts = np.diff(ptr)
    if counts[1::2].sum() < len(node):
        raise ValueError("the edges name a pair of nodes more than once; keep the shortest distance of each pair.")
    message = np.concatenate((2 * position, 2 * position + 1))  # all real ones, then all virtual ones
    rows = np.arange(2 * nodes)
    to_message = start[order[rows // 2]] - rows * width + rows % 2 * nodes
    return ptr, message[entries + np.repeat(to_message, counts)], table.reshape(-1)[entries].astype(np.int64)
