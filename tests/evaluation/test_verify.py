"""Norms of our predictions against those of the published code."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
import torchvision

from timm_ghn.cli import main
from timm_ghn.errors import GHNError
from timm_ghn.evaluation import verify as module
from timm_ghn.evaluation.verify import ARCHITECTURES, verify


@pytest.fixture
def golden(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GHN-3 with random weights, for which the published code's norms replace those of the official checkpoints."""
    norms = {}
    for name in ("resnet18", "mobilenet_v2", "convnext_tiny"):
        data = (shared / "golden" / f"torchvision-{name}.json.gz").read_bytes()
        predictions = json.loads(gzip.decompress(data))["predictions"]
        # What that code leaves alone, ConvNeXt's layer scale, has the same initial value everywhere.
        initial = dict(torchvision.models.get_model(name).named_parameters())
        squares = [
            (float(initial[key].detach().norm()) if value is None else value["norm"]) ** 2
            for key, value in predictions["ghn3"].items()
        ]
        norms[name] = math.sqrt(sum(squares))
    table = tmp_path / "norms.json"
    entry = {"config": {"hypernet": "graphormer", "hid": 32}, "norms": norms}
    table.write_text(json.dumps({"checkpoints": {"golden": entry}}))
    monkeypatch.setattr(module, "_TABLE", table)
    return shared / "golden" / "ghn3.safetensors"


def test_the_published_codes_norms_are_met(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    for check in verify(golden, ["resnet18", "mobilenet_v2", "convnext_tiny"]):
        assert check.agrees
        assert check.predicted == pytest.approx(check.published, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), before)
    assert main(["verify", str(golden), "resnet18"]) == 0
    assert "the same" in capsys.readouterr().out


def test_a_difference_is_an_error(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = json.loads(module._TABLE.read_text())
    table["checkpoints"]["golden"]["norms"]["resnet18"] += 0.02
    module._TABLE.write_text(json.dumps(table))
    assert main(["verify", str(golden), "resnet18"]) == 1
    captured = capsys.readouterr()
    assert "different" in captured.out
    assert "does not predict what its authors published for resnet18" in captured.err


def test_what_was_not_published_is_an_error(golden: Path, ghn_file: Path) -> None:
    with pytest.raises(GHNError, match="No norms were published for a GHN like"):
        next(verify(ghn_file))
    with pytest.raises(GHNError, match="No norm was published for 'resnet19'"):
        next(verify(golden, ["resnet19"]))


def test_the_table_is_the_published_one(shared: Path) -> None:
    published = json.loads((shared / "golden" / "published_imagenet.json").read_text())
    checkpoints = json.loads(module._TABLE.read_text())["checkpoints"]
    for name, column in {"ghn2": "ghn2", "ghn3tm8": "ghn3-t", "ghn3xlm16": "ghn3"}.items():
        norms = {architecture: row[f"{column}-paramnorm"] for architecture, row in published.items()}
        assert checkpoints[name]["norms"] == norms
        assert norms.keys() >= set(ARCHITECTURES)


def test_the_embedded_checkpoint_is_told_from_the_published_one_of_its_name() -> None:
    with pytest.raises(GHNError, match=r"like ghn2 \(num_classes 10, .* of ghn2 \(num_classes 1000, .*\), ghn3tm8"):
        next(verify("ghn2"))
