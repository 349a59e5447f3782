"""Pictures that are read on light and dark screens, with what is under the pointer."""

from __future__ import annotations

import re
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

from timm_ghn.errors import GHNError
from timm_ghn.evaluation import pictures
from timm_ghn.evaluation.ranking import Ranked, Ranking, Trust

RANKING = Ranking(
    [
        Ranked("a&b", {"predicted": 0.5}, parameters=10, macs=10),
        Ranked("worse", {"adapted": 0.4, "left out": 0.9}, parameters=10, macs=2000),
        Ranked("better", {"predicted": 0.6}, parameters=10, macs=3000),
        Ranked("failed", error="no"),
    ],
    Trust("ghn2"),
)
EMBEDDINGS = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
NAMES, FAMILIES = [f"net{index}" for index in range(30)], [f"family{index // 2}" for index in range(30)]


def draw(kind: str, file: Path) -> None:
    if kind == "ranking":
        pictures.plot_ranking(RANKING, file)
    else:
        pictures.plot_embeddings(EMBEDDINGS, NAMES, FAMILIES, file, "ghn2")


@pytest.mark.parametrize("kind", ["ranking", "embeddings"])
def test_all_text_can_be_read_on_both_screens(kind: str, tmp_path: Path) -> None:
    draw(kind, tmp_path / "new" / "picture.svg")
    drawn = (tmp_path / "new" / "picture.svg").read_text()
    xml.etree.ElementTree.fromstring(drawn)
    colours = re.findall(r"<!-- .*? -->\s*<g (?:style=\"fill: (#\w+)|)", drawn)
    assert len(colours) > 10 and set(colours) == {pictures._INK}, "what has no colour is black, on black too"
    for light, dark in pictures._DARK.items():
        assert f'[style*="fill: {light}"] {{ fill: {dark} !important }}' in drawn
    draw(kind, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_point_says_what_it_is(tmp_path: Path) -> None:
    draw("ranking", tmp_path / "ranking.svg")
    drawn = (tmp_path / "ranking.svg").read_text()
    titles = re.findall(r"<title>(.*?)</title>", drawn)
    assert sorted(title.partition(":")[0] for title in titles) == ["a&amp;b", "better", "worse"]
    assert "<!-- better -->" in drawn and "<!-- worse -->" not in drawn, "names are those of the front"
    draw("embeddings", tmp_path / "embeddings.svg")
    drawn = (tmp_path / "embeddings.svg").read_text()
    assert "<title>net3 (family1)</title>" in drawn and "<!-- 3 other families -->" in drawn


def test_pictures_need_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind in ("ranking", "embeddings"):
        with pytest.raises(GHNError, match=r'pip install "timm-ghn\[plot\]"'):
            draw(kind, tmp_path / "picture.svg")
    assert list(tmp_path.iterdir()) == []
