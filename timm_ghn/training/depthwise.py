"""Derivatives of depthwise convolutions on a CPU, from what oneDNN is fast at.

Forward, oneDNN is fast at all of them. Derivatives of kernels that are dilated, and the weight's of kernels wider than
three, take it many times as long as the convolution. Here the input's is a convolution with the flipped kernel, and the
weight's is put together from strips of the kernel that are three wide, over images that are taken apart where the
kernel is dilated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

Pair = tuple[int, int]

_STRIP = 3  # columns of a kernel


class FastDepthwise(TorchFunctionMode):
    """While it is active, `torch.nn.functional.conv2d` is `conv2d` of this module."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return (conv2d if func is F.conv2d and not types else func)(*args, **(kwargs or {}))


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.conv2d`, with derivatives that a CPU is fast at."""
    far = _pair(dilation)
    pads = _pads(padding, weight, far)
    if groups == 1 or pads is None or not _is_depthwise(x, weight, groups):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    steps = _pair(stride)
    (rows, columns), pads = reaching_taps(x.shape[2:], weight.shape[2:], steps, pads, far)
    weight = weight[..., rows, columns]
    far = (far[0] if weight.shape[2] > 1 else 1, far[1] if weight.shape[3] > 1 else 1)
    if max(steps) > 1 and max(far) > 1 and not any(step % d for step, d in zip(steps, far, strict=True)):
        x = F.pad(x, (pads[1], pads[1], pads[0], pads[0]))[..., :: far[0], :: far[1]]  # what is read of it
        steps, pads, far = (steps[0] // far[0], steps[1] // far[1]), (0, 0), (1, 1)
    if not _is_slow(weight, steps, pads, far):
        return F.conv2d(x, weight, bias, steps, pads, far, groups)
    y: Tensor = _Depthwise.apply(x, weight, steps, pads, far)
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def reaching_taps(
    size: Sequence[int], kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair
) -> tuple[tuple[slice, slice], Pair]:
    """Rows and columns of a kernel that meet the map and not only the padding, and the padding for these alone."""
    rows, columns = map(_taps, size, kernel, stride, padding, dilation)
    return (rows, columns), (padding[0] - dilation[0] * rows.start, padding[1] - dilation[1] * columns.start)


def _is_depthwise(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether there are derivatives to compute of a depthwise convolution, on a CPU and not in half precision."""
    if not (torch.is_grad_enabled() and weight.requires_grad) or torch.is_autocast_enabled("cpu"):
        return False
    plain = x.ndim == 4 and x.device.type == "cpu" and x.dtype == weight.dtype in (torch.float32, torch.float64)
    return plain and groups == x.shape[1] == weight.shape[0]


def _pads(padding: Any, weight: Tensor, far: Pair) -> Pair | None:
    """Rows and columns that are added at each end; None if they are not the same at both, or in other words."""
    if not isinstance(padding, str):
        return _pair(padding)
    around = [d * (size - 1) for d, size in zip(far, weight.shape[2:], strict=False)]
    return (around[0] // 2, around[1] // 2) if padding == "same" and not any(size % 2 for size in around) else None


def _taps(positions: int, taps: int, step: int, pad: int, far: int) -> slice:
    """Those that meet the map along one dimension, with as many left out at both ends."""
    last = (positions + 2 * pad - far * (taps - 1) - 1) // step * step - pad  # where the kernel begins, at most
    outside = max(0, min(-(last // far), taps - 1 - (positions - 1 + pad) // far, pad // far))
    return slice(outside, taps - outside)


def _is_slow(weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> bool:
    """Whether oneDNN is slow at derivatives, and `_Depthwise` can compute them."""
    if any(pad > d * (size - 1) for size, pad, d in zip(weight.shape[2:], padding, dilation, strict=True)):
        return False
    return max(stride) == 1 if max(dilation) > 1 else weight.shape[3] > _STRIP


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, dilation
        return F.conv2d(x, weight, None, stride, padding, dilation, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        grad = grad.contiguous(memory_format=torch.channels_last)
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            for_x = _input_gradient(grad, x, weight, stride, padding, dilation)
        if ctx.needs_input_grad[1]:
            for_weight = _weight_gradient(grad, x, weight, stride, padding, dilation)
        return for_x, for_weight, None, None, None


def _native(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, (1, 1), False, (0, 0), len(weight), mask
    )
    return found


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    if max(stride) > 1:
        return _native(grad, x, weight, stride, padding, (True, False, False))[0]
    rest = [d * (size - 1) - pad for size, pad, d in zip(weight.shape[2:], padding, dilation, strict=True)]
    return F.conv2d(grad, weight.flip(2, 3), None, 1, rest, dilation, len(weight))


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    x, grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)  # channels last, as it is in memory
    (top, left), (rows, columns) = padding, weight.shape[2:]
    if max(dilation) > 1:
        x = F.pad(x, (0, 0, left, left, top, top))
        x, grad = (_interleaved(images, dilation) for images in (x, grad))
        top = left = 0
    width = min(columns, _STRIP)
    height, reach = ((size - 1) * step for size, step in zip(grad.shape[1:3], stride, strict=True))
    gradient = torch.empty_like(weight)
    for column in range(0, columns, _STRIP):
        column = min(column, columns - width)  # the last strip may overlap with the one before
        # oneDNN can pad by itself, but is as slow again where it does so to maps of a few rows.
        before, after = left - column, reach + width - (left - column) - x.shape[2]
        strip = F.pad(x, (0, 0, before, after, top, height + rows - top - x.shape[1]))
        gradient[..., column : column + width] = _native(
            grad.permute(0, 3, 1, 2),
            strip.permute(0, 3, 1, 2),
            weight[..., :width],
            stride,
            (0, 0),
            (False, True, False),
        )[1]
    return gradient


def _interleaved(images: Tensor, far: Pair) -> Tensor:
    """Every so many-th row and column of [n, rows, columns, channels], from each of the first ones on."""
    rows, columns = (-(-size // d) for size, d in zip(images.shape[1:3], far, strict=True))
    ends = (0, 0, 0, far[1] * columns - images.shape[2], 0, far[0] * rows - images.shape[1])
    parts: Tensor = F.pad(images, ends).unflatten(2, (columns, far[1])).unflatten(1, (rows, far[0]))
    return parts.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)
