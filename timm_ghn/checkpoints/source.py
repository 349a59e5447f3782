"""Where a GHN's checkpoint comes from: this package, a repository on the Hub, or files on this machine.

Nothing is handed on before its size and hash agree with what is known about it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub.constants
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files import sha256_of, whole_file
from .convert import convert_file

logger = logging.getLogger("timm_ghn.checkpoints")

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
RECORD_NAME = "source.json"
"""Beside a converted checkpoint: what it was made of, which is what is accepted from then on."""
HUB_PREFIX = "hf-hub:"
EMBEDDED = Path(__file__).resolve().parents[1] / "weights"
"""The checkpoints that come with the package, ``TAG.safetensors``."""

_HUB_ADDRESS = re.compile(
    r"(?:https?://[^/]+/|hf://(?:models/)?)?([\w.-]*\w/[\w.-]+?)(?:@([\w.-]+))?(?:/(?:tree|blob|resolve)/([\w.-]+).*)?/?"
)
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".joblib")

Configs = Mapping[str, Mapping[str, Any]]
"""What is stated about a GHN, as `GHNConfig.to_dict` has it, by the place that states it."""


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """One published GHN: the contents of ``hub_configs/TAG.json``.

    Attributes:
        repo_id: Repository on the Hub.
        filename: The checkpoint's name in it.
        revision: Commit that holds the file; null while the repository is not published. A null in these three means,
            for a ``joblib`` file, that what its first download had is recorded and holds from then on.
        sha256: Hash of the file; null while the checkpoint does not exist.
        size: Its size in bytes; null while the checkpoint does not exist.
        format: ``safetensors``, the one that is loaded, or ``joblib``, which is converted at its first use.
        config: The GHN's config.
        trained_on: The data set and the architectures.
        license: SPDX identifier.
        citation: What to cite.
        results: Measured results, by name.
        ranking: How far its order of networks is that of their trained accuracies, once it has been measured:
            Kendall's ``tau``, its standard ``error``, over how many ``networks``, and the ``source`` of these numbers.
    """

    repo_id: str
    filename: str
    revision: str | None
    sha256: str | None
    size: int | None
    format: str
    config: Mapping[str, Any]
    trained_on: str
    license: str
    citation: str
    results: Mapping[str, Any]
    ranking: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A local file that passed verification, with every config known for it."""

    file: Path
    configs: Configs


class Source(Protocol):
    """A place that a checkpoint comes from; as text, what `load_ghn` takes for it."""

    def stamp(self) -> object:
        """What changes when the checkpoint does, as far as that shows without the network."""

    def fetch(self) -> Checkpoint:
        """The checkpoint, verified.

        Raises:
            CheckpointError: If it cannot be had, or is not what it should be.
        """

    def stated(self) -> Configs:
        """What is stated about it on this machine, without fetching anything."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A shipped tag: the embedded copy if there is one, the Hub's file otherwise."""

    tag: str
    pin: HubConfig

    def __str__(self) -> str:
        return self.tag

    def stamp(self) -> object:
        return self.pin.sha256

    def stated(self) -> Configs:
        return {f"hub_configs/{self.tag}.json": self.pin.config}

    def fetch(self) -> Checkpoint:
        tag, pin = self.tag, self.pin
        embedded = EMBEDDED / f"{tag}.safetensors"
        if embedded.is_file():
            _verify(embedded, pin.sha256, pin.size, "reinstall timm-ghn")
            return Checkpoint(embedded, self.stated())
        if pin.format == "joblib":
            return Checkpoint(self._converted(), self.stated())
        if pin.revision is None or pin.sha256 is None:
            raise CheckpointError(
                f"The GHN {tag!r} has no checkpoint in this version: train one with `timm-ghn train` and add it with "
                f"timm_ghn.register(tag, directory)."
            )
        file = _download(pin.repo_id, pin.filename, pin.revision)
        _verify(file, pin.sha256, pin.size, "delete it and it will be downloaded again")
        return Checkpoint(file, self.stated())

    def _converted(self) -> Path:
        """The safetensors file that a published pickle was converted to, beside the Hub's cache.

        What the pin leaves open is trusted the first time and recorded; from then on the record is what was published.
        """
        tag, pin = self.tag, self.pin
        folder = converted_folder(tag)
        weights, record_file = folder / WEIGHTS_NAME, folder / RECORD_NAME
        record: Mapping[str, Any] = next(iter(_read_json(record_file).values())) if record_file.is_file() else {}
        known = {name: getattr(pin, name) or record.get(name) for name in ("revision", "sha256", "size")}
        changed = [name for name, value in known.items() if record and record.get(name) != value]
        if changed:
            raise CheckpointError(
                f"The GHN {tag!r} was converted from a file with another {changed[0]} than this version pins: delete "
                f"{folder} to convert the one that is pinned."
            )
        if record and weights.is_file():
            _verify(weights, record.get("converted_sha256"), None, f"delete {folder} and it will be made again")
            return weights
        file = _download(pin.repo_id, pin.filename, known["revision"])
        _verify_announced(file)
        sha256 = sha256_of(file)
        if known["sha256"]:
            remedy = "delete it and it will be downloaded again" if pin.sha256 else f"delete {folder} if you trust it"
            _verify(file, known["sha256"], known["size"], remedy)
        else:
            logger.warning("%s is trusted because it is the first of its name: sha256 %s", file, sha256)
        convert_file(file, folder)
        record = {
            "repo_id": pin.repo_id,
            "filename": pin.filename,
            "revision": known["revision"] or file.parent.name,  # the cache names the folder of a snapshot by its commit
            "sha256": sha256,
            "size": file.stat().st_size,
            "converted_sha256": sha256_of(weights),
        }
        with whole_file(record_file) as part:
            part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return weights


