"""Fixtures for more than one test file."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hub_server import HubServer
from safetensors.torch import save_file

from timm_ghn.checkpoints.catalog import CATALOG
from timm_ghn.checkpoints.load import SHARED
from timm_ghn.hypernet import GHN, GHNConfig

# Tests leave the user's cache of graphs alone.
os.environ["TIMM_GHN_CACHE"] = "0"
# Small networks are slower on several threads, and sums come out in another order. What tests start inherits it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data: $TIMM_GHN_SHARED, or ../shared beside the checkout."""
    folder = Path(os.environ.get("TIMM_GHN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist; set TIMM_GHN_SHARED")
    return folder


@pytest.fixture(scope="session")
def save_ghn() -> Callable[..., Path]:
    """Writes a random GHN as one file that carries its config, ``save_ghn(path, hid=16, ...)``."""

    def save(path: Path, seed: int = 0, **config: Any) -> Path:
        config = {"num_classes": 10, "max_shape": (16, 16, 3, 3), "hid": 16, **config}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            ghn = GHN(GHNConfig(**config))
        save_file(ghn.state_dict(), path, metadata={"config": json.dumps(ghn.config.to_dict())})
        return path

    return save


@pytest.fixture(scope="session")
def ghn_file(save_ghn: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GHN for ten classes."""
    return save_ghn(tmp_path_factory.mktemp("ghn") / "random.safetensors")


@pytest.fixture(scope="session")
def run_benchmark() -> Callable[..., None]:
    """Does what ``python benchmarks/NAME.py ARGUMENTS`` does in this process, ``run_benchmark("graph_layer", ...)``."""

    def run(name: str, *arguments: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(BENCHMARKS / f"{name}.py"), *arguments])
            patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])  # which its worker processes get as well
            try:
                importlib.import_module(name).main()
            finally:
                torch.set_flush_denormal(False)  # which one may set, and hypothesis refuses to run with

    return run


@pytest.fixture
def tags() -> Iterator[None]:
    """Forgets the tags that a test registers."""
    before = dict(CATALOG.registered)
    yield
    CATALOG.registered.clear()
    CATALOG.registered.update(before)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub of our own and an empty cache, for the client in this process."""
    constants = huggingface_hub.constants
    SHARED.clear()
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol is not served
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server
