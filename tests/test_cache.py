"""The cache of graphs, through the plugin and on its own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from timm.models import resnet
from timm.models.resnet import BasicBlock

from timm_ghn import predictor, trace
from timm_ghn.checkpoints.catalog import CATALOG
from timm_ghn.errors import TraceError
from timm_ghn.graph import cache

MODEL = "test_resnet"
TAG = "ghn-cached"
SCALE = 2.0


@pytest.fixture(autouse=True)
def folder(tags: None, ghn_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    monkeypatch.delenv("TIMM_GHN_CACHE", raising=False)
    CATALOG.register(TAG, ghn_file)
    yield cache.directory()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every trace of the plugin's."""
    calls: list[str] = []

    def counting(model: torch.nn.Module, *args: Any) -> Any:
        calls.append(type(model).__name__)
        return trace(model, *args)

    monkeypatch.setattr(predictor, "trace", counting)
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


@pytest.mark.slow
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


def test_arguments_that_are_not_plain_values(traced: list[str]) -> None:
    """What they make of the model counts, not they."""
    for layer in (torch.nn.SiLU, torch.nn.SiLU, torch.nn.ELU, functools.partial(torch.nn.ELU, alpha=0.5)):
        create(act_layer=layer)
    assert len(traced) == 3


def _without_shortcut(self: Any, x: torch.Tensor) -> Any:
    return self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))


def _replaced_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other code in the very function object, as an editor's hot reload puts there."""
    monkeypatch.setattr(BasicBlock.forward, "__code__", _without_shortcut.__code__)


def _by_closure(scale: float) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return original(self, x) + scale * x if scale else original(self, x)

    original = torch.nn.ReLU.forward
    return forward


def _wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a decorator that takes on the name and module of what it decorates."""
    original = resnet.BasicBlock.forward

    @functools.wraps(original)
    def forward(self: Any, x: torch.Tensor) -> Any:
        return _without_shortcut(self, x)

    monkeypatch.setattr(BasicBlock, "forward", torch.no_grad()(torch.enable_grad()(forward)))


CHANGES: dict[str, Any] = {
    "a method": lambda patch: patch.setattr(BasicBlock, "forward", _without_shortcut),
    "a method's code": _replaced_inside,
    "a decorated method": _wrapped,
    "a method of torch's": lambda patch: patch.setattr(torch.nn.ReLU, "forward", _by_closure(1.0)),
    "how modules are called": lambda patch: patch.setattr(
        torch.nn.Module, "__call__", lambda self, *args, **kwargs: self._call_impl(*args, **kwargs)
    ),
    "a function that torch's modules use": lambda patch: patch.setattr(
        torch.nn.functional, "relu", lambda x, inplace=False: x * (x > 0)
    ),
    "a function that forward looks up": lambda patch: patch.setattr(resnet, "checkpoint_seq", lambda *args: None),
    "a method of tensors": lambda patch: patch.setattr(torch.Tensor, "mean", lambda self, *args, **kwargs: torch.mean(
        self, *args, **kwargs)),
    "a method that is new": lambda patch: patch.setattr(BasicBlock, "__getattr__", torch.nn.Module.__getattr__, False),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_the_code_is_part_of_the_key(change: str, traced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = create()
    CHANGES[change](monkeypatch)
    changed = create()
    assert len(traced) == 2
    monkeypatch.setenv("TIMM_GHN_CACHE", "0")
    assert equal(changed, create())  # what is predicted without a cache
    monkeypatch.undo()
    assert equal(create(), before)


def test_what_a_forward_pass_holds_is_part_of_the_key() -> None:
    """Closures, defaults, constants, attributes, hooks, a module's own forward."""

    class Net(torch.nn.Module):
        mode = "plain"

        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor, skip: bool = False) -> Any:
            return self.conv(x) * SCALE

    def located(change: Any = None) -> Path | None:
        net = Net()
        if change:
            change(net)
        return cache.locate(net, None)

    files = {located(), located()}
    assert len(files) == 1 and None not in files
    changes: list[Any] = [
        lambda net: setattr(net, "forward", lambda x: x),
        lambda net: setattr(net, "forward", functools.partial(net.forward, skip=True)),
        lambda net: setattr(net, "depth", 3),
        lambda net: setattr(net, "names", ["a", {"b": (1.5, None)}]),
        lambda net: net.register_forward_pre_hook(lambda module, args: None),
        lambda net: net.conv.register_forward_hook(lambda module, args, output: output),
        lambda net: net.register_buffer("mask", torch.zeros(3)),
        lambda net: net.register_buffer("mask", torch.zeros(4)),
        lambda net: torch.nn.utils.parametrizations.weight_norm(net.conv),
        lambda net: net.add_module("other", net.conv),
        lambda net: net.conv.__setattr__("stride", (2, 2)),
    ]
    for change in changes:
        files.add(located(change))
    assert len(files) == 1 + len(changes)
    Net.mode = "other"
    files.add(located())
    Net.forward.__defaults__ = (True,)
    files.add(located())
    globals()["SCALE"] = 3.0
    files.add(located())
    globals()["SCALE"] = 2.0
    assert len(files) == 4 + len(changes) and None not in files


