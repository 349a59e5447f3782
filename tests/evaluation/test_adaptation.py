"""A classifier in closed form: exact against direct solutions, for every kind of head, all or nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import timm_ghn  # noqa: F401, installs the hook
from timm_ghn import adapt
from timm_ghn.evaluation.accuracy import accuracy


def images(count: int, classes: int, size: int = 32, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of noise with a colour for each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    colours = torch.randn(classes, 3, 1, 1, generator=torch.Generator().manual_seed(9))
    pixels = 0.5 * torch.randn(count, 3, size, size, generator=generator) + colours[labels]
    return list(zip(pixels.split(16), labels.split(16), strict=True))


def linear(features: int, classes: int, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Identity(), nn.Linear(features, classes, bias=bias)).double()


def penalised(rows: Tensor, labels: Tensor, classes: int, ridge: float, bias: bool) -> tuple[Tensor, Tensor]:
    """Least squares on rows extended by the penalty, by QR: weight and bias of the classes' indicators."""
    wanted = nn.functional.one_hot(labels, classes).double()
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    design = torch.cat((rows, ones), 1) if bias else rows
    penalty = math.sqrt(ridge) * torch.eye(rows.shape[1], design.shape[1], dtype=torch.float64)
    target = torch.cat((wanted, torch.zeros(rows.shape[1], classes, dtype=torch.float64)))
    solution = torch.linalg.lstsq(torch.cat((design, penalty)), target, driver="gelsd").solution.T
    return (solution[:, :-1], solution[:, -1]) if bias else (solution, torch.zeros(classes, dtype=torch.float64))


def test_a_frozen_model_gets_the_same_classifier() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    frozen = copy.deepcopy(model).requires_grad_(False)
    batches = images(64, 4)
    assert adapt(frozen, batches) == adapt(model, batches)
    assert torch.equal(frozen.fc.weight, model.fc.weight) and not frozen.fc.weight.requires_grad


