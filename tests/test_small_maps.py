"""Convolutions on small maps, as training computes them on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from timm_ghn.tiling import tile
from timm_ghn.training.folding import Folded, fold, unfold
from timm_ghn.training.small_maps import simplify_small_maps

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "pointwise": {"kernel_size": 1},
    "without a bias": {"kernel_size": 1, "bias": False},
    "strided": {"kernel_size": 1, "stride": 2},
    "padded": {"kernel_size": 1, "padding": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "not square": {"kernel_size": (1, 5), "padding": (0, 2)},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "off the middle": {"kernel_size": 3, "padding": 2},
    "even": {"kernel_size": 2, "padding": 1},
    "depthwise": {"kernel_size": 5, "padding": 2, "groups": 6},
    "depthwise without a bias": {"kernel_size": 7, "padding": 3, "groups": 6, "bias": False},
    "strided depthwise": {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 6},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "more outputs than groups": {"kernel_size": 3, "padding": 1, "groups": 6, "out_channels": 12},
    "many channels": {"kernel_size": 3, "padding": 1, "in_channels": 132, "out_channels": 132},
    "many channels, strided": {"kernel_size": 3, "padding": 1, "stride": 2, "in_channels": 132, "out_channels": 132},
    "many channels, not square": {"kernel_size": (1, 3), "padding": (0, 1), "in_channels": 132, "out_channels": 132},
    "many channels, dilated": {"kernel_size": 3, "padding": 2, "dilation": 2, "in_channels": 132, "out_channels": 132},
    "many channels, even": {"kernel_size": 2, "padding": 1, "in_channels": 132, "out_channels": 132},
    "reflecting": {"kernel_size": 1, "padding_mode": "reflect"},
    "by a word": {"kernel_size": 3, "padding": "same"},
}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_they_are_the_convolutions(name: str, side: int, folded: bool) -> None:
    torch.manual_seed(0)
    options = {"in_channels": 6, "out_channels": 6, **CONVOLUTIONS[name]}
    plain, ours = (nn.Conv2d(**options).double() for _ in range(2))
    simplify_small_maps(ours)
    shapes = {"x": (4, plain.in_channels, side, side), **{n: tuple(p.shape) for n, p in plain.named_parameters()}}
    # Copies of half of the channels, but for a depthwise kernel's only input.
    parts = {
        n: [size // 2 if folded and d < 2 and size % 6 == 0 else size for d, size in enumerate(shape)]
        for n, shape in shapes.items()
    }
    leaves = {n: torch.randn(part, dtype=torch.float64, requires_grad=True) for n, part in parts.items()}

    def run(convolution: nn.Conv2d, make: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, *weights = (make(leaves[n], shape) for n, shape in shapes.items())
        named = dict(zip(list(shapes)[1:], weights, strict=True))
        y = unfold(torch.func.functional_call(convolution, named, (x,)))
        out = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return y, torch.autograd.grad((y * out).sum(), list(leaves.values()))

    found, gradients = run(ours, fold)
    expected, theirs = run(plain, tile)
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_kernels_made_of_copies_in_space() -> None:
    convolution = nn.Conv2d(6, 6, 5, padding=2, bias=False).double()
    plain = nn.Conv2d(6, 6, 5, padding=2, bias=False).double()
    simplify_small_maps(convolution)
    x, part = torch.randn(2, 6, 1, 1, dtype=torch.float64), torch.randn(6, 6, 2, 2, dtype=torch.float64)
    y, expected = (
        torch.func.functional_call(module, {"weight": make(part, (6, 6, 5, 5))}, (x,))
        for module, make in ((convolution, fold), (plain, tile))
    )
    torch.testing.assert_close(unfold(y), expected)


def test_what_is_folded_stays_so() -> None:
    for options in ({"kernel_size": 1}, {"kernel_size": 5, "padding": 2, "groups": 6}):
        convolution = nn.Conv2d(6, 6, **options)  # type: ignore[arg-type]
        simplify_small_maps(convolution)
        values = {
            n: fold(p[:3, :3] if p.ndim > 1 else p[:3], tuple(p.shape)) for n, p in convolution.named_parameters()
        }
        y = torch.func.functional_call(convolution, values, (fold(torch.randn(2, 3, 1, 1), (2, 6, 1, 1)),))
        assert isinstance(y, Folded) and y.part.shape == (2, 3, 1, 1)


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("pointwise", 4),
        ("strided", 8),
        ("3x3", 1),
        ("depthwise", 1),
        ("many channels", 2),
        ("many channels, strided", 4),
    ],
)
def test_they_are_products_on_small_maps_alone(name: str, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = nn.Conv2d(**{"in_channels": 6, "out_channels": 6, **CONVOLUTIONS[name]})
    simplify_small_maps(convolution)
    convolved: list[int] = []
    conv2d = torch.nn.functional.conv2d

    def watched(x: Tensor, *args: Any) -> Tensor:
        convolved.append(x.shape[-1])
        return conv2d(x, *args)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    sides = (1, 2, 3, 4, 5, 8, 9)
    for side in sides:
        convolution(torch.randn(2, convolution.in_channels, side, side))
    assert convolved == [side for side in sides if side > largest]