def test_closures_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    files = set()
    for scale in (0.0, 1.0, 2.0, 2.0):
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.ReLU, "forward", _by_closure(scale))
            files.add(cache.locate(timm.create_model(MODEL), None))
    assert len(files) == 3 and None not in files


def test_settings_of_timms_layers_are_part_of_the_key(traced: list[str]) -> None:
    fused = timm.layers.use_fused_attn()
    try:
        for enable in (True, False, True, False):
            timm.layers.set_fused_attn(enable)
            create("test_vit")
    finally:
        timm.layers.set_fused_attn(fused)
    assert len(traced) == 2


def test_a_model_that_cannot_be_told_from_others_is_not_cached(folder: Path) -> None:
    model = timm.create_model(MODEL)
    model.lock = threading.Lock()
    assert cache.locate(model, None) is None


def test_a_class_of_the_same_name_has_a_key_of_its_own() -> None:
    one, other = (type("Block", (torch.nn.Conv2d,), {"forward": f}) for f in (torch.nn.Conv2d.forward, lambda s, x: x))
    assert cache.locate(one(3, 8, 3), None) != cache.locate(other(3, 8, 3), None)


def test_it_can_be_turned_off(traced: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMM_GHN_CACHE", "0")
    create()
    assert not folder.exists()
    monkeypatch.delenv("TIMM_GHN_CACHE")
    create()
    monkeypatch.setenv("TIMM_GHN_CACHE", "0")
    create()
    assert len(traced) == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text", "other", "list", "parts", "deep", "folder"])
def test_damaged_entries_are_passed_over(damage: str, traced: list[str], folder: Path) -> None:
    expected = create()
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        middle = len(content) // 2
        others = json.dumps({**json.loads(content.partition(b"\n")[2]), "operands": []}).encode()
        file.write_bytes({
            "cut": content[:middle],
            "empty": b"",
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "text": b"not a graph\n",
            "other": b"%08x\n{}" % zlib.crc32(b"{}"),
            "list": b"%08x\n[1]" % zlib.crc32(b"[1]"),
            "parts": b"%08x\n%s" % (zlib.crc32(others), others),
            "deep": b"%08x\n%s" % (zlib.crc32(b"[" * 100_000), b"[" * 100_000),
        }[damage])  # fmt: skip
    assert equal(create(), expected)
    assert len(traced) == 2
    assert equal(create(), expected)
    assert len(traced) == (3 if damage == "folder" else 2)
    assert not list(folder.glob("*.part"))


def test_a_graph_is_not_used_for_other_parameters() -> None:
    model = timm.create_model(MODEL, num_classes=10)
    graph = trace(model)
    file = cache.locate(model, None)
    assert file is not None
    cache.store(file, graph)
    loaded = cache.load(file)
    assert loaded is not None and loaded.to_dict() == graph.to_dict() and torch.equal(loaded.edges, graph.edges)
    assert cache.locate(timm.create_model(MODEL, num_classes=10).to(torch.bfloat16), None) == file
    assert cache.locate(timm.create_model(MODEL, num_classes=20), None) != file
    assert cache.locate(model, 96) != file
    model.fc.bias.requires_grad_(False)
    assert cache.locate(model, None) != file


def test_a_folder_that_cannot_be_written(tmp_path: Path, traced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "file"))
    assert equal(create(), create())
    assert len(traced) == 2


def test_room_is_made_by_removing_the_oldest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace(timm.create_model(MODEL))
    cache.store(folder / "0.json", graph)
    (file,) = folder.iterdir()
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * file.stat().st_size + 10)
    for index in range(1, 6):
        for age, entry in enumerate(sorted(folder.iterdir(), key=lambda entry: entry.stat().st_mtime_ns)):
            os.utime(entry, (age, age))
        cache.store(folder / f"{index}.json", graph)
    found = [index for index in range(6) if cache.load(folder / f"{index}.json")]
    assert found == [3, 4, 5]


def test_a_failed_trace_stores_nothing(folder: Path) -> None:
    with pytest.raises(TraceError):
        create(ghn_kwargs={"input_size": (5, 8, 8)})
    assert not folder.exists()


CONCURRENT = """
import sys, timm, timm_ghn
timm_ghn.register("shared", sys.argv[1])
for _ in range(3):
    model = timm.create_model("test_resnet", pretrained_cfg="shared")
print(sum(p.double().sum().item() for n, p in model.named_parameters() if not n.startswith("fc")))
"""


@pytest.mark.slow
def test_processes_share_it(ghn_file: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", CONCURRENT, str(ghn_file)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(3)]
    outputs = {process.communicate(timeout=300)[0] for process in processes}
    assert all(process.returncode == 0 for process in processes) and len(outputs) == 1
    assert [file.suffix for file in (tmp_path / "timm-ghn" / "graphs").iterdir()] == [".json"]
