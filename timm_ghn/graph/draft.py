"""A graph while it is being drawn: nodes in the order in which they are met, edges that may still be added."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable

from .record import Size

Nodes = frozenset[int]


class Draft:
    """Nodes and edges; node 0 is the input.

    Attributes:
        ops: Primitives of the nodes.
        names: Their names.
        shapes: Their shapes.
        edges: Pairs of nodes, with the functions that read the first for the second.
        node_of: The nodes that stand for parameters, by name.
        reader: The function that reads what comes through edges which are added now.
    """

    def __init__(self) -> None:
        self.ops = ["input"]
        self.names = ["input"]
        self.shapes: list[Size | None] = [None]
        self.edges: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.node_of: dict[str, int] = {}
        self.reader = 0

    def add(self, op: str, name: str, shape: Size | None, sources: Iterable[int]) -> Nodes:
        """A new node that reads from others."""
        node = len(self.ops)
        self.ops.append(op)
        self.names.append(name)
        self.shapes.append(shape)
        self.read(sources, node)
        return frozenset({node})

    def add_parameter(self, op: str, name: str, shape: Size, sources: Nodes) -> Nodes:
        """A parameter's node; a parameter that is used again keeps its one node and gets the further inputs."""
        if name in self.node_of:
            node = self.node_of[name]
            return frozenset({node}) if self.connect(sources, node) else sources | {node}
        self.node_of[name] = len(self.ops)
        return self.add(op, name, shape, sources)

    def connect(self, sources: Iterable[int], node: int) -> bool:
        """Adds edges into an existing node unless one would close a cycle."""
        below, stack = {node}, [node]
        while stack:
            current = stack.pop()
            for source, target in self.edges:
                if source == current and target not in below:
                    below.add(target)
                    stack.append(target)
        if not below.isdisjoint(sources):
            return False
        self.read(sources, node)
        return True

    def read(self, sources: Iterable[int], node: int) -> None:
        """Adds edges into a node."""
        for source in sources:
            self.edges[source, node].append(self.reader)

    def order(self) -> list[int]:
        """The nodes in a topological order that stays as close to that of execution as possible."""
        waiting = [0] * len(self.ops)
        successors: list[list[int]] = [[] for _ in self.ops]
        for source, target in sorted(self.edges):
            waiting[target] += 1
            successors[source].append(target)
        ready = [node for node, count in enumerate(waiting) if count == 0]
        order: list[int] = []
        while ready:
            node = heapq.heappop(ready)
            order.append(node)
            for target in successors[node]:
                waiting[target] -= 1
                if waiting[target] == 0:
                    heapq.heappush(ready, target)
        return order
