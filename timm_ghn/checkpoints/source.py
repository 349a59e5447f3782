"""Finding a GHN checkpoint, making sure it is the one that was meant, and loading it.

A source is a tag, a directory, a ``.safetensors`` file or ``hf-hub:org/repo@revision``. Nothing is opened before its
size and hash agree with what is known about it, and nothing becomes a module before its header agrees with its config.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import nn

from ..ambient import plain_torch
from ..errors import CheckpointError
from ..files import read_safetensors_header, sha256_of, whole_file
from ..hypernet import GHN, GHNConfig
from .convert import convert_file

logger = logging.getLogger("timm_ghn.hub")

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_HUB_PREFIX = "hf-hub:"
_HUB_ADDRESS = re.compile(
    r"(?:https?://[^/]+/|hf://(?:models/)?)?([\w.-]*\w/[\w.-]+?)(?:@([\w.-]+))?(?:/(?:tree|blob|resolve)/([\w.-]+).*)?/?"
)
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".joblib")
_PACKAGE = Path(__file__).resolve().parents[1]


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


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """A local file that passed verification, with every config known for it, by where it was found."""

    file: Path
    configs: Mapping[str, Mapping[str, Any]]


# All of these are guarded by _lock.
_lock = threading.Lock()
_registered: dict[str, str] = {}
_loading: dict[tuple[str, str, torch.dtype], threading.Lock] = {}
_loaded: dict[tuple[str, str, torch.dtype], tuple[Any, GHN]] = {}
# Called with a tag that is being registered; raising refuses it. The timm plugin lists its names here.
on_register: list[Callable[[str], None]] = []


def list_ghns() -> list[str]:
    """The tags of the published GHNs and of those added by `register`."""
    with _lock:
        return sorted({*hub_configs(), *_registered})


def register(tag: str, source: str | os.PathLike[str]) -> None:
    """Gives a GHN a tag, so that ``timm.create_model(name, pretrained_cfg=tag)`` predicts with it.

    Args:
        tag: Letters, digits, ``_`` and ``-``. A tag registered before is replaced.
        source: A directory with ``model.safetensors`` and ``config.json``, a ``.safetensors`` file, or
            ``hf-hub:org/repo@revision``. A relative path is kept as the absolute one.

    Raises:
        CheckpointError: If the tag cannot be one, or the source does not exist.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", tag):
        raise CheckpointError(f"The tag {tag!r} must consist of letters, digits, '_' and '-'.")
    source = os.fspath(source)
    if source.startswith(_HUB_PREFIX):
        _split_hub_source(source)
    else:
        _refuse_hub_address(source)
        source = str(Path(source).expanduser().absolute())
        _local_files(Path(source))
    with _lock:
        before = dict(_registered)
        _registered[tag] = source
    try:
        for tell in on_register:
            tell(tag)
    except BaseException:
        with _lock:
            _registered.clear()
            _registered.update(before)
        raise


