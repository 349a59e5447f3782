"""Which of several GHNs predicts a network: the one that was trained on its kind."""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..graph import ComputationGraph

KINDS: dict[str, Callable[[ComputationGraph], bool]] = {
    "attention": lambda graph: "msa" in graph.ops,
    "layer_norm": lambda graph: "ln" in graph.ops,
    "depthwise": lambda graph: graph.has_depthwise,
}
"""Kinds of networks that can have a GHN of their own, and how they are told; the first one that fits counts."""


def kind_of(graph: ComputationGraph, experts: Collection[str]) -> str | None:
    """The kind of a network among those that there are experts for; None if it is none of them."""
    return next((kind for kind, fits in KINDS.items() if kind in experts and fits(graph)), None)
