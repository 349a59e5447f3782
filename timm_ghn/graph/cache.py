"""Graphs that were traced before, in files beside the Hub's cache.

A graph is looked up by what its model was made from and by the code that traces, and taken only for a model with the
very parameters it was traced with. Nothing depends on the cache: what is damaged, foreign or not writable is passed
over. ``TIMM_GHN_CACHE=0`` turns it off.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from torch import nn

from .computation_graph import ComputationGraph

logger = logging.getLogger("timm_ghn.graph")

MAX_BYTES = 256 << 20
"""Room for several times all of timm; beyond it the oldest files go."""


def directory() -> Path:
    """Where the files lie."""
    return Path(huggingface_hub.constants.HF_HOME) / "timm-ghn" / "graphs"


def load(key: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> ComputationGraph | None:
    """The graph that was stored under `key` for a model with these parameters, if there is one.

    Args:
        key: What the model was made from, in values that JSON knows.
        parameters: The model's.
    """
    if not (file := _file(key)):
        return None
    try:
        checksum, _, text = file.read_bytes().partition(b"\n")
        if int(checksum, 16) != zlib.crc32(text):
            return None
        entry = json.loads(text)
        if entry["parameters"] != _layout(parameters):
            return None
        return ComputationGraph.from_dict(entry["graph"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def store(key: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], graph: ComputationGraph) -> None:
    """Keeps a graph for `load`; a file appears whole or not at all."""
    if not (file := _file(key)):
        return
    entry = {"key": key, "parameters": _layout(parameters), "graph": graph.to_dict()}
    text = json.dumps(entry, separators=(",", ":")).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(b"%08x\n" % zlib.crc32(text) + text)
            os.replace(temporary, file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _make_room(file.parent)
    except OSError as error:
        logger.debug("graphs are not cached in %s: %s", file.parent, error)


def _file(key: Mapping[str, Any]) -> Path | None:
    """The key's file; None if there is no cache, or the key has values that JSON does not know."""
    if os.environ.get("TIMM_GHN_CACHE") == "0":
        return None
    try:
        text = json.dumps([key, torch.__version__, _tracing_code()], sort_keys=True)
    except (TypeError, ValueError):
        return None
    return directory() / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


@functools.cache
def _tracing_code() -> str:
    """A hash of the code that makes graphs, which says more than a version while somebody works on it."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    return code.hexdigest()


def _layout(parameters: Mapping[str, nn.Parameter]) -> str:
    """A hash of all that a graph and its reading depend on in a model's parameters."""
    rows = [(name, *parameter.shape, parameter.requires_grad) for name, parameter in parameters.items()]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def _make_room(folder: Path) -> None:
    """Removes the files that were written longest ago until the rest fits; others may be doing the same."""
    files = []
    for entry in os.scandir(folder):
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue
        files.append((status.st_mtime, status.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= MAX_BYTES:
            break
        Path(path).unlink(missing_ok=True)
        total -= size
