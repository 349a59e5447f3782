"""The benchmark that compares training from random and from predicted weights, at a small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
STARTS = ("random", "predicted", "conditioned", "later-orthogonal")


@pytest.fixture(scope="module")
def arguments(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("comparison")
    for name in ("cifar10-train", "tiny-imagenet-20k"):
        pq.write_table(pq.read_table(shared / "data" / f"{name}.parquet").slice(0, 1400), folder / f"{name}.parquet")
    return [
        sys.executable, str(BENCHMARKS / "random_vs_ghn.py"), "--data", str(folder / "cifar10-train.parquet"),
        "--transfer", str(folder / "tiny-imagenet-20k.parquet"), "--holdout", "400", "--models", "test_resnet",
        "--starts", *STARTS, "--rates", "0.01", "0.03", "--seeds", "2", "--steps", "20", "--device", "cpu",
        "--out", str(folder),
    ]  # fmt: skip


def run(arguments: list[str]) -> tuple[dict[str, Any], str]:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((Path(arguments[-1]) / "random_vs_ghn.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def report(arguments: list[str]) -> tuple[dict[str, Any], str]:
    return run(arguments)


@pytest.mark.slow
def test_one_command_makes_the_whole_report(arguments: list[str], report: tuple[dict[str, Any], str]) -> None:
    result, printed = report
    sections = {section["name"]: section for section in result["sections"]}
    assert list(sections) == ["full", "long", "few-shot", "transfer", "transfer-small"]
    assert [section["image_size"] for section in sections.values()] == [None, None, None, 64, 48]
    for section in sections.values():
        steps = {"full": 20, "long": 100}.get(section["name"], 4)
        assert len(section["tuning"]) == len(STARTS) * 2 and len(section["runs"]) == len(STARTS) * 2
        for row in section["runs"]:
            assert set(row["curve"]) == {str(mark) for mark in (0, 1, 10, 30, 100, steps) if mark <= steps}
    summary = sections["full"]["summary"]["models"]["test_resnet"]
    assert summary["predicted"]["accuracy"]["0"][0] > 35 > summary["random"]["accuracy"]["0"][0]
    assert summary["conditioned"]["accuracy"]["0"][0] > 35 > summary["later-orthogonal"]["accuracy"]["0"][0]

    folder = Path(arguments[-1])
    page = (folder / "random_vs_ghn.html").read_text()
    assert page.count("<svg") == 5 and "<script" not in page and "http-equiv" not in page
    shown = "{:.1f}±{:.1f}".format(*summary["predicted"]["accuracy"]["20"])
    assert shown in page and shown in (folder / "random_vs_ghn.md").read_text()
    for name in sections:
        stem = folder / ("random_vs_ghn" if name == "full" else f"random_vs_ghn_{name}")
        assert stem.with_suffix(".png").stat().st_size > 5000 and stem.with_suffix(".svg").exists()
    assert result["checkpoint"]["sha256"] in printed


@pytest.mark.slow
def test_a_second_run_takes_what_is_there(arguments: list[str], report: tuple[dict[str, Any], str]) -> None:
    lines = (Path(arguments[-1]) / "random_vs_ghn.jsonl").read_text()
    result, _ = run(arguments)
    assert result == report[0]
    assert (Path(arguments[-1]) / "random_vs_ghn.jsonl").read_text() == lines


def test_starts_without_random_are_refused(arguments: list[str]) -> None:
    done = subprocess.run([*arguments, "--starts", "predicted"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "must have random in it" in done.stderr
