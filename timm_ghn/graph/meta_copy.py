"""A structural copy of a model on the meta device that shares no state with it.

Whatever its forward pass does to the copy or through it, stored features, counters, hooks, wrapped methods, is done to
copies. `copy.deepcopy` alone cannot give that: it takes functions as they are, with all that they close over, and stops
at locks, files, and tensors that have a gradient's history.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import TraceError

# What a class defines that has its own way of being copied.
_COPY_METHODS = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__")
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size})
T = TypeVar("T")
_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode whose tensors live on the meta device and take no memory.

    The original is only read: its device, mode, buffers and hooks stay as they are. Ties between parameters survive.
    Bound methods, functions and partials in attributes are rebound to the copy. Of the hooks only those are taken over
    that are a part of the model: a method of something the model holds, or one that makes a weight out of others.

    Raises:
        TraceError: If the model, or a module in it, is scripted, lazy, or has its own way of being copied that fails.
    """
    for name, module in model.named_modules():
        child = f"{type(model).__name__}.{name}" if name else "The model"
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(f"{child} is scripted: pass the eager model and script it after its prediction.")
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and nn.parameter.is_lazy(tensor):
                raise TraceError(f"{child} has no shape for its {key} yet: run the model once on a batch before.")
    try:
        return _Copier().model(model)
    except Exception as error:
        raise TraceError(f"{type(model).__name__} cannot be copied for tracing ({error}).") from error


