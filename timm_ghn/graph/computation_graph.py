"""The graph a GHN reads: one node per primitive, virtual edges weighted by shortest-path distance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from .kept import Kept
from .primitives import NORMS, PRIMITIVES, WEIGHTS, Carries
from .shortest_paths import with_virtual_edges


class Part(NamedTuple):
    """Neighbouring rows of a parameter.

    Attributes:
        operand: What an attention reads them as: ``"q"``, ``"k"``, ``"v"``, several of these, or ``""`` for none.
        rows: How many there are.
    """

    operand: str
    rows: int


class Operands(NamedTuple):
    """What an attention reads the rows of a parameter as.

    Attributes:
        parts: From the first row on, no operand twice.
        blocks: How often the parts are repeated; above 1 where each head has its own queries, keys and values.
    """

    parts: tuple[Part, ...]
    blocks: int = 1

    def names(self, name: str) -> list[str]:
        """Names of the nodes that the parts of a parameter have in `ComputationGraph.untied`."""
        return [f"{name}[{part.operand}]" for part in self.parts] if len(self.parts) > 1 else [name]


@dataclass(frozen=True)
class ComputationGraph:
    """A network's computation as a directed acyclic graph in topological order; node 0 is the input.

    Attributes:
        ops: Primitive of each of the N nodes, from `PRIMITIVES`.
        names: Parameter name of the node, or the op that autograd recorded for nodes without parameters.
        shapes: Shape of the node's parameter; ``(1, 1, k, k)`` for a pooling node; None for the rest.
        edges: int64 [E, 3] rows (source, target, distance). Distance 1 is a real edge, 2…50 a virtual edge whose value
            is the shortest path's length (arXiv 2110.13100, §3.2.2).
        head: Names of the parameters of the classification layer (weight, then bias); empty without one.
        kept: Parameters that have no node and are not a norm's bias, each with the reason.
        operands: The weights and biases that make operands of an attention. A fused projection has several parts.
        readers: Edges (source, target) from a fused projection, or the bias behind it, whose target reads a few of its
            parts only, with the operands that these are.
    """

    ops: list[str]
    names: list[str]
    shapes: list[tuple[int, ...] | None]
    edges: torch.Tensor
    head: tuple[str, ...] = ()
    kept: dict[str, Kept] = field(default_factory=dict)
    operands: dict[str, Operands] = field(default_factory=dict)
    readers: dict[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ops)

    def __repr__(self) -> str:
        real = len(self.real_edges)
        return f"ComputationGraph({len(self)} nodes, {real} edges, {len(self.edges) - real} virtual edges)"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists for JSON; virtual edges are left out because `from_dict` can restore them."""
        return {
            "ops": self.ops,
            "names": self.names,
            "shapes": [None if shape is None else list(shape) for shape in self.shapes],
            "edges": [list(edge) for edge in self.real_edges],
            "head": list(self.head),
            "kept": self.kept,
            "operands": self.operands,
            "readers": [[*edge, *operands] for edge, operands in self.readers.items()],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ComputationGraph:
        """Inverse of `to_dict`."""
        return cls(
            ops=list(data["ops"]),
            names=list(data["names"]),
            shapes=[None if shape is None else tuple(shape) for shape in data["shapes"]],
            edges=with_virtual_edges(len(data["ops"]), [tuple(edge) for edge in data["edges"]]),
            head=tuple(data["head"]),
            kept={name: Kept(reason) for name, reason in data["kept"].items()},
            operands={
                name: Operands(tuple(Part(*part) for part in parts), blocks)
                for name, (parts, blocks) in data["operands"].items()
            },
            readers={(source, target): tuple(operands) for source, target, *operands in data["readers"]},
        )

    def within(self, vocabulary: Collection[str]) -> ComputationGraph:
        """The graph as it is for a GHN that knows these primitives only: nodes of others are contracted."""
        if set(self.ops).issubset(vocabulary):
            return self
        frontier: list[frozenset[int]] = []
        for node, op in enumerate(self.ops):
            reach = frozenset().union(*(frontier[source] for source in self.sources[node]))
            joins_nothing = op in ("sum", "concat") and len(reach) < 2
            frontier.append(reach if op not in vocabulary or joins_nothing else frozenset({node}))
        order = [node for node, nodes in enumerate(frontier) if nodes == {node}]
        rank = {node: position for position, node in enumerate(order)}
        reached = [(source, node) for node in order for before in self.sources[node] for source in frontier[before]]
        edges = sorted({(rank[source], rank[node]) for source, node in reached})
        kept = dict(self.kept)
        for node, (op, name) in enumerate(zip(self.ops, self.names, strict=True)):
            if node not in rank and PRIMITIVES[op].carries is not Carries.NOTHING:
                kept[name] = Kept.NO_PRIMITIVE
                if op in NORMS:  # its bias, if it has one, is predicted from the same node
                    kept[f"{name.removesuffix('weight')}bias"] = Kept.NO_PRIMITIVE
        return ComputationGraph(
            ops=[self.ops[node] for node in order],
            names=[self.names[node] for node in order],
            shapes=[self.shapes[node] for node in order],
            edges=with_virtual_edges(len(order), edges),
            head=tuple(name for name in self.head if name not in kept),
            kept=kept,
            operands={name: operands for name, operands in self.operands.items() if name not in kept},
            readers={
                (rank[source], rank[target]): read
                for (source, target), read in self.readers.items()
                if source in rank and target in rank
            },
        )

    @cached_property
    def real_edges(self) -> list[tuple[int, int]]:
        """Edges (source, target) that are computed along, without the virtual ones."""
        real = self.edges[self.edges[:, 2] == 1, :2]  # large networks have hundreds of times as many virtual ones
        return [(source, target) for source, target in real.tolist()]

    @cached_property
    def sources(self) -> list[list[int]]:
        """For each node, those that it reads."""
        sources: list[list[int]] = [[] for _ in self.ops]
        for source, target in self.real_edges:
            sources[target].append(source)
        return sources

    @property
    def has_depthwise(self) -> bool:
        """Whether there are convolutions of one input channel each."""
        return any(
            op in ("sep_conv", "dil_conv") and shape is not None and shape[1] == 1
            for op, shape in zip(self.ops, self.shapes, strict=True)
        )

    @cached_property
    def untied(self) -> ComputationGraph:
        """The graph with a node for each part of a fused projection, where it has one for the whole.

        The weight of a part has the bias of its own rows behind it, and the readers of these rows behind that.
        """
        if all(len(operands.parts) == 1 for operands in self.operands.values()):
            return self
        chains = bias_chains(self.ops, self.names, self.real_edges, self.operands)
        position = {node: (chain, place) for chain in chains for place, node in enumerate(chain)}

        names: list[str] = []
        origin: list[int] = []
        made: list[dict[str, int]] = []  # for each node, by operand, what it becomes
        for node, name in enumerate(self.names):
            use = self.operands.get(name, Operands((Part("", 0),)))
            made.append({part.operand: len(names) + i for i, part in enumerate(use.parts)})
            names += use.names(name)
            origin += [node] * len(use.parts)

        def sources(node: int, wanted: Sequence[str] | None) -> list[int]:
            if node not in position:
                return list(made[node].values())
            chain, place = position[node]
            found = []
            for operand in made[chain[0]] if wanted is None else wanted:
                # Where a bias has no rows for this operand, the weight or bias before it is the last of its chain.
                found.append(next(made[n][operand] for n in reversed(chain[: place + 1]) if operand in made[n]))
            return found

        edges: list[tuple[int, int]] = []
        for source, target in self.real_edges:
            is_bias_in_chain = target in position and target != position[target][0][0]
            for operand, new in made[target].items():
                wanted = [operand] if is_bias_in_chain else self.readers.get((source, target))
                edges += [(old, new) for old in sources(source, wanted)]
        operands = {
            new: Operands((Part(part.operand, part.rows * whole.blocks),))
            for name, whole in self.operands.items()
            for new, part in zip(whole.names(name), whole.parts, strict=True)
        }
        shapes = [self.shapes[node] for node in origin]
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            if name in operands and shape is not None:
                shapes[i] = (operands[name].parts[0].rows, *shape[1:])
        return ComputationGraph(
            ops=[self.ops[node] for node in origin],
            names=names,
            shapes=shapes,
            edges=with_virtual_edges(len(names), edges),
            head=self.head,
            kept=self.kept,
            operands=operands,
        )


def bias_chains(
    ops: Sequence[str], names: Sequence[str], edges: Iterable[tuple[int, int]], operands: Mapping[str, Operands]
) -> list[list[int]]:
    """The nodes of fused projections, each followed by the biases of its rows."""
    before: dict[int, list[int]] = defaultdict(list)
    after: dict[int, list[int]] = defaultdict(list)
    for source, target in edges:
        before[target].append(source)
        after[source].append(target)

    def uses(node: int) -> set[str]:
        return {part.operand for part in operands[names[node]].parts}

    chains = []
    for node, (op, name) in enumerate(zip(ops, names, strict=True)):
        if op in WEIGHTS and name in operands and len(operands[name].parts) > 1:
            chain = [node]
            while behind := [
                target
                for target in after[chain[-1]]
                if ops[target] == "bias"
                and names[target] in operands
                and before[target] == [chain[-1]]
                and uses(target) <= uses(node)
            ]:
                chain.append(behind[0])
            chains.append(chain)
    return chains
