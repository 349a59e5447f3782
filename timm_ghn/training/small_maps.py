"""Convolutions on maps of a few positions, as products of matrices.

At 32 pixels networks end with maps of 4x4 to 1x1, on which oneDNN takes far longer than the little there is to compute:
it goes through the taps of a kernel that lie outside of the map as well.
"""

from __future__ import annotations

from types import MethodType

import torch.nn.functional as F
from torch import Tensor, nn

from timm_ghn.training.folding import Folded, fold

_FEW = 16


def simplify_small_maps(module: nn.Module) -> None:
    """Makes a module's convolutions compute small maps as products; the results are the same."""
    for child in module.modules():
        # A subclass does something to its weight or padding first.
        if type(child) is nn.Conv2d and child.padding_mode == "zeros" and not isinstance(child.padding, str):
            child._conv_forward = MethodType(_conv_forward, child)  # type: ignore[method-assign]


def _conv_forward(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    positions = x.shape[2:].numel()
    depthwise = self.groups == weight.shape[0] == x.shape[1]
    if positions == 1 and (self.groups == 1 or depthwise) and _is_centred(self):
        middle = _tap(weight, self.kernel_size[0] // 2, self.kernel_size[1] // 2)
        if self.groups == 1:
            return _at_each_position(x, middle, bias)
        y = x * middle.flatten().view(1, -1, 1, 1)
        return y if bias is None else y + bias.view(1, -1, 1, 1)
    if positions <= _FEW and self.groups == 1 and self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0):
        return _at_each_position(x, _tap(weight, 0, 0), bias)
    plain: Tensor = nn.Conv2d._conv_forward(self, x, weight, bias)
    return plain


def _is_centred(convolution: nn.Conv2d) -> bool:
    """Whether one position gives one, by the middle of the kernel."""
    sizes = zip(convolution.kernel_size, convolution.padding, convolution.dilation, strict=True)
    return all(size % 2 and padding == dilation * (size // 2) for size, padding, dilation in sizes)


def _tap(weight: Tensor, row: int, column: int) -> Tensor:
    """[out, in, h, w] to [out, in]."""
    if not isinstance(weight, Folded):
        return weight[:, :, row, column]
    part = weight.part
    return fold(part[:, :, min(row, part.shape[2] - 1), min(column, part.shape[3] - 1)], weight.shape[:2])


def _at_each_position(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