class _Copier:
    """Copies whatever a model holds, each object once.

    Attributes:
        memo: The copies by the identity of their originals, as `copy.deepcopy` keeps it.
        modules: The originals of the modules among them.
    """

    def __init__(self) -> None:
        self.memo: dict[int, Any] = {}
        self.modules: list[nn.Module] = []
        self._alive: list[Any] = []  # an identity says something as long as its object lives

    def model(self, model: nn.Module) -> nn.Module:
        """The copy of a whole model."""
        modules = list(model.modules())
        for module in modules:  # blank twins first, so that whatever refers to a module finds its twin
            self.modules.append(module)
            if _is_plain(module):
                self._remember(module, type(module).__new__(type(module)))
        for module in reversed(modules):
            if id(module) in self.memo:
                self._fill(module)
        duplicate: nn.Module = self(model)
        for module in list(duplicate.modules()):
            if isinstance(module, nn.RNNBase):
                module.__class__ = _single_step_class(type(module))
        duplicate.eval()
        held = frozenset(self.memo)
        for module in self.modules:
            self._connect(module, held)
        return duplicate

    def __call__(self, value: Any) -> Any:
        """The copy of a value; the value itself where it cannot change or cannot be copied."""
        cls: Any = type(value)
        if cls in _ATOMS:
            return value
        if (known := self.memo.get(id(value))) is not None:
            return known
        if rule := _RULES.get(cls):
            return rule(self, value)
        if isinstance(value, torch.Tensor):
            return self._remember(value, _on_meta(value))
        if not _is_plain(value):
            return self._foreign(value)
        twin = self._remember(value, cls.__new__(cls))
        if isinstance(value, nn.Module):  # one in a list, say, that is not registered
            self.modules.append(value)
            self._fill(value)
        else:
            vars(twin).update((name, self(item)) for name, item in vars(value).items())
        return twin

    def _remember(self, value: Any, twin: T) -> T:
        self.memo[id(value)] = twin
        self._alive.append(value)
        return twin

    def _fill(self, module: nn.Module) -> None:
        """Gives a blank twin its attributes, all but the hooks."""
        attributes = vars(self.memo[id(module)])
        for name, value in vars(module).items():
            if name not in _HOOKS and name != "_compiled_call_impl":
                attributes[name] = self(value)

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        twin = self._remember(value, type(value)())
        twin.update((self(key), self(item)) for key, item in value.items())
        return twin

    def _list(self, value: list[Any]) -> list[Any]:
        twin: list[Any] = self._remember(value, [])
        twin.extend(self(item) for item in value)
        return twin

    def _immutable(self, value: Any) -> Any:
        return type(value)(self(item) for item in value)

    def _set(self, value: set[Any]) -> set[Any]:
        return self._remember(value, {self(item) for item in value})

    def _partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        twin = functools.partial(self(value.func), *self(value.args), **self(value.keywords))
        vars(twin).update(self(vars(value)))
        return twin

    def _builtin(self, value: Any) -> Any:
        owner = value.__self__
        return value if isinstance(owner, _CLASSES) else getattr(self(owner), value.__name__)

    def _reference(self, value: weakref.ref[Any]) -> weakref.ref[Any]:
        target = self.memo.get(id(value()))
        return value if target is None else weakref.ref(target)

    def _proxy(self, value: Any) -> Any:
        target = self.memo.get(id(value.__init__.__self__))
        return value if target is None else weakref.proxy(target)

    def _method(self, value: types.MethodType) -> types.MethodType:
        function = value.__func__
        is_defined = getattr(type(value.__self__), getattr(function, "__name__", ""), None) is function
        return types.MethodType(function if is_defined else self(function), self(value.__self__))

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        """A function over copies of what it closes over, and of what it finds in its module if that leads to the model
        or is a collection it may write to."""
        scope, closure = value.__globals__, value.__closure__ or ()
        names = {n for n in _global_names(value.__code__) if n in scope and self._concerns(scope[n], scope, set())}
        if not names and not closure and not self._concerns((value.__defaults__, value.__kwdefaults__), scope, set()):
            return self._remember(value, value)
        cells = tuple(types.CellType() for _ in closure)
        scope = {**scope} if names else scope
        twin = self._remember(value, types.FunctionType(value.__code__, scope, value.__name__, None, cells))
        scope.update((name, self(scope[name])) for name in names)
        for cell, original in zip(cells, closure, strict=True):
            if original != types.CellType():  # it may be empty
                cell.cell_contents = self(original.cell_contents)
        twin.__defaults__ = self(value.__defaults__)
        twin.__kwdefaults__ = self(value.__kwdefaults__)
        vars(twin).update(self(vars(value)))
        return twin

    def _concerns(self, value: Any, scope: dict[str, Any], seen: set[int]) -> bool:
        """Whether something that a function of this scope uses leads to what was copied, or is a collection that may be
        written to. Functions of other modules, libraries mostly, are not looked into."""
        if self.memo.get(id(value), value) is not value or isinstance(value, (dict, list, set)):
            return True
        inside: Iterable[Any] = ()
        if isinstance(value, tuple):
            inside = value
        elif isinstance(value, functools.partial):
            inside = (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, types.MethodType):
            inside = (value.__self__,)
        elif isinstance(value, types.FunctionType):
            cells = (cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType())
            own = _global_names(value.__code__) if value.__globals__ is scope else ()
            inside = (*cells, *(scope.get(name) for name in own))
        if id(value) in seen:
            return False
        seen.add(id(value))
        return any(self._concerns(item, scope, seen) for item in inside)

    def _foreign(self, value: Any) -> Any:
        """What has its own way of being copied. What cannot be, such as a lock or a file, stays what it is."""
        try:
            with _TensorsOnMeta(self):
                return self._remember(value, copy.deepcopy(value, self.memo))
        except Exception:
            if isinstance(value, nn.Module):
                raise
            return self._remember(value, value)

    def _connect(self, module: nn.Module, held: frozenset[int]) -> None:
        """Makes calls of a twin go straight to its forward method, past all hooks but those that are a part of it."""
        twin = self(module)
        vars(twin).update({name: OrderedDict() for name in _HOOKS}, training=False)
        has_tensors = any(isinstance(value, torch.Tensor) for value in vars(twin).values())
        before, after = [], []
        for key, hook in module._forward_pre_hooks.items():
            with_kwargs = key in module._forward_pre_hooks_with_kwargs
            if _owner(hook) in held or (has_tensors and _makes_weights(self(hook), twin, with_kwargs)):
                before.append((self(hook), with_kwargs))
        for key, hook in module._forward_hooks.items():
            if _owner(hook) in held:
                after.append((self(hook), key in module._forward_hooks_with_kwargs))
        call = functools.partial(_call, twin, before, after) if before or after else twin.forward
        vars(twin)["_compiled_call_impl"] = call  # what `nn.Module.__call__` takes instead of its way through the hooks


