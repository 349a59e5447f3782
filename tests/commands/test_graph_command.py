"""``timm-ghn graph``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from timm_ghn.cli import main


@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_the_file(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("igraph")
    file = tmp_path / "new" / f"graph{suffix}"
    assert main(["graph", "test_vit", "--ghn", "ghn2_split", "--virtual-edges", "-o", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    text = file.read_text(encoding="utf-8")
    assert text.startswith("<svg" if suffix == ".svg" else "<!doctype html>") and text.endswith("</svg>\n")
    assert "attn.qkv.weight[q]" in text, "as this GHN reads it"


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["graph", "test_vit", "-o", str(tmp_path / "graph.jpg")])
    assert "a .svg or .html file is written" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "igraph", None)
    assert main(["graph", "test_vit", "-o", str(tmp_path / "graph.svg")]) == 1
    assert 'pip install "timm-ghn[plot]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
