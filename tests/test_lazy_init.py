"""Creation without random numbers that a prediction would overwrite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from timm_ghn import GHN, initialize, load_ghn, predict
from timm_ghn.errors import GHNError
from timm_ghn.lazy_init import DeferredFills
from timm_ghn.predictor import Predictor


@pytest.fixture(scope="module")
def ghn(ghn_file: Path) -> GHN:
    return load_ghn(ghn_file)


# Between them: batch norm buffers, layer scale, tokens, relative position tables and indices, rotary buffers,
# standardised convolutions, an LSTM, frozen parameters, a head without biases.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_vit3": {},
    "test_efficientnet_evos": {},
    "test_nfnet": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1)},
    "maxvit_pico_rw_256": {},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "cait_xxs24_224": {"depth": 2},
    "eva02_tiny_patch14_224": {"depth": 2},
    "vit_small_patch16_dinov3": {"depth": 2},
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},
    "levit_128s": {},
    "mobilevitv2_050": {},
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_predicted_parameters_differ_from_timms(name: str, ghn: GHN, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random numbers that are always the same, what is kept has to be exactly timm's."""
    fill = torch.Tensor.fill_
    for function in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, function, lambda tensor, *args, **kwargs: fill(tensor, 0.5))
    kwargs = ARCHITECTURES[name]
    plain = timm.create_model(name, **kwargs)
    model, report = Predictor(ghn).create(lambda: timm.create_model(name, **kwargs))
    assert type(model) is type(plain) and model.training
    assert report.predicted.keys() | report.kept.keys() == dict(plain.named_parameters()).keys()
    prediction = predict(plain, ghn)
    state, expected = model.state_dict(), plain.state_dict(keep_vars=True) | dict(prediction)
    assert state.keys() == expected.keys()
    assert [key for key in state if not torch.equal(state[key], expected[key])] == []
    buffers = dict(plain.named_buffers())
    assert [key for key, buffer in model.named_buffers() if not torch.equal(buffer, buffers[key])] == []
    assert {k: p.requires_grad for k, p in model.named_parameters()} == {
        k: p.requires_grad for k, p in plain.named_parameters()
    }


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224", "test_vit3"])
def test_random_numbers(name: str, ghn: GHN) -> None:
    """They come from torch's generator, for what is kept; for a model that is all predicted none are drawn."""

    def create() -> nn.Module:
        torch.manual_seed(1)
        return Predictor(ghn).create(lambda: timm.create_model(name))[0]

    one, other = create().state_dict(), create().state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    before = torch.get_rng_state()
    model, report = Predictor(ghn, head="predict").create(lambda: timm.create_model(name))
    random = any(parameter.std() > 0 for key, parameter in model.named_parameters() if key in report.kept)
    assert torch.equal(torch.get_rng_state(), before) == (not random)


def test_kept_parameters_have_timms_distribution(ghn: GHN) -> None:
    model, _ = Predictor(ghn, head="keep").create(lambda: timm.create_model("test_vit", num_classes=64))
    plain = timm.create_model("test_vit", num_classes=64)
    weight, bias = (model.get_parameter(f"head.{name}") for name in ("weight", "bias"))
    assert weight.std().item() == pytest.approx(plain.head.weight.std().item(), rel=0.1)
    assert torch.equal(bias, plain.head.bias)


# The mode on its own


def reads(look: Callable[[torch.Tensor], object]) -> float:
    """The first value a tensor filled with 3 has after `look` while filling is deferred; NaN if it was not filled."""
    with DeferredFills():
        tensor = torch.full((4,), torch.nan)
        tensor.fill_(3.0)
        look(tensor)
        pointer = tensor.detach()
    return torch.stack((pointer,))[0, 0].item()


@pytest.mark.parametrize(
    "look",
    [
        lambda t: t + 1, lambda t: t.tolist(), lambda t: t.numpy(), lambda t: t[:1].clone(),
        lambda t: torch.cat([t, t]), lambda t: float(t[0]), lambda t: repr(t), lambda t: t.to(torch.float64),
        lambda t: t.copy_(t * 1),
        lambda t: t.data.mul(2), lambda t: nn.Parameter(t).sum(), lambda t: torch.zeros(4).add_(t),
        lambda t: nn.functional.linear(t[None], weight=t[None]), lambda t: t[1:].__setitem__(0, 7.0),
    ],
)  # fmt: skip
def test_a_look_at_a_tensor_fills_it(look: Callable[[torch.Tensor], object]) -> None:
    assert reads(look) == 3.0


@pytest.mark.parametrize(
    "look",
    [lambda t: t.shape, lambda t: t.numel(), lambda t: nn.Parameter(t), lambda t: t.data, lambda t: t.view(2, 2)],
)
def test_other_things_do_not(look: Callable[[torch.Tensor], object]) -> None:
    assert torch.isnan(torch.tensor(reads(look)))


def test_order_is_kept() -> None:
    def fill(tensors: list[torch.Tensor]) -> None:
        torch.manual_seed(0)
        for tensor in tensors:
            nn.init.kaiming_uniform_(tensor)
            nn.init.constant_(tensor.narrow(0, 0, 1), 5.0)
        for tensor in reversed(tensors):
            tensor.narrow(0, 1, 2).normal_().mul_(2).add_(1)
            tensor.view(-1).narrow(0, 5, 1).zero_()

    expected, deferred = ([torch.zeros(3, 2) for _ in range(3)] for _ in range(2))
    fill(expected)
    with DeferredFills() as fills:
        fill(deferred)
    assert not any(tensor.any() for tensor in deferred)
    fills.run()
    assert all(torch.equal(one, other) for one, other in zip(expected, deferred, strict=True))


def test_a_tensor_that_shares_memory_is_not_forgotten() -> None:
    with DeferredFills() as fills:
        whole = torch.zeros(4)
        whole.fill_(1.0)
        part = whole[:2]
        alone = torch.zeros(4)
        alone.fill_(1.0)
    fills.forget([part, alone])
    fills.run()
    assert whole.tolist() == [1.0] * 4 and alone.tolist() == [0.0] * 4


def test_a_tensor_that_is_given_other_data_keeps_it() -> None:
    with DeferredFills() as fills:
        layer = nn.Linear(3, 3)
        layer.weight.data = torch.eye(3)
    fills.run()
    assert torch.equal(layer.weight, torch.eye(3))


# When something goes wrong


def test_no_model_is_left_unfilled_by_an_error(ghn: GHN) -> None:
    built = []

    def build() -> nn.Module:
        built.append(nn.Linear(3, 5))
        with torch.no_grad():
            built[0].weight.fill_(2.0)
        return nn.Conv2d(4, 4, 3)

    with pytest.raises(GHNError):
        Predictor(ghn, input_size=(3, 8, 8)).create(build)
    assert (built[0].weight == 2.0).all()


def test_a_wrong_head_costs_no_time(ghn: GHN) -> None:
    with pytest.raises(ValueError, match="head is 'nonsense'"):
        Predictor(ghn, head="nonsense")


def test_the_same_as_initialize(ghn: GHN) -> None:
    model, report = Predictor(ghn, head="predict").create(lambda: timm.create_model("test_resnet"))
    other = timm.create_model("test_resnet")
    expected = initialize(other, ghn, head="predict")
    assert (report.predicted, report.kept) == (expected.predicted, expected.kept)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert set(report.seconds) == {"build", "trace", "predict", "fill", "assign"}
