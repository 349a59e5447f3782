"""What models compute from parameters: weights that are made of others, and state that follows them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from timm_ghn import GHN, PredictionError, initialize, load_ghn, predict
from timm_ghn.predictor import Predictor

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def ghn(ghn_file: Path) -> GHN:
    return load_ghn(ghn_file)


def network(change: Callable[[Any], nn.Module] = lambda layer: layer, index: int = 2) -> Any:
    """A sequential model, of no type: what its layers have depends on the change."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 24, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 10),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the older forms of torch's norms
        net[index] = change(net[index])
    return net


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- norms of weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_spectral_norm_holds_for_the_predicted_weight(norm: Any, training: bool, ghn: GHN) -> None:
    net = network(norm).train(training)
    initialize(net, ghn, input_size=32)
    assert all(module.training == training for module in net.modules())
    found = net.eval()[2]
    net(IMAGES)
    assert torch.linalg.matrix_norm(found.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("finetune", [None, "orthogonal"])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_a_weight_norms_weight_is_what_was_predicted(
    norm: Any, dim: int | None, finetune: str | None, ghn: GHN
) -> None:
    net = network(lambda layer: norm(layer, dim=dim))
    names = [name for name, parameter in net.named_parameters() if name.startswith("2.") and parameter.numel() > 500]
    torch.manual_seed(1)
    prediction = predict(net, ghn, input_size=32, finetune=finetune)
    torch.manual_seed(1)
    report = initialize(net, ghn, input_size=32, finetune=finetune)
    net(IMAGES)
    torch.testing.assert_close(net[2].weight, prediction[names[0]])
    assert not report.kept and report.predicted_fraction == 1
    for name, tensor in prediction.items():
        assert torch.equal(net.get_parameter(name), tensor)


def test_a_magnitude_that_was_fixed_stays(ghn: GHN) -> None:
    net = network(parametrizations.weight_norm)
    magnitude = net[2].parametrizations.weight.original0.requires_grad_(False).fill_(1)
    report = initialize(net, ghn, input_size=32)
    assert (magnitude == 1).all() and "frozen" in report.kept["2.parametrizations.weight.original0"]
    torch.testing.assert_close(net[2].weight.flatten(1).norm(dim=1), torch.ones(24))


def test_grouped_layers_that_compute_their_weight_are_prepared_group_by_group(ghn: GHN) -> None:
    net = network(parametrizations.weight_norm)
    initialize(net, ghn, input_size=32, finetune="orthogonal")
    for group in net[2].weight.detach().double().view(2, 12, -1):
        gram = group @ group.mT
        torch.testing.assert_close(gram / gram.diagonal().mean(), torch.eye(12).double(), rtol=0, atol=1e-5)


# ---- other parametrizations -----------------------------------------------------------------------------------------


class LowRankUpdate(nn.Module):
    """An adapter as a parametrization."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, weight.shape[1])), nn.Parameter(torch.zeros(len(weight), 4))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu()


class Refusing(Symmetric):
    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.allclose(x, x.mT):
            raise ValueError("not symmetric")
        return x.triu()


def parametrized(make: Callable[[torch.Tensor], nn.Module]) -> Callable[[Any], nn.Module]:
    return lambda layer: parametrize.register_parametrization(layer, "weight", make(layer.weight))


def test_a_parametrizations_own_parameters_are_kept(ghn: GHN) -> None:
    net = network(parametrized(LowRankUpdate), 6)
    before, prediction = state(net), predict(net, ghn, input_size=32)
    report = initialize(net, ghn, input_size=32)
    own = {"6.parametrizations.weight.0.a", "6.parametrizations.weight.0.b"}
    assert report.kept == dict.fromkeys(own, "parameter of a parametrization")
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in own)
    assert torch.equal(net[6].weight, prediction["6.parametrizations.weight.original"])


def test_a_right_inverse_is_what_makes_the_original(ghn: GHN) -> None:
    net = network(lambda layer: parametrized(lambda weight: Symmetric())(nn.Linear(24, 24)), 6)
    net[8] = nn.Linear(24, 10)
    plain = network(lambda layer: nn.Linear(24, 24), 6)
    plain[8] = nn.Linear(24, 10)
    initialize(net, ghn, input_size=32)
    assert torch.equal(net[6].parametrizations.weight.original, predict(plain, ghn, input_size=32)["6.weight"].triu())


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (parametrizations.orthogonal, "_Orthogonal"),
        (lambda layer: parametrized(lambda weight: Refusing())(symmetric(layer)), "Refusing"),
    ],
    ids=["orthogonal", "refusing"],
)
def test_a_layer_that_cannot_take_on_a_weight_is_kept(change: Any, kind: str, ghn: GHN) -> None:
    net = network(lambda layer: change(nn.Linear(24, 24)), 6)
    net[8] = nn.Linear(24, 10)
    before = state(net)
    report = initialize(net, ghn, input_size=32)
    assert report.kept == {
        "6.parametrizations.weight.original": f"its parametrization, {kind}, cannot take on a given weight"
    }
    after = net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("6.param"))
    assert not torch.equal(after["2.weight"], before["2.weight"])


def symmetric(layer: nn.Linear) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(layer.weight + layer.weight.mT)
    return layer


def test_a_pruned_layers_mask_stays_and_its_weight_follows(ghn: GHN) -> None:
    net = network(lambda layer: prune.l1_unstructured(layer, "weight", 0.5))
    mask = net[2].weight_mask.clone()
    prediction = predict(net, ghn, input_size=32)
    initialize(net, ghn, input_size=32)
    assert torch.equal(net[2].weight_mask, mask)
    assert torch.equal(net[2].weight, prediction["2.weight_orig"] * mask)  # before any forward pass


# ---- other state ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch is about to move this to a package of its own
def test_a_quantizer_of_a_weight_sees_the_new_one(ghn: GHN) -> None:
    quantization: Any = pytest.importorskip("torch.ao.quantization")
    net = network().train()
    net.qconfig = quantization.get_default_qat_qconfig("x86")
    net = quantization.prepare_qat(net)
    net(IMAGES)
    net.apply(quantization.disable_observer)
    initialize(net, ghn, input_size=32)
    assert not net[2].weight_fake_quant.observer_enabled.any()
    weight, quantized = net[2].weight.detach(), net[2].weight_fake_quant(net[2].weight).detach()
    step = weight.flatten(1).abs().amax(1) / 127
    assert ((weight - quantized).flatten(1).abs().amax(1) <= step).all()


def test_a_table_that_was_looked_up_once_is_looked_up_again(ghn: GHN) -> None:
    biased = GHN(type(ghn.config)(**{**ghn.config.to_dict(), "position_bias": 0.5}))
    model = timm.create_model("levit_128s", num_classes=10).eval()
    with torch.no_grad():
        images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        model(images)
        initialize(model, biased)
        cached = model(images)
        fresh = model.train().eval()(images)
    assert torch.equal(cached, fresh)


def test_casts_that_autocast_remembers_are_made_again(ghn: GHN) -> None:
    net = network()
    with torch.autocast("cpu", torch.bfloat16):
        net(IMAGES)
        initialize(net, ghn, input_size=32)
        inside = net(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(IMAGES), inside)


class Momentum(nn.Module):
    """An encoder with a copy of itself that follows it, and a buffer that remembers a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.online = network()
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.norm = nn.BatchNorm1d(10)
        self.register_buffer("start", self.online[6].weight.detach().clone())

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(self.online(x))


def test_copies_of_a_parameter_follow_it_or_say_so(ghn: GHN) -> None:
    model = Momentum()
    statistics = state(model.norm)
    target = state(model.target)
    report = initialize(model, ghn, input_size=32)
    assert torch.equal(model.get_buffer("start"), model.online[6].weight)
    assert {report.kept[f"target.{name}"] for name in target} == {"copy of a predicted parameter: copy it again"}
    assert all(torch.equal(value, target[name]) for name, value in model.target.state_dict().items())
    for name in ("running_mean", "running_var"):  # as constant as the norm's bias and weight once were
        assert torch.equal(model.norm.state_dict()[name], statistics[name])


# ---- weights that are zero ------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A layer with a low-rank adapter beside it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.a, self.b = nn.Linear(layer.in_features, 4), nn.Linear(4, layer.out_features)
        nn.init.zeros_(self.b.weight)
        nn.init.zeros_(self.b.bias)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x) + 0.5 * self.b(self.a(x))


