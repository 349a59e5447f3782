"""LoGAH's low-rank decoder against its definition, on wide networks, and in training."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from timm_ghn import GHN, GHNConfig, predict, trace
from timm_ghn.hypernet.decoders import DECODERS
from timm_ghn.hypernet.decoders.lowrank import LowRankDecoder
from timm_ghn.hypernet.decoders.sliced_linear import sliced_linear, sliced_linear_reference
from timm_ghn.training.trainer import new_ghn

CONFIG = GHNConfig(
    10, max_shape=(512, 512, 7, 7), hid=16, hypernet="graphormer", decoder="lowrank", heads=4, layers=2, rank=8
)


@pytest.mark.parametrize(
    ("shape", "decoded"),
    [
        ((96, 32, 3, 3), (96, 32, 3, 3)),
        ((512, 512, 1, 1), (512, 512, 1, 1)),
        ((5, 1, 7, 7), (5, 1, 7, 7)),
        ((40, 30, 1, 7), (40, 30, 1, 7)),
        ((600, 700, 1, 1), (512, 512, 1, 1)),  # wider than the widest
        ((256, 64, 3, 1), (170, 64, 3, 1)),
        ((1, 64, 14, 14), (1, 64, 7, 7)),
    ],
)
def test_the_definition(shape: tuple[int, int, int, int], decoded: tuple[int, int, int, int]) -> None:
    """A and B are made whole, multiplied, and read as a kernel."""
    torch.manual_seed(0)
    decoder = LowRankDecoder(CONFIG)
    x = torch.randn(3, CONFIG.hid)
    out, into, height, width = decoded
    with torch.no_grad():
        assert decoder.decoded_shape(shape) == decoded
        vectors = decoder.mlp["fc"](x).view(3, 2 * CONFIG.rank, CONFIG.rank)
        a, b = decoder.l2(F.relu(vectors)).view(3, 2 * 512, CONFIG.rank).split(512, dim=1)
        matrix = a[:, : out * height] @ b[:, : into * width].transpose(1, 2)
        expected = matrix.view(3, out, height, into, width).permute(0, 1, 3, 2, 4)
        torch.testing.assert_close(decoder([x], [shape])[0], expected)
    assert int(torch.linalg.matrix_rank(matrix[0])) <= CONFIG.rank


def test_nothing_is_tiled_up_to_the_widest_layer() -> None:
    config = dataclasses.replace(CONFIG, max_shape=(3072, 3072, 16, 16))  # 192 channels, 16x16 patches
    ghn = GHN(config).eval()
    for name in ("resnet18", "vit_tiny_patch16_224"):
        prediction = predict(timm.create_model(name, num_classes=10), ghn)
        tiled = [key for key, tile in prediction.tiles.items() if tile.shape != prediction.shapes[key]]
        assert not tiled
        assert prediction.report.predicted_fraction > 0.999  # all but the class token


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_classes_of_kernels_that_are_not_square(name: str) -> None:
    config = dataclasses.replace(CONFIG, max_shape=(16, 8, 3, 3), decoder=name)
    weights = GHN(config).decoder.class_weight(torch.randn(2, CONFIG.hid), 8)
    assert weights.shape == (2, CONFIG.num_classes, 8)


@pytest.mark.slow
def test_it_learns() -> None:
    """A few steps of gradient descent on what the predicted weights compute; in float64, for the same on any CPU."""
    torch.manual_seed(0)
    ghn = new_ghn(dataclasses.replace(CONFIG, max_shape=(128, 128, 7, 7)), seed=0).double()
    images, labels = torch.randn(16, 3, 8, 8, dtype=torch.float64), torch.arange(16) % 10
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(32, 10),
    ).double()  # fmt: skip
    graph = trace(model, (3, 8, 8))
    optimizer = torch.optim.Adam(ghn.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        (tiles,) = ghn([graph])
        loss = F.cross_entropy(torch.func.functional_call(model, tiles, (images,)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_a_prediction_under_autocast_can_be_differentiated(name: str) -> None:
    ghn = new_ghn(GHNConfig(10, (16, 16, 3, 3), 8, decoder=name), seed=0)
    graph = trace(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3)), (3, 8, 8))

    def gradient(bf16: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            (tiles,) = ghn([graph])
        loss = sum(tile.float().square().sum() for tile in tiles.values())
        return torch.autograd.grad(loss, ghn.shape_enc.embed_channel.weight)[0]

    assert torch.nn.functional.cosine_similarity(gradient(True).flatten(), gradient(False).flatten(), 0) > 0.99


def test_classes_must_fit() -> None:
    with pytest.raises(ValueError, match="must be as wide as the widest layer, of which num_classes=1000 is one"):
        dataclasses.replace(CONFIG, num_classes=1000)


SLICES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=5
)


@settings(deadline=None, max_examples=60)
@given(slices=SLICES, seed=st.integers(0, 1000))
def test_slices_of_one_weight_equal_the_plain_maps(slices: list[tuple[int, int, int, int]], seed: int) -> None:
    """Values and gradients of `sliced_linear`; overlapping slices, and inputs of no row, too."""
    torch.manual_seed(seed)
    weight, bias = torch.randn(6, 5, 3, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    parts = [(slice(start, out), slice(into)) for start, out, into, _ in slices]
    xs = [torch.randn(rows, 3, dtype=torch.float64) for *_, rows in slices]
    results = []
    for function in (sliced_linear, sliced_linear_reference):
        inputs = [tensor.clone().requires_grad_() for tensor in (weight, bias, *xs)]
        ys = function(inputs[2:], inputs[0], inputs[1], parts)
        loss = sum((y * torch.arange(y.numel()).view_as(y).cos()).sum() for y in ys)
        assert isinstance(loss, torch.Tensor)
        results.append([*ys, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_shapes_decoded_together_equal_those_decoded_alone(decoder: str) -> None:
    config = GHNConfig(10, (16, 16, 5, 5), hid=8, decoder=decoder, rank=4)
    module = GHN(config).decoder
    shapes = [(16, 16, 3, 3), (40, 3, 7, 7), (8, 1, 1, 5), (4, 16, 1, 1), (1, 24, 14, 14)]
    states = [torch.randn(count, 8) for count in (2, 1, 3, 1, 2)]
    together = module(states, shapes)
    for state, shape, kernels in zip(states, shapes, together, strict=True):
        (alone,) = module([state], [shape])
        assert kernels.shape == (len(state), *module.decoded_shape(shape))
        torch.testing.assert_close(kernels, alone)
