"""Prediction and assignment on real timm models, with a small random GHN for ten classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from timm_ghn import GHN, GHNConfig, PredictionError, TraceError, initialize, load_ghn, predict


@pytest.fixture(scope="module")
def ghn(ghn_file: Path) -> GHN:
    return load_ghn(ghn_file)


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {}),
        ("mobilenetv3_small_050", {}),
        ("convnext_atto", {}),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4}),
        ("mixer_s32_224", {}),
        ("regnetx_002", {"features_only": True}),
        ("dla46_c", {}),
    ],
)
def test_every_parameter_is_accounted_for_and_written(name: str, kwargs: dict[str, Any], ghn: GHN) -> None:
    kwargs = kwargs if "features_only" in kwargs else {"num_classes": 10, **kwargs}
    model = timm.create_model(name, **kwargs).eval()
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    prediction = predict(model, ghn)
    assert all(torch.equal(value, initial[key]) for key, value in model.state_dict().items())

    report = initialize(model, ghn)
    parameters = dict(model.named_parameters())
    assert report.predicted.keys() | report.kept.keys() == parameters.keys()
    assert not report.predicted.keys() & report.kept.keys()
    assert report.predicted_fraction > 0.99
    for key, parameter in parameters.items():
        assert torch.equal(parameter, prediction[key] if key in prediction else initial[key]), key
    for key, value in model.named_buffers():
        assert torch.equal(value, initial[key]), key
    assert "predicted" in str(report)


def test_the_same_checkpoint_predicts_the_same_numbers(ghn: GHN) -> None:
    first, second = (predict(timm.create_model("resnet18", num_classes=10), ghn) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_convnext"])
def test_a_prediction_can_be_saved_and_changed(name: str, ghn: GHN, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=10)
    prediction = predict(model, ghn)
    tensors = dict(prediction)
    assert all(tensor.is_contiguous() and tensor.shape == prediction.shapes[key] for key, tensor in tensors.items())
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == len(tensors)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values())
    save_file(tensors, tmp_path / "weights.safetensors")
    initialize(model, ghn)
    for key, tensor in load_file(tmp_path / "weights.safetensors").items():
        assert torch.equal(tensor, model.get_parameter(key))
        tensors[key].zero_()
        assert torch.equal(prediction[key], tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_models_dtype_is_kept(dtype: torch.dtype, ghn: GHN) -> None:
    model = timm.create_model("resnet18", num_classes=10).to(dtype)
    initialize(model, ghn)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_on_cuda_takes_predictions_from_the_cpu(ghn: GHN) -> None:
    model = timm.create_model("resnet18", num_classes=10).cuda()
    expected = predict(model, ghn)
    initialize(model, ghn)
    assert torch.equal(model.conv1.weight.cpu(), expected["conv1.weight"])


# ---- the head -------------------------------------------------------------------------------------------------------


def test_a_head_of_other_classes_is_kept(ghn: GHN) -> None:
    model = timm.create_model("resnet18", num_classes=7)
    report = initialize(model, ghn)
    assert report.kept == dict.fromkeys(("fc.weight", "fc.bias"), "head: the checkpoint has 10 classes")


def test_a_head_can_be_forced(ghn: GHN) -> None:
    prediction = predict(timm.create_model("resnet18", num_classes=13), ghn, head="predict")
    weight = prediction["fc.weight"]
    assert weight.shape == (13, 512)
    assert torch.equal(weight[10:], weight[:3])


def test_a_head_can_be_kept(ghn: GHN) -> None:
    assert predict(timm.create_model("resnet18", num_classes=10), ghn, head="keep").report.kept.keys() == {
        "fc.weight",
        "fc.bias",
    }


def test_an_unknown_head_policy_is_refused(ghn: GHN) -> None:
    with pytest.raises(ValueError, match="must be one of auto, predict, keep"):
        predict(nn.Linear(3, 3), ghn, head="maybe", input_size=(3,))


# ---- constants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field", "reason"),
    [
        ("convnext_atto", "branch_scale", "scale of a residual branch"),
        ("poolformer_s12", "branch_scale", "scale of a residual branch"),
        ("rdnet_tiny", "branch_scale", "scale of a residual branch"),  # of a dense connection
        ("beit_base_patch16_224", "position_bias", "relative position bias"),
        ("coatnet_nano_rw_224", "position_bias", "relative position bias"),
        ("efficientformerv2_s0", "position_bias", "relative position bias"),  # before talking heads
        ("gcvit_xxtiny", "position_bias", "relative position bias"),
        ("levit_128s", "position_bias", "relative position bias"),
        ("maxvit_tiny_tf_224", "position_bias", "relative position bias"),  # through matrices, not indices
        ("swin_tiny_patch4_window7_224", "position_bias", "relative position bias"),
        ("tiny_vit_5m_224", "position_bias", "relative position bias"),
    ],
)
def test_constants_take_the_value_the_ghn_was_trained_with(name: str, field: str, reason: str, ghn: GHN) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    kept = predict(model, ghn).report.kept
    constants = {key for key in kept if kept[key] == reason}
    assert constants
    prediction = predict(model, GHN(GHNConfig.from_dict({**ghn.config.to_dict(), field: 0.5})))
    assert all((prediction[key] == 0.5).all() for key in constants)
    assert kept.keys() - prediction.report.kept.keys() == constants


@pytest.mark.parametrize(
    "name",
    [
        "swinv2_tiny_window8_256",  # temperatures of logits that a bias is added to
        "halonet26t",  # tables that queries are multiplied with
        "hgnetv2_b0",  # affine layers
        "dm_nfnet_f0",  # branches of a network without norms
        "resmlp_12_224",
    ],
)
def test_what_only_looks_like_a_constant_is_left_alone(name: str, ghn: GHN) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    kept = predict(model, ghn).report.kept
    trained = GHN(dataclasses.replace(ghn.config, branch_scale=0.5, position_bias=0.5))
    assert predict(model, trained).report.kept == kept


# ---- all or nothing -------------------------------------------------------------------------------------------------


def test_nothing_is_written_when_a_prediction_is_not_finite(ghn_file: Path) -> None:
    broken = GHN(load_ghn(ghn_file).config)
    last = broken.get_parameter("bias_class.1.bias")  # on which only the very last parameter depends
    torch.nn.init.constant_(last, torch.nan)
    model = timm.create_model("resnet18", num_classes=10)
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PredictionError, match=r"fc.bias is not finite"):
        initialize(model, broken)
    assert all(torch.equal(value, initial[key]) for key, value in model.state_dict().items())


def test_nothing_is_written_when_the_forward_pass_fails(ghn: GHN) -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    initial = model.cls_token.clone()
    with pytest.raises(TraceError):
        initialize(model, ghn, input_size=(3, 50, 50))
    assert torch.equal(model.cls_token, initial)


def test_integer_parameters_are_refused(ghn: GHN) -> None:
    model = nn.Linear(3, 3)
    model.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    assert predict(model, ghn, input_size=(3,)).report.kept["weight"] == "frozen (requires_grad=False)"


# ---- other kinds of kernels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(3, 40, 5), (3, 16)),
        (nn.Conv3d(3, 40, 3), (3, 8, 8, 8)),
        (nn.Conv2d(3, 40, 31), (3, 32, 32)),
        (nn.Conv2d(3, 40, (1, 7)), (3, 32, 32)),
        (nn.ConvTranspose2d(3, 40, 3), (3, 8, 8)),
        (nn.Linear(3, 40), (3,)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kernels_of_any_rank_and_size(layer: nn.Module, size: tuple[int, ...], ghn: GHN) -> None:
    report = initialize(layer, ghn, input_size=size, head="predict")
    assert report.predicted.keys() == {"weight", "bias"}


def test_the_published_layout_round_trips(tmp_path: Path, ghn: GHN) -> None:
    ghn.save_pretrained(tmp_path)
    restored = GHN.from_pretrained(tmp_path)
    assert restored.config == ghn.config
    assert restored is not ghn
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in ghn.state_dict().items())
    with pytest.raises(TypeError, match="takes no token, device: downloads go by huggingface_hub's settings"):
        GHN.from_pretrained(tmp_path, token="secret", device="cuda")
