"""Graphs and weights that the tests of the graph layer share."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from timm_ghn.graph.shortest_paths import with_virtual_edges

GOLDEN_ARCHITECTURES = (
    "timm-convmixer_768_32",
    "timm-dla34",
    "timm-seresnet50",
    "torchvision-convnext_tiny",
    "torchvision-densenet121",
    "torchvision-mobilenet_v2",
    "torchvision-resnet18",
    "torchvision-resnet50",
    "torchvision-swin_t",
    "torchvision-vgg11_bn",
)


def golden_graph(architecture: str) -> tuple[Tensor, int]:
    """Edges [E, 3] and number of nodes of a graph made by the published code."""
    root = Path(__file__).parents[2]
    shared = Path(os.environ.get("TIMM_GHN_SHARED", root.parent / "shared"))
    for folder in (root / "tests" / "data" / "golden", shared / "golden"):
        path = folder / f"{architecture}.json.gz"
        if path.exists():
            with gzip.open(path) as file:
                graph = json.load(file)
            return torch.tensor(graph["edges"]), len(graph["nodes"])
    pytest.skip(f"no golden graph of {architecture}")


def batch(graphs: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, list[int]]:
    """Edges of several graphs with their nodes numbered one graph after the other, and the graphs' sizes."""
    edges, first = [torch.empty(0, 3, dtype=torch.int64)], 0
    for graph, nodes in graphs:
        edges.append(graph + torch.tensor([first, first, 0]))
        first += nodes
    return torch.cat(edges), [nodes for _, nodes in graphs]


def chain(nodes: int) -> tuple[Tensor, int]:
    return with_virtual_edges(nodes, [(v, v + 1) for v in range(nodes - 1)]), nodes


def fan(width: int) -> tuple[Tensor, int]:
    """One source, `width` nodes, one sink."""
    spokes = [(0, v) for v in range(1, width + 1)] + [(v, width + 1) for v in range(1, width + 1)]
    return with_virtual_edges(width + 2, spokes), width + 2


def several_sinks() -> tuple[Tensor, int]:
    return with_virtual_edges(7, [(0, 1), (1, 2), (1, 3), (0, 4), (4, 5), (1, 5), (4, 6)]), 7


@st.composite
def dags(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Any DAG of up to 12 nodes, unconnected ones included."""
    nodes = draw(st.integers(1, 12))
    pairs = [(u, v) for u in range(nodes) for v in range(u + 1, nodes)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    return with_virtual_edges(nodes, edges), nodes


def layer_weights(d: int, hidden: int | None = None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random weights in the order of the layer's arguments, of the size that training starts from."""
    hidden = hidden or d // 2
    shapes = [(hidden, d), (hidden,), (d, hidden), (d,)] * 2 + [(3 * d, d), (3 * d, d), (3 * d,), (3 * d,)]
    generator = torch.Generator().manual_seed(0)
    return [(d**-0.5 * torch.randn(s, generator=generator, dtype=dtype)).requires_grad_() for s in shapes]


def states(nodes: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(nodes, d, generator=generator, dtype=dtype).requires_grad_()