def converted_folder(tag: str) -> Path:
    """Where the safetensors file is that a published pickle was converted to, beside the Hub's cache."""
    return Path(huggingface_hub.constants.HF_HUB_CACHE).with_name("timm-ghn") / tag


@dataclasses.dataclass(frozen=True)
class HubRepository:
    """A repository on the Hub, at a revision or, if that is None, at its default branch."""

    repo_id: str
    revision: str | None

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.repo_id}" + (f"@{self.revision}" if self.revision else "")

    def stamp(self) -> object:
        return str(self)

    def stated(self) -> Configs:
        return {}

    def fetch(self) -> Checkpoint:
        config = _download(self.repo_id, CONFIG_NAME, self.revision)
        # A branch can move between two downloads; the folder of the first names the commit, which cannot.
        file = _download(self.repo_id, WEIGHTS_NAME, config.parent.name)
        _verify_announced(file)
        return Checkpoint(file, _read_json(config))


@dataclasses.dataclass(frozen=True)
class LocalFiles:
    """A directory, or a single file, by its absolute path."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def stamp(self) -> object:
        return [(file, file.stat().st_mtime_ns, file.stat().st_size) for file in self.files() if file]

    def stated(self) -> Configs:
        weights, config = self.files()
        return {**(_read_json(config) if config else {}), **embedded_config(weights)}

    def fetch(self) -> Checkpoint:
        return Checkpoint(self.files()[0], self.stated())

    def files(self) -> tuple[Path, Path | None]:
        """The weights and the config file, if there is one that counts.

        Raises:
            CheckpointError: If there is no checkpoint.
        """
        path = self.path
        if path.is_dir():
            weights = path / WEIGHTS_NAME
            if not weights.is_file():
                pickles = sorted(file for file in path.iterdir() if file.suffix in _PICKLES)
                if pickles:
                    raise _pickle_error(pickles[0])
                raise CheckpointError(f"{path} is not a GHN checkpoint: it has no {WEIGHTS_NAME}.")
        elif path.suffix in _PICKLES:
            raise _pickle_error(path)
        elif path.is_file():
            weights = path
        else:
            raise CheckpointError(f"There is no GHN checkpoint at {path}: give a directory or a .safetensors file.")
        config = weights.with_name(CONFIG_NAME)
        # A single file that carries its config does not have to match whatever lies beside it.
        needed = path.is_dir() or "config" not in _metadata(weights)
        return weights, config if needed and config.is_file() else None


def source_at(address: str) -> Source:
    """The source that is written as a directory, a ``.safetensors`` file or ``hf-hub:org/repo@revision``.

    Raises:
        CheckpointError: If it is a repository on the Hub that is written in another way.
    """
    if address.startswith(HUB_PREFIX):
        repo_id, _, revision = address.removeprefix(HUB_PREFIX).partition("@")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id):
            raise CheckpointError(
                f"{address!r} is not a Hub repository: write hf-hub:org/repo or hf-hub:org/repo@revision."
            )
        return HubRepository(repo_id, revision or None)
    _refuse_hub_address(address)
    return LocalFiles(Path(address).expanduser().absolute())


def _refuse_hub_address(source: str) -> None:
    """Raises, with the right spelling, for a repository on the Hub that is written as its address or its bare name."""
    match = _HUB_ADDRESS.fullmatch(source)
    path = Path(source).expanduser()
    if "://" in source or (match and not path.exists() and path.suffix not in (".safetensors", *_PICKLES)):
        revision = match and (match[2] or match[3])
        spelling = f"{HUB_PREFIX}{match[1]}" if match else f"{HUB_PREFIX}org/repo"
        raise CheckpointError(
            f"There is no GHN checkpoint at {source!r}: for a repository on the Hub, write "
            f"{spelling + (f'@{revision}' if revision else '')!r}."
        )


def _download(repo_id: str, filename: str, revision: str | None) -> Path:
    """One file of a Hub repository, from the cache or the network, with every way to fail in one sentence."""
    where = f"{repo_id}@{revision}" if revision else repo_id
    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision))
    # The client's HTTP library, and with it the exceptions of a broken transfer, differ between its versions.
    except Exception as error:
        raise CheckpointError(f"Cannot get {filename} of {where}: {_download_problem(error, repo_id)}.") from error


def _download_problem(error: Exception, repo_id: str) -> str:
    """What went wrong and what to do. A class comes before the class it derives from."""
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated; accept its terms on the Hub and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no repository {repo_id}; check its name, or log in if it is private"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision; look it up in its list of commits"
    if isinstance(error, LocalEntryNotFoundError):
        return "it is not in the cache and the Hub cannot be reached; check the network, HF_HUB_OFFLINE and HF_ENDPOINT"
    if isinstance(error, EntryNotFoundError):
        return f"there is no such file; a GHN needs {WEIGHTS_NAME} and {CONFIG_NAME}, which `timm-ghn convert` makes"
    return f"the download failed ({' '.join(str(error).split()) or type(error).__name__}); try again"


def _pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle, which can run code and is never opened here: convert it with "
        f"`timm-ghn convert {path} -o DIRECTORY` and load the directory."
    )


def _read_json(file: Path) -> Configs:
    try:
        return {str(file): json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}.") from error


def _verify(file: Path, sha256: str | None, size: int | None, remedy: str) -> None:
    """Raises unless the file is, byte for byte, the one that was published."""
    found = file.stat().st_size
    if size is not None and found != size:
        raise CheckpointError(f"{file} is not the published file: {found} bytes instead of {size}; {remedy}.")
    digest = sha256_of(file)
    if digest != sha256:
        raise CheckpointError(f"{file} is not the published file: sha256 {digest} instead of {sha256}; {remedy}.")


def _verify_announced(file: Path) -> None:
    """The Hub's cache names a large file by the sha256 that was announced before the download."""
    announced = Path(os.readlink(file)).name if file.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", announced):
        _verify(file, announced, None, "delete it and it will be downloaded again")


def embedded_config(file: Path) -> Configs:
    """The config that a safetensors file carries in its metadata, if it does.

    Raises:
        CheckpointError: If it is no such file, or the config is not JSON.
    """
    config = _metadata(file).get("config")
    try:
        return {} if config is None else {f"the metadata of {file}": json.loads(config)}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"The config of {file} is not a GHN's: {error}.") from error


def _metadata(file: Path) -> dict[str, str]:
    with open_safetensors(file) as tensors:
        return tensors.metadata() or {}


def open_safetensors(file: Path) -> Any:
    """The file as safetensors has it, checked against its header.

    Raises:
        CheckpointError: If it is not a whole one.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}): get it again, or convert it with `timm-ghn convert`."
        ) from error
