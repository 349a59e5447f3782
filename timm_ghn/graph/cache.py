"""Graphs that were traced before, in files in ``$HF_HOME/timm-ghn/graphs``.

A graph is looked up by its model's `fingerprint`, which covers the code that the model runs, by the input's size, and
by the code that traces. Nothing depends on the cache: what is damaged, foreign or not writable is passed over.
``TIMM_GHN_CACHE=0`` turns it off.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import zlib
from pathlib import Path

import huggingface_hub.constants
from torch import nn

from ..files import whole_file
from .computation_graph import ComputationGraph
from .fingerprint import fingerprint

logger = logging.getLogger("timm_ghn.graph")

MAX_BYTES = 256 << 20
"""Room for several times all of timm; beyond it the oldest files go."""


def directory() -> Path:
    """Where the files lie."""
    return Path(huggingface_hub.constants.HF_HOME) / "timm-ghn" / "graphs"


def locate(model: nn.Module, input_size: int | tuple[int, ...] | None) -> Path | None:
    """The file for a model's graph on an input of this size; None if there is no cache, or no telling models apart."""
    if os.environ.get("TIMM_GHN_CACHE") == "0" or (found := fingerprint(model)) is None:
        return None
    key = hashlib.sha256(repr((found, input_size, _tracing_code())).encode())
    return directory() / f"{key.hexdigest()}.json"


def load(file: Path) -> ComputationGraph | None:
    """The graph that was stored in a file, if there is one."""
    try:
        checksum, _, text = file.read_bytes().partition(b"\n")
        if int(checksum, 16) != zlib.crc32(text):
            return None
        return ComputationGraph.from_dict(json.loads(text))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def store(file: Path, graph: ComputationGraph) -> None:
    """Keeps a graph for `load`; the file appears whole or not at all."""
    text = json.dumps(graph.to_dict(), separators=(",", ":")).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as part:
            part.write_bytes(b"%08x\n" % zlib.crc32(text) + text)
        _make_room(file.parent)
    except OSError as error:
        logger.debug("graphs are not cached in %s: %s", file.parent, error)


@functools.cache
def _tracing_code() -> str:
    """A hash of the code that makes graphs, which says more than a version while somebody works on it."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    return code.hexdigest()


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
