"""The graph layer in C, compiled when it is first wanted: on one core, node by node, with nothing in between.

Compiling takes a second or two, so it is for those who compute gradients, and for those who ask for it with
``TIMM_GHN_COMPILE=1``; with ``TIMM_GHN_COMPILE=0``, for nobody. So it never depends on what was compiled before which
implementation computes: their results differ in the last digits. Without a C compiler, and in float64, `portable.py`
computes.

Libraries lie in ``$HF_HOME/timm-ghn/kernels``. As they are executed, a folder that belongs to somebody else or that
others can write to is not used; each process then compiles its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import huggingface_hub.constants
import torch
from torch import Tensor

from timm_ghn.files import whole_files
from timm_ghn.ops.portable import Weights, empty_sweeps, sweeps
from timm_ghn.ops.topology import Topology

_logger = logging.getLogger("timm_ghn.ops")

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_COMPILER_SECONDS = 120


def wanted(differentiated: bool) -> bool:
    """Whether to compute in C where that is possible.

    Args:
        differentiated: Whether gradients are to be computed.
    """
    return {"0": False, "1": True}.get(os.environ.get("TIMM_GHN_COMPILE", ""), differentiated)


def can_compute(h: Tensor, weights: Weights) -> bool:
    """Whether there is a library for tensors like these, which is compiled if need be."""
    return (
        all(x.dtype == torch.float32 for x in (h, *weights)) and _library(h.shape[1], len(weights.mlp0_w)) is not None
    )


def forward(h: Tensor, topology: Topology, weights: Weights) -> tuple[Tensor, Tensor]:
    """As `portable.forward`."""
    saved = empty_sweeps(h)
    up, down = sweeps(saved)
    torch.index_select(h, 0, topology.order, out=up.before)
    after = torch.empty_like(up.before)
    library, transposed = _library(h.shape[1], len(weights.mlp0_w)), _transposed(weights)
    assert library, "ask can_compute first"
    for sweep, lists, states in ((up, _incoming(topology), down.before), (down, _outgoing(topology), after)):
        library.forward(len(h), sweep is down, _pointers(*lists, *sweep, states), _pointers(*transposed))
    return torch.empty_like(after).index_copy_(0, topology.order, after), saved


def backward(grad: Tensor, out: Tensor, saved: Tensor, topology: Topology, weights: Weights) -> list[Tensor]:
    """As `portable.backward`."""
    nodes, d = out.shape
    hidden = len(weights.mlp0_w)
    library, transposed = _library(d, hidden), _transposed(weights)
    assert library, "ask can_compute first"
    weights = Weights(*(w.contiguous() for w in weights))
    by_weights = [torch.zeros_like(w) for w in weights]
    grad, after = grad[topology.order], out[topology.order]
    by_message, slopes = torch.empty_like(grad), grad.new_empty(nodes, 6 * d + 4 * hidden)
    up, down = sweeps(saved)
    for sweep, lists, states in ((down, _incoming(topology), after), (up, _outgoing(topology), down.before)):
        library.backward(
            nodes,
            sweep is up,
            _pointers(*lists, *sweep, states),
            *(_pointers(*tensors) for tensors in (weights, transposed, by_weights)),
            *(tensor.data_ptr() for tensor in (grad, by_message, slopes)),
        )
    return [torch.empty_like(grad).index_copy_(0, topology.order, grad), *by_weights]


def _incoming(topology: Topology) -> tuple[Tensor, ...]:
    return topology.in_ptr, topology.in_index, topology.in_distance


def _outgoing(topology: Topology) -> tuple[Tensor, ...]:
    return topology.out_ptr, topology.out_index, topology.out_distance


def _transposed(weights: Weights) -> Weights:
    return Weights(*(w.t().contiguous() for w in weights))


def _pointers(*tensors: Tensor) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


@functools.cache
def _library(d: int, hidden: int) -> ctypes.CDLL | None:
    """The functions of `native.c` for states and hidden layers of this width; None if they cannot be had."""
    try:
        library = _load(d, hidden)
    except (OSError, subprocess.SubprocessError) as error:
        # Who asked for it is told, everybody else has lost nothing but time.
        _logger.log(
            logging.WARNING if wanted(False) else logging.INFO,
            "the graph layer cannot be compiled here (%s: %s%s); its portable implementation gives the same results, "
            "slower.",
            type(error).__name__,
            error,
            f": {error.stderr}" if isinstance(error, subprocess.CalledProcessError) else "",
        )
        return None
    library.forward.argtypes = [ctypes.c_int64, ctypes.c_int, *[ctypes.c_void_p] * 2]
    library.backward.argtypes = [ctypes.c_int64, ctypes.c_int, *[ctypes.c_void_p] * 7]
    library.forward.restype = library.backward.restype = None
    return library


def _load(d: int, hidden: int) -> ctypes.CDLL:
    """Loads the library, compiled before or now."""
    # The same instructions, and so the same results, on all CPUs that have them.
    simd = ("-mavx2", "-mfma") if torch.backends.cpu.get_cpu_capability().startswith("AVX") else ()
    widths = f"-DD={d}", f"-DHIDDEN={hidden}", f"-DLANES={math.gcd(d, hidden, 8)}"
    command = (*shlex.split(os.environ.get("CC") or "cc"), *_FLAGS, *simd, *widths)
    key = repr((platform.system(), platform.machine(), command, _SOURCE.read_bytes()))
    name = f"gated_gnn-{hashlib.sha256(key.encode()).hexdigest()}.so"
    folder = _own_folder()
    if folder and (folder / name).exists():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(folder / name))
    # Whole or not at all, even if the power fails: half a library would crash whoever calls it.
    with whole_files(folder) if folder else tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        file = Path(place) / name
        subprocess.run(
            [*command, "-o", file, _SOURCE], check=True, capture_output=True, text=True, timeout=_COMPILER_SECONDS
        )
        return ctypes.CDLL(str(file))


def directory() -> Path:
    """Where libraries are kept."""
    return Path(huggingface_hub.constants.HF_HOME) / "timm-ghn" / "kernels"


def _own_folder() -> Path | None:
    """Where libraries are kept, if that is a place that only this user can write to."""
    if os.environ.get("TIMM_GHN_CACHE") == "0":
        return None
    folder = directory()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    own = os.name == "nt" or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
    return folder if own and os.access(folder, os.W_OK) else None
