"""The benchmark that adapts networks to images of other data sets, at a small size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from timm_ghn import demo


@pytest.mark.slow
def test_it_compares_starts_and_goes_on_where_it_was(
    tmp_path: Path, run_benchmark: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        f"{demo.IMAGES}:32", "--models", "test_resnet", "--shots", "3", "all", "--holdout", "60", "--images", "40",
        "--finetune", "2", "--rates", "0.01", "0.03", "--device", "cpu", "--out", str(tmp_path),
    ]  # fmt: skip
    run_benchmark("your_data", *arguments)
    assert "sgd" in capsys.readouterr().out
    text = (tmp_path / "your_data.json").read_text()
    rows = json.loads(text)["rows"]
    assert [(row["of"][2], row["of"][4]) for row in rows] == [
        (count, start) for count in (3, None) for start in ("predicted", "random", "sgd")
    ]
    by_start = {row["of"][4]: row for row in rows[3:]}
    assert by_start["predicted"]["top1"] > 15 and by_start["predicted"]["finetuned_rate"] in (0.01, 0.03)
    assert "finetuned" not in by_start["sgd"] and by_start["sgd"]["seconds"] == by_start["predicted"]["seconds"]
    assert (tmp_path / "your_data.png").stat().st_size > 0
    run_benchmark("your_data", *arguments)
    assert (tmp_path / "your_data.json").read_text() == text
