"""Which rows of a projection an attention reads as queries, keys and values.

A fused projection is one parameter whose rows make two or three operands of an attention. What the rows are for is
found from what flows: every element of a tensor behind a projection is told which row it comes from, through reshapes,
permutations and slices, up to the products that make an attention. An attention is two matrix products of data, the
second with the result of the first. Keys are the operand both of whose dimensions are summed over:

    softmax(q kᵀ) v        with a softmax in between, the first product is that of queries and keys
    q (kᵀ v)               linear attention, without one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .computation_graph import WEIGHT_PRIMITIVES, Operands, Part, bias_chains
from .tape import Function, Size

MATMULS = frozenset({"Bmm", "Baddbmm", "Mm"})
_USES = tuple("".join(letter for bit, letter in enumerate("qkv") if bits >> bit & 1) for bits in range(8))

# The rows that a tensor's elements come from: for each element its row (-1: none), or, where the elements are not told
# apart, for each row whether it is among them.
_Rows = Tensor | np.ndarray
# By what they are rows of: a parameter, or the function of a product, whose last dimension counts as its rows.
_Streams = dict[str | int, _Rows]


def operands_and_readers(
    tape: list[Function],
    frontier: Sequence[frozenset[int] | None],
    attention: Sequence[int | None],
    weighted: Mapping[int, list[str]],
    leaf_names: Sequence[str | None],
    parameters: Mapping[str, nn.Parameter],
    ops: Sequence[str],
    names: Sequence[str],
    edges: Mapping[tuple[int, int], list[int]],
) -> tuple[dict[str, Operands], dict[tuple[int, int], tuple[str, ...]]]:
    """What `ComputationGraph.operands` and `.readers` hold, for a graph and the tape that it was made from.

    Args:
        tape: The functions of a forward pass.
        frontier: For each, the nodes that reach it with no other in between; None for a transformed parameter.
        attention: For each, the attention whose weights it carries from softmax to values, if it does.
        weighted: The functions that apply weights, with the names of these.
        leaf_names: For each, the parameter that it is the leaf of.
        parameters: The model's.
        ops: Primitives of the graph's nodes.
        names: Their names.
        edges: Pairs of nodes, with the functions that read the first for the second.
    """
    finder = _OperandFinder(tape, frontier, attention, weighted, leaf_names, parameters)
    found = {
        name: operands
        for op, name in zip(ops, names, strict=True)
        if (op in WEIGHT_PRIMITIVES or op == "bias") and (operands := regular(finder.uses(name)))
    }
    readers: dict[tuple[int, int], tuple[str, ...]] = {}
    for chain in bias_chains(ops, names, edges, found):
        name, members = names[chain[0]], frozenset(chain)
        order = [part.operand for part in found[name].parts]

        def read(
            index: int, wanted: frozenset[int], name: str = name, members: frozenset[int] = members,
            all_: frozenset[str] = frozenset(order),
        ) -> frozenset[str]:  # fmt: skip
            """As what a function reads rows that come to it through these nodes."""
            if name in weighted.get(index, ()):
                return all_
            told: set[str] = set()
            for slot, source in enumerate(tape[index].inputs):
                if source is not None and wanted & (frontier[source] or frozenset()):
                    known = finder.read_as(index, slot, name)
                    told |= read(source, members) if known is None else known
            return frozenset(told)

        told_apart = {
            edge: told
            for edge, functions in edges.items()
            if edge[0] in members and edge[1] not in members
            for told in [frozenset().union(*(read(index, frozenset(edge[:1])) for index in functions))]
        }
        if frozenset().union(*told_apart.values()).issuperset(order):
            readers |= {
                edge: tuple(operand for operand in order if operand in told)
                for edge, told in told_apart.items()
                if told and len(told) < len(order)
            }
    return found, readers


class _OperandFinder:
    """Follows the rows of parameters through a tape; arguments as for `operands_and_readers`."""

    def __init__(
        self,
        tape: list[Function],
        frontier: Sequence[frozenset[int] | None],
        attention: Sequence[int | None],
        weighted: Mapping[int, list[str]],
        leaf_names: Sequence[str | None],
        parameters: Mapping[str, nn.Parameter],
    ):
        self.tape = tape
        self.frontier = frontier
        self.attention = attention
        self.weighted = weighted
        self.leaf_names = leaf_names
        self.parameters = parameters
        self.labels: dict[str, np.ndarray] = {}  # parameter -> for each row, the operands that it is read as, as bits
        self.streams: list[_Streams] = [{} for _ in tape]

        products = {index: slots for index in range(len(tape)) if (slots := self._operand_slots(index))}
        needed = self._needed(products)
        sides: dict[int, tuple[_Streams, _Streams]] = {}  # of the products that no other has followed so far
        for index, function in enumerate(tape):
            if index in products:
                self.streams[index] = self._product(index, products[index], sides)
            elif needed[index]:
                self.streams[index] = self._carried(index, function)

    def uses(self, name: str) -> list[str]:
        """For each row of a parameter, the operands that it is read as; empty if none is."""
        return [_USES[bits] for bits in self.labels.get(name, ())]

    def read_as(self, index: int, slot: int, name: str) -> frozenset[str] | None:
        """As which operands the rows of a parameter are read that come in at a slot of a function; None if unknown."""
        rows = self._input(index, slot).get(name)
        if rows is None:
            return None
        return frozenset(_USES[bits] for bits in np.unique(self.labels[name][self._among(name, rows)]))

    def _among(self, key: str | int, rows: _Rows) -> np.ndarray:
        """For each row whether it is among these."""
        if isinstance(rows, np.ndarray):
            return rows
        size = len(self.parameters[key]) if isinstance(key, str) else self.tape[key].shape[-1]
        among = np.zeros(size + 1, dtype=bool)  # the last for -1
        among[rows[tuple(slice(None) if stride else slice(1) for stride in rows.stride())].numpy()] = True
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
                heads = torch.Size(shape).numel() if self._may_mix_heads(index) else 0
                for key, rows in streams.items():
                    if isinstance(key, str) and self._keeps_channels(function):
                        found[key] = self._moved(key, function, rows)
                    elif isinstance(key, int) and heads == torch.Size(self.tape[key].shape).numel():
                        found[key] = self._among(key, rows)
                continue
            for key, rows in streams.items():
                if isinstance(rows, Tensor) and (vector := _by_channel(function, slot, rows)) is not None:
                    found[key] = vector.view([-1 if d == channels else 1 for d in range(len(shape))]).expand(shape)
        return found

    def _merged(self, key: str | int, found: list[_Rows]) -> _Rows:
        """The rows of an elementwise function of several tensors; those not told apart are factors of the others."""
        exact = [rows for rows in found if isinstance(rows, Tensor)]
        if exact and all(rows is exact[0] or torch.equal(rows, exact[0]) for rows in exact[1:]):
            return exact[0]
        return np.any([self._among(key, rows) for rows in found], axis=0)

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
        if len(exact) + sum(rows is None for rows in found) == len(found):
            dim = _signed(function.saved._saved_dim)
            if function.op == "Stack":
                blank = exact[0].new_full((), -1).expand(exact[0].shape)
                return torch.stack([rows if isinstance(rows, Tensor) else blank for rows in found], dim)
            missing = len(found) - len(exact)
            size = list(exact[0].shape)
            room = function.shape[dim] - sum(rows.shape[dim] for rows in exact)
            if missing < 2 or room % missing == 0:
                size[dim] = room // max(1, missing)
                blank = exact[0].new_full((), -1).expand(size)
                return torch.cat([rows if isinstance(rows, Tensor) else blank for rows in found], dim)
        return np.any([self._among(key, rows) for rows in found if rows is not None], axis=0)


def regular(labels: Sequence[str]) -> Operands | None:
    """Rows with these uses as the shortest list of parts of which they are repetitions.

    None if no row has a single use, or if a use has several parts in a repetition.
    """
    runs = [Part(label, len(list(group))) for label, group in groupby(labels)]
    for size in range(1, len(runs) + 1):
        if len({part.operand for part in runs[:size]}) < size:
            return None
        if len(runs) % size == 0 and runs == runs[:size] * (len(runs) // size):
            return Operands(tuple(runs[:size]), len(runs) // size) if size > 1 or len(labels[0]) == 1 else None
    return None


def _numbered(shape: Size, dim: int) -> Tensor:
    """A tensor that holds each element's place along one dimension, with memory for that dimension only."""
    places = torch.arange(shape[dim], dtype=torch.int32, device="cpu")  # whatever device is the default
    return places.view([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]).expand(shape)


