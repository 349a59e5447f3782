"""Linear maps by slices of one weight, which share one gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def sliced_linear_reference(
    xs: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, slices: Sequence[tuple[slice, ...]]
) -> list[torch.Tensor]:
    """What `sliced_linear` computes, plainly: for each input, the linear map made of a slice of the weight."""
    return [F.linear(x, weight[part].flatten(0, -2), bias[part].flatten()) for x, part in zip(xs, slices, strict=True)]


def sliced_linear(
    xs: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, slices: Sequence[tuple[slice, ...]]
) -> list[torch.Tensor]:
    """Linear maps by slices of one weight.

    Autograd gives every slice a gradient of the whole weight's size, zeros around it, and adds these up: with dozens of
    kernel shapes, more work than the maps themselves. Here all slices add into one gradient.

    Args:
        xs: An [n, k] for each slice.
        weight: [*sizes, k].
        bias: [*sizes].
        slices: For each input, which outputs to compute: a slice of each of `sizes`.

    Returns:
        For each input, [n, outputs], the slice's outputs flattened. They can be differentiated once.
    """
    return list(_SlicedLinear.apply(weight, bias, slices, *xs))


class _SlicedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, bias: torch.Tensor, slices: Sequence[tuple[slice, ...]], *xs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(weight, *xs)
        ctx.slices = slices
        return tuple(sliced_linear_reference(xs, weight, bias, slices))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *xs = ctx.saved_tensors
        of_weight, of_bias = torch.zeros_like(weight), weight.new_zeros(weight.shape[:-1])
        of_xs = []
        for x, gradient, part in zip(xs, gradients, ctx.slices, strict=True):
            x, gradient = x.to(weight.dtype), gradient.to(weight.dtype)  # which autocast makes another one
            of_xs.append(gradient @ weight[part].flatten(0, -2))
            target = of_weight[part]
            if target.is_contiguous():
                target.view(-1, target.shape[-1]).addmm_(gradient.t(), x)
            else:
                target += (gradient.t() @ x).view_as(target)
            of_bias[part] += gradient.sum(0).view_as(of_bias[part])
        return of_weight, of_bias, None, *of_xs