@settings(max_examples=60, deadline=None)
@given(
    features=st.integers(1, 30),
    classes=st.integers(1, 7),
    count=st.integers(1, 60),
    batch=st.integers(1, 25),
    bias=st.booleans(),
    most=st.sampled_from([1, 4096]),  # so that products are summed, or rows kept
    constant=st.booleans(),
    shift=st.sampled_from([0.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_direct_solution(
    features: int, classes: int, count: int, batch: int, bias: bool, most: int, constant: bool, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, features, generator=generator, dtype=torch.float64) + shift
    if constant:
        rows[:, 0] = 3.0
    labels = torch.randint(classes, (count,), generator=generator)
    model = linear(features, classes, bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timm_ghn.evaluation.adaptation._MOST_KEPT", most)
        report = adapt(model, list(zip(rows.split(batch), labels.split(batch), strict=True)))
    weight, offset = penalised(rows, labels, classes, report.ridge, bias)
    expected = rows @ weight.T + offset
    found = model(rows) * report.temperature
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert report.images == count and report.features == features and report.classes == classes
    assert report.missing == [label for label in range(classes) if label not in labels]
    if bias:
        assert not set(model(rows).argmax(1).tolist()) & set(report.missing)


@pytest.mark.parametrize("head", ["ridge", "prototype"])
@pytest.mark.parametrize("features", [5, 40])
def test_its_accuracy_is_that_of_refitting_without_each_image(head: str, features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    rows = torch.randn(30, features, generator=generator, dtype=torch.float64)
    rows[torch.arange(30), labels] += 1.5
    report = adapt(linear(features, 3), [(rows, labels)], head)
    right = 0
    for left_out in range(30):
        others = torch.arange(30) != left_out
        if head == "ridge":
            weight, offset = penalised(rows[others], labels[others], 3, report.ridge, bias=True)
            logits = weight @ rows[left_out] + offset
        else:
            means = torch.stack([rows[others & (labels == label)].mean(0) for label in range(3)])
            logits = -(means - rows[left_out]).square().sum(1)
        right += int(logits.argmax() == labels[left_out])
    assert report.accuracy == pytest.approx(right / 30)
    assert 0.4 < report.accuracy < 1


def test_the_penalty_is_the_one_with_the_least_error_on_images_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (40,), generator=generator)
    noise = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    signal = noise.clone()
    signal[:, 0] += 20 * labels
    assert adapt(linear(30, 2), [(noise, labels)]).ridge > 100 * adapt(linear(30, 2), [(signal, labels)]).ridge


def test_probabilities_say_how_often_it_is_right() -> None:
    """Two classes that overlap: among new images, those given 80 % are right in about 80 % of the cases."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 2
    rows = torch.randn(2000, 3, generator=generator, dtype=torch.float64) + labels[:, None]
    model = linear(3, 2)
    report = adapt(model, [(rows[:1000], labels[:1000])])
    sure, answers = model(rows[1000:]).softmax(1).max(1)
    assert sure.mean().item() == pytest.approx((answers == labels[1000:]).double().mean().item(), abs=0.04)
    assert 0.7 < report.accuracy < 0.9


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout", "levit_128s",
        "deit_tiny_distilled_patch16_224", "repvit_m0_9", "mobilenetv3_small_050", "resnetv2_50", "mixer_s32_224",
        "dla34", "tresnet_m",
    ],
)  # fmt: skip
def test_every_head_of_timm(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    size = timm.get_pretrained_cfg(name).input_size[-1] if "224" in name or "levit" in name or "form" in name else 64
    model = timm.create_model(name, num_classes=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = images(8, 5, size)
    report = adapt(model, batches)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    heads = {key for key in changed if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert heads and all(model.get_parameter(key).shape[0] == 5 for key in heads)
    assert report.images == 8 and model.training


def test_a_predicted_network_learns_colours_in_one_call() -> None:
    model = timm.create_model("test_resnet", pretrained_cfg="ghn2", num_classes=4)
    report = adapt(model, images(120, 4))
    assert report.accuracy > 0.9
    assert accuracy(model, images(80, 4, seed=1)) > 0.9
    assert "120 images of 4 classes" in str(report)


def test_at_creation() -> None:
    kwargs = {"data": images(80, 4)}
    model = timm.create_model("test_resnet", pretrained_cfg="ghn2", num_classes=4, ghn_kwargs=kwargs)
    assert accuracy(model, images(80, 4, seed=1)) > 0.9
    assert "data" in kwargs, "what the caller has is left alone"
    with pytest.raises(ValueError, match="none of the 3 classes"):
        timm.create_model("test_resnet", pretrained_cfg="ghn2", num_classes=3, ghn_kwargs=kwargs)


def test_a_thousand_classes_and_one_image_of_each() -> None:
    rows = torch.randn(1000, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for head in ("ridge", "prototype"):
        model = linear(16, 1000)
        report = adapt(model, [(rows, torch.arange(1000))], head)
        assert math.isnan(report.accuracy)
        share = (model(rows).argmax(1) == torch.arange(1000)).double().mean()
        assert share == 1 if head == "prototype" else share > 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = timm.create_model("test_vit", num_classes=3).to(dtype)
    batches = [(pixels.to(dtype), labels) for pixels, labels in images(64, 3, 160)]
    assert adapt(model, batches).accuracy > 0.8
    assert model.head.weight.dtype == dtype


def once(batches: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    yield from batches


def test_mistakes_change_nothing() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    good = images(20, 3)
    broken = [good[0], (torch.full_like(good[1][0], math.nan), good[1][1])]
    cases: list[tuple[Any, str]] = [
        (once(good), "only once"),
        ([], "no batches"),
        (broken, "NaN"),
        ([good[0], (good[1][0], good[1][1] + 3)], "none of the 3 classes"),
        ([(good[0][0], good[0][1].float())], "integers"),
        ([good[0][0]], "A batch is a tuple of images and labels, not float32 of shape"),
        ([1], "not a int"),
    ]
    for batches, message in cases:
        with pytest.raises(ValueError, match=message):
            adapt(model, batches)
    with pytest.raises(ValueError, match="head is 'svm'; it must be one of ridge, prototype"):
        adapt(model, good, "svm")
    with pytest.raises(ValueError, match="not the logits"):
        adapt(nn.Sequential(model, nn.Softmax(1)), good)
    with pytest.raises(ValueError, match="has no classifier"):
        adapt(timm.create_model("test_resnet", num_classes=0), good)
    with pytest.raises(ValueError, match="a classifier with a bias"):
        adapt(linear(4, 2, bias=False), [(torch.randn(3, 4).double(), torch.zeros(3).long())], "prototype")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
