"""What a GHN is to predict for a network: a target for each parameter, or each part of one.

What a parameter *is* is decided here and only here: its role, how its dimensions are those of a kernel, how much of it
is decoded, and the scale it is brought to.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from .graph import PRIMITIVES, ComputationGraph, Kept
from .graph.computation_graph import Operands
from .graph.primitives import Carries

if TYPE_CHECKING:
    from .hypernet import GHNConfig

Shape4d = tuple[int, int, int, int]


class Role(enum.Enum):
    """What a parameter does in its network."""

    WEIGHT = enum.auto()
    BIAS = enum.auto()
    NORM_WEIGHT = enum.auto()
    NORM_BIAS = enum.auto()
    POSITIONS = enum.auto()
    CLASS_WEIGHT = enum.auto()
    CLASS_BIAS = enum.auto()
    CONSTANT = enum.auto()


class Layout(enum.Enum):
    """What the dimensions of a parameter are, as those of a kernel [out, in, height, width]."""

    VECTOR = "out"
    MATRIX = "out, in"
    SEQUENCE = "out, in, height"
    KERNEL = "out, in, height, width"
    VOLUME = "out, in, …, height, width"
    TOKENS = "1, tokens and positions of a square map, in"
    GRID = "1, height, width, in"


_ROLES = {
    Carries.WEIGHT: Role.WEIGHT,
    Carries.BIAS: Role.BIAS,
    Carries.NORM: Role.NORM_WEIGHT,
    Carries.TABLE: Role.POSITIONS,
}
_ROLE_OF_NODE = {op: _ROLES.get(row.carries) for op, row in PRIMITIVES.items()}
_IN_HEAD = {Role.WEIGHT: Role.CLASS_WEIGHT, Role.BIAS: Role.CLASS_BIAS}


class Target(NamedTuple):
    """Something to predict.

    Attributes:
        name: Of the parameter, or of the part as `ComputationGraph.untied` has it.
        role: What it is.
        node: The node whose state it is decoded from; None for a constant.
        shape: Its own, in full.
        layout: What its dimensions are.
        decoded: What a decoder makes for it, as a kernel; `shape` is made of copies of that.
        gain: What the decoded kernel is multiplied with; the value of a constant. Vectors are squashed instead.
    """

    name: str
    role: Role
    node: int | None = None
    shape: tuple[int, ...] = ()
    layout: Layout = Layout.VECTOR
    decoded: Shape4d = (1, 1, 1, 1)
    gain: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What there is to do for one network.

    Attributes:
        graph: The graph that the GHN reads.
        shapes: What it sees as the shapes of the nodes.
        targets: In the order of their nodes, constants first.
        whole: The parameters whose parts are targets, with what these are.
    """

    graph: ComputationGraph
    shapes: list[tuple[int, ...] | None]
    targets: list[Target]
    whole: dict[str, Operands] = field(default_factory=dict)


def make_plan(
    graph: ComputationGraph, config: GHNConfig, decoded_shape: Callable[[Shape4d], Shape4d], predict_head: bool = True
) -> Plan:
    """Decides what to predict.

    Args:
        graph: The network.
        config: The GHN.
        decoded_shape: What its decoder makes for a kernel of a shape.
        predict_head: Whether the classification layer is predicted, with the checkpoint's classes.
    """
    whole = {}
    if config.split_attention:
        known = graph.within(config.primitives).operands
        whole = {name: operands for name, operands in known.items() if len(operands.parts) > 1}
    graph = as_read(graph, config)
    shapes = list(graph.shapes)
    targets = _constants(graph, config)
    for node, (name, role) in enumerate(zip(graph.names, _node_roles(graph), strict=True)):
        shape = graph.shapes[node]
        if role is None or shape is None:
            continue
        if name in graph.head and not predict_head:
            # A head that is left alone looks like one for the classes the GHN was trained on.
            shapes[node] = (config.num_classes, *shape[1:])
        elif role in (Role.BIAS, Role.NORM_WEIGHT):
            size = min(math.prod(shape), config.max_channels)
            targets.append(Target(name, role, node, shape, decoded=(size, 1, 1, 1)))
            if role is Role.NORM_WEIGHT:  # whether or not the norm has a bias
                bias = f"{name.removesuffix('weight')}bias"
                targets.append(Target(bias, Role.NORM_BIAS, node, shape, decoded=(size, 1, 1, 1)))
        elif role is Role.CLASS_BIAS:
            targets.append(Target(name, role, node, shape, decoded=(config.num_classes, 1, 1, 1)))
        else:
            kernel = shape_to_4d(shape)
            if role is Role.CLASS_WEIGHT:
                decoded = (config.num_classes, min(kernel[1], config.max_shape[1]), 1, 1)
            else:
                decoded = decoded_shape(kernel)
            gain = _gain(shape) if config.weight_norm else 1.0
            targets.append(Target(name, role, node, shape, layout_of(shape), decoded, gain))
    return Plan(graph, shapes, targets, whole)


