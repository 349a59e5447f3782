"""Networks with tiled parameters, computed without the copies.

A GHN predicts at most `max_shape` of a kernel; a wider layer repeats that tile along its channels. Then its output
channels repeat as well, and so do those of every norm, activation and layer behind it: a network of 512 channels, made
of tiles of 64, computes each number eight times. Here it is computed once. A `Folded` tensor holds the part of which
the whole is made of copies, and the functions that networks consist of work on that part. It is exact, and its
derivatives are: a sum over eight equal terms becomes a product with eight.

What a function does not know how to do on a part, it does on the whole. What changes a tensor in place changes that
tensor, not other views of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ghn.tiling import tile
from timm_ghn.training import depthwise

Size = Sequence[int]


class Folded(Tensor):
    """A tensor of copies: element i along a dimension is element i mod n of `part`, which has n there.

    It looks like the whole to those who ask for its shape, dtype or device, and has no memory for it.
    """

    part: Tensor

    @staticmethod
    def __new__(cls, part: Tensor, shape: Size) -> Folded:
        whole = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=part.dtype, device=part.device)
        whole.part = part
        return whole

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Folded({list(self.part.shape)} of {list(self.shape)})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        changed = args[0] if kwargs.get("inplace") or _is_in_place(func) else None
        result = NotImplemented
        if func in _HANDLERS and (changed is None or isinstance(changed, Folded)):
            result = _HANDLERS[func](func, *args, **kwargs)
        if result is NotImplemented:
            args = torch.utils._pytree.tree_map_only(Folded, unfold, args)
            kwargs = torch.utils._pytree.tree_map_only(Folded, unfold, kwargs)
            result = func(*args, **kwargs)
            if func is Tensor.__setitem__:
                result = args[0]
        if isinstance(changed, Folded):
            changed.part = _part(result).to(changed.dtype)
            return changed
        return result

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        raise RuntimeError(f"{func} got a folded tensor, which has no memory of its own.")


def fold(part: Tensor, shape: Size) -> Tensor:
    """The tensor of a shape that is made of copies of `part`; `part` itself if there is nothing to copy."""
    part = part.view((*part.shape, *(1,) * (len(shape) - part.ndim)))  # dimensions that it lacks at the end, as `tile`
    return part if part.shape == tuple(shape) else Folded(part, shape)


def fold_constant(x: Tensor) -> Tensor:
    """The same tensor, made of copies of its first element if all are equal."""
    first = x.flatten()[:1].view([1] * x.ndim)
    return fold(first, x.shape) if x.is_floating_point() and x.numel() and bool((x == first).all()) else x


def unfold(x: Tensor) -> Tensor:
    """The whole, as an ordinary tensor."""
    return tile(x.part, x.shape) if isinstance(x, Folded) else x


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return func in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _part(x: Any) -> Any:
    return x.part if isinstance(x, Folded) else x


def folded_dims(x: Tensor) -> list[int]:
    """Along which a tensor is made of copies."""
    return [dim for dim, (have, whole) in enumerate(zip(_part(x).shape, x.shape, strict=True)) if have != whole]


def _copies(whole: int, part: Tensor, dim: int) -> Tensor | int:
    """How often each element of a part along a dimension occurs in the whole, to be multiplied with the part."""
    have = part.shape[dim]
    times, rest = divmod(whole, have)
    if not rest:
        return times
    counts = part.new_full((have,), times)
    counts[:rest] += 1
    return counts.view([-1 if d == dim % part.ndim else 1 for d in range(part.ndim)])


def _contract(x: Tensor, weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Parts of an input and a weight [out, in, …] of a layer that sums over the input's dimension `dim`."""
    whole, x_part, w_part = weight.shape[1], _part(x), _part(weight)
    have, width = x_part.shape[dim], w_part.shape[1]
    if have > width and whole % have == 0 and have % width == 0:
        # Channels that meet copies of the same weights, as behind an attention, are added up first.
        x_part = x_part.unflatten(dim, (-1, width)).sum(dim)
        return x_part, w_part if have == whole else w_part * (whole // have)
    if have != width:
        # Copies that do not coincide: only the output can be folded.
        return unfold(x), tile(w_part, (w_part.shape[0], *weight.shape[1:]))
    if width != whole:
        w_part = w_part * _copies(whole, w_part, 1)
    return x_part, w_part


def _bias(bias: Tensor | None, out: int) -> Tensor | None:
    """The part of a bias that belongs to `out` output channels."""
    part = _part(bias)
    # Both are made of copies of the first `out`, if the bias is made of copies of no more than these.
    return None if part is None else tile(part, (out,))


def _conv2d(
    func: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    positions = [dim for dim in folded_dims(x) if dim != 1] + [dim for dim in folded_dims(weight) if dim > 1]
    if positions or not _bias_fits(bias, weight):
        return NotImplemented
    channels = weight.shape[0]
    if groups == 1:
        x, w = _contract(x, weight, 1)
    else:
        # As long as the copies hold whole groups, each copy of a group reads copies of the same channels.
        w, width = _part(weight), weight.shape[1]
        if w.shape[0] != _part(x).shape[1] or x.shape[1] != channels or w.shape[0] % width or w.shape[1] != width:
            return NotImplemented
        x, groups = _part(x), w.shape[0] // width
    y = depthwise.conv2d(x, w, _bias(bias, w.shape[0]), stride, padding, dilation, groups)
    return fold(y, (y.shape[0], channels, *y.shape[2:]))


def _linear(func: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if any(dim != x.ndim - 1 for dim in folded_dims(x)) or not _bias_fits(bias, weight):
        return NotImplemented
    x, w = _contract(x, weight, x.ndim - 1)
    y = func(x, w, _bias(bias, w.shape[0]))
    return fold(y, (*y.shape[:-1], weight.shape[0]))


def _bias_fits(bias: Tensor | None, weight: Tensor) -> bool:
    """Whether output channels that are copies of each other get the same bias."""
    if bias is None or _part(weight).shape[0] == weight.shape[0]:
        return True
    fits: bool = _part(weight).shape[0] % _part(bias).shape[0] == 0
    return fits


def _batch_norm(
    func: Callable[..., Tensor], x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    channels = _part(x).shape[1]
    vectors = [_part(vector) for vector in (mean, var, weight, bias)]
    if folded_dims(x) != [1] or any(v is not None and v.shape[0] != channels for v in vectors):
        return NotImplemented
    return fold(func(_part(x), *vectors, *args, **kwargs), x.shape)


def _layer_norm(
    func: Callable[..., Tensor], x: Tensor, shape: Size, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    if len(shape) != 1:
        return NotImplemented
    return _norm_over_channels(
        x, x.ndim - 1, weight, bias, lambda part, w, b: func(part, part.shape[-1:], w, b, eps), eps
    )


def _group_norm(
    func: Callable[..., Tensor], x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    if groups == 1:
        return _norm_over_channels(x, 1, weight, bias, lambda part, w, b: func(part, 1, w, b, eps), eps)
    part, width = _part(x), x.shape[1] // groups
    vectors = [_part(vector) for vector in (weight, bias)]
    if folded_dims(x) != [1] or any(v is not None and v.shape[0] != part.shape[1] for v in vectors):
        return NotImplemented
    if part.shape[1] % width:  # a copy that does not hold whole groups
        return NotImplemented
    return fold(func(part, part.shape[1] // width, *vectors, eps), x.shape)


def _norm_over_channels(
    x: Tensor, dim: int, weight: Tensor | None, bias: Tensor | None, norm: Callable[..., Tensor], eps: float
) -> Any:
    """A norm whose statistics reach over channels, some of which may occur more often than others."""
    if folded_dims(x) != [dim]:
        return NotImplemented
    part = _part(x)
    w, b = _part(weight), _part(bias)
    if any(vector is not None and vector.shape[0] != part.shape[dim] for vector in (w, b)):
        return NotImplemented
    if x.shape[dim] % part.shape[dim] == 0:
        return fold(norm(part, w, b), x.shape)
    dims = list(range(1, x.ndim)) if dim == 1 else [dim]
    precise = part.to(torch.promote_types(part.dtype, torch.float32))
    share = _copies(x.shape[dim], precise, dim) / torch.Size(x.shape[d] for d in dims).numel()
    centred = precise - (precise * share).sum(dims, keepdim=True)
    y = centred * ((centred.square() * share).sum(dims, keepdim=True) + eps).rsqrt()
    shape = [-1 if d == dim else 1 for d in range(x.ndim)]
    if w is not None:
        y = y * w.view(shape)
    if b is not None:
        y = y + b.view(shape)
    return fold(y.to(part.dtype), x.shape)


def _elementwise(func: Callable[..., Tensor], x: Folded, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(arg, Tensor) for arg in (*args, *kwargs.values())):
        return NotImplemented
    kwargs.pop("inplace", None)  # the whole is not there to be changed
    y = func(x.part, *args, **kwargs)
    return fold(y, x.shape)


def _dropout(
    func: Callable[..., Tensor], x: Folded, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    return NotImplemented if training and p > 0 else x  # each copy would be dropped on its own


def _binary(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """An elementwise function of two, given in its form that changes neither."""

    def handle(func: Callable[..., Tensor], x: Any, y: Any, **kwargs: Any) -> Any:
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            shape = x.shape if isinstance(x, Tensor) else y.shape
            return fold(function(_part(x), _part(y), **kwargs), shape)
        sizes = [tuple(zip(_part(z).shape, z.shape, strict=True)) for z in (x, y)]
        width = max(map(len, sizes))
        sizes = [((1, 1),) * (width - len(size)) + size for size in sizes]
        if any(a != b and 1 not in (a[0], b[0]) for a, b in zip(*sizes, strict=True)):
            return NotImplemented
        return fold(function(_part(x), _part(y), **kwargs), torch.broadcast_shapes(x.shape, y.shape))

    return handle


def _addcmul(func: Callable[..., Tensor], x: Tensor, y: Tensor, z: Tensor, *, value: float = 1) -> Tensor:
    return x + value * (y * z)


def _over_positions(func: Callable[..., Tensor], x: Folded, *args: Any, **kwargs: Any) -> Any:
    """Pooling, padding, resizing: what treats each channel of [n, channels, h, w] alike."""
    if folded_dims(x) != [1] or x.ndim != 4:
        return NotImplemented
    y = func(x.part, *args, **kwargs)
    return fold(y, (y.shape[0], x.shape[1], *y.shape[2:])) if isinstance(y, Tensor) else NotImplemented


def _pad(func: Callable[..., Tensor], x: Folded, pad: Size, *args: Any, **kwargs: Any) -> Any:
    return _over_positions(func, x, pad, *args, **kwargs) if len(pad) <= 4 else NotImplemented


def _mean(func: Callable[..., Tensor], x: Folded, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    if dim is None or dim == () or dim == []:
        return NotImplemented
    dims, shape = _reduction(x, dim, keepdim)
    part = x.part
    for d in dims.intersection(folded_dims(x)):
        part = part * (_copies(x.shape[d], part, d) * (part.shape[d] / x.shape[d]))
    return fold(func(part, tuple(dims), keepdim=keepdim, **kwargs), shape)


def _norm(
    func: Callable[..., Tensor], x: Folded, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Any:
    if p not in (2, "fro") or dim is None or dtype is not None:
        return NotImplemented
    dims, shape = _reduction(x, dim, keepdim)
    part = x.part
    for d in dims.intersection(folded_dims(x)):
        part = part * _copies(x.shape[d], part, d) ** 0.5
    return fold(func(part, p, tuple(dims), keepdim), shape)


def _reduction(x: Folded, dim: int | Size, keepdim: bool) -> tuple[set[int], list[int]]:
    """Dimensions that a function reduces, and the shape that the whole has then."""
    dims = {d % x.ndim for d in ((dim,) if isinstance(dim, int) else dim)}
    return dims, [1 if d in dims else size for d, size in enumerate(x.shape) if d not in dims or keepdim]


def _view(func: Callable[..., Tensor], x: Folded, *shape: Any) -> Any:
    """Of a vector, to be broadcast along other dimensions."""
    sizes = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
    long = [d for d, size in enumerate(sizes) if size != 1]
    if x.ndim != 1 or len(long) != 1:
        return NotImplemented
    return fold(x.part.view([-1 if d in long else 1 for d in range(len(sizes))]), [
        x.shape[0] if d in long else 1 for d in range(len(sizes))
    ])  # fmt: skip


def _flatten(func: Callable[..., Tensor], x: Folded, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % x.ndim, end_dim % x.ndim
    merged = range(start, end + 1)
    if any(dim in merged for dim in folded_dims(x)) and sum(x.shape[dim] > 1 for dim in merged) > 1:
        return NotImplemented
    return fold(x.part.flatten(start, end), (*x.shape[:start], x.shape[start : end + 1].numel(), *x.shape[end + 1 :]))


def _permute(func: Callable[..., Tensor], x: Folded, *dims: Any) -> Any:
    order = dims if isinstance(dims[0], int) else dims[0]
    return fold(x.part.permute(order), [x.shape[d] for d in order])


def _transpose(func: Callable[..., Tensor], x: Folded, dim0: int, dim1: int) -> Any:
    order = list(range(x.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(func, x, order)


_METADATA = frozenset(
    {
        getattr(Tensor, name).__get__
        for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_meta", "layout")
    }
    | {getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "element_size", "__len__")}
)

_IN_PLACE = frozenset(
    (
        Tensor.__iadd__, Tensor.__imul__, Tensor.__isub__, Tensor.__itruediv__, Tensor.__ipow__, Tensor.__setitem__,
    )
)  # fmt: skip

_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.conv2d: _conv2d, F.linear: _linear, F.batch_norm: _batch_norm, F.layer_norm: _layer_norm,
    F.group_norm: _group_norm, F.dropout: _dropout, F.pad: _pad, torch.addcmul: _addcmul, Tensor.norm: _norm,
    torch.mean: _mean, Tensor.mean: _mean, torch.flatten: _flatten, Tensor.flatten: _flatten,
    torch.permute: _permute, Tensor.permute: _permute, torch.transpose: _transpose, Tensor.transpose: _transpose,
    Tensor.view: _view, Tensor.reshape: _view,
}  # fmt: skip
_HANDLERS |= dict.fromkeys(
    (
        F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.selu, F.celu, F.silu, F.mish, F.gelu, F.softplus,
        F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh, torch.relu, torch.sigmoid, torch.tanh, torch.clamp,
        Tensor.relu, Tensor.sigmoid, Tensor.tanh, Tensor.clamp, Tensor.contiguous, Tensor.to, Tensor.float,
        Tensor.bfloat16, Tensor.type_as, Tensor.clone, Tensor.square, torch.square, Tensor.pow, Tensor.__pow__,
        torch.pow,
    ),
    _elementwise,
)  # fmt: skip
_HANDLERS |= dict.fromkeys(
    (F.avg_pool2d, F.max_pool2d, torch.max_pool2d, F.adaptive_avg_pool2d, F.interpolate), _over_positions
)
for _function, _forms in (
    (torch.add, (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_)),
    (torch.mul, (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__, Tensor.mul_)),
    (torch.sub, (torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__isub__)),
    (torch.div, (torch.div, Tensor.div, Tensor.__truediv__)),
):
    _HANDLERS |= dict.fromkeys(_forms, _binary(_function))
