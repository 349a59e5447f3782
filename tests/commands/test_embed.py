"""``timm-ghn embed``: vectors with their names in a file, and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from timm_ghn import embed
from timm_ghn.cli import main


def test_vectors_are_in_the_file_with_their_names(
    tmp_path: Path, ghn_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "new" / "embeddings.safetensors", tmp_path / "zoo.svg"
    command = ["embed", "test_resn*", "test_vit,resnet18", "resnet18", "--ghn", str(ghn_file)]
    assert main([*command, "-o", str(file), "--plot", str(picture), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    with safe_open(file, "pt") as stored:
        embeddings, metadata = stored.get_tensor("embeddings"), stored.metadata()
    names = json.loads(metadata["names"])
    assert names == ["test_resnet", "test_vit", "resnet18"] and metadata["ghn"] == str(ghn_file)
    assert result["embeddings"].keys() == set(names) and result["failed"] == {}
    assert torch.equal(torch.tensor([result["embeddings"][name] for name in names]), embeddings)
    torch.testing.assert_close(embeddings, embed(names, str(ghn_file)))
    drawn = picture.read_text()
    assert "<title>resnet18 (resnet)</title>" in drawn and "<title>test_vit (vision_transformer)</title>" in drawn


def test_what_cannot_be_traced_is_named(
    tmp_path: Path, ghn_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("timm.models.resnet.ResNet.forward", lambda self, x: x.detach())
    monkeypatch.chdir(tmp_path)
    assert main(["embed", "resnet18", "test_vit", "--ghn", str(ghn_file)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "resnet18 is left out: ResNet returned nothing that autograd traces" in printed and "1 x 16" in printed
    assert main(["embed", "resnet18", "--ghn", str(ghn_file), "-o", "none.safetensors"]) == 1
    assert "None of 1 architectures can be traced; the first, resnet18" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"embeddings.safetensors"}