@plain_torch()
def load_ghn(
    source: str | os.PathLike[str] = "ghn2",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> GHN:
    """Loads a GHN, verified, in eval mode.

    The module is shared: a second call with the same arguments returns the same object, unless the file has changed or
    the tag means another one since. Copy it (`copy.deepcopy`) before you train it. Its weights are read, not
    mapped: nothing that happens to the file later reaches them.

    Args:
        source: A tag of `list_ghns`, a directory with ``model.safetensors`` and ``config.json``, a ``.safetensors``
            file, or ``hf-hub:org/repo@revision``.
        device: Where its parameters go; the CPU if None.
        dtype: Their precision. A GHN-3 also works in half precision, with half the memory: what it predicts is then
            off by 0.1 % of its norm (``float16``) or 0.8 % (``bfloat16``).

    Raises:
        ValueError: If the GHN does not work in this precision.
        CheckpointError: If it cannot be found or downloaded, is not the file that was published, disagrees with its
            config, or holds values that are not finite.
    """
    device = torch.device(device or "cpu")
    source = resolve(os.fspath(source))
    key = (source, str(device), dtype)
    with _lock:
        loading = _loading.setdefault(key, threading.Lock())
    # One lock for each key: whoever asks for another GHN does not wait for this one's download.
    with loading:
        stamp, fetch = _locate(source)
        if key not in _loaded or _loaded[key][0] != stamp:
            ghn = _load(fetch())
            if dtype != torch.float32 and ghn.config.hypernet == "gatedgnn":
                raise ValueError(f"dtype is {dtype}, but a GatedGNN computes in torch.float32: {source} has one.")
            ghn = ghn.to(device, dtype)
            logger.info("loaded %s on %s", source, device)
            with _lock:
                _loaded[key] = stamp, ghn
        return _loaded[key][1]


def resolve(source: str) -> str:
    """Follows a registered tag to its source; a shipped tag, a path and a Hub repository stay what they are.

    Raises:
        CheckpointError: If the source is none of these.
    """
    with _lock:
        if source in _registered:
            return _registered[source]
    if source in hub_configs() or source.startswith(_HUB_PREFIX):
        return source
    _refuse_hub_address(source)
    path = Path(source).expanduser()
    if path.exists() or path.suffix or len(path.parts) > 1:
        return str(path.absolute())
    known = list_ghns()
    nearest = difflib.get_close_matches(source, known, n=1, cutoff=0.0)
    raise CheckpointError(
        f"Unknown GHN {source!r}: did you mean {nearest[0]!r}? Known tags: {', '.join(known)}."
        if nearest
        else f"Unknown GHN {source!r}, and no tag is known: register one with timm_ghn.register(tag, source)."
    )


def _refuse_hub_address(source: str) -> None:
    """Raises, with the right spelling, for a repository on the Hub that is written as its address or its bare name."""
    match = _HUB_ADDRESS.fullmatch(source)
    path = Path(source).expanduser()
    if "://" in source or (match and not path.exists() and path.suffix not in (".safetensors", *_PICKLES)):
        revision = match and (match[2] or match[3])
        spelling = f"{_HUB_PREFIX}{match[1]}" if match else f"{_HUB_PREFIX}org/repo"
        raise CheckpointError(
            f"There is no GHN checkpoint at {source!r}: for a repository on the Hub, write "
            f"{spelling + (f'@{revision}' if revision else '')!r}."
        )


@functools.cache
def hub_configs() -> dict[str, HubConfig]:
    """The published GHNs by tag, from the ``hub_configs`` folder.

    Raises:
        CheckpointError: If a file in it does not have the fields of `HubConfig`.
    """
    # Next to the package in a checkout, inside it when installed from a wheel.
    folders = [_PACKAGE / "hub_configs", _PACKAGE.parent / "hub_configs"]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    configs = {}
    for file in sorted(folder.glob("*.json")):
        try:
            configs[file.stem] = HubConfig(**json.loads(file.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            fields = ", ".join(field.name for field in dataclasses.fields(HubConfig))
            raise CheckpointError(f"{file} must be a JSON object with exactly the fields {fields}: {error}.") from error
    return configs


def _locate(source: str) -> tuple[Any, Callable[[], _Checkpoint]]:
    """What a resolved source refers to now: a stamp that changes with the contents, and how to get it."""
    if source in hub_configs():
        pin = hub_configs()[source]
        return pin.sha256, lambda: _published(source, pin)
    if source.startswith(_HUB_PREFIX):
        return source, lambda: _from_hub(source)
    weights, config = _local_files(Path(source))
    stamp = [(file, file.stat().st_mtime_ns, file.stat().st_size) for file in (weights, config) if file]
    return stamp, lambda: _Checkpoint(weights, _read_json(config) if config else {})


def _published(tag: str, pin: HubConfig) -> _Checkpoint:
    """The checkpoint of a shipped tag: the embedded copy if there is one, the Hub's otherwise."""
    embedded = _PACKAGE / "weights" / f"{tag}.safetensors"
    configs = {f"hub_configs/{tag}.json": pin.config}
    if embedded.is_file():
        _verify(embedded, pin.sha256, pin.size, "reinstall timm-ghn")
        return _Checkpoint(embedded, configs)
    if pin.format == "joblib":
        return _Checkpoint(_converted(tag, pin), configs)
    if pin.revision is None or pin.sha256 is None:
        raise CheckpointError(
            f"The GHN {tag!r} has no checkpoint in this version: train one with `timm-ghn train` and add it with "
            f"timm_ghn.register(tag, directory)."
        )
    file = _download(pin.repo_id, pin.filename, pin.revision)
    _verify(file, pin.sha256, pin.size, "delete it and it will be downloaded again")
    return _Checkpoint(file, configs)


def _converted(tag: str, pin: HubConfig) -> Path:
    """The safetensors file that a published pickle was converted to, beside the Hub's cache.

    What the pin leaves open is trusted the first time and recorded; from then on the record is what was published.
    """
    folder = Path(huggingface_hub.constants.HF_HUB_CACHE).with_name("timm-ghn") / tag
    weights, record_file = folder / WEIGHTS_NAME, folder / "source.json"
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


def _from_hub(source: str) -> _Checkpoint:
    repo_id, revision = _split_hub_source(source)
    config = _download(repo_id, CONFIG_NAME, revision)
    # A branch can move between two downloads; the folder of the first names the commit, which cannot.
    file = _download(repo_id, WEIGHTS_NAME, config.parent.name)
    _verify_announced(file)
    return _Checkpoint(file, _read_json(config))


def _split_hub_source(source: str) -> tuple[str, str | None]:
    repo_id, _, revision = source.removeprefix(_HUB_PREFIX).partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id):
        raise CheckpointError(f"{source!r} is not a Hub repository: write hf-hub:org/repo or hf-hub:org/repo@revision.")
    return repo_id, revision or None


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


def _local_files(path: Path) -> tuple[Path, Path | None]:
    """The weights and the config file, if it has one, of a checkpoint on this machine."""
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


def _pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle, which can run code and is never opened here: convert it with "
        f"`timm-ghn convert {path} -o DIRECTORY` and load the directory."
    )


def _read_json(file: Path) -> dict[str, Mapping[str, Any]]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}.") from error
    return {str(file): config}


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


