"""Publishing with the real client, to a Hub of our own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from timm_ghn.checkpoints.catalog import CATALOG
from timm_ghn.checkpoints.load import load_ghn
from timm_ghn.checkpoints.publish import publish
from timm_ghn.checkpoints.source import CONFIG_NAME, WEIGHTS_NAME, embedded_config
from timm_ghn.cli import main
from timm_ghn.errors import CheckpointError, GHNError

REPO = "someone/ghn"
CARD = """---
license: mit
---

# Mine

timm_ghn.register("mine", "path/to/this/directory")
"""


@pytest.fixture
def directory(ghn_file: Path, tmp_path: Path) -> Path:
    """A trained GHN, as training leaves it."""
    directory = tmp_path / "trained"
    directory.mkdir()
    save_file(load_file(ghn_file), directory / WEIGHTS_NAME)
    (config,) = embedded_config(ghn_file).values()
    (directory / CONFIG_NAME).write_text(json.dumps(config))
    (directory / "README.md").write_text(CARD)
    (directory / "curves.png").write_bytes(b"\x89PNG")
    (directory / "log.csv").write_text("step\n")
    return directory


def test_nothing_is_sent_by_default(server: HubServer, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publication = publish(directory, REPO)
    assert not server.requests
    assert list(publication.files) == ["README.md", "config.json", "model.safetensors", "curves.png"]
    assert publication.pin["revision"] is None
    assert main(["publish", str(directory), REPO]) == 0
    printed = capsys.readouterr().out
    assert "hf-hub:someone/ghn" in printed and "Nothing was sent" in printed
    assert not server.requests


def test_what_is_published_can_be_loaded(server: HubServer, directory: Path) -> None:
    publication = publish(directory, REPO, upload=True)
    commit = publication.pin["revision"]
    files = server.repos[REPO][commit]
    assert sorted(files) == ["README.md", "config.json", "curves.png", "model.safetensors"]
    assert files["model.safetensors"] == (directory / WEIGHTS_NAME).read_bytes()
    assert publication.pin == {
        "repo_id": REPO,
        "filename": WEIGHTS_NAME,
        "revision": commit,
        "sha256": hashlib.sha256(files["model.safetensors"]).hexdigest(),
        "size": len(files["model.safetensors"]),
    }
    assert server.messages == ["Upload a graph hypernetwork"]
    loaded, original = load_ghn(f"hf-hub:{REPO}@{commit}"), load_ghn(directory)
    assert loaded.config == original.config
    assert all((a == b).all() for a, b in zip(loaded.parameters(), original.parameters(), strict=True))


def test_publishing_again_adds_a_commit(server: HubServer, directory: Path) -> None:
    first = publish(directory, REPO, upload=True).pin["revision"]
    (directory / "README.md").write_text(CARD.replace("Mine", "Ours"))
    assert main(["publish", str(directory), REPO, "--upload"]) == 0
    assert b"# Mine" in server.repos[REPO][first]["README.md"]
    assert b"# Ours" in server.repos[REPO]["main"]["README.md"]


def test_the_card_of_a_training_run(directory: Path) -> None:
    card = publish(directory, REPO).files["README.md"]
    assert isinstance(card, bytes)
    text = card.decode()
    assert 'timm_ghn.register("mine", "hf-hub:someone/ghn")' in text
    assert "![curves](curves.png)" in text
    assert "## Citation\n\nKnyazev et al. 2021" in text
    assert ModelCard(text).data.to_dict()["license"] == "mit"


def test_the_card_of_a_shipped_tag(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "README.md").unlink()
    config = json.loads((directory / CONFIG_NAME).read_text())
    xlm16 = CATALOG.published["ghn3_xlm16"]
    pin = dataclasses.replace(xlm16, config=config)
    monkeypatch.setattr(CATALOG, "published", {"xlm16": xlm16, "tiny": pin})
    card = publish(directory, pin.repo_id).files["README.md"]
    assert isinstance(card, bytes)
    text = card.decode()
    assert ModelCard(text).data.to_dict()["license"] == "mit"
    for expected in (pin.trained_on, pin.citation, "| 43.69 |", f'"hf-hub:{pin.repo_id}"', "num_classes=10"):
        assert expected in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "README.md").unlink(), "has no README.md: write one"),
        (lambda d: (d / "README.md").write_text("# Mine"), "has no licence"),
        (lambda d: (d / "README.md").write_text("---\nlicense: [\n---\n"), "is not what a model card's is"),
        (lambda d: (d / CONFIG_NAME).write_text('{"num_classes": 3}'), "disagrees with its config"),
        (lambda d: (d / WEIGHTS_NAME).unlink(), r"it has no model\.safetensors"),
    ],
)
def test_what_is_incomplete_is_not_published(
    server: HubServer, directory: Path, change: Callable[[Path], object], message: str
) -> None:
    change(directory)
    with pytest.raises(GHNError, match=message):
        publish(directory, REPO, upload=True)
    assert not server.requests


def test_names_and_directories_that_cannot_be(directory: Path, ghn_file: Path) -> None:
    with pytest.raises(GHNError, match="write organisation/name"):
        publish(directory, "ghn")
    with pytest.raises(GHNError, match="is not a directory with"):
        publish(ghn_file, REPO)
    with pytest.raises(CheckpointError):
        publish(directory.parent, REPO)


def test_who_may_not_write_is_told(
    server: HubServer, directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["publish", str(directory), REPO, "--upload"]) == 1
    assert "hf auth login" in capsys.readouterr().err
    assert REPO not in server.repos
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["publish", str(directory), REPO, "--upload"]) == 0