def as_read(graph: ComputationGraph, config: GHNConfig) -> ComputationGraph:
    """The graph that a GHN reads where `trace` made this one: of its primitives, and with the nodes it tells apart."""
    known = graph.within(config.primitives)
    return known.untied if config.split_attention else known


def roles(graph: ComputationGraph) -> dict[str, Role]:
    """What the parameters are that have a node, in the order of these."""
    return {name: role for name, role in zip(graph.names, _node_roles(graph), strict=True) if role is not None}


def _node_roles(graph: ComputationGraph) -> list[Role | None]:
    found = [_ROLE_OF_NODE[op] for op in graph.ops]
    return [
        _IN_HEAD[role] if name in graph.head and role else role for name, role in zip(graph.names, found, strict=True)
    ]


def _constants(graph: ComputationGraph, config: GHNConfig) -> list[Target]:
    """Parameters without a node that all had one value while the GHN was trained."""
    values = {Kept.BRANCH_SCALE: config.branch_scale, Kept.POSITION_BIAS: config.position_bias}
    known = ((name, values.get(reason)) for name, reason in graph.kept.items())
    return [Target(name, Role.CONSTANT, gain=value) for name, value in known if value is not None]


@functools.cache
def layout_of(shape: tuple[int, ...]) -> Layout:
    """What the dimensions of a parameter of this shape are."""
    if len(shape) == 4:
        return Layout.GRID if shape[0] == 1 and shape[1] == shape[2] != shape[3] else Layout.KERNEL
    if len(shape) == 3:
        return Layout.TOKENS if shape[0] == 1 and min(shape[1:]) > 1 else Layout.SEQUENCE
    if len(shape) > 4:
        return Layout.VOLUME
    return Layout.MATRIX if len(shape) == 2 else Layout.VECTOR


@functools.cache  # networks have few shapes, and a GHN in training asks for them at every step
def shape_to_4d(shape: tuple[int, ...]) -> Shape4d:
    """A parameter's shape as (out, in, height, width).

    Vectors and matrices are 1x1 kernels; a position embedding (1, L, C) is a map of C channels on the largest square
    grid with at most L cells, one of (1, s, s, C) on its own; what has more than two spatial dimensions keeps its last
    two.
    """
    layout = layout_of(shape)
    if layout is Layout.GRID:
        return 1, shape[3], shape[1], shape[2]
    if layout is Layout.TOKENS:
        side = math.isqrt(shape[1])
        return 1, shape[2], side, side
    sizes = (*shape[:2], *shape[-2:]) if layout is Layout.VOLUME else shape
    out, into, height, width = (*sizes, 1, 1, 1, 1)[:4]
    return out, into, height, width


@functools.cache
def _gain(shape: tuple[int, ...]) -> float:
    """The scale of a parameter's fan-in, so that activations keep their variance (arXiv 2110.13100, §3.2.3).

    Position embeddings are not products with anything and stay as they are. The published code tells them by their
    shape: one filter, at least 11 high. So it scales small ones all the same, and a kernel of that shape it does not;
    its checkpoints were trained with that.
    """
    if len(shape) > 2 and shape[0] == 1 and shape[2] >= 11:
        return 1.0
    linear = len(shape) > 2 and (shape[1] == 1 or (len(shape) > 3 and shape[2] < shape[3]))
    return math.sqrt((1 if linear else 2) / math.prod(shape[1:]))
