"""``timm-ghn rank``: candidates in order, within a budget, with the reasons of those that cannot be measured."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from timm_ghn import demo
from timm_ghn.cli import main
from timm_ghn.commands import rank
from timm_ghn.predictor import Predictor

DATA = ["--data", str(demo.IMAGES), "--holdout", "60", "--support", "60", "--device", "cpu"]
NOT_FOR_32 = "halonet26t"  # cuts its maps into blocks of eight


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_rows_are_in_order_and_a_failure_is_one_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "new" / "rows.csv", tmp_path / "new" / "ranking.svg"
    names = ["test_vit", NOT_FOR_32, "resnet18,test_resn*", "resnet18"]
    assert main(["rank", *names, *DATA, "-o", str(file), "--plot", str(picture), "--json"]) == 0
    result = printed(capsys)
    assert result["head"] == "predict" and result["ghn"] == "ghn2"
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows)[-1] == NOT_FOR_32 and rows.keys() == {"test_vit", NOT_FOR_32, "resnet18", "test_resnet"}
    assert rows[NOT_FOR_32]["top1"] is None and "H % self.block_size == 0" in rows[NOT_FOR_32]["error"]
    shares = [row["top1"] for row in result["rows"][:3]]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.4, "a tenth would be chance"
    assert rows["resnet18"]["macs"] == 37_016_576 and rows["resnet18"]["parameters"] == 11_181_642
    with file.open(newline="") as stream:
        written = list(csv.DictReader(stream))
    assert [row["name"] for row in written] == ["test_vit", NOT_FOR_32, "resnet18", "test_resnet"], "as they came"
    assert {row["name"]: float(row["top1"]) for row in written if row["top1"]} == {
        name: row["top1"] for name, row in rows.items() if row["top1"] is not None
    }
    drawn = picture.read_text()
    assert "<title>resnet18: " in drawn and "prefers-color-scheme: dark" in drawn and NOT_FOR_32 not in drawn


def test_how_far_to_trust_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rank", "test_resnet", "test_vit", "--top", "1", "--images", "20", *DATA]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "test_resnet" in text and "test_vit" not in text, "one is the best"
    assert "Kendall's tau" in text and "0.26 on its own test split" in text


def test_budgets_come_before_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = []
    create = Predictor.build

    def build(self: Any, maker: Any) -> Any:
        built.append(maker)
        return create(self, maker)

    monkeypatch.setattr(Predictor, "build", build)
    file = tmp_path / "rows.jsonl"
    names = ["test_vit", "test_resnet", "resnet18"]
    limits = ["--max-params", "350K", "--max-macs", "30e6"]
    assert main(["rank", *names, *DATA, *limits, "-o", str(file), "--json"]) == 0
    result = printed(capsys)
    assert [row["name"] for row in result["rows"]] == ["test_vit"] and result["beyond_limits"] == 2
    assert len(built) == 1
    assert [json.loads(line)["name"] for line in file.read_text().splitlines()] == ["test_vit"]
    assert main(["rank", "resnet18", *DATA, "--max-macs", "1M"]) == 1
    assert "None of 1 architectures is within the limits." in capsys.readouterr().err


def test_other_classes_get_a_head(
    tmp_path: Path, save_ghn: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ghn = save_ghn(tmp_path / "ghn.safetensors", num_classes=7)
    assert main(["rank", "test_resnet", *DATA, "--ghn", str(ghn), "--json"]) == 0
    result = printed(capsys)
    assert result["head"] == "ridge"
    (row,) = result["rows"]
    assert row["top1"] == row["accuracy"]["adapted"] and "left out" in row["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rank"], "the following arguments are required: patterns"),
        (["rank", ""], "'' names no architecture"),
        (["rank", "zzz*"], "timm has no architecture like 'zzz*'"),
        (["rank", "resnet18", "--max-params", "many"], "'many' is no count: give a number, or one with K, M, G or T"),
        (["rank", "resnet18", "--max-macs", "-1"], "'-1' is no count"),
        (["rank", "resnet18", "-o", "rows.txt"], "a .csv or .jsonl file is written; give it such a name"),
        (["rank", "resnet18", "--plot", "a.pdf"], "a .svg or .png file is written"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_costs_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("timm_ghn.command_line.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        parser = argparse.ArgumentParser()
        rank.add_arguments(parser)
        parser.parse_args(["test_resnet", "--plot", "a.svg"])
    assert stopped.value.code == 2 and 'pip install "timm-ghn[plot]"' in capsys.readouterr().err


def test_when_nothing_can_be_measured_the_command_has_failed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rank", NOT_FOR_32, *DATA]) == 1
    assert f"None of 1 networks could be measured; the first, {NOT_FOR_32}: Assert" in capsys.readouterr().err