class Branch(nn.Module):
    """A residual branch that is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(24, 24), nn.Linear(24, 24)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.last(self.first(x).relu())


@pytest.mark.parametrize("index", [6, 8])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("created", [False, True])
def test_an_adapter_that_adds_nothing_still_adds_nothing(index: int, frozen: bool, created: bool, ghn: GHN) -> None:
    def build() -> Any:
        net = network(Adapted, index)
        net[index].layer.requires_grad_(not frozen)
        return net

    net: Any
    if created:
        net, report = Predictor(ghn, input_size=(3, 32, 32)).create(build)
    else:
        report = initialize(net := build(), ghn, input_size=32)
    assert {name for name, reason in report.kept.items() if "adds nothing" in reason} == {
        f"{index}.b.weight",
        f"{index}.b.bias",
    }
    assert not net[index].b.weight.any() and not net[index].b.bias.any()
    assert f"{index}.a.weight" in report.predicted and (f"{index}.layer.weight" in report.predicted) != frozen


def test_adapters_in_the_residuals_of_a_frozen_network_still_add_nothing(ghn: GHN) -> None:
    branch = Branch()
    net = nn.Sequential(*network().requires_grad_(False)[:6], branch, nn.Linear(24, 10))
    report = initialize(net, ghn, input_size=32)
    assert "adds nothing" in report.kept["6.last.weight"] and "6.last.bias" in report.predicted
    assert not branch.last.weight.any()


def test_zeros_that_only_begin_training_are_predicted(ghn: GHN) -> None:
    branch, head = Branch(), nn.Linear(24, 10)
    net = nn.Sequential(*network()[:6], branch, head)
    nn.init.zeros_(head.weight)
    assert initialize(net, ghn, input_size=32).predicted_fraction == 1
    assert branch.last.weight.any() and head.weight.any()


@pytest.mark.parametrize("name", ["gcresnext26ts", "mixer_s32_224", "samvit_base_patch16_224"])
def test_timms_zeros_are_predicted(name: str, ghn: GHN) -> None:
    """Those of a global context's last layer, a head, and tables that queries are multiplied with."""
    model, report = Predictor(ghn).create(lambda: timm.create_model(name, num_classes=10))
    assert not [reason for reason in report.kept.values() if "adds nothing" in reason]
    assert all(model.get_parameter(key).any() for key in report.predicted if key.endswith("weight"))


