"""Predicted weights written to files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from timm_ghn import cli, export, load_ghn, predict, prediction
from timm_ghn.errors import GHNError
from timm_ghn.predictor import Predictor

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, output: Path, ghn_file: Path, *options: str) -> dict[str, torch.Tensor]:
    assert cli.main(["predict", name, "-o", str(output), "--ghn", str(ghn_file), *options]) == 0
    return {key: tensor for file in output.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit3", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_the_file_holds_the_model(name: str, tmp_path: Path, ghn_file: Path) -> None:
    torch.manual_seed(0)
    state = run(name, tmp_path, ghn_file, "--head", "predict")
    model = timm.create_model(name)
    expected = model.state_dict()
    prediction = predict(model, str(ghn_file), head="predict")
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        if key in prediction:
            assert torch.equal(tensor, prediction[key])
        else:  # a buffer or a kept parameter: equal, or as random
            assert torch.equal(tensor, expected[key]) or tensor.std() == pytest.approx(expected[key].std(), rel=0.5)


def test_timm_loads_it(tmp_path: Path, ghn_file: Path) -> None:
    state = run("test_resnet", tmp_path, ghn_file, "--num-classes", "10")
    sources: list[dict[str, Any]] = [
        {"model_name": "test_resnet", "num_classes": 10, "checkpoint_path": tmp_path / "model.safetensors"},
        {"model_name": f"local-dir:{tmp_path}", "pretrained": True},
    ]
    if timm.__version__ == "1.0.22":  # which reads only pickles from a local directory
        sources.pop()
    for source in sources:
        model = timm.create_model(**source)
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_classes"] == 10 and config["pretrained_cfg"]["tag"] == "ghn"
    assert "license" not in config["pretrained_cfg"]


def test_weights_prepared_for_training(tmp_path: Path, ghn_file: Path) -> None:
    torch.manual_seed(0)
    state = run("test_vit", tmp_path, ghn_file, "--num-classes", "10", "--finetune", "orthogonal")
    weight = state["blocks.0.mlp.fc2.weight"]
    gram = weight @ weight.T
    torch.testing.assert_close(gram / gram[0, 0], torch.eye(len(gram)), rtol=0, atol=1e-4)


def test_dtype(tmp_path: Path, ghn_file: Path) -> None:
    full = run("test_resnet", tmp_path / "full", ghn_file, "--num-classes", "10")
    half = run("test_resnet", tmp_path / "half", ghn_file, "--num-classes", "10", "--dtype", "bfloat16")
    for key, tensor in full.items():
        assert torch.equal(half[key], tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)


def test_shards(tmp_path: Path, ghn_file: Path) -> None:
    whole = run("test_resnet", tmp_path / "whole", ghn_file, "--num-classes", "10")
    parts = run("test_resnet", tmp_path / "parts", ghn_file, "--num-classes", "10", "--max-shard-size", "500KB")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for file in (tmp_path / "parts").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            assert opened.metadata() == {"format": "pt"}
        assert {index["weight_map"][name] for name in names} == {file.name}
        assert len(names) == 1 or sum(whole[name].nbytes for name in names) <= 500_000
    assert len(set(index["weight_map"].values())) > 2


def test_weights_are_not_overwritten(tmp_path: Path, ghn_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("test_resnet", tmp_path, ghn_file)
    assert cli.main(["predict", "test_resnet", "-o", str(tmp_path), "--ghn", str(ghn_file)]) == 1
    assert "model.safetensors exists" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_disk_without_room(tmp_path: Path, ghn_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(GHNError, match="room for 1,000"):
        export.export("test_resnet", tmp_path, Predictor(load_ghn(ghn_file)), "ghn")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_failed_write(tmp_path: Path, ghn_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(prediction, "tile_into", fail)
    with pytest.raises(OSError, match="disk full"):
        export.export("test_resnet", tmp_path, Predictor(load_ghn(ghn_file)), "ghn")
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import resource, sys, timm_ghn.cli, timm_ghn.export
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert timm_ghn.cli.main(["predict", *sys.argv[1:]]) == 0
print("MiB:", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_is_that_of_the_largest_tensor(tmp_path: Path, ghn_file: Path) -> None:
    """A model of 330 MiB whose largest tensor has 9, in a process where nothing else has used memory before."""
    command = [sys.executable, "-c", MEASURE, "vit_base_patch16_224", "-o", str(tmp_path), "--ghn", str(ghn_file)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout.split()[-1]) < 150
    assert (tmp_path / "model.safetensors").stat().st_size > 340e6
