"""All that decides what a forward pass does, as one hash: the key under which a model's graph is kept.

Read are the built model (its modules, their plain attributes, hooks and the shapes of their tensors, so that whatever
was set while it was built shows in what came of it) and the code it runs: every function of its classes or of its
attributes, and what that code looks up by name in turn, down to the standard library and torch. Those two count by
name, together with torch's version, apart from functions that somebody else has put into them. The values of tensors
do not matter, since a trace does not see them.

Where in doubt there is no fingerprint: an object whose state cannot be read, a lock say, might decide anything.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_PLAIN = frozenset({
    bool, int, float, complex, str, bytes, type(None), type(...), range, slice, torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.Size,
})  # fmt: skip
_OF_EVERY_MODULE = vars(nn.Module()).keys()
# Namespaces of torch in which people put functions of their own.
_TORCH = (torch, torch.nn.functional, torch.Tensor, nn.Module)
_BY_NAME = frozenset({*sys.stdlib_module_names, "torch", "numpy"})
# Of a class, what Python keeps there for itself, some of it only from a first use on.
_NOT_CODE = frozenset({
    "__dict__", "__weakref__", "__doc__", "__annotations__", "__annotate__", "__annotate_func__", "__module__",
    "__qualname__", "__firstlineno__", "__static_attributes__", "__slotnames__", "__abstractmethods__", "_abc_impl",
})  # fmt: skip
_COMPILED = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType,
    types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip
_WRAPPERS = (staticmethod, classmethod, functools.cached_property, functools.partialmethod)


class _UnknownError(Exception):
    """A value that cannot be described."""


def fingerprint(model: nn.Module) -> str | None:
    """A hash that two models share, in any process, only if one trace serves both; None if that cannot be known."""
    try:
        description = _Description([*_TORCH, model])
    except _UnknownError as error:
        logging.getLogger("timm_ghn.graph").debug("%s has no fingerprint: %s", type(model).__name__, error)
        return None
    return hashlib.sha256("\n".join([torch.__version__, *description.lines]).encode()).hexdigest()


class _Description:
    """Values in words; each that others refer to has one line, in the order in which they are met."""

    def __init__(self, roots: list[Any]):
        self.lines: list[str] = []
        self._numbers: dict[int, int] = {}
        self._met: list[Any] = []  # holds on to them, so that no other gets an id of theirs
        for root in roots:
            self._number(root)
        for value in self._met:  # grows meanwhile
            self.lines.append(" ".join(self._words(value)))

    def _number(self, value: Any) -> str:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._met)
            self._met.append(value)
        return f"#{self._numbers[id(value)]}"

    def _word(self, value: Any, depth: int = 0) -> str:
        kind = type(value)
        if kind in _PLAIN:
            return repr(value)
        if depth > 20:
            raise _UnknownError("containers are nested too deeply")
        if isinstance(value, nn.Module):
            return self._number(value)
        if isinstance(value, dict):
            items = [f"{self._word(k, depth + 1)}:{self._word(v, depth + 1)}" for k, v in value.items()]
            return f"{{{','.join(items)}}}"
        if isinstance(value, torch.Tensor):
            return f"tensor{tuple(value.shape)}{value.requires_grad:d}{value.is_floating_point():d}"
        if kind in (list, tuple):
            return f"{kind.__name__}({','.join([self._word(item, depth + 1) for item in value])})"
        if kind in (set, frozenset):
            return f"set({','.join(sorted(self._word(item, depth + 1) for item in value))})"
        if isinstance(value, (types.ModuleType, logging.Logger)):
            return f"{kind.__name__} {getattr(value, '__name__', '')}"
        if isinstance(value, enum.Enum):
            return f"{kind.__module__}.{value}"
        return self._number(value)

    def _words(self, value: Any) -> Iterator[str]:
        if value in _TORCH if isinstance(value, (type, types.ModuleType)) else False:
            yield from self._foreign(value)
        elif isinstance(value, type):
            yield from self._class(value)
        elif isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, types.MethodType):
            yield from (self._word(value.__func__), self._word(value.__self__))
        elif isinstance(value, functools.partial):
            yield from map(self._word, ("partial", value.func, value.args, value.keywords))
        elif isinstance(value, property):
            yield from map(self._word, (value.fget, value.fset))
        elif isinstance(value, _WRAPPERS) or hasattr(value, "__wrapped__"):
            yield type(value).__name__
            yield self._word(getattr(value, "__wrapped__", None) or getattr(value, "func", None))
        elif isinstance(value, weakref.ref):
            yield self._word(value())
        elif isinstance(value, _COMPILED):
            yield f"{value.__module__ if hasattr(value, '__module__') else ''}.{value.__qualname__}"
        elif isinstance(value, torch.jit.ScriptFunction):
            yield str(value.code)
        elif isinstance(getattr(value, "__dict__", None), dict):
            yield self._word(type(value))
            for name, item in vars(value).items():
                if name not in _OF_EVERY_MODULE or item:  # most of what modules consist of are empty dictionaries
                    yield f"{name}={self._word(item)}"
        else:
            text = repr(value)  # built-in functions and descriptors, compiled patterns, …
            if " at 0x" in text:
                raise _UnknownError(f"{text} cannot be read")
            yield text

    def _class(self, cls: type) -> Iterator[str]:
        yield f"class {cls.__module__}.{cls.__qualname__}"
        if _by_name(cls.__module__):
            if issubclass(cls, nn.Module):
                yield from self._foreign(cls)
            return
        yield from map(self._word, cls.__bases__)
        for name, member in vars(cls).items():
            # How a module was built shows in what it is.
            if name not in _NOT_CODE and not (name == "__init__" and issubclass(cls, nn.Module)):
                yield f"{name}={self._word(member)}"

    def _foreign(self, namespace: Any) -> Iterator[str]:
        """The functions in a namespace of torch's that are not its own."""
        for name, member in vars(namespace).items():
            if isinstance(member, types.FunctionType) and not _by_name(member.__globals__.get("__name__")):
                yield f"{name}={self._word(member)}"

    def _function(self, function: types.FunctionType) -> Iterator[str]:
        module = function.__globals__.get("__name__")
        yield f"def {module}.{function.__qualname__}"
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:  # not assigned yet
                cells.append(None)
        if _by_name(module):
            # A decorator's inner function: what it decorates counts.
            yield from (self._word(value) for value in (*cells, *vars(function).values()) if callable(value))
            return
        yield from map(self._word, (function.__defaults__, function.__kwdefaults__, vars(function), cells))
        names: dict[str, None] = {}
        for code in _nested(function.__code__):
            constants = [self._word(value) for value in code.co_consts if not isinstance(value, types.CodeType)]
            yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars} {constants}"
            names.update(dict.fromkeys(code.co_names))
        spaces = [function.__globals__]
        seen = set()
        for space in spaces:  # grows by the modules that are met
            for name in names:
                if name in space:
                    found = space[name]
                    yield f"{name}={self._word(found)}"
                    if isinstance(found, types.ModuleType) and id(found) not in seen:
                        seen.add(id(found))
                        spaces.append(vars(found))


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _by_name(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _BY_NAME
