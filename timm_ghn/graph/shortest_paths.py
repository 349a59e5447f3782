"""All-pairs shortest paths in a DAG, bounded by a cutoff."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

MAX_DISTANCE = 50  # the cutoff of GHN-2's virtual edges (arXiv 2110.13100, eq. 4)


def with_virtual_edges(
    num_nodes: int, edges: Sequence[tuple[int, int]], max_distance: int = MAX_DISTANCE
) -> torch.Tensor:
    """Adds an edge for every ordered pair of nodes that a path of 2…`max_distance` edges connects.

    A node's distances are one more than the least of its successors', so a single sweep against the topological order
    fills the whole matrix, one vectorised minimum of N bytes per edge.

    Args:
        num_nodes: N; nodes are numbered in topological order.
        edges: (source, target) pairs with source < target.
        max_distance: Longest path that still gets a virtual edge; below 255.

    Returns:
        int64 [E, 3] rows (source, target, distance), sorted by source, then target.

    Raises:
        ValueError: If an edge does not go forward in the given order, which is how a cycle shows.
    """
    successors: list[list[int]] = [[] for _ in range(num_nodes)]
    for source, target in edges:
        if not 0 <= source < target < num_nodes:
            raise ValueError(
                f"Edge ({source}, {target}) is not forward in the topological order of {num_nodes} nodes; "
                "number the nodes so that every source comes before its targets."
            )
        successors[source].append(target)
    unreachable = max_distance + 1
    distances = np.full((num_nodes, num_nodes), unreachable, dtype=np.uint8)
    for source in range(num_nodes - 1, -1, -1):
        row = distances[source]
        for target in successors[source]:
            np.minimum(row, distances[target] + 1, out=row)  # at most unreachable + 1, which the minimum discards
        row[successors[source]] = 1
        row[source] = 0
    pairs = np.argwhere((distances > 0) & (distances <= max_distance))
    lengths = distances[pairs[:, 0], pairs[:, 1]]
    return torch.from_numpy(np.column_stack((pairs, lengths)).astype(np.int64))