def _metadata(file: Path) -> dict[str, str]:
    with _open(file) as tensors:
        return tensors.metadata() or {}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}): get it again, or convert it with `timm-ghn convert`."
        ) from error


def _load(checkpoint: _Checkpoint) -> GHN:
    """The module of a verified file."""
    file = checkpoint.file
    config = _agreed_config(checkpoint)
    with _open(file) as tensors:
        problems = list(_disagreements(tensors, GHN.parameter_shapes(config)))
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise CheckpointError(f"{file} disagrees with its config: {problems[0]}{more}.")
    state = _read_tensors(file)
    for name, tensor in state.items():
        if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN spreads; no temporary of the tensor's size
            raise CheckpointError(f"{file} holds NaN or infinite values in {name}: this GHN cannot predict anything.")
    # On meta nothing is initialised only to be overwritten, and the caller's random state is left alone.
    with torch.device("meta"):
        ghn = GHN(config)
    # Not by load_state_dict, which registers parameters: where those are made without memory for their values
    # (accelerate's init_empty_weights), it is that function which is replaced.
    for name, tensor in state.items():
        prefix, _, attribute = name.rpartition(".")
        ghn.get_submodule(prefix)._parameters[attribute] = nn.Parameter(tensor)
    return ghn.eval()


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checked file, all of them float32, read into memory of their own, one after the other.

    A mapped file would be shared with whoever writes to it next: other values in tensors that are held, or, if it is
    cut, the end of the process.
    """
    tensors = {}
    with file.open("rb") as stream:
        header, start = read_safetensors_header(stream)
        for name, entry in header.items():
            tensor = torch.empty(entry["shape"])
            stream.seek(start + entry["data_offsets"][0])
            if stream.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
                raise CheckpointError(f"{file} was cut short while it was read: get it again.")
            tensors[name] = tensor
    return tensors


def _agreed_config(checkpoint: _Checkpoint) -> GHNConfig:
    """The one config that all places which state it agree upon."""
    stated = dict(checkpoint.configs)
    embedded = _metadata(checkpoint.file).get("config")
    try:
        if embedded is not None:
            stated[f"the metadata of {checkpoint.file}"] = json.loads(embedded)
        configs = {where: GHNConfig.from_dict(config) for where, config in stated.items()}
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = str(error).rstrip(".")
        raise CheckpointError(f"The config of {checkpoint.file} is not a GHN's: {reason}.") from error
    if not configs:
        raise CheckpointError(
            f"{checkpoint.file} has no config: put a {CONFIG_NAME} beside it or JSON into its metadata key 'config'."
        )
    where, config = next(iter(configs.items()))
    for other, second in configs.items():
        if second != config:
            differing = ", ".join(k for k, v in config.to_dict().items() if v != second.to_dict().get(k, v))
            raise CheckpointError(f"{where} and {other} disagree about {differing}: one of them is wrong.")
        if config.images is None:  # not every place that states a config says how the images were prepared
            where, config = other, second
        elif second.images not in (None, config.images):
            raise CheckpointError(f"{where} and {other} disagree about images: one of them is wrong.")
    return config


def stated_config(tag: str) -> GHNConfig | None:
    """A tag's config as far as it is stated on this machine, without loading the GHN."""
    source = resolve(tag)
    if source in hub_configs():
        return GHNConfig.from_dict(hub_configs()[source].config)
    if source.startswith(_HUB_PREFIX):
        return None
    weights, config = _local_files(Path(source))
    return _agreed_config(_Checkpoint(weights, _read_json(config) if config else {}))


def _disagreements(tensors: Any, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What the header says that the config does not, tensor by tensor, before any of them is read."""
    names = set(tensors.keys())
    for name in sorted(shapes.keys() - names):
        yield f"{name} is missing"
    for name in sorted(names - shapes.keys()):
        yield f"{name} does not belong there"
    for name in sorted(names & shapes.keys()):
        header = tensors.get_slice(name)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if shape != tuple(shapes[name]):
            yield f"{name} has shape {shape}, the config asks for {tuple(shapes[name])}"
        elif dtype != "F32":
            yield f"{name} has dtype {dtype}, a GHN's is F32"
