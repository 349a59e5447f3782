"""Networks of DeepNets-1M's kind (Knyazev et al. 2021, section 4 and appendix A): stacks of DARTS-like cells.

A cell reads the outputs of the two cells before it. Each of its nodes adds two operations on those or on earlier nodes,
and some of the nodes, side by side, are the cell's output. Two of the cells halve the resolution. The operations cover
all fifteen primitives that a hypernetwork knows. The draws are our own, not the published list of networks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ghn.training.sampling import Config, Cost, Draw, Family, halve

_POOLS = ("max_pool", "avg_pool")
_CONVS = ("conv_1", "conv_3", "conv_5", "conv_7", "sep_conv_3", "sep_conv_5", "dil_conv_3", "dil_conv_5")
_HIDDEN = 256  # width of the classifier's hidden layer
_HEAD_CHANNELS = 16  # per attention head

Conv = tuple[int, int, int, int, int, int]  # in, out, kernel, stride, dilation, groups
Edge = list[Any]  # [operation, source]: 0 and 1 are the cells before, 2 the first node


# --- drawing ---


def _sample_cell(draw: Draw, nodes: int, operations: tuple[str, ...], drop_concat: bool) -> Config | None:
    """A cell, or None when part of what was drawn would not take part in its output."""
    cell: list[list[Edge]] = []
    for node in range(nodes):
        edges: list[Edge] = []
        for _ in range(2):
            operation, source = draw.choice(operations), draw.between(0, node + 1)
            if nodes == 1 or not draw.chance(0.1):  # else the zero operation: no edge at all
                edges.append([operation, source])
        if not edges:
            return None
        cell.append(edges)
    inner = {source for edges in cell for _, source in edges}
    concat = [node for node in range(nodes) if not drop_concat or node + 2 not in inner or draw.chance(0.5)]
    # Without the previous cell among the sources, every other cell of the network would be dead.
    return {"nodes": cell, "concat": concat} if 1 in inner else None


def _is_sound(normal: Config, reduction: Config) -> bool:
    """Whether the pair is trainable and affordable: some learnt layer, no crowd of gates or of large kernels."""
    for cell in (normal, reduction):
        operations = [operation for edges in cell["nodes"] for operation, _ in edges]
        if operations.count("cse") > 1 or sum(operation in ("conv_5", "conv_7") for operation in operations) > 1:
            return False
    operations = [operation for cell in (normal, reduction) for edges in cell["nodes"] for operation, _ in edges]
    convolves = any(operation in _CONVS for operation in operations)
    return convolves or ("msa" in operations and "cse" not in operations)


def _sample(draw: Draw, attention: bool, split: str = "") -> Config:
    fewest, most = (19, 36) if split == "deep" else (4, 18)
    cells = draw.between(fewest, most)
    deep = cells > draw.between(7, 10)
    nodes = draw.between(5, 6 if deep else 10) if split == "dense" else draw.between(1, 2 if deep else 4)
    shallow = cells <= 5 and nodes <= 2
    if split == "bnfree" and shallow:
        cells, shallow = cells + 2, False  # shallow networks without norm are part of the training distribution
    operations = ("skip", *_POOLS, *_CONVS, "cse", *(("msa", "msa") if attention else ()))
    while True:
        drop_concat = draw.chance(0.5)
        only_pools = draw.chance(0.5)
        normal = _sample_cell(draw, nodes, operations, drop_concat)
        reduction = _sample_cell(draw, nodes, _POOLS if only_pools else operations, drop_concat)
        if normal is None or reduction is None or not _is_sound(normal, reduction):
            continue
        if not attention or any(
            "msa" in edge for cell in (normal, reduction) for edges in cell["nodes"] for edge in edges
        ):
            break
    growth = draw.choice((1, 2))
    average = attention or cells > 10 or draw.chance(0.9)
    width = (
        draw.between(144, 320, 16)
        if split == "wide"
        else draw.choice((16, 16, 24, 32, 32, 32, 48, 48, 64, 64, 96, 128))
    )
    return {
        "cells": cells,
        "normal": normal,
        "reduction": reduction,
        "width": width,
        "growth": growth,
        "project": nodes > 1 or growth > 1 or not draw.chance(0.5),
        "norm": "none" if split == "bnfree" or (shallow and draw.chance(0.5)) else "bn",
        # At 32×32, attention over all pixels would cost more than everything else.
        "stem": draw.choice(("deep", "patch")) if attention else draw.choice(("plain", "plain", "deep")),
        "stem_kernel": draw.choice((3, 5, 7)),
        "stem_stride": draw.choice((2, 4)) if attention else draw.choice((1, 2, 2)),
        "stem_pool": draw.chance(0.5),
        "average": average,
        "hidden": draw.between(0, 1) if average else 1,
    }


# --- building ---


def _reductions(cells: int) -> tuple[int, int]:
    return cells // 3, 2 * cells // 3


class _SelfAttention(nn.Module):
    """A pre-norm transformer layer over the pixels of a feature map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // _HEAD_CHANNELS)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        batch, length, width = tokens.shape
        qkv = self.qkv(self.norm1(tokens)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        tokens = tokens + self.proj(attended)
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.transpose(1, 2).reshape(x.shape)


class _SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, width // 8, 1)
        self.excite = nn.Conv2d(width // 8, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return gate.sigmoid() * x


class _Block(nn.Sequential):
    """ReLU, convolutions one behind the other, and the network's norm."""

    def __init__(self, norm: str, *convs: Conv, act: bool = True) -> None:
        layers: list[nn.Module] = [nn.ReLU()] if act else []
        for number, (cin, cout, kernel, stride, dilation, groups) in enumerate(convs):
            # With a norm only the last convolution feeds it; none of them needs a bias then.
            padding = dilation * (kernel // 2)
            bias = norm == "none" and number == len(convs) - 1
            layers.append(nn.Conv2d(cin, cout, kernel, stride, padding, dilation, groups, bias=bias))
        if norm == "bn":
            layers.append(nn.BatchNorm2d(convs[-1][1]))
        super().__init__(*layers)


def _operation(name: str, width: int, stride: int, norm: str) -> nn.Module:
    kind, _, kernel_text = name.rpartition("_")
    if name in _CONVS:
        kernel = int(kernel_text)
        point = (width, width, 1, 1, 1, 1)
        if kind == "conv":
            return _Block(norm, (width, width, kernel, stride, 1, 1))
        if kind == "dil_conv":
            return _Block(norm, (width, width, kernel, stride, 2, width), point)
        first = _Block(norm, (width, width, kernel, stride, 1, width), point)
        return nn.Sequential(first, _Block(norm, (width, width, kernel, 1, 1, width), point))
    if name == "max_pool":
        return nn.MaxPool2d(3, stride, 1)
    if name == "avg_pool":
        return nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    if name == "skip":
        return nn.Identity() if stride == 1 else _Block(norm, (width, width, 1, 2, 1, 1))
    layer = _SelfAttention(width) if name == "msa" else _SqueezeExcite(width)
    return layer if stride == 1 else nn.Sequential(_operation("avg_pool", width, 2, norm), layer)


class _Node(nn.Module):
    """The sum of one or two operations on states of the cell."""

    def __init__(self, edges: list[nn.Module], sources: list[int]) -> None:
        super().__init__()
        self.edges, self.sources = nn.ModuleList(edges), sources

    def forward(self, states: list[Tensor]) -> Tensor:
        first, *others = (edge(states[source]) for edge, source in zip(self.edges, self.sources, strict=True))
        return sum(others, start=first)


class _Cell(nn.Module):
    def __init__(
        self, config: Config, cell: Config, inputs: tuple[int, int], width: int, stride: int, shrink: bool
    ) -> None:
        super().__init__()
        norm, self.concat = config["norm"], cell["concat"]
        used = {source for edges in cell["nodes"] for _, source in edges}
        self.inputs = nn.ModuleList()
        for source, channels in enumerate(inputs):
            halves = 2 if source == 0 and shrink else 1  # the cell before the previous one may be twice as large
            if source not in used:
                self.inputs.append(nn.Identity())
            elif config["project"]:
                self.inputs.append(_Block(norm, (channels, width, 1, halves, 1, 1)))
            else:
                self.inputs.append(nn.Identity() if halves == 1 else _operation("avg_pool", width, 2, norm))
        self.nodes = nn.ModuleList(
            _Node(
                [_operation(name, width, stride if source < 2 else 1, norm) for name, source in edges],
                [source for _, source in edges],
            )
            for edges in cell["nodes"]
        )

    def forward(self, before: Tensor, previous: Tensor) -> Tensor:
        states = [self.inputs[0](before), self.inputs[1](previous)]
        for node in self.nodes:
            states.append(node(states))
        outputs = [states[place + 2] for place in self.concat]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


class DeepNet(nn.Module):
    """A network of cells, as its configuration describes."""

    def __init__(self, config: Config, num_classes: int, in_chans: int, image_size: int) -> None:
        super().__init__()
        self.img_size = (image_size, image_size)  # where tracing finds the only size it takes
        norm, width = config["norm"], config["width"]
        convs, size = _stem(config, in_chans, image_size)
        self.stem = nn.Sequential(*(_Block(norm, conv, act=number > 0) for number, (conv, _) in enumerate(convs)))
        if config["stem_pool"]:
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        self.position = nn.Parameter(0.02 * torch.randn(1, width, size, size)) if _attends(config) else None
        self.cells = nn.ModuleList()
        inputs, shrink = (width, width), False
        for index in range(config["cells"]):
            reduces = index in _reductions(config["cells"])
            if reduces:
                width, size = width * config["growth"], halve(size)
            cell = config["reduction" if reduces else "normal"]
            self.cells.append(_Cell(config, cell, inputs, width, 2 if reduces else 1, shrink))
            inputs, shrink = (inputs[1], width * len(cell["concat"])), reduces
        features = inputs[1] * (1 if config["average"] else size * size)
        self.pool = nn.AdaptiveAvgPool2d(1) if config["average"] else nn.Identity()
        self.head = nn.Sequential(nn.Flatten())
        if config["hidden"]:
            self.head.extend([nn.Linear(features, _HIDDEN), nn.ReLU()])
            features = _HIDDEN
        self.head.append(nn.Linear(features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        previous = self.stem(x)
        if self.position is not None:
            previous = previous + self.position
        before = previous
        for cell in self.cells:
            before, previous = previous, cell(before, previous)
        return self.head(self.pool(F.relu(previous)))


def _attends(config: Config) -> bool:
    cells = (config["normal"], config["reduction"])
    return any(name == "msa" for cell in cells for edges in cell["nodes"] for name, _ in edges)


def _stem(config: Config, in_chans: int, image_size: int) -> tuple[list[tuple[Conv, int]], int]:
    """The stem's convolutions with the sizes of their outputs, and the size behind its pooling."""
    width, stride = config["width"], config["stem_stride"]
    if config["stem"] == "deep":
        plan = [(in_chans, width // 2, 3, min(stride, 2)), (width // 2, width, 3, max(1, stride // 2))]
    elif config["stem"] == "patch":
        plan = [(in_chans, width, stride + 1, stride)]  # an odd kernel, so that sizes only depend on strides
    else:
        plan = [(in_chans, width, config["stem_kernel"], stride)]
    convs: list[tuple[Conv, int]] = []
    size = image_size
    for cin, cout, kernel, step in plan:
        size = (size - 1) // step + 1
        convs.append(((cin, cout, kernel, step, 1, 1), size))
    return convs, halve(size) if config["stem_pool"] else size


# --- adding up ---


def _add_operation(cost: Cost, name: str, width: int, positions: int, strided: bool, norm: str) -> None:
    """One edge's cost; `positions` of its output, for whatever halves the resolution does so first."""
    last = {"bias": norm == "none", "norm": norm == "bn"}
    kind, _, kernel_text = name.rpartition("_")
    if kind == "conv":
        cost.conv(width, width, int(kernel_text), positions, **last)
    elif kind in ("sep_conv", "dil_conv"):
        for _ in range(2 if kind == "sep_conv" else 1):
            cost.conv(width, width, int(kernel_text), positions, groups=width)
            cost.conv(width, width, 1, positions, **last)
    elif name == "skip" and strided:
        cost.conv(width, width, 1, positions, **last)
    elif name == "cse":
        cost.conv(width, width // 8, 1, 1, bias=True)
        cost.conv(width // 8, width, 1, 1, bias=True)
    elif name == "msa":
        cost.vector(4 * width)
        cost.conv(width, 3 * width, 1, positions, bias=True)
        cost.attention(width, positions)
        cost.conv(width, width, 1, positions, bias=True)
        cost.conv(width, 4 * width, 1, positions, bias=True)
        cost.conv(4 * width, width, 1, positions, bias=True)


def _cost(config: Config, num_classes: int, in_chans: int, image_size: int) -> Cost:
    cost, norm, width = Cost(), config["norm"], config["width"]
    last = {"bias": norm == "none", "norm": norm == "bn"}
    convs, size = _stem(config, in_chans, image_size)
    for (cin, cout, kernel, *_), side in convs:
        cost.conv(cin, cout, kernel, side * side, **last)
    cost.vector(width * size * size if _attends(config) else 0)
    inputs = (width, width)
    for index in range(config["cells"]):
        reduces = index in _reductions(config["cells"])
        positions = size * size
        if reduces:
            width, size = width * config["growth"], halve(size)
        cell = config["reduction" if reduces else "normal"]
        used = {source for edges in cell["nodes"] for _, source in edges}
        for source in used & {0, 1} if config["project"] else ():
            cost.conv(inputs[source], width, 1, positions, **last)
        for edges in cell["nodes"]:
            for name, source in edges:
                _add_operation(cost, name, width, size * size, reduces and source < 2, norm)
        inputs = (inputs[1], width * len(cell["concat"]))
    features = inputs[1] * (1 if config["average"] else size * size)
    if config["hidden"]:
        cost.conv(features, _HIDDEN, 1, 1, bias=True)
        features = _HIDDEN
    cost.conv(features, num_classes, 1, 1, bias=True)
    return cost


def _family(name: str, tier: int, attention: bool, split: str = "") -> Family:
    return Family(name, tier, partial(_sample, attention=attention, split=split), DeepNet, _cost, fixed_size=True)


FAMILIES = (
    _family("cells", 1, False),
    _family("transformer_cells", 2, True),
    # Beyond the training distribution (16 to 128 channels, 4 to 18 cells, 1 to 4 nodes, a norm unless shallow) in one
    # respect each: 144 to 320 channels, 19 to 36 cells, 5 to 10 nodes, no batch norm at any depth.
    *(_family(f"{split}_cells", 2, False, split) for split in ("wide", "deep", "dense", "bnfree")),
    *(_family(f"{split}_transformer_cells", 2, True, split) for split in ("wide", "deep", "dense", "bnfree")),
)
