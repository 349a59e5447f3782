"""A graph as a person would draw it: equal blocks that follow each other are one thing, with a count."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import groupby
from typing import NamedTuple

from ..graph import PRIMITIVES, ComputationGraph
from ..graph.primitives import Carries

Module = tuple[str, ...]

_LEAST_NODES = 3  # of a block; a layer with its bias is no shorter as a box


class Item(NamedTuple):
    """What is drawn as one thing.

    Attributes:
        nodes: All that it stands for.
        blocks: The modules that are equal, dotted; none for a single node.
        first: The nodes of the first block.
    """

    nodes: tuple[int, ...]
    blocks: tuple[str, ...] = ()
    first: tuple[int, ...] = ()


class Blocks:
    """The blocks of a graph: modules with a number in their name, such as ``blocks.3`` or ``Mixed_5b``."""

    def __init__(self, graph: ComputationGraph):
        """Finds out which node belongs to which module, by the names of parameters and by what is around the others."""
        self._graph = graph
        self._before = graph.sources
        self._after: list[list[int]] = [[] for _ in graph.ops]
        for source, target in graph.real_edges:
            self._after[source].append(target)
        self._modules: list[Module] = []
        for node, name in enumerate(graph.names):
            self._modules.append(tuple(name.split(".")[:-1]) if self._carries(node) else self._joined(node))
        for node in range(len(graph)):
            if len(self._before[node]) == 1 and not self._carries(node):
                self._modules[node] = self._between(node)
        self._sizes = Counter(module[:depth] for module in self._modules for depth in range(1, len(module) + 1))

    def _joined(self, node: int) -> Module:
        """Where several things come together, the branch ends that was computed last."""
        branches = [source for source in self._before[node] if self._carries(source) or len(self._before[source]) > 1]
        last = max(branches, default=None)
        if last is None:
            return ()
        return self._modules[last][:-1] if self._carries(last) else self._modules[last]

    def _carries(self, node: int) -> bool:
        return PRIMITIVES[self._graph.ops[node]].carries is not Carries.NOTHING

    def _between(self, node: int) -> Module:
        """A pooling is part of the module behind it if this reads the same input on another way too, as in a shortcut.

        Else it is part of what the modules on both sides have in common.
        """
        (before,) = self._before[node]
        behind = [self._modules[target] for target in self._after[node]] or [()]
        beside = {self._modules[target] for target in self._after[before] if target != node}
        found = behind[0]
        while not any(module[: len(found)] == found for module in beside | {self._modules[before]}):
            found = found[:-1]
        return found

    def items(self, nodes: Sequence[int] | None = None, depth: int = 0) -> list[Item]:
        """What to draw, in order; no edge between two of them closes a cycle.

        Args:
            nodes: Of a block; all by default.
            depth: How many parts its module's name has.
        """
        found = self._folded(range(len(self._graph)) if nodes is None else nodes, depth)
        while True:
            place = {node: index for index, item in enumerate(found) for node in item.nodes}
            sorter: TopologicalSorter[int] = TopologicalSorter()
            for source, target in self._graph.real_edges:
                if source in place and target in place and place[source] != place[target]:
                    sorter.add(place[target], place[source])
            try:
                sorter.prepare()
            except CycleError as error:
                in_cycle = set(error.args[1])
                found = [
                    part
                    for index, item in enumerate(found)
                    for part in (self._opened(item) if index in in_cycle else [item])
                ]
            else:
                return sorted(found, key=lambda item: item.nodes[0])

    def _folded(self, nodes: Sequence[int], depth: int) -> list[Item]:
        members: dict[Module, list[int]] = defaultdict(list)
        found = []
        for node in nodes:
            if (block := self._block(node, depth)) is None:
                found.append(Item((node,)))
            else:
                members[block].append(node)
        for _, run in groupby(members, key=lambda block: self._likeness(block, members[block])):
            blocks = list(run)
            item = _item([(block, members[block]) for block in blocks])
            inner = self._folded(item.nodes, len(blocks[0])) if len(blocks) == 1 else []
            # A stage is no more than the runs of blocks that it has.
            found += inner if any(len(part.blocks) > 1 for part in inner) else [item]
        return found

    def _block(self, node: int, depth: int) -> Module | None:
        """The outermost block below a depth that a node is in."""
        module = self._modules[node]
        prefixes = (module[:length] for length in range(depth + 1, len(module) + 1))
        return next((p for p in prefixes if re.search(r"\d", p[-1]) and self._sizes[p] >= _LEAST_NODES), None)

    def _likeness(self, block: Module, nodes: list[int]) -> Hashable:
        """What is equal for blocks that are: primitives, names, shapes, edges, and what is read from outside."""
        place = {node: index for index, node in enumerate(nodes)}
        graph, prefix = self._graph, ".".join(block)
        return (
            block[:-1],
            re.sub(r"\d+[a-z]?$", "", block[-1]),
            tuple((graph.ops[node], graph.names[node].removeprefix(prefix), graph.shapes[node]) for node in nodes),
            tuple(frozenset(place.get(source, -1) for source in self._before[node]) for node in nodes),
        )

    def _opened(self, item: Item) -> Iterator[Item]:
        """The next smaller things that an item consists of."""
        size = len(item.first)
        if len(item.blocks) > 1:
            for index, block in enumerate(item.blocks):
                part = item.nodes[index * size : (index + 1) * size]
                yield Item(part, (block,), part)
        elif item.blocks:
            yield from self._folded(item.nodes, item.blocks[0].count(".") + 1)
        else:
            yield item


def _item(blocks: list[tuple[Module, list[int]]]) -> Item:
    nodes = tuple(node for _, members in blocks for node in members)
    return Item(nodes, tuple(".".join(block) for block, _ in blocks), tuple(blocks[0][1]))
