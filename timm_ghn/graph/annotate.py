"""What cannot be said of a function by itself: attention, logits, gates, scales of branches.

Each is told by what comes before and after the function in the tape, before any of it is contracted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .record import Function, Size, Tape

MATMULS = frozenset({"Bmm", "Baddbmm", "Mm"})
CONCATENATIONS = frozenset({"Cat", "Stack"})
# What autograd calls the products of a layer's input with its weight; the slots that may hold the bias.
WEIGHTED = {"Convolution": 2, "Addmm": 0, "Addmv": 0, "Baddbmm": 0, "Addbmm": 0, "Linear": 2, "Mm": None, "Mv": None,
            "Bmm": None}  # fmt: skip
_SOFTMAX = frozenset({"Softmax", "SafeSoftmax"})
_RECTIFIERS = ("Relu", "Hard", "Sigmoid")


@dataclass
class Notes:
    """Functions of a tape, by what they turned out to be.

    Attributes:
        attentions: Softmaxes whose result weights values; a softmax over branches does not.
        attended: The products of such weights with the values.
        logits: What lies between q·k and the softmax: a table added there is a position bias, not an encoding.
        squeezes: The means over positions that gates are made of.
        gates: The products of a squeeze-excite, as far as the published code sees them.
    """

    attentions: set[int] = field(default_factory=set)
    attended: set[int] = field(default_factory=set)
    logits: set[int] = field(default_factory=set)
    squeezes: set[int] = field(default_factory=set)
    gates: set[int] = field(default_factory=set)


def annotate(tape: Tape) -> Notes:
    """Looks ahead through a tape."""
    notes = Notes()
    for index, function in enumerate(tape.functions):
        if function.op in _SOFTMAX and (product := _product_behind(tape, index)) is not None:
            notes.attentions.add(index)
            notes.attended.add(product)
            _mark_logits(tape, index, notes.logits)
    slots: dict[int, int] = {}
    for index, function in enumerate(tape.functions):
        if function.op == "Mul" and (found := _gate(tape, function, notes)):
            slots[index], squeezes = found
            notes.squeezes |= squeezes
    notes.gates = {index for index, slot in slots.items() if _is_seen(tape, index, slot, notes)}
    return notes


# ---- attention ------------------------------------------------------------------------------------------------------


def _product_behind(tape: Tape, softmax: int) -> int | None:
    """The matrix product that a softmax reaches, if it does."""
    reached, steps = [softmax], 0
    while reached and steps < 64:
        steps += 1
        for reader in tape.readers[reached.pop()]:
            op = tape.functions[reader].op
            if op in MATMULS:
                return reader
            if not op.startswith("Native"):
                reached.append(reader)
    return None


def _mark_logits(tape: Tape, softmax: int, logits: set[int]) -> None:
    reached = [softmax]
    while reached:
        index = reached.pop()
        function = tape.functions[index]
        sources = [source for source in function.inputs if source is not None]
        # A convolution from logits to logits mixes heads; they were added to before.
        mixes = function.op == "Convolution" and function.shape == tape.functions[sources[0]].shape
        if index not in logits and (mixes or function.op not in WEIGHTED):
            logits.add(index)
            reached.extend(sources)


# ---- squeeze-excite -------------------------------------------------------------------------------------------------


def averages_positions(function: Function) -> bool:
    """Whether a function averages over all positions of a feature map or token sequence, keeping channels apart."""
    if function.op.startswith("AdaptiveAvgPool"):
        return True
    if function.name != "MeanBackward1":
        return False
    dims, size = function.saved._saved_dim, function.saved._saved_self_sym_sizes
    if dims is None:
        return False
    return len(dims) > 1 or (len(size) == 3 and not function.saved._saved_keepdim)


def _is_squeeze(tape: Tape, index: int, notes: Notes) -> bool:
    """Whether a function makes one vector of all positions: their mean, or their sum weighted by attention."""
    function = tape.functions[index]
    return averages_positions(function) or (index in notes.attended and 1 in function.shape[-2:])


def _gate(tape: Tape, function: Function, notes: Notes) -> tuple[int, set[int]] | None:
    """Of a product with a factor that was averaged over the positions it now scales, that factor's slot and the means
    it is made of."""
    if len(function.inputs) != 2:
        return None
    first, second = function.inputs
    if first is None or second is None:
        return None
    sizes = _numel(tape.functions[first].shape), _numel(tape.functions[second].shape)
    if sizes[0] == sizes[1]:  # it was expanded to the features' size, or there is one position only
        slot = int(first < second)
        squeezes = _squeezes_between(tape, min(first, second), max(first, second), notes)
    else:
        slot = int(sizes[0] > sizes[1])
        squeezes = _squeezes_behind(tape, (first, second)[slot], max(sizes), notes)
    return (slot, squeezes) if squeezes else None


def _squeezes_behind(tape: Tape, gate: int, size: int, notes: Notes) -> set[int]:
    """What squeezes positions among the functions smaller than `size` that a gate is made of."""
    squeezes: set[int] = set()
    reached: list[int | None] = [gate]
    seen = set()
    while reached:
        index = reached.pop()
        if index is None or index in seen or _numel(tape.functions[index].shape) >= size:
            continue
        seen.add(index)
        if _is_squeeze(tape, index, notes):
            squeezes.add(index)
        else:
            reached.extend(tape.functions[index].inputs)
    return squeezes


def _squeezes_between(tape: Tape, features: int, gate: int, notes: Notes) -> set[int]:
    """What squeezes positions on each way from the features to a gate as large as they are; nothing if there is a way
    around."""
    whole: set[int | None] = {features}
    squeezed: set[int | None] = set()
    squeezes: set[int] = set()
    for index in range(features + 1, min(gate, features + 64) + 1):
        sources = tape.functions[index].inputs
        if whole.isdisjoint(sources):
            if not squeezed.isdisjoint(sources):
                squeezed.add(index)
        elif _is_squeeze(tape, index, notes):
            squeezed.add(index)
            squeezes.add(index)
        else:
            whole.add(index)
    return squeezes if gate in squeezed else set()


def _is_seen(tape: Tape, index: int, slot: int, notes: Notes) -> bool:
    """Whether the published code sees this gate, which its checkpoints were trained with.

    It recognises the product by what stands beside it in a traversal that starts at the output and goes into first
    factors first: a gate that is the first factor, features that come straight from a rectifier, or the last gate
    before the head's pooling. The rest are contracted.
    """
    features = tape.functions[index].inputs[1 - slot]
    assert features is not None
    if slot == 0 or tape.functions[features].op.startswith(_RECTIFIERS):
        return True
    for _ in range(3):
        readers = tape.readers[index]
        if len(readers) != 1:
            return False
        index = readers[0]
        if averages_positions(tape.functions[index]):
            return index not in notes.squeezes
        if tape.functions[index].op not in ("Add", "Relu"):
            return False
    return False


# ---- branches -------------------------------------------------------------------------------------------------------


def ends_branch(tape: Tape, index: int) -> bool:
    """Whether a product goes straight into a sum or concatenation, so that what it scales is a branch."""
    while len(tape.readers[index]) == 1:
        (index,) = tape.readers[index]
        function = tape.functions[index]
        if function.op == "Add":  # of a parameter: the scale and it are an affine layer
            return all(source is not None and tape.names[source] is None for source in function.inputs)
        if function.op in CONCATENATIONS:
            return True
        if sum(source is not None for source in function.inputs) > 1:
            return False
    readers = tape.readers[index]
    return bool(readers) and all(tape.functions[reader].op in CONCATENATIONS for reader in readers)


def _numel(shape: Size) -> int:
    return torch.Size(shape).numel()
