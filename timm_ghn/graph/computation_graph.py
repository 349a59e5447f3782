"""The graph a GHN reads: one node per primitive, virtual edges weighted by shortest-path distance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

PRIMITIVES = (
    "max_pool", "avg_pool", "sep_conv", "dil_conv", "conv", "msa", "cse", "sum",
    "concat", "input", "bias", "bn", "ln", "pos_enc", "glob_avg",
)  # fmt: skip
"""The vocabulary of DeepNets-1M (arXiv 2110.13100, table 1); a primitive's index is its row in the GHN's embedding."""

WEIGHT_PRIMITIVES = frozenset({"sep_conv", "dil_conv", "conv"})
NORM_PRIMITIVES = frozenset({"bn", "ln"})
PARAMETER_PRIMITIVES = WEIGHT_PRIMITIVES | NORM_PRIMITIVES | {"bias", "pos_enc"}
"""Primitives whose nodes are named by a parameter of the model; the others are named by the op that made them."""

BRANCH_SCALE = "scale of a residual branch"
"""Why a layer scale has no node; a GHN may have been trained with a value for it."""

POSITION_BIAS = "relative position bias"
"""Why a table that is added to attention's logits has no node; likewise."""


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
    """

    ops: list[str]
    names: list[str]
    shapes: list[tuple[int, ...] | None]
    edges: torch.Tensor
    head: tuple[str, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ops)

    def __repr__(self) -> str:
        real = int((self.edges[:, 2] == 1).sum())
        return f"ComputationGraph({len(self)} nodes, {real} edges, {len(self.edges) - real} virtual edges)"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists for JSON; virtual edges are left out because `from_dict` can restore them."""
        real = self.edges[self.edges[:, 2] == 1, :2]
        return {
            "ops": self.ops,
            "names": self.names,
            "shapes": [None if shape is None else list(shape) for shape in self.shapes],
            "edges": real.tolist(),
            "head": list(self.head),
            "kept": self.kept,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ComputationGraph:
        """Inverse of `to_dict`."""
        from .shortest_paths import with_virtual_edges

        return cls(
            ops=list(data["ops"]),
            names=list(data["names"]),
            shapes=[None if shape is None else tuple(shape) for shape in data["shapes"]],
            edges=with_virtual_edges(len(data["ops"]), [tuple(edge) for edge in data["edges"]]),
            head=tuple(data["head"]),
            kept=dict(data["kept"]),
        )
