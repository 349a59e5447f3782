"""``timm-ghn inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import pytest
from PIL import Image
from torch import Tensor

import timm_ghn
from timm_ghn import demo
from timm_ghn.cli import main

DATA = ["--data", str(demo.IMAGES), "--holdout", "100", "--images", "4"]


def test_weights_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "test_resnet"]) == 0
    printed = capsys.readouterr().out
    assert "layer1.0.conv1.weight" in printed and "norms without statistics of data" in printed
    assert "largest" not in printed


def test_images_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "test_vit", *DATA, "--image-size", "64"]) == 0
    printed = capsys.readouterr().out
    assert "output: ok" in printed and "largest" in printed and "queries, keys and values are equal" in printed


def test_images_of_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label, colour in enumerate(("red", "lime", "blue")):
        (tmp_path / colour).mkdir()
        for index in range(8):
            Image.new("RGB", (32, 32), colour).save(tmp_path / colour / f"{label}{index}.png")
    looked_at: list[Tensor] = []

    def look(name: str, ghn: str, images: Tensor) -> NoReturn:
        looked_at.append(images)
        raise timm_ghn.GHNError("seen")

    monkeypatch.setattr("timm_ghn.evaluation.inspection.inspect", look)
    main(["inspect", "test_resnet", "--data", str(tmp_path), "--holdout", "12", "--images", "3", "--image-size", "32"])
    assert len(looked_at[0].unique(dim=0)) == 3, "rows are grouped by class, and the first three are of one"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "test_vit", "--ghn", "ghn2_split", *DATA, "--image-size", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["architecture"] == "test_vit" and found["ghn"] == "ghn2_split" and found["output"] == "ok"
    assert {"name", "shape", "role", "kept", "tiles", "scale", "init_scale"} <= found["parameters"][0].keys()
    assert found["activations"][0]["name"] == "patch_embed.proj"
    assert all({"what", "where", "cause"} == finding.keys() for finding in found["findings"])
