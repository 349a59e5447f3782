"""Folded tensors: every function on the part gives what it gives on the whole, values and derivatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ghn.hypernet import GHN, GHNConfig
from timm_ghn.tiling import tile
from timm_ghn.training.architectures import SPLITS, architecture, families
from timm_ghn.training.folding import Folded, fold, fold_constant, unfold
from timm_ghn.training.task import Task, prepare


# Parts of 4 channels, in wholes of 8 and of 11.
def in_place(x: Tensor, scale: Tensor) -> Tensor:
    """As networks do that pay no attention to what these return."""
    x.mul_(scale)
    F.relu(x, inplace=True)
    x = x * 1
    x.clamp_(max=1.0)
    x += 1
    x[:, 1] = 0.5
    return x


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "conv": lambda x, w, v: F.conv2d(x, w["conv"], v["out"], 2, 1),
    "conv of another period": lambda x, w, v: F.conv2d(x, w["wide"], None, 1, 1),
    "depthwise conv": lambda x, w, v: F.conv2d(x, w["depthwise"], v["channels"], 1, 2, 2, x.shape[1]),
    "grouped conv": lambda x, w, v: F.conv2d(x, w["grouped"], None, 1, 1, 1, 4) if x.shape[1] == 8 else x,
    "linear": lambda x, w, v: F.linear(x.mean((2, 3)), w["matrix"], v["out"]),
    "linear over a whole": lambda x, w, v: F.linear(unfold(x).mean((2, 3)), w["matrix"], v["out"]),
    "conv over a whole": lambda x, w, v: F.conv2d(unfold(x), w["conv"]),
    "linear over tokens": lambda x, w, v: F.linear(x.flatten(2).transpose(1, 2), w["matrix"]),
    "batch norm": lambda x, w, v: F.batch_norm(x, None, None, v["channels"], v["bias"], True),
    "layer norm": lambda x, w, v: F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], v["channels"], v["bias"], 1e-6),
    "group norm": lambda x, w, v: F.group_norm(x, 1, v["channels"], v["bias"]),
    "norm of two groups": lambda x, w, v: F.group_norm(x, 4, v["channels"], v["bias"]) if x.shape[1] == 8 else x,
    "norm of groups that no part holds": lambda x, w, v: F.group_norm(x, 1 + (x.shape[1] == 8), v["channels"]),
    "layer norm over positions too": lambda x, w, v: F.layer_norm(x, x.shape[1:]),
    "activations": lambda x, w, v: F.gelu(F.silu(x) + F.hardswish(x) * x.sigmoid()) - F.relu(x * 1, inplace=True) ** 2,
    "sum": lambda x, w, v: x + 2 * x - x * v["scale"] + 1,
    "sum with a whole": lambda x, w, v: x + torch.ones_like(unfold(x)),
    "gate": lambda x, w, v: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "vector": lambda x, w, v: x * v["channels"].view(1, -1, 1, 1) + v["bias"].reshape(-1, 1, 1),
    "means": lambda x, w, v: x.mean(1, keepdim=True) * x.norm(p=2, dim=(2, 3), keepdim=True) / x.mean((1, 2)).mean(),
    "addcmul": lambda x, w, v: torch.addcmul(v["bias"].view(1, -1, 1, 1), v["channels"].view(1, -1, 1, 1), x, value=3),
    "pooling": lambda x, w, v: F.max_pool2d(F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 2, 1), 3, 2, 1),
    "global pooling": lambda x, w, v: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "flatten": lambda x, w, v: x.flatten(1),
    "concat": lambda x, w, v: torch.cat([x, F.relu(x)], 1),
    "slice": lambda x, w, v: x[:, 2:5].chunk(3, 1)[1],
    "dropout": lambda x, w, v: F.dropout(x, 0.5, training=False),
    "in place": lambda x, w, v: in_place(x * 1, v["scale"]),
    "in place, of a whole": lambda x, w, v: unfold(x).mul(2).add_(x * v["scale"]),
    "mean of all": lambda x, w, v: x.mean(()) + x.mean(),
    "permuted vector": lambda x, w, v: v["channels"].permute(0),
    "casts": lambda x, w, v: x.float().contiguous().to(torch.float64).clone(),
}  # fmt: skip


@pytest.mark.parametrize("channels", [8, 11])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_part_gives_what_the_whole_gives(name: str, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    leaves = [leaf(2, 4, 6, 6), leaf(4, 4, 3, 3), leaf(6, 6, 3, 3), leaf(4, 1, 3, 3), leaf(4, 2, 3, 3), leaf(4, 4)]
    leaves += [leaf(4), leaf(4), leaf(4), leaf(1)]
    shapes: list[tuple[int, ...]]
    shapes = [(2, channels, 6, 6), (10, channels, 3, 3), (9, channels, 3, 3), (channels, 1, 3, 3), (channels, 2, 3, 3)]
    shapes += [(10, channels), (channels,), (channels,), (10,), (1,)]

    def run(make: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        x, *weights = (make(one, shape) for one, shape in zip(leaves, shapes, strict=True))
        named = dict(zip(("conv", "wide", "depthwise", "grouped", "matrix"), weights, strict=False))
        vectors = dict(zip(("channels", "bias", "out", "scale"), weights[5:], strict=True))
        y = unfold(FUNCTIONS[name](x, named, vectors))
        out = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return y, list(torch.autograd.grad((y * out).sum(), leaves, allow_unused=True))

    (folded, folded_gradients), (whole, whole_gradients) = run(fold), run(tile)
    torch.testing.assert_close(folded, whole)
    for ours, theirs in zip(folded_gradients, whole_gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_what_stays_folded() -> None:
    """As long as possible, so that the whole is never computed."""
    x, w = fold(torch.randn(2, 4, 6, 6), (2, 11, 6, 6)), fold(torch.randn(4, 4, 3, 3), (11, 11, 3, 3))
    scale, one = fold(torch.randn(4), (11,)), fold_constant(torch.full((11, 1, 1), 0.5))
    y = F.conv2d(x, w, None, 1, 1)
    y = F.relu(F.batch_norm(y, None, None, scale, scale, True)) + x * one
    y = F.layer_norm(y.permute(0, 2, 3, 1), (11,), scale, scale).permute(0, 3, 1, 2)
    assert isinstance(y, Folded) and y.part.shape == (2, 4, 6, 6) and y.shape == (2, 11, 6, 6)
    y = F.linear(F.max_pool2d(y, 2).mean((2, 3)), fold(torch.randn(10, 4), (10, 11)))
    assert not isinstance(y, Folded) and y.shape == (2, 10)


def test_copies_that_meet_the_same_weights_are_added_up() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 8, 5, 5), (4, 4, 3, 3)))
    folded = F.conv2d(fold(x, (2, 16, 5, 5)), fold(w, (12, 16, 3, 3)))
    assert isinstance(folded, Folded) and folded.part.shape == (2, 4, 3, 3)
    torch.testing.assert_close(unfold(folded), F.conv2d(tile(x, (2, 16, 5, 5)), tile(w, (12, 16, 3, 3))))


@pytest.mark.parametrize("part", [(4, 4, 3, 3), (8, 8, 3, 3), (4, 1, 2, 2), (1, 1, 1, 1)])
def test_kernels_made_of_copies_in_space(part: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 4, 6, 6), part))
    whole, groups = (8, 8 if part[1] > 1 or part[0] == 1 else 1, 5, 5), 1 if part[1] > 1 or part[0] == 1 else 8
    y = F.conv2d(fold(x, (2, 8, 6, 6)), fold(w, whole), None, 1, 2, 1, groups)
    torch.testing.assert_close(unfold(y), F.conv2d(tile(x, (2, 8, 6, 6)), tile(w, whole), None, 1, 2, 1, groups))


def test_a_tensor_keeps_its_type_when_it_is_changed_in_place() -> None:
    x = fold(torch.randn(2, 4), (2, 8)).bfloat16()
    x += fold(torch.randn(2, 4), (2, 8))
    assert x.dtype == unfold(x).dtype == torch.bfloat16


def test_folded_tensors_tell_of_the_whole() -> None:
    x = fold(torch.randn(2, 4), (2, 11))
    assert x.shape == (2, 11) and x.ndim == 2 and x.numel() == 22 and len(x) == 2 and x.size(1) == 11
    assert x.dtype == torch.float32 and x.device.type == "cpu" and "of [2, 11]" in repr(x)
    assert fold(torch.ones(3), (3,)).shape == (3,) and not isinstance(fold(torch.ones(3), (3,)), Folded)
    constant, varied = fold_constant(torch.full((5,), 2.0)), fold_constant(torch.arange(5.0))
    assert isinstance(constant, Folded) and torch.equal(unfold(constant), torch.full((5,), 2.0))
    assert not isinstance(varied, Folded)
    assert torch.equal(fold_constant(torch.tensor(2.0)), torch.tensor(2.0))


CASES = [(source, family, False) for source in SPLITS for family in families(source, max_tier=3)]
CASES += [("timm", family, True) for family in families("timm", 3) if family not in SPLITS["timm"]["train"].families]


@pytest.mark.parametrize("source, family, split_attention", CASES)
def test_every_family_is_computed_exactly(
    source: str, family: str, split_attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    ghn = GHN(GHNConfig(num_classes=5, max_shape=(12, 12, 3, 3), hid=8, split_attention=split_attention))
    # In float64: rectifiers make of the last digits of float32 whole digits of a gradient.
    prepared = prepare(architecture(source, "train", 7, families=[family], max_macs=10_000_000), 5, 32)
    fixed = {name: value.double() if value.is_floating_point() else value for name, value in prepared.fixed.items()}
    task = Task(dataclasses.replace(prepared, fixed=fixed), 5, 32)
    parts = {name: part for name, part in ghn([task.graph])[0].items() if name in task.shapes}
    leaves = {name: part.detach().double().requires_grad_() for name, part in parts.items()}
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)

    def run() -> tuple[Tensor, list[Tensor]]:
        y = task.output(task.parameters(leaves), x)
        gradients = torch.autograd.grad(y.square().sum(), list(leaves.values()), allow_unused=True)
        return y, [g for g in gradients if g is not None]

    folded, ours = run()
    task.fixed = {name: unfold(value) for name, value in task.fixed.items()}
    monkeypatch.setattr("timm_ghn.training.task.fold", tile)
    whole, theirs = run()
    torch.testing.assert_close(folded, whole)
    scale = max(g.norm() for g in theirs)
    assert len(ours) == len(theirs)
    assert all((a - b).norm() < 1e-9 * scale for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("channels", [8, 11])
@pytest.mark.parametrize("dim", [(2, 3), 1])
def test_the_norm_of_nothing_has_a_derivative(channels: int, dim: int | tuple[int, ...]) -> None:
    # ConvNeXt-V2 scales channels by their norms over an image, and one may be silent in it.
    part = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    part[0, 2] = part[1, :, 0, 0] = 0
    gradients = []
    for make in (fold, tile):
        leaf = part.clone().requires_grad_()
        norm = make(leaf, (2, channels, 3, 3)).norm(p=2, dim=dim, keepdim=True)
        unfold(norm).sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0] is not None and gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients)
