"""The benchmark of semantic segmentation, at a small size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from timm_ghn import demo
from timm_ghn.checkpoints.catalog import CATALOG


@pytest.mark.slow
def test_it_compares_starts_and_goes_on_where_it_was(
    tmp_path: Path, run_benchmark: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--data", str(demo.IMAGES), "--image-size", "32", "--holdout", "60", "--models", "test_resnet",
        "--canvas", "32", "--scenes", "12", "--test-scenes", "6", "--steps", "3", "--batch", "4", "--device",
        "cpu", "--out", str(tmp_path),
    ]  # fmt: skip
    run_benchmark("dense", *arguments)
    assert "background" in capsys.readouterr().out
    text = (tmp_path / "dense.json").read_text()
    rows = json.loads(text)["rows"]
    checkpoint = f"ghn2 {CATALOG.published['ghn2'].sha256}"
    assert [row["of"][1:4] for row in rows] == [
        [start, ghn, seed] for start, ghn in (("predicted", checkpoint), ("random", "")) for seed in (0, 1)
    ], "rows of one checkpoint are not taken for those of another"
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        for training in ("probe", "whole"):
            found = first[training]
            assert found["validation"][str(found["rate"])] == max(found["validation"].values())
            assert list(second[training]["validation"]) == [str(found["rate"])]
            assert all(0 <= found[figure] <= 100 for figure in ("miou", "foreground", "accuracy"))
    (tmp_path / "dense.png").unlink()
    run_benchmark("dense", *arguments)
    assert (tmp_path / "dense.json").read_text() == text
    assert (tmp_path / "dense.png").stat().st_size > 0