# ---- what cannot be written -----------------------------------------------------------------------------------------


def replaced(make: Callable[[torch.Tensor], torch.Tensor], index: int = 2) -> nn.Module:
    net: nn.Module = network()
    layer = net.get_submodule(str(index))
    layer.weight = nn.Parameter(make(layer.get_parameter("weight").detach()))
    return net


@pytest.mark.parametrize(
    ("net", "name", "reason"),
    [
        (replaced(lambda w: w[:1].expand(w.shape)), "2.weight", "an expanded view: its elements share memory"),
        (replaced(lambda w: w.to(torch.complex64), 6), "6.weight", "torch.complex64"),
        (replaced(lambda w: w.to_sparse(), 6), "6.weight", "torch.sparse_coo"),
    ],
    ids=["expanded", "complex", "sparse"],
)
def test_parameters_that_take_no_values_are_kept(net: nn.Module, name: str, reason: str, ghn: GHN) -> None:
    before = net.get_parameter(name).detach().clone()
    report = initialize(net, ghn, input_size=32)
    assert list(report.kept) == [name] and reason in report.kept[name]
    assert torch.equal(net.get_parameter(name).detach().to_dense(), before.to_dense())


def test_parameters_in_the_same_memory_are_written_once(ghn: GHN) -> None:
    net = network()
    net[6] = nn.Linear(24, 24)
    net[7] = nn.Linear(24, 24)
    net[8] = nn.Linear(24, 10)
    net[7].weight = nn.Parameter(net[6].weight.data.t())
    prediction = predict(net, ghn, input_size=32)
    report = initialize(net, ghn, input_size=32)
    assert report.kept == {"7.weight": "shares memory with another parameter"}
    assert torch.equal(net[7].weight.t(), prediction["6.weight"])


def test_slices_of_one_tensor_are_parameters_like_others(ghn: GHN) -> None:
    net = network()
    flat = torch.zeros(48, 80)
    net[6], net[8] = nn.Linear(24, 48), nn.Linear(48, 10)
    net[6].weight = nn.Parameter(flat[:, 8:32])
    net[2].weight = nn.Parameter(flat[:24, 32:68].view(24, 4, 3, 3))
    prediction = predict(net, ghn, input_size=32)
    assert initialize(net, ghn, input_size=32).predicted_fraction == 1
    assert all(torch.equal(net.get_parameter(name), tensor) for name, tensor in prediction.items())


def test_parameters_made_in_inference_mode_are_written(ghn: GHN) -> None:
    with torch.inference_mode():
        net = network()
    prediction = predict(net, ghn, input_size=32)
    initialize(net, ghn, input_size=32)
    assert all(torch.equal(net.get_parameter(name), tensor) for name, tensor in prediction.items())


def test_tensors_of_other_kinds_are_refused_before_anything_is_written(ghn: GHN) -> None:
    class Wrapped(torch.Tensor):
        """A tensor that handles every function itself, as sharded and quantized ones do."""

        @classmethod
        def __torch_dispatch__(  # type: ignore[override]  # torch's own is no method
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.empty_like.default:
                return torch.empty(args[0].shape, device="meta")
            raise RuntimeError("no other function of torch works on this")

    net = network()
    net[6]._parameters["weight"] = torch.Tensor._make_subclass(Wrapped, net[6].weight.detach(), True)
    before = net[0].weight.detach().clone()
    with pytest.raises(PredictionError, match=r"6.weight is a Wrapped.*before the model is sharded or quantized"):
        initialize(net, ghn, input_size=32)
    assert torch.equal(net[0].weight, before)


def test_values_too_large_for_the_models_type_are_refused(ghn: GHN) -> None:
    large = copy.deepcopy(ghn)
    nn.init.constant_(large.get_parameter("bias_class.1.bias"), 1e6)
    large.config = type(ghn.config)(**{**ghn.config.to_dict(), "weight_norm": False})
    net = network().half()
    before = state(net)
    with pytest.raises(PredictionError, match=r"8.bias is too large for torch.float16"):
        initialize(net, large, input_size=32)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
