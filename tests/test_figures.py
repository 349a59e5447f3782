"""What the documents and configs say of the embedded checkpoints is what the committed results say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = {"ghn2": "", "ghn2_split": "_split", "ghn2_experts": "_experts"}
TABLES = {"real": "zoo", "timm's": "timm", "DeepNets": "deepnets"}  # words of a header, and the results they are of


def results(table: str, tag: str) -> dict[str, Any]:
    file = ROOT / "benchmarks" / "results" / f"evaluate_{table}{CHECKPOINTS[tag]}.json"
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def quoted(header: str, tag: str) -> str:
    """What a column says of a checkpoint: a mean over networks and its error, or one network's accuracy."""
    if table := next((table for words, table in TABLES.items() if words in header), None):
        summary = results(table, tag)["summary"]["predicted"]
        return f"{100 * summary['mean']:.1f} ± {100 * summary['error']:.1f}"
    rows = results("zoo", tag)["architectures"]
    (row,) = (row for row in rows if row["name"] == header or row["name"].startswith(f"{header}_"))
    return f"{100 * row['accuracy']['predicted']:.1f}"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(("document", "tables"), [("README.md", 1), ("docs/checkpoints.md", 2)])
def test_tables_of_accuracies(document: str, tables: int) -> None:
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    found = 0
    for number, line in enumerate(lines):
        if line.startswith("| `ghn2` |"):
            header = next(before for before in reversed(lines[:number]) if before.startswith("| | "))
            found += 1
            for row in lines[number : number + len(CHECKPOINTS)]:
                tag, *values = cells(row)
                columns = cells(header)[1:]
                assert dict(zip(columns, values, strict=True)) == {
                    column: quoted(column, tag.strip("`")) for column in columns
                }
    assert found == tables


@pytest.mark.parametrize("tag", CHECKPOINTS)
def test_configs(tag: str) -> None:
    config = json.loads((ROOT / "hub_configs" / f"{tag}.json").read_text())["results"]
    for name, value in config.items():
        if match := re.fullmatch(r"top1_(timm|zoo|deepnets)(_test)?_(\d+)", name):
            summary = results(match[1], tag)["summary"]["predicted"]
            assert (round(summary["mean"], 4), summary["count"]) == (value, int(match[3])), name
        elif name.startswith("top1_"):
            rows = {row["name"]: row["accuracy"]["predicted"] for row in results("zoo", tag)["architectures"]}
            assert rows[name.removeprefix("top1_")] == value
