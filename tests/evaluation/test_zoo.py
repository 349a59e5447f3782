"""The zoo: two architectures of every module file of timm, traced, predicted and assigned; and the sweep over it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from timm_ghn import GHN, cli, initialize, load_ghn
from timm_ghn.evaluation import zoo

DATA = Path(__file__).parents[1] / "data"
# The smallest two of each file, by number of parameters.
SAMPLE = (DATA / "zoo_sample.txt").read_text().split()
SUMMARY = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "zoo.json").read_text())


@pytest.fixture(scope="module")
def ghn() -> GHN:
    return load_ghn()


def test_the_sample_covers_every_file() -> None:
    assert len(SAMPLE) >= 150
    missing = set(timm.list_modules()) - {timm.models._registry._model_to_module[name] for name in SAMPLE}
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_architecture(name: str, ghn: GHN) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    model.to_empty(device="cpu")  # memory without values: what is not predicted must not matter here
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[-1:] = torch.nan
    report = initialize(model, ghn, head="predict")
    parameters = dict(model.named_parameters())
    assert report.predicted.keys() | report.kept.keys() == parameters.keys()
    unwritten = [key for key in report.predicted if not torch.isfinite(parameters[key].view(-1)[-1])]
    assert not unwritten
    assert report.predicted_fraction >= SUMMARY["architectures"][name]["predicted_fraction"], report


def test_the_committed_summary_has_every_architecture() -> None:
    fractions = {name: row["predicted_fraction"] for name, row in SUMMARY["architectures"].items()}
    if f"timm {timm.__version__}," in SUMMARY["machine"]:
        assert fractions.keys() == set(timm.list_models())
    assert not SUMMARY["failed"]
    assert {name for name, fraction in fractions.items() if fraction < 0.99} == SUMMARY["exceptions"].keys()
    assert sum(fraction >= 0.999 for fraction in fractions.values()) >= 0.95 * len(fractions)


# ---- the sweep ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    pixels = torch.randint(256, (4, 40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    for number, image in enumerate(pixels):
        (folder / str(number % 2)).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / str(number % 2) / f"{number}.png")
    return folder


def sweep(output: Path, ghn: Path, *arguments: str) -> dict[str, Any]:
    assert cli.main(["zoo", "test_resnet", "test_vit", "--ghn", str(ghn), "-o", str(output), *arguments]) == 0
    summary: dict[str, Any] = json.loads((output / "zoo.json").read_text())
    return summary


def test_models_are_run_on_images(tmp_path: Path, ghn_file: Path, images: Path) -> None:
    summary = sweep(tmp_path, ghn_file, "--data", str(images))
    assert summary["all"]["outputs_ok"] == 2 and not summary["outputs"]
    assert {row["output"] for row in summary["architectures"].values()} == {"ok"}
    assert "| output ok |" in (tmp_path / "zoo.md").read_text()


@pytest.mark.slow
def test_a_sweep_goes_on_with_rows_of_its_own_setting(tmp_path: Path, ghn_file: Path, images: Path) -> None:
    def rows() -> int:
        return len((tmp_path / "zoo.jsonl").read_text().splitlines())

    assert sweep(tmp_path, ghn_file)["all"]["outputs_ok"] is None
    sweep(tmp_path, ghn_file)
    assert rows() == 2
    sweep(tmp_path, ghn_file, "--data", str(images), "--workers", "2")
    assert rows() == 4
    other = copy.deepcopy(load_ghn(ghn_file))
    torch.nn.init.constant_(other.get_parameter("bias_class.1.bias"), 0.5)
    other.save_pretrained(tmp_path / "other")
    sweep(tmp_path, tmp_path / "other")
    assert rows() == 6


def test_a_sweep_that_was_stopped_in_the_middle_of_a_line(tmp_path: Path, ghn_file: Path) -> None:
    file = tmp_path / "zoo.jsonl"
    sweep(tmp_path, ghn_file)
    file.write_text(file.read_text()[:-20])
    sweep(tmp_path, ghn_file)
    assert len(file.read_text().splitlines()) == 3, "what was cut, and that row again on a line of its own"
    sweep(tmp_path, ghn_file)
    assert len(file.read_text().splitlines()) == 3


def test_a_wrong_output_is_named(ghn: GHN, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    blank = GHN(ghn.config)
    for parameter in blank.parameters():
        torch.nn.init.zeros_(parameter)
    assert zoo.examine("test_vit", blank, pair)["output"] == "constant over the classes"
    assert zoo.examine("test_vit", ghn, pair[:1].repeat(2, 1, 1, 1))["output"].startswith("almost the same for all")
    assert "output" not in zoo.examine("test_vit", ghn)
    monkeypatch.setattr(zoo, "RUN_PARAMETERS", 1000)
    assert zoo.examine("test_vit", ghn, pair)["output"].startswith("skipped: 3")
