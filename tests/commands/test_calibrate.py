"""``timm-ghn calibrate``: a classifier without training, for the classes that the GHN knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm

from timm_ghn import demo
from timm_ghn.cli import main
from timm_ghn.evaluation.accuracy import accuracy
from timm_ghn.hypernet import Images
from timm_ghn.training.data import load_dataset

DATA = ["--data", str(demo.IMAGES), "--holdout", "100", "--device", "cpu"]


def test_timm_reads_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "model.safetensors"
    assert main(["calibrate", "resnet18", *DATA, "-o", str(file), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["architectures"]
    model = timm.create_model(f"local-dir:{file.parent}", pretrained=True)
    held_out = load_dataset(str(demo.IMAGES), "val", holdout=100)
    assert accuracy(model, held_out.batches(50)) == row["top1"] > 0.4, "a tenth would be chance"
    assert model.pretrained_cfg["label_names"] == list(demo.CLASSES)
    assert {path.name for path in file.parent.iterdir()} == {"model.safetensors", "config.json", "confusion.png"}


def test_other_classes_are_for_adapt(
    tmp_path: Path, save_ghn: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ghn = save_ghn(tmp_path / "ghn.safetensors", num_classes=7)
    assert main(["calibrate", "test_resnet", *DATA, "--ghn", str(ghn)]) == 1
    assert "does not have the classes that" in capsys.readouterr().err
    images = Images((0.5,) * 3, (0.2,) * 3, (3, 32, 32), label_names=tuple("abcdefghij"))
    ghn = save_ghn(tmp_path / "other.safetensors", images=images)
    assert main(["calibrate", "test_resnet", *DATA, "--ghn", str(ghn)]) == 1
    assert "does not have the classes that" in capsys.readouterr().err, "as many, but others"
    assert main(["calibrate", "test_resnet", *DATA, "--ghn", "ghn2_tasks"]) == 1
    assert "does not have the classes that" in capsys.readouterr().err, "it predicts no heads"
