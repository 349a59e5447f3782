"""``timm-ghn cache``: what is kept where, and what is removed."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from timm_ghn.cli import main


def test_what_was_computed_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(["cache", "--clear"]) == 0, "there need be nothing"
    home = tmp_path / "timm-ghn"
    files = (
        "graphs/a.json",
        "kernels/gated_gnn.so",
        "ghn3_tm8/model.safetensors",
        "ghn3_tm8/source.json",
        "datasets/cifar10/data",
    )
    for name in (*files, "../hub/blob"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(b"12345")
    (home / "kernels" / ".unfinished-killed").mkdir()
    (home / "kernels" / ".unfinished-killed" / "gated_gnn.c").touch()
    capsys.readouterr()
    assert main(["cache", "--json"]) == 0
    kept = {row["what"]: row for row in json.loads(capsys.readouterr().out)["kept"]}
    assert kept["graphs"]["bytes"] == 5 and kept["graphs"]["where"] == str(home / "graphs")
    assert kept["ghn3_tm8, converted"]["files"] == 2 and kept["data sets"]["files"] == 1
    assert kept["graph layer, compiled"]["bytes"] == 5
    assert main(["cache", "--clear", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["removed_bytes"] == 15
    assert {row["what"]: row["files"] for row in told["kept"]}["graphs"] == 0, "what is left, not what was there"
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    # The record says which published file is trusted.
    assert left == {"timm-ghn/ghn3_tm8/source.json", "timm-ghn/datasets/cifar10/data", "hub/blob"}
