"""The command line, by its exit status and what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_ghn import cli
from timm_ghn.assign import predict


def test_list_names_every_shipped_ghn(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    assert "ghn2" in capsys.readouterr().out


def test_create_saves_what_timm_loads(ghn_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "saved.safetensors"
    command = ["create", "test_resnet", "--ghn", str(ghn_file), "--num-classes", "10", "--output", str(saved)]
    assert cli.main(command) == 0
    assert "predicted" in capsys.readouterr().out
    model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=saved)
    state = load_file(saved)
    for name, tensor in predict(model, str(ghn_file)).items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(model.get_parameter(name), tensor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "tset_resnet"], "timm has no architecture 'tset_resnet': did you mean 'test_resnet'?"),
        (["create", "test_resnet", "--ghn", "ghn7"], "Unknown GHN 'ghn7': did you mean"),
        (["demo", "--ghn", "missing.safetensors"], "There is no GHN checkpoint at"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, ghn_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--ghn" not in arguments:
        arguments = [*arguments, "--ghn", str(ghn_file)]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"timm-ghn: {message}") and printed.err.count("\n") == 1
    assert printed.out == ""


def test_demo(
    ghn_file: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_DEMO_ARCHITECTURES", ("test_resnet", "test_vit"))
    monkeypatch.setattr(cli, "_DEMO_CLASSIFIERS", ("test_resnet",))
    assert cli.main(["demo", "--ghn", str(ghn_file), "--cifar10", str(shared / "data" / "cifar10-train.parquet")]) == 0
    printed = capsys.readouterr().out
    assert "random init" in printed and "5000 held-out images" in printed
