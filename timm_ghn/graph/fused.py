"""Which rows of a projection an attention reads as queries, keys and values.

A fused projection is one parameter whose rows make two or three operands of an attention. What the rows are for is
found from what flows: every element of a tensor behind a projection is told which row it comes from, through reshapes,
permutations and slices, up to the products that make an attention. An attention is two matrix products of data, the
second with the result of the first. Keys are the operand both of whose dimensions are summed over:

    softmax(q kᵀ) v        with a softmax in between, the first product is that of queries and keys
    q (kᵀ v)               linear attention, without one
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .annotate import MATMULS
from .computation_graph import Operands, Part, bias_chains
from .draft import Draft
from .primitives import Carries, carrying
from .record import Function, Size, Tape

_USES = tuple("".join(letter for bit, letter in enumerate("qkv") if bits >> bit & 1) for bits in range(8))

# The rows that a tensor's elements come from: for each element its row (-1: none), or, where the elements are not told
# apart, for each row whether it is among them. The former has memory only for dimensions along which rows differ, of
# which positions are none: their stride is 0, and is kept so.
_Rows = Tensor | np.ndarray[Any, Any]
# By what they are rows of: a parameter, or the function of a product, whose last dimension counts as its rows.
_Streams = dict[str | int, _Rows]


def operands_and_readers(
    tape: Tape,
    frontier: Sequence[frozenset[int] | None],
    attention: Sequence[int | None],
    weighted: Mapping[int, list[str]],
    draft: Draft,
) -> tuple[dict[str, Operands], dict[tuple[int, int], tuple[str, ...]]]:
    """What `ComputationGraph.operands` and `.readers` hold, for a graph and the tape that it was made from.

    Args:
        tape: What a forward pass left behind.
        frontier: For each function, the nodes that reach it with no other in between; None for a transformed parameter.
        attention: For each, the attention whose weights it carries from softmax to values, if it does.
        weighted: The functions that apply weights, with the names of these.
        draft: The graph.
    """
    finder = _OperandFinder(tape, frontier, attention, weighted)
    rows = carrying(Carries.WEIGHT, Carries.BIAS)
    found = {
        name: operands
        for op, name in zip(draft.ops, draft.names, strict=True)
        if op in rows and (operands := regular(finder.uses(name)))
    }
    names, edges = draft.names, draft.edges
    readers: dict[tuple[int, int], tuple[str, ...]] = {}
    for chain in bias_chains(draft.ops, names, edges, found):
        order = [part.operand for part in found[names[chain[0]]].parts]
        read = {
            edge: frozenset().union(*finder.read_by(functions, edge[0], chain, names[chain[0]]))
            for edge, functions in edges.items()
            if edge[0] in chain and edge[1] not in chain
        }
        if frozenset().union(*read.values()).issuperset(order):
            readers |= {
                edge: tuple(operand for operand in order if operand in some)
                for edge, some in read.items()
                if 0 < len(some) < len(order)
            }
    return found, readers


class _OperandFinder:
    """Follows the rows of parameters through a tape; arguments as for `operands_and_readers`."""

    def __init__(
        self,
        tape: Tape,
        frontier: Sequence[frozenset[int] | None],
        attention: Sequence[int | None],
        weighted: Mapping[int, list[str]],
    ):
        self.tape = tape.functions
        self.leaf_names = tape.names
        self.parameters = tape.parameters
        self.frontier = frontier
        self.attention = attention
        self.weighted = weighted
        # Parameter -> for each row, the operands that it is read as, as bits.
        self.labels: dict[str, np.ndarray[Any, Any]] = {}
        self.streams: list[_Streams] = [{}] * len(self.tape)

        products = {index: slots for index in range(len(self.tape)) if (slots := self._operand_slots(index))}
        needed = self._needed(products)
        sides: dict[int, tuple[_Streams, _Streams]] = {}  # of the products that no other has followed so far
        for index, function in enumerate(self.tape):
            if index in products:
                self.streams[index] = self._product(index, products[index], sides)
            elif needed[index]:
                self.streams[index] = self._carried(index, function)

    def uses(self, name: str) -> list[Part]:
        """The rows of a parameter in runs of the same use; empty if none has any."""
        if (labels := self.labels.get(name)) is None:
            return []
        bounds = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
        return [Part(_USES[labels[start]], end - start) for start, end in pairwise(bounds)]

    def read_by(self, functions: list[int], node: int, chain: list[int], name: str) -> list[frozenset[str]]:
        """As which operands each function reads a parameter's rows, of those that reach it through a node.

        Args:
            functions: Positions in the tape.
            node: The parameter's, or that of a bias behind it.
            chain: Its node and those of the biases.
            name: The parameter.
        """
        seen: dict[int, frozenset[str]] = {}

        def through(index: int, nodes: frozenset[int]) -> frozenset[str]:
            if name in self.weighted.get(index, ()):
                return frozenset(part.operand for part in self.uses(name))
            read: frozenset[str] = frozenset()
            for slot, source in enumerate(self.tape[index].inputs):
                if source is None or nodes.isdisjoint(self.frontier[source] or ()):
                    continue
                rows = self._input(index, slot).get(name)
                if rows is not None:
                    read |= {_USES[bits] for bits in np.unique(self.labels[name][self._among(name, rows)])}
                else:  # not on the way to a product: what comes from there is all that goes in there
                    if source not in seen:
                        seen[source] = through(source, frozenset(chain))
                    read |= seen[source]
            return read

        return [through(index, frozenset({node})) for index in functions]

    def _among(self, key: str | int, rows: _Rows) -> np.ndarray[Any, Any]:
        """For each row whether it is among these."""
        if isinstance(rows, np.ndarray):
            return rows
        size = len(self.parameters[key]) if isinstance(key, str) else self.tape[key].shape[-1]
        among = np.zeros(size + 1, dtype=bool)  # the last for -1
        among[_thin(rows).numpy()] = True
        return among[:-1]

    # ---- products ---------------------------------------------------------------------------------------------------

    def _operand_slots(self, index: int) -> tuple[int, ...]:
        """The input slots of the factors, if the function is a product of data; three if it is a whole attention."""
        function = self.tape[index]
        if function.op.startswith("ScaledDotProduct"):
            return 0, 1, 2
        slots = (1, 2) if function.op == "Baddbmm" else (0, 1)
        is_product = function.op in MATMULS and index not in self.weighted
        return slots if is_product and all(self._is_data(function, slot) for slot in slots) else ()

    def _is_data(self, function: Function, slot: int) -> bool:
        source = function.inputs[slot]
        return source is not None and self.frontier[source] is not None

    def _product(self, index: int, slots: tuple[int, ...], sides: dict[int, tuple[_Streams, _Streams]]) -> _Streams:
        function = self.tape[index]
        operands = [self._input(index, slot) for slot in slots]
        if len(slots) == 3:
            for streams, operand in zip(operands, "qkv", strict=True):
                self._label(streams, operand)
            return {}
        followed = False
        for side in (0, 1):
            source = function.inputs[slots[side]]
            assert source is not None
            for key, rows in operands[side].items():
                if not isinstance(key, int) or key not in sides:
                    continue
                # This product sums over its first factor's last dimension, or its second's last but one. Where that
                # dimension is not told, the first product's result came as it was.
                summed = -1 - side
                last = _varies(rows, summed) if isinstance(rows, Tensor) else side == 0
                first, second = sides.pop(key)
                self._label(second if last else first, "k")
                queries_first = self.attention[source] is not None
                self._label(first if last else second, "q" if queries_first else "v")
                self._label(operands[1 - side], "v" if queries_first else "q")
                followed = True
        if followed:
            return {}
        sides[index] = operands[0], operands[1]
        return {index: _numbered(function.shape, -1)}

    def _label(self, streams: _Streams, operand: str) -> None:
        for name, rows in streams.items():
            if isinstance(name, str):
                labels = self.labels.setdefault(name, np.zeros(len(self.parameters[name]), dtype=np.uint8))
                labels[self._among(name, rows)] |= 1 << "qkv".index(operand)

    # ---- rows through functions -------------------------------------------------------------------------------------

    def _needed(self, products: Mapping[int, tuple[int, ...]]) -> list[bool]:
        """The functions between projections and products."""
        needed = [False] * len(self.tape)
        for index in range(len(self.tape) - 1, -1, -1):
            function = self.tape[index]
            if index in products:
                passing = products[index]
            elif not needed[index]:
                continue
            else:
                passing = tuple(range(len(function.inputs)))
                if index in self.weighted and not self._keeps_channels(function) and not self._may_mix_heads(index):
                    passing = tuple(slot for slot in passing if not self._is_data(function, slot))
            for slot in passing:
                source = function.inputs[slot]
                if source is not None:
                    needed[source] = True
        return needed

    def _keeps_channels(self, function: Function) -> bool:
        """Whether a weighted function is a depthwise convolution."""
        if function.op != "Convolution" or function.saved._saved_transposed:
            return False
        return bool(function.saved._saved_groups == function.shape[1] == function.saved._saved_input.shape[1])

    def _may_mix_heads(self, index: int) -> bool:
        size = self.parameters[self.weighted[index][0]].shape
        return len(size) > 1 and size[0] == size[1] <= 64

    def _input(self, index: int, slot: int) -> _Streams:
        """What comes in at a slot, of functions with several outputs the part that is read."""
        function = self.tape[index]
        source = function.inputs[slot]
        if source is None or not (streams := self.streams[source]):
            return {}
        saved, part = self.tape[source].saved, function.outputs[slot]
        cut = _PARTS.get(self.tape[source].op)
        if cut is None:
            return streams if part == 0 else {}
        return {key: cut(rows, saved, part) if isinstance(rows, Tensor) else rows for key, rows in streams.items()}

    def _carried(self, index: int, function: Function) -> _Streams:
        name = self.leaf_names[index]
        if name is not None:
            size = self.parameters[name].shape
            return {name: _numbered(size, 0)} if len(size) else {}
        inputs = [self._input(index, slot) for slot in range(len(function.inputs))]
        if index in self.weighted:
            return self._weighted(index, function, inputs)
        if function.op in ("Cat", "Stack"):
            return {key: self._joined(key, function, [streams.get(key) for streams in inputs]) for key in _keys(inputs)}
        if function.op.startswith("Native"):  # of a norm's inputs, the first is what it is applied to
            return {key: self._moved(key, function, rows) for key, rows in inputs[0].items() if isinstance(key, str)}
        keys = _keys(inputs)
        if function.op in ("Add", "Sub"):
            names = [
                {key for key in streams if isinstance(key, str)}
                for slot, streams in enumerate(inputs)
                if self._is_data(function, slot)
            ]
            if any(a.isdisjoint(b) for a, b in pairwise(names)):
                # A sum of things of different origin, such as a residual connection, is neither of them.
                keys = [key for key in keys if isinstance(key, int)]
        return {
            key: self._merged(key, [self._moved(key, function, s[key]) for s in inputs if key in s]) for key in keys
        }

    def _weighted(self, index: int, function: Function, inputs: list[_Streams]) -> _Streams:
        """The rows of a layer's weight and bias, each at its output channel; with depthwise ones, also the input's."""
        shape, found = function.shape, _Streams()
        channels = 1 if function.op == "Convolution" else len(shape) - 1
        for slot, streams in enumerate(inputs):
            if self._is_data(function, slot):
                heads = math.prod(shape) if self._may_mix_heads(index) else 0
                for key, rows in streams.items():
                    if isinstance(key, str) and self._keeps_channels(function):
                        found[key] = self._moved(key, function, rows)
                    elif isinstance(key, int) and heads == math.prod(self.tape[key].shape):
                        found[key] = self._among(key, rows)
                continue
            for key, rows in streams.items():
                if isinstance(rows, Tensor) and (vector := _by_channel(function, slot, rows)) is not None:
                    found[key] = vector.view([-1 if d == channels else 1 for d in range(len(shape))]).expand(shape)
        return found

    def _merged(self, key: str | int, found: list[_Rows]) -> _Rows:
        """The rows of an elementwise function of several tensors; those not told apart are factors of the others."""
        if len(found) == 1:
            return found[0]
        exact = [rows for rows in found if isinstance(rows, Tensor)]
        if exact and all(rows is exact[0] or torch.equal(*_thin_together(rows, exact[0])) for rows in exact[1:]):
            return exact[0]
        among: _Rows = np.any([self._among(key, rows) for rows in found], axis=0)
        return among

    def _moved(self, key: str | int, function: Function, rows: _Rows) -> _Rows:
        """The rows of a function's output from those of its input."""
        if isinstance(rows, np.ndarray) or function.op in _PARTS:  # whose parts are taken where they are read
            return rows
        shape, dims = function.shape, rows.ndim
        if move := _MOVES.get(function.op):
            moved = move(rows, function.saved, shape)
            return moved if moved.shape == shape else self._among(key, rows)
        if dims <= len(shape) and all(a in (1, b) for a, b in zip(rows.shape[::-1], shape[::-1], strict=False)):
            return rows.expand(shape)
        if dims == len(shape) and rows.shape[:2] == shape[:2] and not any(_varies(rows, d) for d in range(2, dims)):
            return rows[tuple(slice(1 if d > 1 else None) for d in range(dims))].expand(shape)  # only positions changed
        return self._among(key, rows)

    def _joined(self, key: str | int, function: Function, found: list[_Rows | None]) -> _Rows:
        """The rows of a concatenation; an input without any is as long as the others leave room for."""
        exact = [rows for rows in found if isinstance(rows, Tensor)]
        missing = sum(rows is None for rows in found)
        if len(exact) + missing == len(found):
            dim = _signed(function.saved._saved_dim)
            size = list(exact[0].shape)
            room = 0
            if function.op == "Cat":
                room = function.shape[dim] - sum(rows.shape[dim] for rows in exact)
                size[dim] = room // max(1, missing)
            if missing < 2 or room % missing == 0:
                blank = exact[0].new_full((), -1).expand(size)
                keep = (dim,) if function.op == "Cat" else ()
                pieces = _thin_together(*(rows if isinstance(rows, Tensor) else blank for rows in found), keep=keep)
                join = torch.cat if function.op == "Cat" else torch.stack
                return join(pieces, dim).expand(function.shape)
        among: _Rows = np.any([self._among(key, rows) for rows in found if rows is not None], axis=0)
        return among


