"""From a file to a GHN: nothing becomes a module before the file's header agrees with its config."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..ambient import plain_torch
from ..errors import CheckpointError
from ..files import read_safetensors_header
from ..hypernet import GHN, GHNConfig
from .catalog import CATALOG
from .source import CONFIG_NAME, Checkpoint, Configs, Source, embedded_config, open_safetensors

logger = logging.getLogger("timm_ghn.checkpoints")


class _Shared:
    """The GHNs that were loaded, each as long as its source has the same checkpoint."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loading: dict[tuple[str, str, torch.dtype], threading.Lock] = {}
        self._loaded: dict[tuple[str, str, torch.dtype], tuple[object, GHN]] = {}

    def get(self, source: Source, device: torch.device, dtype: torch.dtype) -> GHN:
        """The one of a source, loaded now if it has not been before."""
        key = (str(source), str(device), dtype)
        with self._lock:
            loading = self._loading.setdefault(key, threading.Lock())
        # One lock for each key: whoever asks for another GHN does not wait for this one's download.
        with loading:
            stamp = source.stamp()
            if key not in self._loaded or self._loaded[key][0] != stamp:
                ghn = _load(source.fetch())
                if dtype != torch.float32 and ghn.gnn.single_precision:
                    kind = type(ghn.gnn).__name__
                    raise ValueError(f"dtype is {dtype}, but a {kind} computes in torch.float32: {source} has one.")
                ghn = ghn.to(device, dtype)
                logger.info("loaded %s on %s", source, device)
                with self._lock:
                    self._loaded[key] = stamp, ghn
            return self._loaded[key][1]

    def clear(self) -> None:
        """Forgets them all."""
        with self._lock:
            self._loaded.clear()


SHARED = _Shared()

_DTYPES = {"F32": torch.float32, "F16": torch.float16}


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
    return SHARED.get(CATALOG.find(os.fspath(source)), device, dtype)


GHN.loader = load_ghn


def stated_config(tag: str) -> GHNConfig | None:
    """A tag's config as far as it is stated on this machine, without loading the GHN."""
    source = CATALOG.find(tag)
    stated = source.stated()
    return _agreed_config(stated, source) if stated else None


def _load(checkpoint: Checkpoint) -> GHN:
    """The module of a verified file."""
    file = checkpoint.file
    config = _agreed_config({**checkpoint.configs, **embedded_config(file)}, file)
    with open_safetensors(file) as tensors:
        problems = list(_disagreements(tensors, GHN.parameter_shapes(config)))
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise CheckpointError(f"{file} disagrees with its config: {problems[0]}{more}.")
    state = _read_tensors(file)
    for name, tensor in state.items():
        if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN spreads; no temporary of the tensor's size
            raise CheckpointError(f"{file} holds NaN or infinite values in {name}: this GHN cannot predict anything.")
    return GHN.of(config, state)


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checked file, as float32, read into memory of their own, one after the other.

    A mapped file would be shared with whoever writes to it next: other values in tensors that are held, or, if it is
    cut, the end of the process.
    """
    tensors = {}
    with file.open("rb") as stream:
        header, start = read_safetensors_header(stream)
        for name, entry in header.items():
            tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
            stream.seek(start + entry["data_offsets"][0])
            if stream.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
                raise CheckpointError(f"{file} was cut short while it was read: get it again.")
            tensors[name] = tensor.float()
    return tensors


def _agreed_config(configs: Configs, of: object) -> GHNConfig:
    """The one config that all places which state it agree upon."""
    try:
        stated = {where: GHNConfig.from_dict(config) for where, config in configs.items()}
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = str(error).rstrip(".")
        raise CheckpointError(f"The config of {of} is not a GHN's: {reason}.") from error
    if not stated:
        raise CheckpointError(
            f"{of} has no config: put a {CONFIG_NAME} beside it or JSON into its metadata key 'config'."
        )
    where, config = next(iter(stated.items()))
    for other, second in stated.items():
        if second != config:
            differing = ", ".join(k for k, v in config.to_dict().items() if v != second.to_dict().get(k, v))
            raise CheckpointError(f"{where} and {other} disagree about {differing}: one of them is wrong.")
        if config.images is None:  # not every place that states a config says how the images were prepared
            where, config = other, second
        elif second.images not in (None, config.images):
            raise CheckpointError(f"{where} and {other} disagree about images: one of them is wrong.")
    return config


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
        elif dtype not in _DTYPES:
            yield f"{name} has dtype {dtype}, a GHN's is {' or '.join(_DTYPES)}"
