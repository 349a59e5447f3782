"""A pickle read as data: its opcodes, interpreted by a machine that knows what a state dict is made of and no more.

Python's unpickler calls whatever a file names. Torch's ``weights_only`` one does not, but its list of names includes
``bytearray``, with which 350 bytes take any amount of memory, and tuples nested a million deep as a dictionary's key
overflow the stack of the process. So here a file's names are looked up in a table of this package's own functions, keys
are strings, and there is a limit to everything.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

# The largest published checkpoint, 654 million parameters in 317 tensors, takes about 13,000.
MAX_OPCODES = 100_000


class Stream(Protocol):
    """Where opcodes come from. Both methods raise ValueError rather than return less than was asked for."""

    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


class Bytes:
    """A byte string on the stack, gone once it was used: memos would keep a second copy of every tensor alive."""

    def __init__(self, data: bytes):
        self._data: bytes | None = data

    def take(self) -> bytes:
        data, self._data = self._data, None
        if data is None:
            raise ValueError("the same bytes serve as two storages")
        return data


class Buildable:
    """An object whose state follows in the stream."""

    def build(self, state: Any, stream: Stream) -> Any:
        """Takes the state and returns what replaces the object."""
        raise NotImplementedError


class StateDict(dict[str, Any], Buildable):
    """What the files call OrderedDict, made empty; its attributes (torch's ``_metadata``) are dropped."""

    def __init__(self) -> None:
        super().__init__()

    def build(self, state: Any, stream: Stream) -> StateDict:
        return self


def run(
    stream: Stream, names: Mapping[str, Any], storage: Callable[[torch.dtype, str, int], torch.Tensor] | None = None
) -> Any:
    """Interprets one pickle and returns the object it describes.

    Args:
        stream: Left right behind the pickle.
        names: What each name that the pickle may use stands for. Only what is in here can be called.
        storage: Gives the storage, as a flat tensor, for torch's persistent ids: dtype, key, number of elements.

    Raises:
        ValueError: If the pickle uses anything else. Other exceptions mean that it is malformed.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int | None = None) -> list[Any]:
        """The last `count` objects, or all since the last mark."""
        start = marks.pop() if count is None else len(stack) - count
        if start < 0:
            raise IndexError
        items = stack[start:]
        del stack[start:]
        return items

    arg: Any
    for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
        if count == MAX_OPCODES:
            raise ValueError("its pickle is longer than any checkpoint's")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(arg)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(arg)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(Bytes(arg))
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop({"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}[opcode.name])))
            case "TUPLE":
                stack.append(tuple(pop()))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND" | "APPENDS":
                items = pop(1 if opcode.name == "APPEND" else None)
                of(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = pop(2 if opcode.name == "SETITEM" else None)
                # Only keys that hash in constant time: numbers are the optimiser's parameters.
                keys = [of((str, int), key) for key in items[::2]]
                of(dict, stack[-1]).update(zip(keys, items[1::2], strict=True))
            case "GLOBAL" | "STACK_GLOBAL":
                module, name = arg.split(" ", 1) if opcode.name == "GLOBAL" else (of(str, part) for part in pop(2))
                if f"{module}.{name}" not in names:
                    raise ValueError(f"it names {module}.{name}, which no checkpoint needs")
                stack.append(names[f"{module}.{name}"])
            case "REDUCE" | "NEWOBJ":
                function, args = pop(2)
                stack.append(function(*of(tuple, args)))
            case "BUILD":
                target, state = pop(2)
                stack.append(of(Buildable, target).build(state, stream))
            case "BINPERSID":
                kind, dtype, key, _location, size, *view = of(tuple, stack.pop())
                if storage is None or kind != "storage" or view not in ([], [None]):
                    raise ValueError("it refers to something outside its pickle that is not a storage")
                stack.append(storage(of(torch.dtype, dtype), of(str, key), natural(size)))
            case _:
                raise ValueError(f"its pickle uses {opcode.name}, which no checkpoint needs")
    raise EOFError


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """A tensor as a view of a flat storage, which it must not exceed; gradients and hooks are ignored."""
    flat = of(torch.Tensor, storage)
    size = [natural(n) for n in of(tuple, size)]
    stride = [natural(n) for n in of(tuple, stride)]
    last = natural(offset) + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if flat.ndim != 1 or len(size) > 8:
        raise ValueError("a tensor has more dimensions than any parameter")
    if math.prod(size) > len(flat) or not 0 <= last < len(flat):
        raise ValueError(f"a tensor of size {tuple(size)} does not lie within its storage of {len(flat)} elements")
    tensor: torch.Tensor = flat.as_strided(size, stride, offset)
    return tensor


def natural(value: Any) -> int:
    """A non-negative integer of at most 63 bits."""
    if not 0 <= of(int, value) < 1 << 63:
        raise ValueError(f"it has a size of {value}")
    return int(value)


def of(kind: Any, value: Any) -> Any:
    """The value, which must be of a kind: one nested deeply enough kills whoever hashes, compares or prints it."""
    if not isinstance(value, kind):
        raise TypeError
    return value
