"""The shape of a batch of graphs, laid out for a sweep over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from timm_ghn.graph.shortest_paths import MAX_DISTANCE


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

        device, edges = edges.device, edges.to("cpu", torch.int64)
        graph_sizes = torch.tensor(list(sizes), dtype=torch.int64)
        nodes = int(graph_sizes.sum())
        graph_of = torch.repeat_interleave(graph_sizes)
        _check_edges(edges, graph_of)
        source, target, distance = edges[edges[:, 2] <= MAX_DISTANCE].unbind(1)

        level = _levels(source[distance == 1], target[distance == 1], nodes)
        flat = level[source] >= level[target]
        if flat.any():
            u, v, s = (int(x[flat][0]) for x in (source, target, distance))
            raise ValueError(f"edge {u} -> {v} has distance {s}, but no path of edges of distance 1 leads there.")

        order = torch.argsort(level, stable=True)
        position = torch.empty_like(order)
        position[order] = torch.arange(nodes)
        source, target, real = 2 * position[source], 2 * position[target], distance == 1
        source = torch.cat((source[real], source + 1))
        target = torch.cat((target[real], target + 1))
        distance = torch.cat((distance[real], distance))
        in_ptr, in_index, in_distance = _compress(target, source, distance, nodes)
        out_ptr, out_index, out_distance = _compress(source, target, distance, nodes)

        _, counts = torch.unique_consecutive(level[order] * len(graph_sizes) + graph_of[order], return_counts=True)
        groups = torch.stack((counts.cumsum(0) - counts, counts.cumsum(0)), 1)
        graph_of_group, by_graph = torch.sort(graph_of[order][groups[:, 0]], stable=True)

        topology = cls(
            order=order,
            level_ptr=_pointers(torch.bincount(level)),
            groups=groups[by_graph],
            graph_ptr=_pointers(torch.bincount(graph_of_group, minlength=len(graph_sizes))),
            in_ptr=in_ptr,
            in_index=in_index,
            in_distance=in_distance,
            out_ptr=out_ptr,
            out_index=out_index,
            out_distance=out_distance,
        )
        return topology.to(device)

    @property
    def num_nodes(self) -> int:
        """Number of nodes in the batch."""
        return self.order.shape[0]

    def to(self, device: torch.device | str) -> Topology:
        """The same topology on another device."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return Topology(**{**moved, "level_ptr": self.level_ptr})


def _check_edges(edges: Tensor, graph_of: Tensor) -> None:
    """Raises ValueError for the first edge that cannot be one, and says why."""
    source, target, distance = edges.unbind(1)
    nodes = len(graph_of)
    outside = ((edges[:, :2] < 0) | (edges[:, :2] >= nodes)).any(1)
    for wrong, reason in (
        (outside, f"names a node outside 0...{nodes - 1}"),
        (source >= target, "closes a cycle or is out of order: number the nodes so that sources precede targets"),
        (distance < 1, "has a distance below 1"),
    ):
        if wrong.any():
            u, v, s = edges[wrong][0].tolist()
            raise ValueError(f"edge {u} -> {v} (distance {s}) {reason}.")
    across = graph_of[source] != graph_of[target]
    if across.any():
        u, v, _ = edges[across][0].tolist()
        raise ValueError(f"edge {u} -> {v} joins graphs {int(graph_of[u])} and {int(graph_of[v])} of the batch.")


def _levels(source: Tensor, target: Tensor, nodes: int) -> Tensor:
    """Length of the longest path to each node."""
    level = [0] * nodes
    by_target = torch.argsort(target)
    for u, v in zip(source[by_target].tolist(), target[by_target].tolist(), strict=True):
        level[v] = max(level[v], level[u] + 1)
    return torch.tensor(level, dtype=torch.int64)


def _pointers(counts: Tensor) -> Tensor:
    """Where each of consecutive runs starts, and the end of the last."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _compress(row: Tensor, column: Tensor, distance: Tensor, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compressed rows, columns ascending in each."""
    key, by_key = torch.sort(row * (2 * nodes) + column)
    if (key[1:] == key[:-1]).any():
        raise ValueError("the edges name a pair of nodes more than once; keep the shortest distance of each pair.")
    return _pointers(torch.bincount(row, minlength=2 * nodes)), column[by_key], distance[by_key]
