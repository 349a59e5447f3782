"""Evaluation: statistics from data, accuracies, orders of architectures, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from timm_ghn.checkpoints.load import load_ghn
from timm_ghn.cli import main
from timm_ghn.evaluation.accuracy import Measured, accuracy, create_model, sgd, summarize
from timm_ghn.evaluation.calibration import calibrate
from timm_ghn.evaluation.ranking import rank
from timm_ghn.training.data import ImageDataset

Batches = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def batches() -> Batches:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 3, 32, 32, generator=generator) * 2 + 1, torch.arange(16) % 10) for _ in range(3)]


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10),
    )  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_calibrate_takes_the_average_of_the_batches(batches: Batches, training: bool) -> None:
    model = network().train(training)
    model[3].eval()
    weights = [parameter.clone() for parameter in model.parameters()]
    assert id(calibrate(model, batches)) == id(model)
    first = torch.stack([model[0](x).mean((0, 2, 3)) for x, _ in batches]).mean(0)
    variance = torch.stack([model[0](x).var((0, 2, 3)) for x, _ in batches]).mean(0)
    torch.testing.assert_close(model[1].running_mean, first.detach())
    torch.testing.assert_close(model[1].running_var, variance.detach())

    def second_input(x: torch.Tensor) -> Any:
        y = model[0](x)
        y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        return model[4](y.relu()).mean((0, 2, 3))

    second = torch.stack([second_input(x) for x, _ in batches]).mean(0)
    torch.testing.assert_close(model[5].running_mean, second.detach(), atol=1e-4, rtol=1e-3)
    assert [module.training for module in model] == [training] * 3 + [False] + [training] * 5
    assert model[1].momentum == 0.3 and model[5].momentum == 0.1
    assert all(map(torch.equal, weights, model.parameters()))


def test_calibrate_again_forgets_the_first_time(batches: Batches) -> None:
    model = network()
    calibrate(model, batches)
    once = model[5].running_var.clone()
    calibrate(model, (x for x, _ in batches))
    assert torch.equal(model[5].running_var, once)


def test_a_small_last_batch_counts_for_as_many_images_as_it_has(batches: Batches) -> None:
    model = network()
    images = torch.cat([x for x, _ in batches])
    calibrate(model, images.split(46))
    torch.testing.assert_close(model[1].running_mean, model[0](images).mean((0, 2, 3)).detach())


def test_a_batch_of_one_image_tells_nothing_where_it_is_one_value(batches: Batches) -> None:
    model: Any = nn.Sequential(network()[:2], nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten())
    images = torch.cat([x for x, _ in batches])
    calibrate(model, [images[:16], images[16:17]])
    assert model[2].num_batches_tracked == 1 and model[0][1].num_batches_tracked == 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^2 sees one value of each channel in every batch; give more images in one"):
        calibrate(model, images.split(1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calibrate_leaves_models_without_batch_norms_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False))
    assert calibrate(model, []) is model


def test_calibrate_says_which_batch_norms_have_no_statistics(
    batches: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4))
    calibrate(model, batches)
    assert "no running statistics in 1:" in caplog.text
    assert model[2].num_batches_tracked == 3


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d])
def test_calibrate_reaches_every_norm_with_statistics(norm: Any, momentum: float | None, batches: Batches) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4, momentum=momentum, track_running_stats=True))
    calibrate(model, batches)
    features = [model[0](images).detach() for images, _ in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean((0, 2, 3)) for x in features]).mean(0))
    dims = (2, 3) if norm is nn.InstanceNorm2d else (0, 2, 3)
    variances = torch.stack([x.var(dims).view(-1, 4).mean(0) for x in features])
    torch.testing.assert_close(model[1].running_var, variances.mean(0))
    assert model[1].momentum == momentum


def test_calibrate_reaches_timms_evonorms(batches: Batches) -> None:
    norm = timm.layers.EvoNorm2dB0(3)
    calibrate(norm, batches)
    variances = torch.stack([images.var((0, 2, 3)) for images, _ in batches])
    torch.testing.assert_close(norm.running_var, variances.mean(0), rtol=1e-3, atol=0)
    assert norm.momentum == 0.1


def test_a_norm_that_is_called_twice_takes_the_average_of_its_calls(batches: Batches) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            nn.init.constant_(self.unused.get_buffer("running_mean"), 7)

        def forward(self, x: torch.Tensor) -> Any:
            return self.norm(x) + self.norm(3 * x)

    model = Twice()
    calibrate(model, batches)
    mean = torch.stack([images.mean((0, 2, 3)) for images, _ in batches]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, 2 * mean)
    assert (model.unused.get_buffer("running_mean") == 7).all()


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        (torch.full((2, 3, 32, 32), torch.nan), "NaN or infinite"),
        (torch.full((2, 3, 32, 32), torch.inf), "NaN or infinite"),
        (1e30 * torch.eye(32).expand(2, 3, 32, 32), "The statistics of 1 are not finite"),
        (torch.zeros(0, 3, 32, 32), "no images"),
        ("images", "not a str"),
    ],
    ids=["nan", "infinite", "too large", "empty", "text"],
)
def test_statistics_come_only_from_images(batch: Any, error: str, batches: Batches) -> None:
    model = network()
    calibrate(model, batches)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=error):
        calibrate(model, [batches[0], (batch, batches[0][1])])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and model[1].momentum == 0.3 and not model[1]._forward_pre_hooks


def test_a_calibration_that_fails_changes_nothing(batches: Batches) -> None:
    model = network()
    calibrate(model, batches)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="no batches to calibrate with"):
        calibrate(model, [])
    with pytest.raises(RuntimeError):
        calibrate(model, [batches[0], (torch.zeros(2, 5, 32, 32), torch.zeros(2))])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and model[1].momentum == 0.3


def test_calibrate_reaches_timms_own_norms(batches: Batches) -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=10)
    calibrate(model, batches)
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.num_batches_tracked == 3 and norm.running_var.std() > 0 for norm in norms)


def test_accuracy_counts_what_is_right() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([0.0, 2.0, 1.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return self.logits.expand(len(x), 3)

    model = Constant()
    assert (
        accuracy(model, [(torch.zeros(3, 3), torch.tensor([1, 1, 0])), (torch.zeros(1, 3), torch.tensor([1]))]) == 0.75
    )
    assert model.training
    with pytest.raises(ValueError, match="no images"):
        accuracy(model, [])


LABELS = torch.arange(16) % 10


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (LABELS[:, None], r"integers of shape \(16,\) here, not int64 of shape \(16, 1\)"),
        (LABELS[:1], r"not int64 of shape \(1,\)"),
        (torch.eye(10)[LABELS], r"not float32 of shape \(16, 10\)"),
        (torch.eye(10, dtype=torch.int64)[LABELS], r"not int64 of shape \(16, 10\)"),
        (LABELS.float(), r"not float32 of shape \(16,\)"),
        (LABELS > 5, r"not bool of shape \(16,\)"),
        (LABELS.tolist(), "not a list"),
        (LABELS + 1, "Label 10 is none of the 10 classes, which are 0 to 9"),
        (LABELS - 1, "Label -1 is none of the 10 classes"),
    ],
    ids=["column", "one", "soft", "one-hot", "float", "bool", "list", "large", "negative"],
)
def test_labels_are_one_index_for_each_image(labels: Any, error: str, ghn_file: Path) -> None:
    batch = (torch.zeros(16, 3, 32, 32), labels)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    with pytest.raises(ValueError, match=error):
        accuracy(model, [batch])
    with pytest.raises(ValueError, match=error):
        rank(["test_resnet"], [batch], str(ghn_file))
    assert model.training


@pytest.mark.parametrize(
    ("images", "error"),
    [(torch.full((16, 3, 32, 32), torch.nan), "NaN or infinite"), (torch.zeros(0, 3, 32, 32), "no images")],
    ids=["nan", "empty"],
)
def test_images_are_finite_and_there_are_some(images: torch.Tensor, error: str, ghn_file: Path) -> None:
    batch = (images, LABELS[: len(images)])
    with pytest.raises(ValueError, match=error):
        accuracy(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), [batch])
    with pytest.raises(ValueError, match=error):
        rank(["test_resnet"], [batch], str(ghn_file))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Conv2d(3, 10, 3), r"not float32 of shape \(16, 10, 30, 30\)"),
        (nn.Flatten(0), r"not float32 of shape \(49152,\)"),
        (nn.Sequential(nn.Flatten(), nn.Unflatten(0, (8, 2)), nn.Flatten(1)), r"not float32 of shape \(8, 6144\)"),
        (nn.LSTM(32, 10), "not a tuple"),
    ],
    ids=["dense", "flat", "other images", "tuple"],
)
def test_outputs_are_a_logit_for_each_class(model: nn.Module, shape: str) -> None:
    images = torch.zeros(16, 3, 32) if isinstance(model, nn.LSTM) else torch.zeros(16, 3, 32, 32)
    with pytest.raises(ValueError, match=rf"an output of shape \(16, classes\), {shape}"):
        accuracy(model, [(images, LABELS)])


def test_an_answer_of_nan_is_wrong() -> None:
    class Answers(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, torch.nan], [torch.inf, 0.0]])

    assert accuracy(Answers(), [(torch.zeros(2, 3), torch.tensor([1, 0]))]) == 0.5


def test_measuring_leaves_every_modules_mode(batches: Batches) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3072, 10))
    model[1].eval()
    accuracy(model, batches)
    sgd(model, lambda: batches[0], 1)
    assert [module.training for module in model] == [True, False, True] and model.training


def test_sgd_learns(batches: Batches) -> None:
    x, y = batches[0][0][:, :, :8, :8].clone(), batches[0][1]
    x += 3 * y.view(-1, 1, 1, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).eval()
    before = accuracy(model, [(x, y)])
    assert accuracy(sgd(model, lambda: (x / 10, y), 60), [(x / 10, y)]) > before + 0.3
    assert not model.training


def test_rank_orders_names_and_modules(
    batches: Batches, save_ghn: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghn = load_ghn(save_ghn(tmp_path / "ghn.safetensors"))
    module = timm.create_model("resnet10t", num_classes=10)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    rows = rank(["test_resnet", "test_vit", module, "test_no_such_model"], (batch for batch in batches), ghn)
    assert {row.name for row in rows[:3]} == {"test_resnet", "test_vit", "ResNet"}
    found = [row.accuracy["predicted"] for row in rows[:3]]
    assert found == sorted(found, reverse=True) and all(0 <= value <= 1 for value in found)
    assert all(row.error is None and row.parameters > 0 and row.predicted_fraction > 0.9 for row in rows[:3])
    assert rows[3].name == "test_no_such_model" and "test_no_such_model" in (rows[3].error or "")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.training
    with pytest.raises(ValueError, match="no batches to rank on"):
        rank(["test_resnet"], [], ghn)


def test_models_with_a_table_of_positions_are_told_the_size() -> None:
    assert create_model("test_vit", 10, 32)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert create_model("test_resnet", 7, 32)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_summaries() -> None:
    rows = [Measured("a", {"predicted": 0.5}), Measured("b", {"predicted": 0.7}), Measured("c", error="no")]
    summary = summarize(rows)
    assert summary.mean == pytest.approx(0.6) and summary.error == pytest.approx(0.1)
    assert (summary.smallest, summary.largest, summary.count) == (0.5, 0.7, 2)
    assert summarize(rows, "sgd").count == 0


def test_the_command(
    tmp_path: Path, save_ghn: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    data = ImageDataset(
        torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(40) % 10, 10
    )
    monkeypatch.setattr("timm_ghn.training.data.load_dataset", lambda *args, **options: data)
    ghn = save_ghn(tmp_path / "ghn.safetensors")
    arguments = ["evaluate", "--ghn", str(ghn), "--device", "cpu", "--images", "20", "--out", str(tmp_path)]
    assert main([*arguments, "--architectures", "2", "--sgd-steps", "2"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["summary"].keys() == {"predicted", "random", "sgd"} and len(results["architectures"]) == 2
    assert (tmp_path / "histogram.png").stat().st_size > 1000
    assert "mean top-1" in capsys.readouterr().out
    assert main([*arguments, "--source", "zoo", "--names", "test_resnet, test_vit,"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["architectures"]] == ["test_resnet", "test_vit"]
    assert all(row["error"] is None for row in results["architectures"])
    assert results["arguments"]["names"] == ["test_resnet", "test_vit"]
    assert "print_completion" not in results["arguments"]
    assert main([*arguments, "--families", "vit_patch4, levit", "--architectures", "3"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["name"].split()[1] for row in results["architectures"]} <= {"vit_patch4", "levit"}
    assert all(row["error"] is None for row in results["architectures"])
    assert main([*arguments, "--families", "resnot"]) == 1
    assert "--families: 'resnot' is not among the families of timm" in capsys.readouterr().err
    assert main([*arguments, "--source", "zoo", "--families", "vit"]) == 1
    assert "--families are of random networks" in capsys.readouterr().err
    assert main([*arguments, "--split", "wide"]) == 1
    assert "timm has no split 'wide'" in capsys.readouterr().err
    assert main([*arguments, "--ghn", str(save_ghn(tmp_path / "other.safetensors", num_classes=7))]) == 1
    assert "has 10 classes" in capsys.readouterr().err


def test_an_evaluation_that_measured_nothing_has_failed(
    tmp_path: Path, save_ghn: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ImageDataset(torch.zeros(40, 3, 32, 32, dtype=torch.uint8), torch.arange(40) % 10, 10)
    monkeypatch.setattr("timm_ghn.training.data.load_dataset", lambda *args, **options: data)

    def build(*args: object, **options: object) -> nn.Module:
        raise RuntimeError("[/bold] is not for images of this size")  # what a terminal must not take for markup

    monkeypatch.setattr("timm_ghn.evaluation.accuracy.create_model", build)
    ghn = save_ghn(tmp_path / "ghn.safetensors")
    arguments = ["evaluate", "--ghn", str(ghn), "--device", "cpu", "--out", str(tmp_path), "--source", "zoo"]
    assert main([*arguments, "--names", "test_resnet"]) == 1
    printed = capsys.readouterr()
    assert "None of 1 networks could be measured; the first, test_resnet: RuntimeError: [/bold] is not" in printed.err
    assert "[/bold]" in printed.out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["summary"] == {} and "RuntimeError" in results["architectures"][0]["error"]
