"""Depthwise convolutions, as training computes their derivatives on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from timm_ghn.training.depthwise import FastDepthwise

PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, tuple[int, int]]:
    """Kernels, and maps that are at least as large as what they cover."""
    kernel = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    dilation, stride = draw(PAIRS), draw(PAIRS)
    covered = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = draw(st.tuples(st.integers(0, covered[0]), st.integers(0, covered[1])))
    size = [draw(st.integers(max(1, c - 2 * p), c + 6)) for c, p in zip(covered, padding, strict=True)]
    return {
        "kernel": kernel, "size": (size[0], size[1]), "stride": stride, "padding": padding, "dilation": dilation
    }  # fmt: skip


def results(x: Tensor, weight: Tensor, bias: Tensor | None, fast: bool, **options: Any) -> list[Tensor]:
    """The output, and derivatives of a random function of it."""
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None and leaf.requires_grad]
    if fast:
        with FastDepthwise():
            y = F.conv2d(x, weight, bias, groups=x.shape[1], **options)
    else:
        y = F.conv2d(x, weight, bias, groups=x.shape[1], **options)
    direction = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad(y, leaves, direction.to(y.dtype))]


@settings(max_examples=200, deadline=None)
@given(geometries(), st.booleans(), st.booleans(), st.booleans())
def test_derivatives_are_those_of_torch(
    geometry: dict[str, tuple[int, int]], channels_last: bool, biased: bool, only_weight: bool
) -> None:
    torch.manual_seed(0)
    kernel, size = geometry.pop("kernel"), geometry.pop("size")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_(not only_weight)
    weight = torch.randn(3, 1, *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True) if biased else None
    for found, expected in zip(
        results(x, weight, bias, True, **geometry), results(x, weight, bias, False, **geometry), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("side", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 1, 2), (5, 1, 1), (5, 2, 1), (5, 1, 2), (5, 2, 2), (7, 1, 1), (7, 2, 1)]
)
def test_the_convolutions_of_networks_have_them_in_single_precision(
    side: int, kernel: int, stride: int, dilation: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 16, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(16, 1, kernel, kernel, requires_grad=True)
    options: dict[str, Any] = {"stride": stride, "padding": dilation * (kernel // 2), "dilation": dilation}
    expected = results(x.double(), weight.double(), None, False, **options)
    for found, exact in zip(results(x, weight, None, True, **options), expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(5, 5), (4, 5)])
def test_padding_may_be_given_as_a_word(padding: str, kernel: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, *kernel, dtype=torch.float64, requires_grad=True)
    for found, expected in zip(
        results(x, weight, None, True, padding=padding), results(x, weight, None, False, padding=padding), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "convnext_atto"])
def test_a_network_trains_as_it_does_without(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).double().train()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for mode in (None, FastDepthwise()):
        torch.manual_seed(1)
        model.zero_grad()
        if mode is None:
            model(images).square().sum().backward()
        else:
            with mode:
                model(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_what_has_no_derivatives_or_is_half_is_left_to_torch() -> None:
    x = torch.randn(2, 4, 8, 8)
    weight = torch.randn(4, 1, 5, 5)
    options: dict[str, Any] = {"padding": 2, "groups": 4}
    with FastDepthwise():
        assert F.conv2d(x, weight, **options).grad_fn is None
        weight.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = F.conv2d(x, weight, **options)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
