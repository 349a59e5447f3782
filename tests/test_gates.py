"""Squeeze-excite in all its clothes: the mean is contracted, the product a `cse` where the published code sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import GatherExcite, GlobalContext, SplitAttn, create_attn
from torch import nn
from torch.nn import functional as F

from timm_ghn import predict, trace

Layer = Callable[[int], nn.Module]


class Net(nn.Module):
    """Three attention layers: behind a rectifier, behind a norm, and the last before the head's pooling."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.stem, self.second, self.third = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)
        self.norm = nn.ModuleList(nn.BatchNorm2d(32) for _ in range(2))
        self.attn = nn.ModuleList(layer(32) for _ in range(3))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.attn[0](self.stem(x).relu())
        x = self.attn[1](self.norm[0](self.second(x))) + x
        x = self.attn[2](self.norm[1](self.third(x))) + x
        return self.head(F.adaptive_avg_pool2d(x.relu(), 1).flatten(1))


def counts(layer: Layer, size: int = 16) -> tuple[int, int, int, int]:
    ops = trace(Net(layer), size).ops
    return ops.count("cse"), ops.count("glob_avg"), ops.count("msa"), ops.count("sum") + ops.count("concat")


def of_timm(name: str) -> Layer:
    return lambda channels: create_attn(name, channels)


# What the graph shows of three layers: cse; glob_avg, of which one is the head's; msa; sum and concat, of which two are
# the shortcuts'. A gate behind a norm that is not the last is contracted, as the published code does not see it.
@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (of_timm("se"), (2, 1, 0, 2)),
        (of_timm("ese"), (2, 1, 0, 2)),
        (of_timm("eca"), (2, 1, 0, 2)),  # expanded to the features' size
        (of_timm("ecam"), (2, 1, 0, 2)),
        (of_timm("ceca"), (2, 1, 0, 2)),
        (of_timm("gc"), (2, 1, 3, 2)),  # positions are weighted by a softmax instead of averaged
        (lambda channels: GlobalContext(channels, use_attn=False), (2, 1, 0, 2)),
        (lambda channels: SplitAttn(channels, radix=1), (3, 1, 0, 2)),  # brings a rectifier
        # No gates: nothing is averaged over all positions, or what is is not multiplied with the features.
        (lambda channels: GatherExcite(channels, use_mlp=False, extent=2), (0, 1, 0, 2)),  # of neighbourhoods
        (
            lambda channels: GatherExcite(channels, use_mlp=False),
            (0, 1, 0, 2),
        ),  # no parameters: it joins a node to itself
        (of_timm("gca"), (0, 1, 3, 5)),  # the context is added
        (of_timm("coord"), (0, 1, 0, 2)),  # rows and columns apart
        (of_timm("scoord"), (0, 1, 0, 5)),
        (of_timm("ela"), (0, 1, 0, 2)),
        (of_timm("strip"), (0, 1, 0, 5)),
        (of_timm("nl"), (0, 1, 3, 5)),
        (of_timm("lambda"), (0, 1, 3, 5)),
        # Gates that the published code does not see for what stands before the product.
        (of_timm("splat"), (0, 1, 0, 2)),  # a reshape into the branches
        (lambda channels: create_attn("sk", channels, out_channels=channels), (0, 1, 0, 5)),  # their stack
        (of_timm("cbam"), (1, 1, 0, 4)),  # the gate over positions comes last
        (of_timm("lcbam"), (1, 1, 0, 4)),
    ],
)
def test_attention_layers_of_timm(layer: Layer, expected: tuple[int, int, int, int]) -> None:
    try:
        found = counts(layer)
    except AssertionError as error:
        pytest.skip(f"this timm has no such layer: {error}")
    assert found == expected


class Gate(nn.Module):
    def __init__(self, channels: int, apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels)
        self.apply_gate = apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_gate(x, self.fc(x.mean((2, 3))))


def _reshaped(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return gate[:, :, None, None]


@pytest.mark.parametrize(
    ("apply", "cse"),
    [
        (lambda x, gate: x * _reshaped(x, gate.sigmoid()), 2),
        (lambda x, gate: x * _reshaped(x, gate).sigmoid(), 2),
        (lambda x, gate: x * _reshaped(x, gate.sigmoid()).expand_as(x), 2),
        (lambda x, gate: x * _reshaped(x, gate).expand(x.shape).sigmoid(), 2),
        (lambda x, gate: x * _reshaped(x, gate.sigmoid()).repeat(1, 1, *x.shape[2:]), 2),
        (lambda x, gate: x * (_reshaped(x, gate.sigmoid()) * torch.ones_like(x)), 2),
        (lambda x, gate: x * F.interpolate(_reshaped(x, gate.sigmoid()), x.shape[2:]), 2),
        (lambda x, gate: x.mul(F.hardsigmoid(_reshaped(x, gate)).broadcast_to(x.shape)), 2),
        (lambda x, gate: _reshaped(x, gate.sigmoid()) * x, 3),  # first factors are always seen
        (lambda x, gate: _reshaped(x, gate.sigmoid()).expand_as(x) * x, 3),
        # No gate, though as large as the features and made of their mean: they go into it themselves.
        (lambda x, gate: x * (x - _reshaped(x, gate)).sigmoid(), 0),
        (lambda x, gate: x * x.sigmoid(), 0),
    ],
)
def test_clothes_of_a_gate(apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], cse: int) -> None:
    seen, averages, _, _ = counts(lambda channels: Gate(channels, apply))
    assert (seen, averages) == (cse, averages if cse == 0 else 1)


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "efficientnet_b0", "seresnet50", "regnety_002", "ecaresnet26t"]
)
def test_a_gate_is_one_where_the_features_have_a_single_position(name: str) -> None:
    model = timm.create_model(name)
    small, large = trace(model, 32), trace(model, 224)
    assert small.to_dict() == large.to_dict()


def test_a_convolution_over_channels_is_predicted() -> None:
    """Published code has no primitive for it; here it is the convolution that it is, with a kernel of one filter."""
    with torch.device("meta"):
        model = timm.create_model("ecaresnet26t")
    prediction = predict(model)
    gates = {name: tensor for name, tensor in prediction.items() if ".se.conv." in name}
    assert len(gates) == 8
    for name, tensor in gates.items():
        assert tensor.shape == model.get_parameter(name).shape
        assert 0 < tensor.abs().max() < 10
