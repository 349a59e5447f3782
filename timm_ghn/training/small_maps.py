"""Convolutions on maps of a few positions, as products of matrices.

At 32 pixels networks end with maps of 4x4 to 1x1, on which oneDNN takes far longer than the little there is to compute:
it goes through the taps of a kernel that lie outside of the map as well.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from timm_ghn.training.depthwise import Pair, reaching_taps
from timm_ghn.training.folding import Folded, fold, folded_dims

# Positions of the map for each step of the stride,
_FEW = 16  # where one tap of the kernel reaches it,
_VERY_FEW = 4  # and where more do: what they read is gathered,
_MANY = 1 << 14  # which pays off from so many pairs of channels on


def simplify_small_maps(module: nn.Module) -> None:
    """Makes a module's convolutions compute small maps as products; the results are the same."""
    for child in module.modules():
        # A subclass does something to its weight or padding first.
        if type(child) is nn.Conv2d and child.padding_mode == "zeros" and not isinstance(child.padding, str):
            child._conv_forward = MethodType(_conv_forward, child)  # type: ignore[method-assign]


def _conv_forward(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    small = x.shape[2:].numel() <= _FEW * math.prod(self.stride) and all(dim == 1 for dim in folded_dims(x))
    product = _product(self, x, weight, bias) if small else None
    return nn.Conv2d._conv_forward(self, x, weight, bias) if product is None else product


def _product(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The convolution of a small map; None if it is not worth while as a product."""
    (rows, columns), padding = reaching_taps(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation)
    taps = (rows.stop - rows.start, columns.stop - columns.start)
    if taps == (1, 1) and padding == (0, 0):
        weight = _tap(weight, rows.start, columns.start)
        if self.groups == 1:
            return _at_each_position(_subsampled(x, self.stride), weight, bias)
        if self.groups == weight.shape[0] == x.shape[1]:
            y = _subsampled(x, self.stride) * weight.flatten().view(1, -1, 1, 1)
            return y if bias is None else y + bias.view(1, -1, 1, 1)
        return None
    few = x.shape[2:].numel() <= _VERY_FEW * math.prod(self.stride) and weight.shape[:2].numel() >= _MANY
    if few and self.groups == 1 and self.dilation == (1, 1) and not any(isinstance(t, Folded) for t in (x, weight)):
        read = _read(x, taps, self.stride, padding)
        weight = weight[..., rows, columns].permute(0, 2, 3, 1)
        return F.linear(read.flatten(3), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return None


def _tap(weight: Tensor, row: int, column: int) -> Tensor:
    """[out, in, h, w] to [out, in]."""
    if not isinstance(weight, Folded):
        return weight[:, :, row, column]
    part = weight.part
    return fold(part[:, :, row % part.shape[2], column % part.shape[3]], weight.shape[:2])


def _subsampled(x: Tensor, stride: Pair) -> Tensor:
    """Every so many-th row and column."""
    if stride == (1, 1):
        return x
    if not isinstance(x, Folded):
        return x[..., :: stride[0], :: stride[1]]
    part = x.part[..., :: stride[0], :: stride[1]]
    return fold(part, (*x.shape[:2], *part.shape[2:]))


def _read(x: Tensor, taps: Pair, stride: Pair, padding: Pair) -> Tensor:
    """What the kernel reads at each position of the output: [n, rows, columns, *taps, channels]."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    return x.unfold(1, taps[0], stride[0]).unfold(2, taps[1], stride[1]).permute(0, 1, 2, 4, 5, 3)


def _at_each_position(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
