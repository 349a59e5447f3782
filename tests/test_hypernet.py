"""The GHN as a module: batches, vocabulary, configs."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_ghn import GHN, ComputationGraph, GHNConfig, trace
from timm_ghn.hypernet.encoder import ShapeEncoder, channel_vocabulary, spatial_vocabulary
from timm_ghn.plan import shape_to_4d

CONFIGS: list[dict[str, Any]] = [
    {"hypernet": "gatedgnn"},
    {"hypernet": "gatedgnn", "ve": False, "layernorm": False, "weight_norm": False},  # GHN-1
    {"hypernet": "graphormer", "heads": 4, "layers": 2},
    {"hypernet": "mlp", "decoder": "mlp"},
    {"hypernet": "gatedgnn", "decoder": "lowrank", "max_shape": (64, 64, 3, 3), "rank": 4},
]


def make(**config: Any) -> GHN:
    torch.manual_seed(0)
    return GHN(GHNConfig(**{"num_classes": 10, "max_shape": (16, 16, 3, 3), "hid": 16, **config})).eval()


@cache
def graph(name: str) -> ComputationGraph:
    with torch.device("meta"):
        return trace(timm.create_model(name, num_classes=10))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config['hypernet']}-{config.get('decoder', 'conv')}")
def test_networks_predicted_together_or_alone_are_the_same(config: dict[str, Any]) -> None:
    ghn = make(**config)
    graphs = [graph(name) for name in ("resnet18", "mobilenetv3_small_050", "convnext_atto")]
    with torch.no_grad():
        together = ghn(graphs)
        for one, tiles in zip(graphs, together, strict=True):
            (alone,) = ghn([one])
            assert alone.keys() == tiles.keys()
            for name in alone:
                torch.testing.assert_close(tiles[name], alone[name], atol=1e-5, rtol=1e-4)
    assert ghn([]) == []


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config['hypernet']}-{config.get('decoder', 'conv')}")
def test_every_weight_learns(config: dict[str, Any]) -> None:
    ghn = make(**config)
    names = ("resnet18", "vit_tiny_patch16_224")
    loss = sum(tile.square().sum() for tiles in ghn([graph(name) for name in names]) for tile in tiles.values())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert all(parameter.grad is not None for parameter in ghn.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in ghn.parameters() if parameter.grad is not None)


def test_a_kept_head_looks_like_one_of_the_checkpoints_classes() -> None:
    ghn = make()
    with torch.device("meta"):
        other = trace(timm.create_model("resnet18", num_classes=77))
    with torch.no_grad():
        (same,), (kept,) = ghn([graph("resnet18")], predict_head=False), ghn([other], predict_head=False)
    assert same.keys() == kept.keys()
    assert all(torch.equal(same[name], kept[name]) for name in same)


# ---- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64,), (64, 1, 1, 1)),
        ((64, 32), (64, 32, 1, 1)),
        ((64, 32, 3, 5), (64, 32, 3, 5)),
        ((1, 197, 768), (1, 768, 14, 14)),
        ((8, 4, 3), (8, 4, 3, 1)),
        ((1, 1, 768), (1, 1, 768, 1)),
        ((1, 16, 16, 768), (1, 768, 16, 16)),
        ((8, 4, 2, 3, 3), (8, 4, 3, 3)),
        ((), (1, 1, 1, 1)),
    ],
)
def test_shapes_become_kernels(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert shape_to_4d(shape) == expected


@given(st.integers(8, 20_000))
def test_an_unknown_channel_count_takes_the_nearest_and_on_a_tie_the_smaller(channels: int) -> None:
    vocabulary = channel_vocabulary(1000)
    row = ENCODER.rows((channels,))[0]
    assert vocabulary[row] == min(vocabulary, key=lambda entry: (abs(entry - channels), entry))


ENCODER = ShapeEncoder(GHNConfig(1000))


@pytest.mark.parametrize(("size", "entry"), [(1, 1), (2, 3), (3, 3), (4, 3), (12, 11), (13, 14), (15, 14), (99, 16)])
def test_kernel_sizes_take_the_nearest(size: int, entry: int) -> None:
    assert spatial_vocabulary(11)[ENCODER.rows((1, 1, size, size))[2]] == entry


@pytest.mark.parametrize(("channels", "entry"), [(1, 1), (2, 1), (3, 3), (4, 8), (7, 8), (12, 8), (9000, 8192)])
def test_few_channels_count_as_eight(channels: int, entry: int) -> None:
    assert channel_vocabulary(1000)[ENCODER.rows((channels,))[0]] == entry


# ---- configs --------------------------------------------------------------------------------------------------------


def test_a_config_round_trips() -> None:
    config = GHNConfig(10, hypernet="graphormer", hid=64, layers=3, branch_scale=1.0)
    assert GHNConfig.from_dict(config.to_dict()) == config


def test_a_config_of_ghn3_needs_no_hypernet() -> None:
    assert GHNConfig.from_dict({"num_classes": 10, "hid": 64, "heads": 8, "layers": 3}).hypernet == "graphormer"


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"num_classes": 0},
        {"num_classes": 10, "hid": 30},
        {"num_classes": 10, "hypernet": "magic"},
        {"num_classes": 10, "max_shape": [1, 2, 3]},
        {"num_classes": 10, "width": 3},
        {"num_classes": 10, "hypernet": "graphormer", "hid": 36, "heads": 8},
    ],
)
def test_a_config_that_cannot_be_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="GHN config"):
        GHNConfig.from_dict(data)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config['hypernet']}-{config.get('decoder', 'conv')}")
def test_a_config_tells_the_shapes_of_its_checkpoint(config: dict[str, Any]) -> None:
    ghn = make(**config)
    assert GHN.parameter_shapes(ghn.config) == {name: tuple(t.shape) for name, t in ghn.state_dict().items()}
