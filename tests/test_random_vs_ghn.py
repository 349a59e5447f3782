"""The benchmark that compares training from random and from predicted weights, at a small size."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

STARTS = ("random", "conditioned", "later-orthogonal")


@pytest.fixture(scope="module")
def arguments(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("comparison")
    data, transfer = folder / "cifar10-train.parquet", folder / "tiny-imagenet-20k.parquet"
    pq.write_table(pq.read_table(shared / "data" / data.name).slice(0, 1200), data)
    table = pq.read_table(shared / "data" / transfer.name).slice(0, 1200)
    images = [{"bytes": smaller(image["bytes"]), "path": None} for image in table["image"].to_pylist()]
    pq.write_table(pa.table({"image": images, "label": table["label"]}), transfer)
    return [
        "--data", str(data), "--transfer", str(transfer), "--holdout", "400", "--models", "test_resnet",
        "--starts", *STARTS, "--rates", "0.01", "0.03", "--seeds", "2", "--steps", "4", "--device", "cpu",
        "--out", str(folder),
    ]  # fmt: skip


def smaller(image: bytes) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(image)).resize((40, 40)).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def report(arguments: list[str], run_benchmark: Callable[..., None]) -> dict[str, Any]:
    run_benchmark("random_vs_ghn", *arguments)
    return read(arguments)


def read(arguments: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((Path(arguments[-1]) / "random_vs_ghn.json").read_text())
    return result


@pytest.mark.slow
def test_one_command_makes_the_whole_report(arguments: list[str], report: dict[str, Any]) -> None:
    sections = {section["name"]: section for section in report["sections"]}
    assert list(sections) == ["full", "long", "few-shot", "transfer", "transfer-small"]
    assert [section["image_size"] for section in sections.values()] == [None, None, None, 40, 30]
    for section in sections.values():
        steps = {"full": 4, "long": 20}.get(section["name"], 1)
        assert len(section["tuning"]) == len(STARTS) * 2 and len(section["runs"]) == len(STARTS) * 2
        for row in section["runs"]:
            assert set(row["curve"]) == {str(mark) for mark in (0, 1, 10, steps) if mark <= steps}
    summary = sections["full"]["summary"]["models"]["test_resnet"]
    at_first = {start: summary[start]["accuracy"]["0"][0] for start in STARTS}
    assert at_first["conditioned"] > 35 > max(at_first["random"], at_first["later-orthogonal"])

    folder = Path(arguments[-1])
    page = (folder / "random_vs_ghn.html").read_text()
    assert page.count("<svg") == 5 and "<script" not in page and "http-equiv" not in page
    shown = "{:.1f} ± {:.1f}".format(*summary["conditioned"]["accuracy"]["4"])
    assert shown in page and shown in (folder / "random_vs_ghn.md").read_text()
    for name in sections:
        stem = folder / ("random_vs_ghn" if name == "full" else f"random_vs_ghn_{name}")
        assert stem.with_suffix(".png").stat().st_size > 5000 and stem.with_suffix(".svg").exists()


@pytest.mark.slow
def test_a_second_run_takes_what_is_there(
    arguments: list[str],
    report: dict[str, Any],
    run_benchmark: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = (Path(arguments[-1]) / "random_vs_ghn.jsonl").read_text()
    run_benchmark("random_vs_ghn", *arguments)
    assert read(arguments) == report
    assert report["checkpoint"]["sha256"] in capsys.readouterr().out
    assert (Path(arguments[-1]) / "random_vs_ghn.jsonl").read_text() == lines


def test_starts_without_random_are_refused(
    arguments: list[str], run_benchmark: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_benchmark("random_vs_ghn", *arguments, "--starts", "predicted")
    assert stopped.value.code == 2 and "must have random in it" in capsys.readouterr().err
