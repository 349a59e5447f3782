"""Putting a GHN on the Hub: weights, config and a model card, checked before anything is sent."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from ..errors import GHNError
from ..files import sha256_of
from ..hypernet import GHN, GHNConfig
from .card import DIRECTORY, model_card, usage
from .catalog import CATALOG
from .load import load_ghn
from .source import CONFIG_NAME, HUB_PREFIX, WEIGHTS_NAME, HubConfig

CARD_NAME = "README.md"
_CITATIONS = {
    "graphormer": "Knyazev et al. 2023, Can We Scale Transformers to Predict Parameters of Diverse ImageNet Models?, "
    "arXiv:2303.04143",
    "gatedgnn": "Knyazev et al. 2021, Parameter Prediction for Unseen Deep Architectures, arXiv:2110.13100",
    "mlp": "Knyazev et al. 2021, Parameter Prediction for Unseen Deep Architectures, arXiv:2110.13100",
}


@dataclasses.dataclass(frozen=True)
class Publication:
    """What a repository on the Hub gets, or got.

    Attributes:
        repo_id: The repository.
        files: Its files by name, as contents or, where they are sent as they are, as paths.
        pin: What ``hub_configs/TAG.json`` says about the weights; the revision is None before they are uploaded.
    """

    repo_id: str
    files: dict[str, bytes | Path]
    pin: dict[str, Any]


def publish(directory: str | os.PathLike[str], repo_id: str, upload: bool = False) -> Publication:
    """Uploads a GHN to a repository on the Hub, which is made if it does not exist.

    The model card is the directory's ``README.md``, as training writes it, or made from ``hub_configs`` if that has
    this GHN in this repository. Usage, citation and the directory's pictures are added where it does not have them.

    Args:
        directory: Holds ``model.safetensors`` and ``config.json``.
        repo_id: ``organisation/name``.
        upload: Whether to send anything; otherwise the network is not used.

    Raises:
        CheckpointError: If the directory does not hold a GHN.
        GHNError: If there is no licence, or the Hub does not take it.
    """
    directory = Path(directory)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise GHNError(f"{repo_id!r} is not a repository on the Hub: write organisation/name.")
    if not directory.is_dir():
        raise GHNError(f"{directory} is not a directory with {WEIGHTS_NAME} and {CONFIG_NAME}.")
    ghn = load_ghn(directory)
    pictures = {path.name: path for path in sorted(directory.glob("*.png"))}
    weights = directory / WEIGHTS_NAME
    files: dict[str, bytes | Path] = {
        CARD_NAME: _card(directory, repo_id, ghn, list(pictures)).encode(),
        CONFIG_NAME: (json.dumps(ghn.config.to_dict(), indent=2) + "\n").encode(),
        WEIGHTS_NAME: weights,
        **pictures,
    }
    revision = _upload(repo_id, files) if upload else None
    pin = {
        "repo_id": repo_id,
        "filename": WEIGHTS_NAME,
        "revision": revision,
        "sha256": sha256_of(weights),
        "size": weights.stat().st_size,
    }
    return Publication(repo_id, files, pin)


def _upload(repo_id: str, files: dict[str, bytes | Path]) -> str:
    """One commit with all files; returns its hash."""
    operations = [CommitOperationAdd(name, file) for name, file in files.items()]
    try:
        api = HfApi(library_name="timm-ghn")
        api.create_repo(repo_id, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message="Upload a graph hypernetwork")
    # The client's HTTP library, and with it the exceptions of a broken transfer, differ between its versions.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GHNError(
            f"The Hub does not take {repo_id} ({reason}): check the name, your right to write there (`hf auth login`) "
            f"and the network."
        ) from error
    return str(commit.oid)


def _card(directory: Path, repo_id: str, ghn: GHN, pictures: list[str]) -> str:
    file, source = directory / CARD_NAME, f"{HUB_PREFIX}{repo_id}"
    pins = [pin for pin in CATALOG.published.values() if pin.repo_id == repo_id]
    pin = next((pin for pin in pins if GHNConfig.from_dict(pin.config) == ghn.config), None)
    if file.is_file():
        # Training does not know yet where its GHN will be found.
        card = file.read_text(encoding="utf-8").replace(DIRECTORY, source)
    elif pin is not None:
        card = _new_card(pin, ghn.config, source)
    else:
        raise GHNError(
            f"{directory} has no {CARD_NAME}: write one that says what the GHN was trained on, and its licence."
        )
    try:
        license = ModelCard(card, ignore_metadata_errors=True).data.to_dict().get("license")
    # The errors of the YAML library have no base in common with the client's own.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise GHNError(f"The metadata at the top of {file} is not what a model card's is: {reason}.") from error
    if not license:
        raise GHNError(f"{file} has no licence: its metadata needs a line like `license: apache-2.0`.")
    if "timm_ghn" not in card:
        card += usage(ghn.config, source)
    for picture in pictures:
        if picture not in card:
            card += f"\n![{picture.removesuffix('.png')}]({picture})\n"
    if "## Citation" not in card:
        card += f"\n## Citation\n\n{pin.citation if pin else _CITATIONS[ghn.config.hypernet]}\n"
    return card


def _new_card(pin: HubConfig, config: GHNConfig, source: str) -> str:
    rows = [f"| {name} | {value} |" for name, value in pin.results.items()]
    return model_card(
        config,
        name=pin.repo_id.split("/")[1],
        license=pin.license.lower(),
        trained_on=pin.trained_on,
        source=source,
        details="\n".join(["| | |", "|---|---|", *rows, ""]) if rows else "",
    )
