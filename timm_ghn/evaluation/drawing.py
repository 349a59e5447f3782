"""The computation graph as a picture: SVG that any browser opens, without a script."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import NamedTuple

import torch

from ..errors import GHNError
from ..graph import PRIMITIVES, ComputationGraph
from ..graph.primitives import Carries
from .blocks import Blocks, Item

# In pixels; letters are of small print, and a label has room for so many large ones.
_WIDTH, _HEIGHT, _BLOCK_HEIGHT, _END_HEIGHT, _ROW_GAP, _COLUMN_GAP, _LANE = 168, 36, 52, 18, 22, 18, 14
_MARGIN, _PADDING, _ARC, _LETTER, _LETTERS = 16, 12, 90, 5.4, 22

_KINDS = {  # by primitive: fill on light and on dark ground, and what it is
    "input": ("#ffffff", "#0d1117", "the image"),
    "conv": ("#b6d7f5", "#1f4b75", "convolution or linear layer"),
    "sep_conv": ("#9fdce6", "#155763", "grouped convolution"),
    "dil_conv": ("#c5cbf7", "#373f8a", "grouped and dilated convolution"),
    "bias": ("#e4eefa", "#253447", "bias of the layer before"),
    "bn": ("#bfe5c0", "#1f5a2c", "batch norm"),
    "ln": ("#dcecae", "#4a5a17", "layer norm, or another one"),
    "msa": ("#f9cfa0", "#7a4510", "attention"),
    "cse": ("#f7e19a", "#6b5510", "squeeze-excite gate"),
    "pos_enc": ("#f4c1dd", "#76285a", "position embedding"),
    "sum": ("#e1e1e6", "#3f434d", "addition"),
    "concat": ("#cfc9c2", "#554d45", "concatenation"),
    "max_pool": ("#d9c6f2", "#4f3380", "max pooling"),
    "avg_pool": ("#e6d9f7", "#5d4a80", "average pooling"),
    "glob_avg": ("#f3c6c2", "#7d2f2a", "mean over positions"),
}
_Point = tuple[float, float]

_STYLE = """
svg { --ground: #ffffff; --ink: #1f2328; --faint: #59636e; --line: #8c959f; --panel: #f6f8fa; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  svg { --ground: #0d1117; --ink: #f0f6fc; --faint: #9198a1; --line: #6e7681; --panel: #161b22; --card: #0d1117; }
}
.ground { fill: var(--ground); }
text { font: 11px system-ui, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; fill: var(--ink); }
.title { font-size: 15px; font-weight: 600; }
.name { font-weight: 600; }
.shape, .note { fill: var(--faint); font-size: 10px; }
.box, .stripe { fill: var(--line); }
.box { stroke: var(--line); }
.card { fill: var(--card); stroke: var(--line); }
.panel { fill: var(--panel); stroke: var(--line); }
.edge { fill: none; stroke: var(--line); stroke-width: 1.2; }
.virtual { fill: none; stroke: #a33ad6; stroke-width: 1; stroke-dasharray: 3 3; }
.arrow { fill: var(--line); }
.end { text-anchor: middle; }
a { text-decoration: none; cursor: pointer; }
a:hover .card { stroke: var(--ink); stroke-width: 2; }
.open { display: none; }
.open:target, .open:has(:target) { display: inline; }
"""


def draw_graph(graph: ComputationGraph, title: str = "", virtual_edges: bool = False) -> str:
    """Draws a graph as SVG, with equal blocks that follow each other as one box with a count.

    A box opens beside itself when it is clicked, and shows the first of its blocks. Names and shapes of parameters
    appear under the pointer. Colours follow the light or dark scheme of whoever looks at it.

    Args:
        graph: From `trace`, or as a GHN reads it (`timm_ghn.plan.as_read`).
        title: Stands above it.
        virtual_edges: Also draw virtual edges, the fainter the longer.

    Returns:
        The text of an ``.svg`` file, which is also what an HTML page can contain.

    Raises:
        GHNError: If igraph, which places the nodes, is not installed.
    """
    return _Picture(graph, virtual_edges).svg(title)


class _Part(NamedTuple):
    """A part of the picture, and how much room it takes."""

    lines: list[str]
    width: float
    height: float


class _Box(NamedTuple):
    """Where something lies: its upper left corner, and its height; all are equally wide."""

    x: float
    y: float
    height: float


@dataclass
class _Place:
    """In a row: a box, or where an edge goes through."""

    middle: float
    half: float


class _Picture:
    def __init__(self, graph: ComputationGraph, virtual_edges: bool):
        self._graph, self._blocks = graph, Blocks(graph)
        self._virtual = graph.edges[graph.edges[:, 2] > 1] if virtual_edges else graph.edges[:0]

    def svg(self, title: str) -> str:
        drawn = self._drawn(self._blocks.items(), "")
        width = max(drawn.width, 560)
        legend = self._legend(width)
        top = 58 + legend.height + _ROW_GAP
        size = f"{width + 2 * _MARGIN:.0f}", f"{top + drawn.height + _MARGIN:.0f}"
        nodes, real = len(self._graph), len(self._graph.real_edges)
        note = f"{nodes} nodes, {real} edges, {len(self._graph.edges) - real} virtual edges. Click a box to open it."
        light, dark = (" ".join(f".{op} {{ fill: {kind[i]}; }}" for op, kind in _KINDS.items()) for i in (0, 1))
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
                f'viewBox="0 0 {size[0]} {size[1]}">',
                f"<style>{_STYLE}{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}</style>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                'orient="auto"><path class="arrow" d="M0 0L8 4L0 8z"/></marker></defs>',
                '<rect class="ground" width="100%" height="100%"/>',
                f'<text class="title" x="{_MARGIN}" y="28">{escape(title)}</text>',
                f'<text class="note" x="{_MARGIN}" y="46">{note}</text>',
                *_moved(legend.lines, _MARGIN, 58),
                *_moved(drawn.lines, _MARGIN, top),
                "</svg>\n",
            ]
        )

    def _legend(self, width: float) -> _Part:
        """A patch for each primitive that occurs."""
        lines, x, y = [], 0.0, 0.0
        for op in PRIMITIVES:
            if op not in self._graph.ops:
                continue
            text = f"{op}: {_KINDS[op][2]}" if op in _KINDS else op
            taken = 32 + _LETTER * len(text)
            if x + taken > width:
                x, y = 0.0, y + 18
            lines.append(f'<rect class="box {op}" x="{x:.0f}" y="{y:.0f}" width="14" height="11" rx="2"/>')
            lines.append(f'<text class="note" x="{x + 20:.0f}" y="{y + 9:.0f}">{text}</text>')
            x += taken
        return _Part(lines, width, y + 11)

    def _drawn(self, items: Sequence[Item], inside: str) -> _Part:
        """Items and their edges; to the right, hidden until it is asked for, what is in them.

        Args:
            items: Of the graph, or of a block; what leads into a block and out of it is shown as two ends.
            inside: The block.
        """
        place = {node: index for index, item in enumerate(items) for node in item.nodes}
        heights: list[float] = [_BLOCK_HEIGHT if item.blocks else _HEIGHT for item in items]
        edges, ends = set[tuple[int, int]](), dict[str, int]()
        for nodes in self._graph.real_edges:
            source, target = map(place.get, nodes)
            if source == target:
                continue
            if source is None:
                source = ends.setdefault(f"into {inside}", len(items) + len(ends))
            if target is None:
                target = ends.setdefault(f"out of {inside}", len(items) + len(ends))
            edges.add((source, target))
        indent = _ARC if len(self._virtual) else 0
        boxes, routes = _layout(heights + [_END_HEIGHT] * len(ends), sorted(edges), indent)
        lines = [f'<path class="edge" marker-end="url(#head)" d="{_curve(route)}"/>' for route in routes]
        lines += self._virtual_edges(place, boxes)
        for item, box in zip(items, boxes, strict=False):
            lines += self._block(item, box, inside) if item.blocks else self._node(item.nodes[0], box, inside)
        for text, index in ends.items():
            x, y, _ = boxes[index]
            lines.append(f'<text class="note end" x="{x + _WIDTH / 2:.0f}" y="{y + 12:.0f}">{text}</text>')
        width = max([box.x + _WIDTH for box in boxes] + [x for route in routes for x, _ in route])
        part = _Part(lines, width, max(box.y + box.height for box in boxes))
        for item, box in zip(items, boxes, strict=False):
            if item.blocks:
                part = self._with_panel(part, width + 3 * _MARGIN, item, box, inside)
        return part

    def _node(self, node: int, box: _Box, inside: str) -> list[str]:
        graph, (x, y, height) = self._graph, box
        op, shape = graph.ops[node], graph.shapes[node]
        has_parameter = PRIMITIVES[op].carries is not Carries.NOTHING
        label = _short(graph.names[node].removesuffix(".weight"), inside) if has_parameter else op
        size = "" if shape is None else _times(shape if has_parameter else shape[2:])
        baseline = y + (16 if size else 22)
        lines = [
            f"<g><title>{escape(self._described(node))}</title>",
            f'<rect class="box {op}" x="{x:.0f}" y="{y:.0f}" width="{_WIDTH}" height="{height}" rx="5"/>',
            f'<text class="name" x="{x + 10:.0f}" y="{baseline:.0f}">{escape(label)}</text>',
        ]
        if size:
            lines.append(f'<text class="shape" x="{x + 10:.0f}" y="{y + 29:.0f}">{size}</text>')
        return [*lines, "</g>"]

    def _described(self, node: int) -> str:
        graph = self._graph
        shape = graph.shapes[node]
        return f"{graph.ops[node]}  {graph.names[node]}" + ("" if shape is None else f"  {_times(shape)}")

    def _block(self, item: Item, box: _Box, inside: str) -> list[str]:
        """A box that opens, with a stripe for each node in it."""
        x, y, height = box
        count, nodes = len(item.blocks), len(item.first)
        about = f"{count} × {nodes} nodes" if count > 1 else f"{nodes} nodes"
        deep = 4 if count > 1 else 0  # a stack of cards
        told = "\n".join(map(self._described, item.first))
        lines = [f'<a href="#{_anchor(item.blocks[0])}"><title>{escape(_span(item))}: {about}\n{escape(told)}</title>']
        lines += [
            f'<rect class="card" x="{x + shift:.0f}" y="{y + shift:.0f}" width="{_WIDTH}" height="{height - deep}" '
            f'rx="5"/>'
            for shift in sorted({deep, 0}, reverse=True)
        ]
        width = (_WIDTH - 20) / nodes
        lines += [
            f'<text class="name" x="{x + 10:.0f}" y="{y + 16:.0f}">{escape(_short(_span(item), inside))}</text>',
            f'<text class="shape" x="{x + 10:.0f}" y="{y + 29:.0f}">{about}</text>',
            *(
                f'<rect class="stripe {self._graph.ops[node]}" x="{x + 10 + index * width:.2f}" y="{y + 34:.0f}" '
                f'width="{width:.2f}" height="9"/>'
                for index, node in enumerate(item.first)
            ),
        ]
        return [*lines, "</a>"]

    def _with_panel(self, part: _Part, left: float, item: Item, box: _Box, inside: str) -> _Part:
        """The same with what opens of a block."""
        block = item.blocks[0]
        inner = self._drawn(self._blocks.items(item.first, block.count(".") + 1), block)
        equal = f"{len(item.blocks)} equal blocks; this is the first" if len(item.blocks) > 1 else ""
        width = max(inner.width, _LETTER * max(len(_span(item)) * 1.2, len(equal) + 10)) + 2 * _PADDING
        height = inner.height + 44 + 2 * _PADDING
        middle = box.y + box.height / 2
        close = f"#{_anchor(inside)}" if inside else "#"
        lines = [
            f'<g class="open" id="{_anchor(item.blocks[0])}">',
            f'<path class="edge" d="M{box.x + _WIDTH:.0f} {middle:.0f}H{left:.0f}"/>',
            f'<rect class="panel" x="{left:.0f}" y="{box.y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="6"/>',
            f'<text class="name" x="{left + _PADDING:.0f}" y="{box.y + 20:.0f}">{escape(_span(item))}</text>',
            f'<text class="note" x="{left + _PADDING:.0f}" y="{box.y + 35:.0f}">{equal}</text>',
            f'<a href="{close}"><text class="note" x="{left + width - 40:.0f}" y="{box.y + 35:.0f}">close</text></a>',
            *_moved(inner.lines, left + _PADDING, box.y + 44 + _PADDING),
            "</g>",
        ]
        return _Part(part.lines + lines, max(part.width, left + width), max(part.height, box.y + height))

    def _virtual_edges(self, place: dict[int, int], boxes: list[_Box]) -> list[str]:
        """Arcs to the left of the boxes, the shortest distance where several nodes are one box."""
        items = torch.full((len(self._graph),), -1)
        items[list(place)] = torch.tensor(list(place.values()))
        edges = torch.cat([items[self._virtual[:, :2]], self._virtual[:, 2:]], dim=1)
        edges = edges[(edges[:, :2] >= 0).all(1) & (edges[:, 0] != edges[:, 1])]
        longest_first = edges[edges[:, 2].argsort(descending=True)].tolist()
        nearest = {(source, target): distance for source, target, distance in longest_first}
        lines = []
        for (source, target), distance in sorted(nearest.items()):
            (x, y, height), (to_x, to_y, to_height) = boxes[source], boxes[target]
            start, end = y + height / 2, to_y + to_height / 2
            left = min(x, to_x) - min(_ARC, 0.4 * abs(end - start))  # a curve goes three quarters of the way
            lines.append(
                f'<path class="virtual" opacity="{max(0.06, 1.2 / distance):.2f}" d="M{x:.0f} {start:.0f}C{left:.0f} '
                f'{start:.0f} {left:.0f} {end:.0f} {to_x:.0f} {end:.0f}"><title>distance {distance}</title></path>'
            )
        return lines


def _layout(
    heights: Sequence[float], edges: Sequence[tuple[int, int]], indent: float
) -> tuple[list[_Box], list[list[_Point]]]:
    """Places boxes in rows, and leads edges around those between.

    Args:
        heights: Of the boxes.
        edges: Pairs of boxes.
        indent: How much room to leave to the left.

    Returns:
        The boxes, and for each edge the points that it goes through.
    """
    try:
        import igraph
    except ImportError:
        raise GHNError('Graphs are drawn with igraph: pip install "timm-ghn[plot]".') from None
    graph = igraph.Graph(n=len(heights), edges=list(edges), directed=True)
    shortcuts = _shortcuts(graph.topological_sorting(), edges)
    graph.delete_edges(sorted(shortcuts))
    layout = graph.layout_sugiyama(maxiter=200)
    rows = [round(row) for _, row in layout.coords]
    tops = [0.0]
    for row in range(max(rows) + 1):
        tops.append(tops[-1] + _ROW_GAP + max(h for h, r in zip(heights, rows, strict=True) if r == row))

    # igraph knows no widths. Columns without a box, through which only edges go, need not be as wide as one.
    columns = sorted({column for column, _ in layout.coords})

    def across(column: float) -> float:
        wide, reached = 0.0, columns[0] - 0.5
        for middle in columns:
            start, end = max(reached, middle - 0.5), min(column, middle + 0.5)
            wide, reached = wide + max(0.0, end - start), max(reached, middle + 0.5)
        return wide * (_WIDTH + _COLUMN_GAP) + (column - wide) * _LANE

    # Nor does it always keep neighbours apart.
    contents: list[list[_Place]] = [[] for _ in range(max(rows) + 1)]
    nodes = [_Place(across(column), _WIDTH / 2) for column, _ in layout.coords]
    for node, row in zip(nodes, rows, strict=True):
        contents[row].append(node)
    bends = [[(_Place(across(column), 0), round(row)) for column, row in route] for route in layout.edge_routing]
    for route in bends:
        for bend, row in route:
            contents[row].append(bend)
    for places in contents:
        places.sort(key=lambda place: place.middle)
        for before, place in pairwise(places):
            place.middle = max(place.middle, before.middle + before.half + place.half + _LANE)
    left = min(places[0].middle - places[0].half for places in contents) - indent
    right = [places[-1].middle + places[-1].half - left for places in contents]
    boxes = [
        _Box(node.middle - left - _WIDTH / 2, tops[row], height)
        for node, row, height in zip(nodes, rows, heights, strict=True)
    ]

    def through(edge: tuple[int, int], points: list[tuple[float, int]], place: float) -> list[_Point]:
        """From a place in a box's width to that in another's, past all the boxes that are in the rows between."""
        (x, y, height), (to_x, to_y, _) = (boxes[index] for index in edge)
        between = [(x, y) for x, row in points for y in (tops[row], tops[row + 1] - _ROW_GAP)]
        return [(x + place * _WIDTH, y + height), *between, (to_x + place * _WIDTH, to_y)]

    direct = [edge for index, edge in enumerate(edges) if index not in shortcuts]
    routes = [
        through(edge, [(bend.middle - left, row) for bend, row in route], 0.5)
        for edge, route in zip(direct, bends, strict=True)
    ]
    skipped: dict[int, list[int]] = defaultdict(list)
    for index in shortcuts:
        skipped[edges[index][0]].append(edges[index][1])
    # All that skip something from one box on share a lane to the right, the inner ones first.
    for source, targets in sorted(skipped.items(), key=lambda item: max(rows[t] for t in item[1]) - rows[item[0]]):
        passed = range(rows[source] + 1, max(rows[target] for target in targets))
        x = max(right[row] for row in passed) + _LANE
        for row in passed:
            right[row] = x
        for target in targets:
            routes.append(through((source, target), [(x, row) for row in range(rows[source] + 1, rows[target])], 0.85))
    return boxes, routes


def _shortcuts(order: list[int], edges: Sequence[tuple[int, int]]) -> set[int]:
    """Which edges skip something: there is a longer way between their ends."""
    targets: dict[int, list[int]] = defaultdict(list)
    for source, target in edges:
        targets[source].append(target)
    behind: dict[int, int] = {}  # for each box those behind it, a bit for each
    for box in reversed(order):
        behind[box] = 0
        for target in targets[box]:
            behind[box] |= behind[target] | 1 << target
    return {
        index
        for index, (source, target) in enumerate(edges)
        if any(behind[other] >> target & 1 for other in targets[source])
    }


def _curve(route: list[_Point]) -> str:
    """A path through points that runs downward at each of them."""
    (x, y), *others = route
    parts = [f"M{x:.0f} {y:.0f}"]
    for to_x, to_y in others:
        middle = (y + to_y) / 2
        parts.append(
            f"V{to_y:.0f}" if x == to_x else f"C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}"
        )
        x, y = to_x, to_y
    return "".join(parts)


def _moved(lines: list[str], x: float, y: float) -> list[str]:
    return [f'<g transform="translate({x:.0f} {y:.0f})">', *lines, "</g>"]


def _times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _span(item: Item) -> str:
    """The blocks of an item, from the first to the last."""
    first, last = item.blocks[0], item.blocks[-1]
    return first if first == last else f"{first} … {last.rpartition('.')[2]}"


def _short(name: str, inside: str) -> str:
    """A name as long as fits, without that of the block that it is in."""
    inner = name.removeprefix(f"{inside}.")
    name = name if inner[0].isdigit() else inner
    return name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}"


def _anchor(block: str) -> str:
    return f"in-{block}"