_CLASSES = (type, types.ModuleType, type(None))  # what a builtin function can belong to without being a method
_RULES: dict[Any, Callable[[_Copier, Any], Any]] = {
    dict: _Copier._dict, OrderedDict: _Copier._dict, list: _Copier._list, set: _Copier._set,
    tuple: _Copier._immutable, frozenset: _Copier._immutable, functools.partial: _Copier._partial,
    types.FunctionType: _Copier._function, types.MethodType: _Copier._method,
    types.BuiltinFunctionType: _Copier._builtin, weakref.ref: _Copier._reference,
    weakref.ProxyType: _Copier._proxy, weakref.CallableProxyType: _Copier._proxy,
}  # fmt: skip


class _TensorsOnMeta(TorchFunctionMode):
    """Lets `copy.deepcopy` take the copier's way with tensors."""

    def __init__(self, copier: _Copier):
        super().__init__()
        self.copier = copier

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return self.copier(args[0])
        if func is torch.Tensor.clone:  # how a parameter copies itself
            return _on_meta(args[0])
        return func(*args, **(kwargs or {}))


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(torch.empty(tensor.shape, device="meta"))
    # As the parameters: in a model of another precision, both have to fit each other.
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, device="meta", dtype=dtype)


def _is_plain(value: Any) -> bool:
    """Whether an object is no more than its attributes."""
    cls = type(value)
    if isinstance(value, nn.Module) and nn.utils.parametrize.is_parametrized(value):
        return True  # its class says how to copy it, for pickle and in that very way
    base = nn.Module if isinstance(value, nn.Module) else object
    own = any(getattr(cls, name, None) is not getattr(base, name, None) for name in _COPY_METHODS)
    slots = any(vars(b).get("__slots__") for b in cls.__mro__)
    new: object = cls.__new__
    return not own and not slots and new is object.__new__ and hasattr(value, "__dict__")


def _global_names(code: types.CodeType) -> Iterator[str]:
    """The names that a function and those defined in it look up in their module, and some more."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _owner(hook: Any) -> int:
    """The identity of what a hook is a method of."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return id(getattr(hook, "__self__", hook))


def _makes_weights(hook: Callable[..., Any], module: nn.Module, with_kwargs: bool) -> bool:
    """Whether a hook remakes a tensor of its module, called without an input, as the norms of weights and masks do."""
    before = dict(vars(module))
    try:
        hook(module, (), {}) if with_kwargs else hook(module, ())
    except Exception:
        return False
    after = vars(module)
    return any(isinstance(old, torch.Tensor) and after.get(name) is not old for name, old in before.items())


def _call(module: nn.Module, before: Iterable[Any], after: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
    """``module(*args, **kwargs)`` with the hooks that were taken over."""
    for hook, with_kwargs in before:
        changed = hook(module, args, kwargs) if with_kwargs else hook(module, args)
        if with_kwargs and changed is not None:
            args, kwargs = changed
        elif changed is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    result = module.forward(*args, **kwargs)
    for hook, with_kwargs in after:
        try:
            changed = hook(module, args, kwargs, result) if with_kwargs else hook(module, args, result)
        except Exception:  # it looks at values; a hook that the forward pass needs would be missed
            continue
        result = result if changed is None else changed
    return result


def _single_step_class(rnn_class: type[nn.RNNBase]) -> type[nn.RNNBase]:
    """A subclass of an RNN that reads each weight once, instead of once a time step.

    Unrolled over the sequence the same few weights would come back at every step, with sums between them; for the graph
    a recurrence is one step: input weight, its bias, hidden weight, its bias.
    """

    def forward(self: Any, x: torch.Tensor, hidden: Any = None) -> tuple[torch.Tensor, None]:
        for layer in range(self.num_layers):
            outputs = []
            for suffix in ("", "_reverse")[: 2 if self.bidirectional else 1]:
                state = x
                for kind in ("ih", "hh"):
                    weight = getattr(self, f"weight_{kind}_l{layer}{suffix}")
                    bias = getattr(self, f"bias_{kind}_l{layer}{suffix}") if self.bias else None
                    state = nn.functional.linear(state, weight, bias)[..., : self.hidden_size]
                outputs.append(state)
            x = torch.cat(outputs, dim=-1)
        return x, None

    return type(rnn_class.__name__, (rnn_class,), {"forward": forward})
