"""Graphs as pictures: what is folded, and what a browser gets."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch

from timm_ghn import ComputationGraph, draw_graph, trace
from timm_ghn.evaluation.blocks import Blocks
from timm_ghn.hypernet.config import PUBLISHED_PRIMITIVES

pytest.importorskip("igraph")

SVG = "{http://www.w3.org/2000/svg}"


def graph_of(name: str) -> ComputationGraph:
    with torch.device("meta"):
        return trace(timm.create_model(name))


def outline(name: str) -> list[tuple[str, int]]:
    """The first block of each box, with the count."""
    return [(item.blocks[0], len(item.blocks)) for item in Blocks(graph_of(name)).items() if item.blocks]


@pytest.mark.parametrize(
    ("name", "boxes"),
    [
        ("vit_tiny_patch16_224", [("blocks.0", 12)]),
        ("resnet50", [("layer1.0", 1), ("layer1.1", 2), ("layer2.0", 1), ("layer2.1", 3), ("layer3.0", 1),
                      ("layer3.1", 5), ("layer4.0", 1), ("layer4.1", 2)]),
        ("convnext_atto", [("stages.0.blocks.0", 2), ("stages.1.blocks.0", 2), ("stages.2.blocks.0", 6),
                           ("stages.3.blocks.0", 2)]),
        ("cait_xxs24_224", [("blocks.0", 24), ("blocks_token_only.0", 1), ("blocks_token_only.1", 1)]),
    ],
)  # fmt: skip
def test_equal_blocks_in_a_row_are_one(name: str, boxes: list[tuple[str, int]]) -> None:
    assert outline(name) == boxes


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "densenet121", "inception_v3", "hrnet_w18_small"])
def test_every_node_is_drawn_once(name: str) -> None:
    graph = graph_of(name)
    blocks = Blocks(graph)

    def check(nodes: set[int], depth: int, items: list[Any]) -> None:
        assert sorted(node for item in items for node in item.nodes) == sorted(nodes)
        for item in items:
            assert len(item.nodes) == len(item.first) * len(item.blocks) if item.blocks else len(item.nodes) == 1
            if item.blocks:
                inner_depth = item.blocks[0].count(".") + 1
                check(set(item.first), inner_depth, blocks.items(item.first, inner_depth))

    check(set(range(len(graph))), 0, blocks.items())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "resnet18", "densenet121"])
@pytest.mark.parametrize("virtual_edges", [False, True])
def test_the_picture(name: str, virtual_edges: bool) -> None:
    graph = graph_of(name)
    text = draw_graph(graph, f"{name} & <more>", virtual_edges)
    root = ET.fromstring(text)
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    for node, parameter in enumerate(graph.names):
        shape = graph.shapes[node]
        if shape is not None and not any(block in parameter for block in ("layer", "block")):
            assert f"{graph.ops[node]}  {parameter}  {' × '.join(map(str, shape))}" in titles
    assert any("distance" in title for title in titles) is virtual_edges
    assert f"{name} & <more>" in {label.text for label in root.iter(f"{SVG}text")}
    # What opens is there, each once, and nothing needs a script.
    anchors = [group.get("id") for group in root.iter(f"{SVG}g") if group.get("class") == "open"]
    links = {link.get("href") for link in root.iter(f"{SVG}a")}
    assert len(anchors) == len(set(anchors)) and links <= {"#", *(f"#{anchor}" for anchor in anchors)}
    assert {f"#{anchor}" for anchor in anchors} <= links
    assert "<script" not in text and "prefers-color-scheme: dark" in text
    for patch in root.iter(f"{SVG}rect"):
        assert float(patch.get("width", "0").rstrip("%")) > 0 and float(patch.get("x", "0")) >= 0


@pytest.mark.parametrize("name", ["hrnet_w18_small", "inception_v3"])
def test_boxes_do_not_overlap(name: str) -> None:
    root = ET.fromstring(draw_graph(graph_of(name)))
    _, drawn = root.findall(f"{SVG}g")
    cards = [r for group in drawn if group.get("class") != "open" for r in group.iter(f"{SVG}rect")]
    boxes = [
        (float(r.attrib["x"]), float(r.attrib["y"]), float(r.attrib["width"]))
        for r in cards
        if re.match(r"box|card", r.get("class", ""))
    ]
    rows: dict[float, list[tuple[float, float]]] = {}
    for x, y, width in boxes:
        rows.setdefault(y, []).append((x, width))
    assert max(map(len, rows.values())) > 1 or name == "inception_v3"
    for row in rows.values():
        row.sort()
        assert all(right - left >= width for (left, width), (right, _) in pairwise(row))


def test_every_published_primitive_has_a_colour() -> None:
    ops = list(PUBLISHED_PRIMITIVES)
    edges = torch.tensor([[i, i + 1, 1] for i in range(len(ops) - 1)])
    style = draw_graph(ComputationGraph(ops, ops, [None] * len(ops), edges))
    for op in ops:
        assert len(re.findall(rf"\.{op} {{ fill: #[0-9a-f]{{6}}; }}", style)) == 2, "on light and on dark ground"
