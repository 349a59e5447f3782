"""A look inside predicted networks."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_ghn
from timm_ghn import Inspection, demo, inspect
from timm_ghn.evaluation.inspection import judge
from timm_ghn.hypernet import GHN
from timm_ghn.training.data import load_dataset


def images(size: int, count: int = 4) -> Tensor:
    batch, _ = load_dataset(str(demo.IMAGES), "val", holdout=100, image_size=size).batch(torch.arange(count))
    return batch


def causes(found: Inspection) -> dict[str, str]:
    return {finding.what: finding.cause for finding in found.findings}


def test_what_each_parameter_got() -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = inspect(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    prediction = timm_ghn.predict(model)
    assert [row.name for row in found.parameters] == [name for name, _ in model.named_parameters()]
    for row in found.parameters:
        whole, tile = prediction[row.name], prediction.tiles[row.name]
        assert row.shape == whole.shape and row.kept is None
        assert row.tiles == whole.numel() / tile.numel()
        assert row.scale == pytest.approx(whole.double().square().mean().sqrt().item())
        assert row.init_scale == pytest.approx(before[row.name].double().square().mean().sqrt().item())
        assert (row.rank is None) == (whole.ndim < 2)
        if row.rank is not None and row.full_rank is not None:
            assert 1 <= row.rank <= row.full_rank
    wide = next(row for row in found.parameters if row.tiles > 1 and row.rank)
    singular = torch.linalg.svdvals(prediction[wide.name].flatten(1).double())
    shares = (singular / singular.sum())[singular > 1e-9]
    if wide.tiles == round(wide.tiles):
        assert wide.rank == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-4), "of the tile, as it is"
    assert "norms without statistics of data" in causes(found) and found.output is None and not found.activations


def test_what_comes_out_of_each_layer() -> None:
    batch = images(64)
    found = inspect("test_resnet", images=batch)
    assert found.output == "ok" and "norms without statistics of data" not in causes(found)
    names = [layer.name for layer in found.activations]
    assert names[0] == "conv1.0" and names[-1] == "fc" and len(names) == len(set(names))
    model = timm.create_model("test_resnet", num_classes=10)
    timm_ghn.initialize(model)
    timm_ghn.calibrate(model, [batch]).eval()
    with torch.no_grad():
        first, last = model.conv1[0](batch), model(batch)
    for layer, output in ((found.activations[0], first), (found.activations[-1], last)):
        assert layer.shape == output.shape[1:]
        assert layer.scale == pytest.approx(output.square().mean().sqrt().item(), rel=1e-4)
        assert layer.largest == pytest.approx(output.abs().max().item(), rel=1e-4)


@pytest.fixture
def unbounded() -> GHN:
    ghn = copy.deepcopy(timm_ghn.load_ghn("ghn2"))
    ghn.config = dataclasses.replace(ghn.config, bounded=False)
    return ghn


def test_growth_without_a_norm(unbounded: GHN) -> None:
    found = inspect("eca_nfnet_l0", unbounded, images=images(96))
    (cause,) = (cause for what, cause in causes(found).items() if what.startswith("activations grow"))
    assert "There is no norm" in cause
    assert "layers that are switched off" in causes(found)
    bounded = causes(inspect("eca_nfnet_l0", images=images(96)))
    assert "layers that are switched off" in bounded and not any("finetune" in cause for cause in bounded.values())


def test_growth_in_branches_without_a_norm(unbounded: GHN) -> None:
    found = inspect("davit_tiny", unbounded, images=images(64))
    (cause,) = (cause for what, cause in causes(found).items() if what.startswith("activations grow"))
    assert "stages.0.blocks.0.0.cpe1.proj.weight" in cause


@pytest.mark.parametrize(("ghn", "equal"), [("ghn2", True), ("ghn2_split", False)])
def test_what_attention_reads(ghn: str, equal: bool) -> None:
    found = inspect("test_vit", ghn, images(160))
    assert ("queries, keys and values are equal" in causes(found)) is equal
    assert any(what.startswith("channels that repeat others") for what in causes(found))


def test_channels_that_nothing_changes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10))
    with torch.no_grad():
        net.get_parameter("0.bias")[:6] = -100
    net[0].requires_grad_(False)  # and so it is kept
    found = inspect(net, images=images(16))
    by_name = {layer.name: layer for layer in found.activations}
    assert by_name["0"].dead == 0 and by_name["1"].dead == 0.75
    assert found.findings[0].what == "channels that no image changes, 75% of 1" and found.findings[0].where == ("1",)
    with torch.no_grad():
        net.get_parameter("0.bias").fill_(-100)
    found = inspect(net, images=images(16))
    assert found.output is not None and found.output.startswith("almost the same")
    assert found.findings[0].what == "the output is the same for all images"
    assert found.findings[0].where[0] == "1"


def test_what_cannot_be_inspected() -> None:
    with pytest.raises(ValueError, match="no images"):
        inspect("test_resnet", images=torch.empty(0, 3, 64, 64))
    with pytest.raises(timm_ghn.GHNError, match="only one tensor"):
        inspect(timm.create_model("test_resnet", features_only=True), images=images(64))


def test_images_that_are_not_square() -> None:
    found = inspect("vit_tiny_patch16_224", images=images(64)[..., :32])
    assert found.output == "ok"


def test_a_single_image() -> None:
    found = inspect("test_resnet", images=images(64, count=1))
    assert found.output == "ok" and all(math.isnan(layer.difference) for layer in found.activations)


def test_judgement() -> None:
    good = torch.tensor([[1.0, 2, 3], [3.0, 2, 1]])
    assert judge(good) == judge(good[:1]) == "ok"
    assert judge(good * 1e4) == "as large as 3e+04"
    assert judge(good / 0) == "not finite"
    assert judge(torch.ones(2, 3)) == "constant over the classes"
    assert judge(good[:1].expand(2, 3)).startswith("almost the same")
    assert judge(good[:, :1]) == "ok", "of a single output"
    assert all(judge(torch.full((2, 1), value)).startswith("almost the same") for value in (0.0, 1.0))
