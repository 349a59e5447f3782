"""The vocabulary: what a node can be, a row each, and how a function of the tape is told to be one."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .annotate import CONCATENATIONS, Notes, averages_positions
from .record import Function, Size, Tape


class Carries(enum.Enum):
    """The parameter that a node stands for."""

    NOTHING = enum.auto()
    WEIGHT = enum.auto()
    BIAS = enum.auto()
    NORM = enum.auto()
    TABLE = enum.auto()


@dataclass(eq=False, slots=True)
class Visit:
    """A function as the contraction meets it.

    Attributes:
        tape: Where it stands.
        notes: What is known of the tape ahead of it.
        index: Its place.
        function: Itself.
        data: The places of the functions it reads data from.
        made_of: Per input slot, the parameters of which what comes in is made; none of data.
        parameters: All of these.
        reach: The nodes whose outputs reach it with no other node in between.
    """

    tape: Tape
    notes: Notes
    index: int
    function: Function
    data: list[int]
    made_of: list[tuple[str, ...]]
    parameters: tuple[str, ...]
    reach: frozenset[int]

    @property
    def joins(self) -> bool:
        """Whether at least two different nodes come together here."""
        return len(self.reach) > 1 and len(self.data) > 1


@dataclass(frozen=True)
class Primitive:
    """A row of the vocabulary.

    Attributes:
        carries: The parameter that its node is named by; a node that carries none is named by what autograd recorded.
        is_made_by: Whether a function makes such a node, and of which parameter; the name is empty if it carries none.
            Of the rows that carry the same, at most one says so.
        shape: Of its node, if it carries no parameter.
    """

    carries: Carries
    is_made_by: Callable[[Visit, str], bool]
    shape: Callable[[Visit], Size | None] = lambda visit: None


def primitive(carries: Carries, visit: Visit, name: str = "") -> str | None:
    """The primitive that a function makes a node of, if it makes any."""
    return next((op for op, row in _CARRYING[carries] if row.is_made_by(visit, name)), None)


def varied_dims(parameter: torch.Tensor) -> int:
    """Dimensions along which a parameter can vary."""
    return sum(size > 1 for size in parameter.shape)


def _grouping(visit: Visit) -> tuple[bool, bool]:
    """Whether a weight is applied in groups, and whether it is dilated then."""
    function = visit.function
    if function.op != "Convolution" or function.saved._saved_groups == 1:
        return False, False
    return True, max(function.saved._saved_dilation) > 1


def _kernel(visit: Visit) -> Size | None:
    """Shape of a pooling; an adaptive pooling's kernel is what it divides its input into."""
    function, saved = visit.function, visit.function.saved
    if hasattr(saved, "_saved_kernel_size"):
        kernel = tuple(saved._saved_kernel_size)
    elif function.op.startswith("AdaptiveMaxPool"):
        kernel = tuple(max(1, i // o) for i, o in zip(saved._saved_self.shape[2:], function.shape[2:], strict=True))
    else:
        return None
    return 1, 1, *((kernel * 2)[-2:] if len(kernel) == 1 else kernel[-2:])


def _is_pooling(visit: Visit) -> bool:
    return "Pool" in visit.function.op and _kernel(visit) is not None


def _is_attention(visit: Visit, _: str) -> bool:
    return visit.index in visit.notes.attentions or visit.function.op.startswith("ScaledDotProduct")


def _is_batch_norm(visit: Visit, name: str) -> bool:
    module = visit.tape.owners[name]
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "batchnorm" in type(module).__name__.lower()


def _is_position_embedding(visit: Visit, name: str) -> bool:
    """A table that varies over positions and channels and is added to features, as opposed to a per-channel shift."""
    parameter, local = visit.tape.parameters[name], name.rpartition(".")[2]
    whole = math.prod(visit.function.shape)
    return varied_dims(parameter) > 1 and ("pos" in local or parameter.numel() == whole)


PRIMITIVES: dict[str, Primitive] = {
    "max_pool": Primitive(Carries.NOTHING, lambda v, _: _is_pooling(v) and "MaxPool" in v.function.op, _kernel),
    "avg_pool": Primitive(Carries.NOTHING, lambda v, _: _is_pooling(v) and "MaxPool" not in v.function.op, _kernel),
    "sep_conv": Primitive(Carries.WEIGHT, lambda v, _: _grouping(v) == (True, False)),
    "dil_conv": Primitive(Carries.WEIGHT, lambda v, _: _grouping(v) == (True, True)),
    "conv": Primitive(Carries.WEIGHT, lambda v, _: _grouping(v) == (False, False)),
    "msa": Primitive(Carries.NOTHING, _is_attention),
    "cse": Primitive(Carries.NOTHING, lambda v, _: v.index in v.notes.gates and len(v.reach) > 1),
    "sum": Primitive(Carries.NOTHING, lambda v, _: v.function.op in ("Add", "Sub") and v.joins),
    "concat": Primitive(Carries.NOTHING, lambda v, _: v.function.op in CONCATENATIONS and v.joins),
    "input": Primitive(Carries.NOTHING, lambda v, _: False),  # node 0, before the first function
    "bias": Primitive(Carries.BIAS, lambda v, _: True),
    "bn": Primitive(Carries.NORM, _is_batch_norm),
    "ln": Primitive(Carries.NORM, lambda v, name: not _is_batch_norm(v, name)),
    "pos_enc": Primitive(Carries.TABLE, _is_position_embedding),
    "glob_avg": Primitive(
        Carries.NOTHING, lambda v, _: averages_positions(v.function) and v.index not in v.notes.squeezes
    ),
}
"""The vocabulary of DeepNets-1M (arXiv 2110.13100, table 1), in the order of the published embeddings' rows."""

_CARRYING = {carries: [(op, row) for op, row in PRIMITIVES.items() if row.carries is carries] for carries in Carries}


def carrying(*kinds: Carries) -> frozenset[str]:
    """The primitives whose nodes stand for a parameter of these kinds."""
    return frozenset(op for op, row in PRIMITIVES.items() if row.carries in kinds)


WEIGHTS = carrying(Carries.WEIGHT)
NORMS = carrying(Carries.NORM)
