"""Predicted weights prepared for training."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_ghn
from timm_ghn.hypernet import GHN
from timm_ghn.predictor import Predictor
from timm_ghn.preparation import PREPARATIONS


@functools.cache
def unbounded() -> GHN:
    """Like the published checkpoints, which bound nothing unless they are asked to."""
    ghn = copy.deepcopy(timm_ghn.load_ghn("ghn2"))
    ghn.config = dataclasses.replace(ghn.config, bounded=False)
    return ghn


@functools.cache
def predicted(name: str, finetune: str | None, num_classes: int = 1000) -> Any:
    """The same model every time; its parameters are not to be changed."""
    torch.manual_seed(0)
    # Half as wide as timm's at the end, which the singular values below take an eighth of the time of.
    kwargs = {"channels": (64, 64, 128, 256)} if name == "resnet18" else {}
    build = functools.partial(timm.create_model, name, num_classes=num_classes, **kwargs)
    model, _ = Predictor(unbounded(), preparation=finetune).create(build)
    # A fresh network's running statistics are those of no data; with its batch's, activations are of their usual size.
    for module in model.modules():
        module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return model


MODELS = ("resnet18", "regnety_002", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224")


def weight_matrices(model: Any) -> dict[str, torch.Tensor]:
    """Weights of all layers but the head as matrices [groups, out, in * kernel], in float64."""
    groups = {f"{key}.weight": getattr(module, "groups", 1) for key, module in model.named_modules()}
    return {
        key: weight.detach().double().reshape(groups[key], -1, weight[0].numel())
        for key, weight in model.named_parameters()
        if key.endswith(".weight") and weight.ndim > 1 and weight is not model.get_classifier().weight
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_conditioned_weights_keep_what_is_strong_and_lift_what_is_weak(name: str) -> None:
    plain, conditioned = predicted(name, None), predicted(name, "conditioned")
    after = weight_matrices(conditioned)
    for key, before in weight_matrices(plain).items():
        assert after[key].square().mean().item() == pytest.approx(before.square().mean().item(), rel=1e-4)
        left, values, right = torch.linalg.svd(before, full_matrices=False)
        mean = values.square().mean(-1, keepdim=True).sqrt()
        expected = (values**2 + (0.3 * mean) ** 2).sqrt()
        # Groups keep their relative sizes.
        expected *= values.norm() / expected.norm()
        rotated = left.mT @ after[key] @ right.mT
        strong = values > mean
        found = rotated.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(found[strong], expected[strong], rtol=0.02, atol=0)
        least = torch.linalg.svdvals(after[key])[:, -1:] / mean
        assert least.min() > 0.25
    # All that is no layer's weight is as predicted.
    for (key, old), new in zip(plain.named_parameters(), conditioned.parameters(), strict=True):
        assert key in after or torch.equal(old, new)


def test_conditioned_weights_have_no_copies() -> None:
    plain, conditioned = predicted("resnet18", None), predicted("resnet18", "conditioned")

    def distinct(model: Any) -> int:
        return len(model.layer4[1].conv1.weight.flatten(1).unique(dim=0))

    assert (distinct(plain), distinct(conditioned)) == (64, 256)


def test_copies_get_different_gradients() -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    rows = {}
    for finetune in (None, "conditioned"):
        model = copy.deepcopy(predicted("resnet18", finetune))
        model(images).logsumexp(1).sum().backward()
        gradient = model.layer3[0].conv1.weight.grad.flatten(1)
        rows[finetune] = (gradient[:64] - gradient[64:128]).norm() / gradient.norm()
    assert rows[None] < 1e-3
    assert rows["conditioned"] > 0.1


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "vit_tiny_patch16_224"])
def test_orthogonal_weights_are_orthogonal_at_hes_scale(name: str) -> None:
    model = predicted(name, "orthogonal", num_classes=10)
    plain = predicted(name, None, num_classes=10)
    for matrices in weight_matrices(model).values():
        rows = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
        gram = rows @ rows.mT
        norm = gram.diagonal(dim1=-2, dim2=-1).mean()
        torch.testing.assert_close(gram / norm, torch.eye(gram.shape[-1]).expand_as(gram).double(), rtol=0, atol=1e-5)
        assert matrices.square().mean().sqrt().item() == pytest.approx((2 / matrices.shape[2]) ** 0.5, rel=1e-4)
    assert torch.equal(plain.get_classifier().weight, model.get_classifier().weight)


def test_the_orthogonal_factor_keeps_the_directions_of_the_prediction() -> None:
    plain, orthogonal = predicted("resnet18", None), predicted("resnet18", "orthogonal")
    before, after = plain.layer1[0].conv1.weight.flatten(1), orthogonal.layer1[0].conv1.weight.flatten(1)
    u, s, v = torch.linalg.svd(before, full_matrices=False)
    certain = s > s[0] / 100
    factor = u.mT @ (after / after.norm(dim=1).mean()) @ v.mT
    torch.testing.assert_close(factor.diagonal()[certain], torch.ones(int(certain.sum())), rtol=0, atol=0.1)


def outputs(model: nn.Module, size: int = 64) -> torch.Tensor:
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(images)
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16", "eca_nfnet_l0"])
def test_networks_in_which_nothing_normalises_are_bounded_by_default(name: str) -> None:
    largest = outputs(timm.create_model(name, pretrained_cfg="ghn2", num_classes=10), 224).abs().max()
    assert 1e-3 < largest < 100


def test_bounded_layers_without_a_norm_compute_the_same_at_another_scale() -> None:
    def build(finetune: str | None) -> nn.Module:
        widths = [64, "M", 128, 128, 256, "M", 512, 512]
        model: nn.Module = timm.models.vgg.VGG(widths, num_classes=10, mlp_ratio=1 / 16)
        timm_ghn.initialize(model, unbounded(), finetune=finetune, input_size=(3, 64, 64))
        return model

    plain, bounded = build(None), build("bounded")
    copies = [1, 1, 2, 2, 4, 8, 8, 4, 64]  # of the input channels of each layer
    scale = math.prod(copies) ** -0.5
    torch.testing.assert_close(outputs(bounded), scale * outputs(plain), rtol=1e-3, atol=1e-5)
    before, after = (model.get_parameter("features.7.weight") for model in (plain, bounded))
    torch.testing.assert_close(after, before / 2**0.5)


def test_bounded_gains_of_standardised_convolutions() -> None:
    """Their own scale counts for nothing, and zeros, which switch a branch off, stay."""
    plain, bounded = (predicted("eca_nfnet_l0", finetune) for finetune in (None, "bounded"))
    torch.testing.assert_close(bounded.stages[1][0].downsample.conv.gain, plain.stages[1][0].downsample.conv.gain / 2)
    assert torch.equal(bounded.stages[1][0].downsample.conv.weight, plain.stages[1][0].downsample.conv.weight)
    assert not bounded.stages[1][0].conv3.gain.any()
    assert outputs(plain).abs().max() > 100 * outputs(bounded).abs().max()
    again = copy.deepcopy(bounded)
    timm_ghn.initialize(again, unbounded(), finetune="bounded")
    assert torch.equal(again.stages[1][0].downsample.conv.gain, bounded.stages[1][0].downsample.conv.gain)


def test_bounded_branches_without_a_norm() -> None:
    plain, bounded = (dict(predicted("davit_tiny", finetune).named_parameters()) for finetune in (None, "bounded"))
    encodings = {name for name in plain if ".cpe" in name}
    changed = {name for name in plain if not torch.equal(plain[name], bounded[name])}
    assert changed and changed <= encodings and {name.rpartition(".")[2] for name in changed} == {"weight", "bias"}
    branches = sum(name.endswith("weight") for name in changed)
    for name in changed:
        torch.testing.assert_close(bounded[name], plain[name] / branches)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv3_small_050"])
def test_bounded_networks_with_norms_are_as_predicted(name: str) -> None:
    plain, bounded = (predicted(name, finetune, num_classes=10).state_dict() for finetune in (None, "bounded"))
    torch.manual_seed(0)
    by_default = timm.create_model(name, pretrained_cfg="ghn2", num_classes=10).state_dict()
    assert all(torch.equal(plain[key], bounded[key]) and torch.equal(plain[key], by_default[key]) for key in plain)


@pytest.mark.parametrize("finetune", ["orthogonal", "conditioned"])
def test_what_is_bounded_by_default_can_be_prepared_as_well(finetune: str) -> None:
    def scales(ghn: str | GHN, finetune: str | None) -> dict[str, float]:
        model = timm.models.davit.DaVit(depths=(1, 1), embed_dims=(32, 96), num_heads=(1, 3), num_classes=10)
        prediction = timm_ghn.predict(model, ghn, finetune=finetune)
        return {name: tensor.square().mean().sqrt().item() for name, tensor in prediction.items()}

    (plain, prepared), (bounded, both) = (
        [scales(ghn, name) for name in (None, finetune)] for ghn in (unbounded(), "ghn2")
    )
    assert bounded != plain
    for name, scale in both.items():
        assert scale * plain[name] == pytest.approx(bounded[name] * prepared[name], rel=1e-3), name


@pytest.mark.parametrize("finetune", PREPARATIONS)
def test_preparation_is_decided_by_the_seed(finetune: str) -> None:
    first, second = (predicted.__wrapped__("test_resnet", finetune).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("finetune", PREPARATIONS)
def test_predict_and_initialize_prepare_as_well(finetune: str) -> None:
    model = timm.create_model("test_vit", num_classes=10)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    prediction = timm_ghn.predict(model, finetune=finetune)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    torch.manual_seed(3)
    report = timm_ghn.initialize(model, finetune=finetune)
    assert report.predicted == prediction.report.predicted
    for name, tensor in prediction.items():
        assert torch.equal(model.get_parameter(name), tensor)


def test_options_mean_the_same_everywhere() -> None:
    """`predict`, `initialize` and what both are made of take the same options, with the same defaults."""
    of_predict, of_initialize, of_predictor = (
        list(inspect.signature(function).parameters.values())[skipped:]
        for function, skipped in ((timm_ghn.predict, 2), (timm_ghn.initialize, 2), (Predictor, 1))
    )
    assert of_predict == of_initialize
    renamed = [option.replace(name="finetune") if option.name == "preparation" else option for option in of_predictor]
    assert of_predict == renamed


def test_an_unknown_preparation_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ValueError, match="finetune is 'magic'; it must be None or one of orthogonal, bounded, cond"):
        timm.create_model("resnet18", pretrained_cfg="ghn2", ghn_kwargs={"finetune": "magic"})
    with pytest.raises(ValueError, match="magic"):
        timm_ghn.initialize(timm.create_model("test_resnet"), finetune="magic")