def _keys(inputs: list[_Streams]) -> list[str | int]:
    return list(dict.fromkeys(key for streams in inputs for key in streams))


def _varies(rows: Tensor, dim: int) -> bool:
    first = rows.narrow(dim, 0, 1)
    return rows.stride(dim) != 0 and not torch.equal(first.expand_as(rows), rows)


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


def _sliced(rows: Tensor, saved: Any, shape: Size) -> Tensor:
    dim, start = _signed(saved._saved_dim), _signed(saved._saved_start)
    start = max(0, start + rows.shape[dim]) if start < 0 else start
    index = torch.arange(start, rows.shape[dim], saved._saved_step, device="cpu")[: shape[dim]]
    return rows.index_select(dim, index) if saved._saved_step != 1 else rows.narrow(dim, start, shape[dim])


_Move = Callable[[Tensor, Any, Size], Tensor]
_MOVES: dict[str, _Move] = {
    **dict.fromkeys(
        ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Expand"), lambda rows, _, shape: (
            rows.reshape(shape) if rows.numel() == torch.Size(shape).numel() else rows.expand(shape)
        )
    ),
    "T": lambda rows, *_: rows.t(),
    "Transpose": lambda rows, saved, _: rows.transpose(_signed(saved._saved_dim0), _signed(saved._saved_dim1)),
    "Permute": lambda rows, saved, _: rows.permute(_dims(saved._saved_dims)),
    "Select": lambda rows, saved, _: rows.select(_signed(saved._saved_dim), _signed(saved._saved_index)),
    "Slice": _sliced,
    "Repeat": lambda rows, saved, _: rows.repeat(saved._saved_repeats),
    "Roll": lambda rows, saved, _: rows.roll(_dims(saved._saved_shifts), _dims(saved._saved_dims)),
    "Flip": lambda rows, saved, _: rows.flip(_dims(saved._saved_dims)),
    "ConstantPadNd": lambda rows, saved, _: nn.functional.pad(rows, _dims(saved._saved_pad), value=-1),
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
