"""Predicted weights prepared for training."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import timm_ghn
from timm_ghn import PredictionError
from timm_ghn.finetune import PREPARATIONS

pytestmark = pytest.mark.usefixtures("one_thread")


def predicted(name: str, finetune: str | None, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained_cfg="ghn2", ghn_kwargs={"finetune": finetune}, **kwargs)
    # A fresh network's running statistics are those of no data; with its batch's, activations are of their usual size.
    for module in model.modules():
        module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return model


@pytest.mark.parametrize(
    "name", ["resnet18", "regnety_002", "mobilenetv3_small_050", "densenet121", "convnext_atto", "vit_tiny_patch16_224"]
)
def test_diversified_weights_compute_the_same_function(name: str) -> None:
    size = 224 if "vit" in name else 64
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    plain, diversified = predicted(name, None), predicted(name, "diversified")
    with torch.no_grad():
        torch.testing.assert_close(diversified(images), plain(images), rtol=1e-3, atol=1e-3)
    for (key, before), after in zip(plain.named_parameters(), diversified.parameters(), strict=True):
        if key.endswith("bias") or before.ndim == 1:
            assert torch.equal(before, after)


def test_diversified_weights_have_no_copies_where_the_input_has_some() -> None:
    plain, diversified = predicted("resnet18", None), predicted("resnet18", "diversified")

    def distinct(model: nn.Module) -> int:
        return len(model.layer4[1].conv1.weight.flatten(1).unique(dim=0))

    assert (distinct(plain), distinct(diversified)) == (64, 512)
    # Three channels of colour are no copies of one another.
    assert torch.equal(plain.conv1.weight, diversified.conv1.weight)


def test_copies_get_different_gradients() -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    rows = {}
    for finetune in (None, "diversified"):
        model = predicted("resnet18", finetune)
        model(images).logsumexp(1).sum().backward()
        gradient = model.layer3[0].conv1.weight.grad.flatten(1)
        rows[finetune] = (gradient[:64] - gradient[64:128]).norm() / gradient.norm()
    assert rows[None] < 1e-3
    assert rows["diversified"] > 0.1


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "vit_tiny_patch16_224"])
def test_orthogonal_weights_are_orthogonal_at_hes_scale(name: str) -> None:
    model = predicted(name, "orthogonal", num_classes=10)
    plain = predicted(name, None, num_classes=10)
    groups = {f"{key}.weight": getattr(module, "groups", 1) for key, module in model.named_modules()}
    head = model.get_classifier().weight
    for key, weight in model.named_parameters():
        if weight.ndim < 2 or not key.endswith(".weight") or weight is head:
            continue
        matrices = weight.detach().reshape(groups[key], -1, weight[0].numel())
        if matrices.shape[1] > matrices.shape[2]:
            matrices = matrices.mT
        gram = matrices @ matrices.mT
        norm = gram.diagonal(dim1=-2, dim2=-1).mean()
        torch.testing.assert_close(gram / norm, torch.eye(gram.shape[-1]).expand_as(gram), rtol=0, atol=2e-3)
        assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.05) or weight[0].numel() < 10
    assert torch.equal(plain.get_classifier().weight, head)


def test_the_orthogonal_factor_keeps_the_directions_of_the_prediction() -> None:
    plain, orthogonal = predicted("resnet18", None), predicted("resnet18", "orthogonal")
    before, after = plain.layer1[0].conv1.weight.flatten(1), orthogonal.layer1[0].conv1.weight.flatten(1)
    u, s, v = torch.linalg.svd(before, full_matrices=False)
    certain = s > s[0] / 100
    factor = u.mT @ (after / after.norm(dim=1).mean()) @ v.mT
    torch.testing.assert_close(factor.diagonal()[certain], torch.ones(int(certain.sum())), rtol=0, atol=0.1)


@pytest.mark.parametrize("finetune", PREPARATIONS)
def test_preparation_is_decided_by_the_seed(finetune: str) -> None:
    first, second = (predicted("test_resnet", finetune).state_dict() for _ in range(2))
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


def test_the_models_mode_and_statistics_stay() -> None:
    model = timm.create_model("test_resnet").train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    timm_ghn.initialize(model, finetune="diversified")
    assert modes == [module.training for module in model.modules()]
    assert all(map(torch.equal, buffers, model.buffers()))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_unknown_preparation_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ValueError, match="finetune is 'magic'; it must be None or one of orthogonal, diversified"):
        timm.create_model("resnet18", pretrained_cfg="ghn2", ghn_kwargs={"finetune": "magic"})
    with pytest.raises(ValueError, match="magic"):
        timm_ghn.initialize(timm.create_model("test_resnet"), finetune="magic")


def test_a_model_that_cannot_run_is_left_as_it_was() -> None:
    class OnlyTraced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not x.is_meta:
                raise RuntimeError("no real images, please")
            return self.head(self.conv(x).mean((2, 3)))

    model = OnlyTraced()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PredictionError, match=r"which failed \(no real images, please\); pass the input_size"):
        timm_ghn.initialize(model, finetune="diversified")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
