"""The cache of graphs, through the plugin and on its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch

from timm_ghn import creation, hub, trace
from timm_ghn.errors import TraceError
from timm_ghn.graph import cache

MODEL = "test_resnet"
TAG = "ghn-cached"
KEY = {"model": MODEL}


@pytest.fixture(autouse=True)
def folder(tags: None, ghn_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    monkeypatch.delenv("TIMM_GHN_CACHE", raising=False)
    hub.register(TAG, ghn_file)
    yield cache.directory()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every trace of the plugin's."""
    calls: list[str] = []

    def counting(model: torch.nn.Module, *args: Any) -> Any:
        calls.append(type(model).__name__)
        return trace(model, *args)

    monkeypatch.setattr(creation, "trace", counting)
    return calls


def create(name: str = MODEL, **kwargs: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(timm.create_model(name, pretrained_cfg=TAG, **kwargs).state_dict())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_second_creation_does_without_a_trace(traced: list[str], folder: Path) -> None:
    assert equal(create(), create())
    assert len(traced) == 1
    (file,) = folder.iterdir()
    assert file.suffix == ".json" and file.is_relative_to(huggingface_hub.constants.HF_HOME)


def test_what_decides_the_graph_is_part_of_the_key(traced: list[str]) -> None:
    settings: list[dict[str, Any]] = [
        {}, {"num_classes": 10}, {"in_chans": 1}, {"features_only": True}, {"name": "test_vit"},
        {"name": "test_vit", "img_size": 96}, {"ghn_kwargs": {"input_size": (3, 96, 96)}},
    ]  # fmt: skip
    first = [create(**setting) for setting in settings]
    assert len(traced) == len(settings)
    assert all(equal(create(**setting), state) for setting, state in zip(settings, first, strict=True))
    assert len(traced) == len(settings)


def test_what_does_not_is_not(traced: list[str]) -> None:
    create()
    create(dtype=torch.bfloat16)
    create(device="cpu")
    create(ghn_kwargs={"head": "predict"})
    create(name=f"{MODEL}.{TAG}", pretrained=True)
    assert len(traced) == 1


def test_arguments_that_are_not_plain_values_are_not_cached(traced: list[str], folder: Path) -> None:
    for _ in range(2):
        create(act_layer=torch.nn.SiLU)
    assert len(traced) == 2 and not folder.exists()


def test_it_can_be_turned_off(traced: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMM_GHN_CACHE", "0")
    create()
    assert not folder.exists()
    monkeypatch.delenv("TIMM_GHN_CACHE")
    create()
    monkeypatch.setenv("TIMM_GHN_CACHE", "0")
    create()
    assert len(traced) == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text", "other", "list", "folder"])
def test_damaged_entries_are_passed_over(damage: str, traced: list[str], folder: Path) -> None:
    expected = create()
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        middle = len(content) // 2
        file.write_bytes({
            "cut": content[:middle],
            "empty": b"",
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "text": b"not a graph\n",
            "other": b"%08x\n{}" % cache.zlib.crc32(b"{}"),
            "list": b"%08x\n[1]" % cache.zlib.crc32(b"[1]"),
        }[damage])  # fmt: skip
    assert equal(create(), expected)
    assert len(traced) == 2
    assert equal(create(), expected)
    assert len(traced) == (3 if damage == "folder" else 2)
    assert not list(folder.glob("*.tmp"))


def test_a_graph_is_not_used_for_other_parameters() -> None:
    model, other = (timm.create_model(MODEL, num_classes=classes) for classes in (10, 20))
    parameters = dict(model.named_parameters())
    graph = trace(model)
    cache.store(KEY, parameters, graph)
    loaded = cache.load(KEY, parameters)
    assert loaded is not None and loaded.to_dict() == graph.to_dict() and torch.equal(loaded.edges, graph.edges)
    assert cache.load(KEY, dict(other.named_parameters())) is None
    model.fc.bias.requires_grad_(False)
    assert cache.load(KEY, parameters) is None
    assert cache.load({"model": "another"}, parameters) is None


def test_a_folder_that_cannot_be_written(tmp_path: Path, traced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "file"))
    assert equal(create(), create())
    assert len(traced) == 2


def test_room_is_made_by_removing_the_oldest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model(MODEL)
    parameters = dict(model.named_parameters())
    graph = trace(model)
    cache.store({"n": 0}, parameters, graph)
    (file,) = folder.iterdir()
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * file.stat().st_size + 10)
    for index in range(1, 6):
        for age, entry in enumerate(sorted(folder.iterdir(), key=lambda entry: entry.stat().st_mtime_ns)):
            os.utime(entry, (age, age))
        cache.store({"n": index}, parameters, graph)
    found = [index for index in range(6) if cache.load({"n": index}, parameters)]
    assert found == [3, 4, 5]


def test_a_failed_trace_stores_nothing(folder: Path) -> None:
    with pytest.raises(TraceError):
        create(ghn_kwargs={"input_size": (5, 8, 8)})
    assert not folder.exists()


CONCURRENT = """
import sys, timm, timm_ghn, torch
torch.set_num_threads(1)
timm_ghn.register("shared", sys.argv[1])
for _ in range(3):
    model = timm.create_model("test_resnet", pretrained_cfg="shared")
print(sum(p.double().sum().item() for n, p in model.named_parameters() if not n.startswith("fc")))
"""


def test_processes_share_it(ghn_file: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", CONCURRENT, str(ghn_file)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(3)]
    outputs = {process.communicate(timeout=300)[0] for process in processes}
    assert all(process.returncode == 0 for process in processes) and len(outputs) == 1
    assert [file.suffix for file in (tmp_path / "timm-ghn" / "graphs").iterdir()] == [".json"]
