"""``timm-ghn inspect``."""

from __future__ import annotations

import json

import pytest

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


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "test_vit", "--ghn", "ghn2_split", *DATA, "--image-size", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["architecture"] == "test_vit" and found["ghn"] == "ghn2_split" and found["output"] == "ok"
    assert {"name", "shape", "role", "kept", "tiles", "scale", "init_scale"} <= found["parameters"][0].keys()
    assert found["activations"][0]["name"] == "patch_embed.proj"
    assert all({"what", "where", "cause"} == finding.keys() for finding in found["findings"])