def regular(runs: list[Part]) -> Operands | None:
    """Neighbouring rows of these uses as the shortest list of parts of which they are repetitions.

    None if no row has a single use, or if a use has several parts in a repetition.
    """
    for size in range(1, len(runs) + 1):
        if len({part.operand for part in runs[:size]}) < size:
            return None
        if len(runs) % size == 0 and runs == runs[:size] * (len(runs) // size):
            return Operands(tuple(runs[:size]), len(runs) // size) if size > 1 or len(runs[0].operand) == 1 else None
    return None


def _numbered(shape: Size, dim: int) -> Tensor:
    """A tensor that holds each element's place along one dimension, with memory for that dimension only."""
    places = torch.arange(shape[dim], dtype=torch.int32, device="cpu")  # whatever device is the default
    return places.view([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]).expand(shape)


def _keys(inputs: list[_Streams]) -> list[str | int]:
    return list(dict.fromkeys(key for streams in inputs for key in streams))


def _varies(rows: Tensor, dim: int) -> bool:
    rows = _thin(rows)
    return rows.shape[dim] > 1 and not torch.equal(rows.narrow(dim, 0, 1).expand_as(rows), rows)


def _thin(rows: Tensor, keep: Iterable[int] = ()) -> Tensor:
    """Without the dimensions that have no memory, except for those to keep."""
    (thin,) = _thin_together(rows, keep=keep)
    return thin


def _thin_together(*tensors: Tensor, keep: Iterable[int] = ()) -> list[Tensor]:
    """Likewise, for tensors of as many dimensions, without those that none has memory for."""
    dims = range(tensors[0].ndim)
    kept = {dim % len(dims) for dim in keep} | {d for d in dims for rows in tensors if rows.stride(d)}
    return [rows[tuple(slice(None) if d in kept else slice(1) for d in dims)] for rows in tensors]


def _by_channel(function: Function, slot: int, rows: Tensor) -> Tensor | None:
    """Of a layer's weight or bias as its function reads it, the row that each output channel comes from."""
    if function.op == "Convolution":
        if function.saved._saved_transposed or slot not in (1, 2):
            return None
        dim = 0
    elif (function.op, slot) in (("Linear", 1), ("Linear", 2)):
        dim = 0
    elif (function.op, slot) in (("Addmm", 0), ("Addmm", 2), ("Mm", 1)):
        dim = rows.ndim - 1
    else:
        return None
    if any(_varies(rows, other) for other in range(rows.ndim) if other != dim):
        return None
    return rows[tuple(slice(None) if other == dim else 0 for other in range(rows.ndim))]


def _signed(number: int) -> int:
    """Autograd saves negative dimensions and indices without their sign."""
    return number - 2**64 if number >= 2**63 else number


def _dims(numbers: Sequence[int]) -> list[int]:
    return [_signed(number) for number in numbers]


def _viewed(rows: Tensor, _: Any, shape: Size) -> Tensor:
    """In another shape, without memory for what still has none."""
    if rows.numel() != math.prod(shape):
        return rows.expand(shape)
    try:
        return rows.view(shape)
    except RuntimeError:  # dimensions with and without memory become one, of which there is to be no more than needed
        pass
    thin_source: list[slice] = []
    thin_target: list[int] = []
    source = target = 0
    while source < rows.ndim or target < len(shape):
        # The next dimensions of both that have equally many elements.
        first, begin, have, want = source, target, 1, 1
        while (source == first and target == begin) or have != want:
            if source < rows.ndim and (have <= want or target == len(shape)):
                have, source = have * rows.shape[source], source + 1
            else:
                want, target = want * shape[target], target + 1
        constant = all(rows.shape[d] == 1 or not rows.stride(d) for d in range(first, source))
        thin_source += [slice(1) if constant else slice(None)] * (source - first)
        thin_target += [1] * (target - begin) if constant else shape[begin:target]
    return rows[tuple(thin_source)].reshape(thin_target).expand(shape)


def _sliced(rows: Tensor, saved: Any, shape: Size) -> Tensor:
    dim, start = _signed(saved._saved_dim) % rows.ndim, _signed(saved._saved_start)
    start = max(0, start + rows.shape[dim]) if start < 0 else start
    cut = slice(start, start + shape[dim] * saved._saved_step, saved._saved_step)
    return rows[tuple(cut if d == dim else slice(None) for d in range(rows.ndim))]


def _padded(rows: Tensor, saved: Any, shape: Size) -> Tensor:
    pad = _dims(saved._saved_pad)
    keep = [rows.ndim - 1 - place // 2 for place, size in enumerate(pad) if size]
    return nn.functional.pad(_thin(rows, keep), pad, value=-1).expand(shape)


def _repeated(rows: Tensor, saved: Any, shape: Size) -> Tensor:
    repeats = saved._saved_repeats
    rows = rows[(None,) * (len(repeats) - rows.ndim)]
    return _thin(rows, [d for d, times in enumerate(repeats) if times > 1]).repeat(repeats).expand(shape)


_Move = Callable[[Tensor, Any, Size], Tensor]
_MOVES: dict[str, _Move] = {
    **dict.fromkeys(
        ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Expand"), _viewed
    ),
    "T": lambda rows, *_: rows.t(),
    "Transpose": lambda rows, saved, _: rows.transpose(_signed(saved._saved_dim0), _signed(saved._saved_dim1)),
    "Permute": lambda rows, saved, _: rows.permute(_dims(saved._saved_dims)),
    "Select": lambda rows, saved, _: rows.select(_signed(saved._saved_dim), _signed(saved._saved_index)),
    "Slice": _sliced,
    "Repeat": _repeated,
    "Roll": lambda rows, saved, shape: _thin(rows, _dims(saved._saved_dims) or range(rows.ndim)).roll(
        _dims(saved._saved_shifts), _dims(saved._saved_dims)
    ).expand(shape),
    "Flip": lambda rows, saved, shape: _thin(rows).flip(_dims(saved._saved_dims)).expand(shape),
    "ConstantPadNd": _padded,
    "Unfold": lambda rows, saved, _: rows.unfold(
        _signed(saved._saved_dimension), saved._saved_size, saved._saved_step
    ),
}  # fmt: skip
_PARTS: dict[str, Callable[[Tensor, Any, int], Tensor]] = {
    "Unbind": lambda rows, saved, part: rows.select(_signed(saved._saved_dim), part),
    "Split": lambda rows, saved, part: rows.split(saved._saved_split_size, _signed(saved._saved_dim))[part],
    "SplitWithSizes": lambda rows, saved, part: rows.split(
        list(saved._saved_split_sizes), _signed(saved._saved_dim)
    )[part],
}  # fmt: skip
