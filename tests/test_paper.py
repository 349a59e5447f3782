"""The benchmark that says what predicted weights are worth in steps of SGD, at a small size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from timm_ghn import demo

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
def test_every_section_is_measured_once(
    tmp_path: Path, run_benchmark: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper

    small = "test_resnet"
    monkeypatch.setattr(paper, "RANKED", ["test_efficientnet", "test_byobnet", "timm:test:8:6000000"])
    monkeypatch.setattr(paper, "GROUPS", {"real": [small], "deepnets test": ["deepnets:test:4"]})
    monkeypatch.setattr(paper, "RATES", (0.01, 0.1))
    monkeypatch.setattr(paper, "FIRST_RATES", slice(0, 1))
    monkeypatch.setattr(paper, "LONG_NETWORKS", {})
    monkeypatch.setattr(paper, "FINETUNE", 2)
    monkeypatch.setattr("dense.main", lambda _: [["model"], [small]])  # has a test of its own
    arguments = [
        "--data", str(demo.IMAGES), "--holdout", "60", "--images", "40", "--epochs", "0.3", "1", "--models", small,
        "--transfer", f"{demo.IMAGES}:32", "--steps", "5", "--device", "cpu", "--out", str(tmp_path),
    ]  # fmt: skip
    run_benchmark("paper", *arguments, "--sections", "ranking", "sgd")
    measured = (tmp_path / "paper.jsonl").read_text()
    run_benchmark("paper", *arguments)
    assert (tmp_path / "paper.jsonl").read_text() == measured

    report = json.loads((tmp_path / "paper.json").read_text())
    assert {name: found["networks"] for name, found in report["summary"]["sgd"].items()} == {
        "ranked": 3, "real": 1, "deepnets test": 1
    }  # fmt: skip
    assert set(report["summary"]["ranking"]) >= {"predicted weights", "parameters", "1 steps of SGD"}
    assert [len(cells) for _, cells in report["others"]] == [2, 5, 2]
    for name in ("paper.md", "paper.html", "paper.png", "paper.svg", "paper_ranking.png", "paper_ranking.svg"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("accuracies", "steps"),
    [({10: 20.0, 100: 40.0}, 10.0), ({10: 15.0, 100: 19.0}, None), ({10: 30.0, 100: 40.0}, 2.3166)],
)
def test_steps_to_reach_an_accuracy(
    accuracies: dict[int, float], steps: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper_report

    row = {"predicted": {"test": 20.0}, "sgd": {length: {"test": value} for length, value in accuracies.items()}}
    assert paper_report.steps_to_reach(row, classes=10) == (None if steps is None else pytest.approx(steps, rel=1e-3))


def test_networks_that_are_trained_for_longer_do_not_move_the_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper_report

    def row(**accuracies: float) -> paper_report.Row:
        trained = {int(steps[1:]): {"test": value} for steps, value in accuracies.items()}
        return {"predicted": {"test": 50.0, "seconds": 0.5, "step_seconds": 0.1}, "sgd": trained}

    short = [row(_10=20.0, _100=40.0) for _ in range(2)]
    reached = paper_report.against_sgd([*short, row(_10=20.0, _100=45.0, _1000=60.0)], {"classes": 10})
    assert (reached["common"], reached["beyond"], reached["steps"]) == (100, 3, [None] * 3)
    assert paper_report.against_sgd([row(_10=20.0, _100=50.0), *short], {"classes": 10})["beyond"] == 2
    assert paper_report.against_sgd([row(_10=20.0, _100=50.0)], {"classes": 10})["times"] == [pytest.approx(20)] * 3


def test_what_a_regression_says_of_networks_it_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper_report

    generator = np.random.default_rng(0)
    features = generator.normal(size=(40, 3))
    tau, error = paper_report.held_out_tau(features, features @ [1, 2, 3])
    assert tau > 0.95 and error < 0.05
    tau, error = paper_report.held_out_tau(features, generator.normal(size=40))
    assert abs(tau) < 2 * error < 0.6
