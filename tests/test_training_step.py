"""The benchmark of a training step, at a small size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_it_times_the_plain_step_and_ours(tmp_path: Path, run_benchmark: Callable[..., None]) -> None:
    few = ["--architectures", "1", "--plain-architectures", "1", "--meta-batch", "1", "--batch-size", "4"]
    run_benchmark("training_step", "--sources", "timm", *few, "--out", str(tmp_path))
    (row,) = json.loads((tmp_path / "training_step.json").read_text())["seconds"]
    for kind in ("plain", "ours"):
        assert row[kind]["network forward and backward"] > 0 and row[kind]["GHN forward"] > 0
    assert (tmp_path / "training_step.png").stat().st_size > 0
