"""From a folder of images to a model with its classes, as timm reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_ghn
from timm_ghn.cli import main
from timm_ghn.evaluation.accuracy import accuracy
from timm_ghn.training.data import load_dataset

COLOURS = {"blue": (40, 60, 200), "green": (60, 180, 60), "red": (200, 50, 40)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for index in range(20):
            noise = 60 * torch.randn(40, 48, 3, generator=generator)
            pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{index}.png")
    return root


def test_the_best_candidate_is_a_model_that_timm_reads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(folder), "--holdout", "15", "--image-size", "32", "--device", "cpu"]
    file = tmp_path / "new" / "model.safetensors"
    assert main(["adapt", "test_vit", "--candidates", "test_resnet,test_byob*", *data, "-o", str(file)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("test_vit", "test_resnet", "test_byobnet"))
    assert {path.name for path in file.parent.iterdir()} == {"model.safetensors", "config.json", "confusion.png"}
    config = json.loads((file.parent / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert cfg["label_names"] == sorted(COLOURS) and cfg["num_classes"] == 3 and cfg["input_size"] == [3, 32, 32]

    model = timm.create_model(f"local-dir:{file.parent}", pretrained=True)
    held_out = load_dataset(str(folder), "val", holdout=15, image_size=32)
    share = accuracy(model, held_out.batches(8))
    assert share > 0.8 and f"{share:.1%}" in printed
    name, options = config["architecture"], {"img_size": 32} if config["architecture"] == "test_vit" else {}
    sized = "".join(f", {key}={value}" for key, value in options.items())
    assert f'timm.create_model("{name}", num_classes=3{sized}, checkpoint_path="{file}")' in printed
    again = timm.create_model(name, num_classes=3, checkpoint_path=str(file), **options)
    assert accuracy(again, held_out.batches(8)) == share


def test_few_images_and_a_network_of_one_size(folder: Path, tmp_path: Path) -> None:
    data = ["--data", str(folder), "--holdout", "15", "--image-size", "32", "--device", "cpu"]
    file = tmp_path / "few.safetensors"
    data += ["--ghn", str(Path(timm_ghn.__file__).parent / "weights" / "ghn2.safetensors")]
    assert main(["adapt", "test_vit", *data, "--support", "9", "--head", "prototype", "-o", str(file)]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["tag"] == "ghn", "a path of this machine means nothing to others"
    model = timm.create_model("test_vit", num_classes=3, img_size=32, checkpoint_path=str(file))
    assert model.head.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapt"], "No architecture is named; give one, or --candidates."),
        (["adapt", "resnt18"], "did you mean 'resnet18'?"),
        (["adapt", "--candidates", "resnet18,zzz*"], "timm has no architecture like 'zzz*'"),
        (["adapt", "resnet18", "--data", "nowhere"], "nowhere is no parquet file, no folder of images"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(arguments) == 1
    except SystemExit as error:
        assert error.code == 2
    assert message in capsys.readouterr().err
