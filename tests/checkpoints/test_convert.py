"""Official checkpoints become safetensors with the same tensors; hostile ones become a `CheckpointError`."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch
from attacks import attacks
from attacks.samples import EDITS, TINY, Edit, attempt, damaged, published_config, samples, torch_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from timm_ghn.checkpoints.convert import convert_file
from timm_ghn.checkpoints.load import load_ghn
from timm_ghn.cli import main
from timm_ghn.errors import CheckpointError
from timm_ghn.hypernet import GHN, GHNConfig

CANARY = "/tmp/timm-ghn-canary"
ATTACKS = attacks(CANARY)
State = dict[str, torch.Tensor]


def tiny(**config: Any) -> tuple[GHNConfig, State]:
    """A small random GHN as a config and a state dict."""
    ghn = GHN(GHNConfig(**{**TINY, **config}))
    return ghn.config, ghn.state_dict()


def assert_converts(file: Path, config: GHNConfig, state: State) -> None:
    directory = convert_file(file, file.with_suffix(".converted"))
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    converted = load_file(directory / "model.safetensors")
    assert converted.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(converted[name], tensor), name
    assert GHNConfig.from_dict(json.loads((directory / "config.json").read_text())) == config
    assert load_ghn(directory).config == config


# Honest files


SAVED: dict[str, Callable[[Path, GHNConfig, State], Any]] = {
    "ppuda": lambda f, c, s: torch.save({"state_dict": s, "config": published_config(c), "epoch": 299}, f),
    "ppuda, before torch 1.6": lambda f, c, s: torch.save(
        {"state_dict": s, "config": published_config(c), "epoch": 299}, f, _use_new_zipfile_serialization=False
    ),
    "state dict": lambda f, c, s: torch.save(s, f),
    "joblib": lambda f, c, s: joblib.dump(s, f),
    "joblib, zlib": lambda f, c, s: joblib.dump(s, f, compress=3),
    "joblib, protocol 3": lambda f, c, s: joblib.dump(s, f, protocol=3),
    "joblib, protocol 5": lambda f, c, s: joblib.dump(s, f, protocol=5),
    "joblib, arrays": lambda f, c, s: joblib.dump({name: tensor.numpy() for name, tensor in s.items()}, f, compress=1),
    "joblib, parameters": lambda f, c, s: joblib.dump({n: torch.nn.Parameter(t) for n, t in s.items()}, f),
}


@pytest.mark.parametrize("golden", ["ghn2", "ghn3"])
@pytest.mark.parametrize("how", SAVED)
def test_the_published_layouts_convert(shared: Path, tmp_path: Path, golden: str, how: str) -> None:
    file = shared / "golden" / f"{golden}.safetensors"
    with safe_open(file, "pt") as tensors:
        config = GHNConfig.from_dict(json.loads(tensors.metadata()["config"]))
    state = collections.OrderedDict(load_file(file))
    SAVED[how](tmp_path / "ghn.pt", config, state)
    assert_converts(tmp_path / "ghn.pt", config, state)


@pytest.mark.parametrize(
    "config",
    [
        {"weight_norm": False, "ve": False, "layernorm": False},  # GHN-1
        {},  # GHN-2
        {"hypernet": "graphormer", "layers": 3},  # GHN-3
        {"hypernet": "graphormer", "layers": 2, "hid": 16, "heads": 4, "max_shape": (8, 8, 16, 16)},
        {"hypernet": "mlp"},
        {"decoder": "mlp"},
        {"max_shape": (8, 4, 3, 3), "num_classes": 7},
    ],
)
def test_the_config_is_found_in_the_tensors(tmp_path: Path, config: dict[str, Any]) -> None:
    expected, state = tiny(**config)
    joblib.dump(state, tmp_path / "ghn.pt")
    if expected.hypernet != "graphormer":
        expected = GHNConfig.from_dict({**expected.to_dict(), "heads": 8})  # nothing depends on it
    assert_converts(tmp_path / "ghn.pt", expected, state)


def test_what_the_tensors_do_not_show_is_taken_from_the_config(tmp_path: Path) -> None:
    config, state = tiny(weight_norm=False, heads=8)
    torch.save({"state_dict": state, "config": published_config(config)}, tmp_path / "ghn.pt")
    assert_converts(tmp_path / "ghn.pt", config, state)


def test_a_training_checkpoint_of_ghn3(tmp_path: Path) -> None:
    """Its program keeps arguments and the optimiser's state beside the weights, and a config that is partly ignored."""
    config, state = tiny(hypernet="graphormer", layers=2)
    ghn = GHN(config)
    ghn.load_state_dict(state)
    optimizer = torch.optim.AdamW(ghn.parameters())
    torch.stack([parameter.sum() for parameter in ghn.parameters()]).sum().backward()
    optimizer.step()
    state = {name: tensor.clone() for name, tensor in ghn.state_dict().items()}
    stated = {**published_config(config), "hypernet": "gatedgnn", "layers": 2, "heads": 2, "is_ghn2": False}
    args = argparse.Namespace(name="ghn3tm8", lr=4e-4, lr_steps=[200, 250], save=None)
    content = {"state_dict": state, "optimizer": optimizer.state_dict(), "epoch": 1, "args": args, "config": stated}
    torch.save(content, tmp_path / "checkpoint.pt")
    assert_converts(tmp_path / "checkpoint.pt", config, state)


def test_embeddings_moved_into_the_first_layer_are_moved_back(tmp_path: Path) -> None:
    config, state = tiny(hypernet="graphormer", layers=2)
    moved = {f"gnn.0.{name}" if "centrality" in name or "input_dist" in name else name: state[name] for name in state}
    torch.save(moved, tmp_path / "ghn.pt")
    assert_converts(tmp_path / "ghn.pt", config, state)


@pytest.mark.parametrize("hypernet", ["gatedgnn", "graphormer"])
@pytest.mark.parametrize("dimensions", [2, 4])
def test_maps_over_channels_are_matrices_or_kernels(tmp_path: Path, hypernet: str, dimensions: int) -> None:
    config, state = tiny(hypernet=hypernet, heads=8 if hypernet == "gatedgnn" else 2)
    maps = ("decoder.conv.0.weight", "decoder.conv.2.weight", "decoder.class_layer_predictor.1.weight")
    other = {**state, **{name: state[name].flatten(1) for name in maps}}
    other |= {name: other[name].reshape(other[name].shape + (1,) * (dimensions - 2)) for name in maps}
    joblib.dump(other, tmp_path / "ghn.pt")
    assert_converts(tmp_path / "ghn.pt", config, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_single(tmp_path: Path, dtype: torch.dtype) -> None:
    config, state = tiny(heads=8)
    joblib.dump({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / "ghn.pt")
    assert_converts(tmp_path / "ghn.pt", config, {name: tensor.to(dtype).float() for name, tensor in state.items()})


def test_torchs_reader_agrees(tmp_path: Path) -> None:
    """Strided views, shared storages and tensors of any layout come out as `torch.load` has them."""
    config, state = tiny(heads=8)
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    state = {
        name: part.view(tensor.shape[::-1]).permute(*reversed(range(tensor.ndim)))
        for (name, tensor), part in zip(state.items(), parts, strict=True)
    }
    for zipped in (True, False):
        data = torch_bytes(state, _use_new_zipfile_serialization=zipped)
        (tmp_path / "ghn.pt").write_bytes(data)
        assert_converts(tmp_path / "ghn.pt", config, torch.load(io.BytesIO(data), weights_only=True))


@pytest.mark.parametrize(
    ("change", "stated", "message"),
    [
        (lambda s: s.pop("ln.bias"), {}, "ln.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), {}, "extra does not belong there"),
        (lambda s: s.update({"ln.bias": torch.zeros(3)}), {}, r"ln.bias has shape \(3,\), its config asks for \(4,\)"),
        (lambda s: s.update({"ln.bias": torch.zeros(4).long()}), {}, "'ln.bias' is not a floating-point tensor"),
        (lambda s: s.pop("embed.weight"), {}, "is not a GHN's: it has no 'embed.weight'"),
        (lambda s: s.pop("gnn.gru.weight_ih"), {}, "is not a GHN's: it has no 'gnn'"),
        (lambda s: None, {"hid": 32}, "its config says hid=32, its tensors say 4"),
        (lambda s: None, {"max_shape": [8, 8, 1, 1]}, r"says max_shape=\(8, 8, 1, 1\), its tensors say \(4, 4, 1, 1\)"),
        (lambda s: None, {"weight_norm": "no"}, "weight_norm is 'no'; it must be one of True, False"),
        (lambda s: None, {"nonsense": 1}, r"unknown keys \['nonsense'\]"),
    ],
)
def test_a_checkpoint_that_disagrees_with_itself_is_refused(
    tmp_path: Path, change: Callable[[State], Any], stated: dict[str, Any], message: str
) -> None:
    config, state = tiny()
    change(state)
    content = {"state_dict": state, "config": {**published_config(config), **stated}}
    torch.save(content, tmp_path / "ghn.pt")
    with pytest.raises(CheckpointError, match=message):
        convert_file(tmp_path / "ghn.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_share_memory_are_refused(tmp_path: Path) -> None:
    """Otherwise a small file could describe any amount of output."""
    _, state = tiny(hid=32, hypernet="graphormer", layers=5)
    flat = torch.zeros(max(tensor.numel() for tensor in state.values()))
    torch.save({name: flat[: tensor.numel()].view(tensor.shape) for name, tensor in state.items()}, tmp_path / "ghn.pt")
    with pytest.raises(CheckpointError, match="its tensors share memory"):
        convert_file(tmp_path / "ghn.pt", tmp_path / "out")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, state = tiny(heads=8)
    joblib.dump(state, tmp_path / "ghn.pt", compress=3)
    assert main(["convert", str(tmp_path / "ghn.pt"), "-o", str(tmp_path / "out")]) == 0
    assert load_ghn(tmp_path / "out").config == config
    assert main(["convert", str(tmp_path / "out" / "config.json"), "-o", str(tmp_path / "again")]) == 1
    assert capsys.readouterr().err.startswith("timm-ghn: Cannot convert ")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Cannot convert .*nowhere.pt: .*No such file"):
        convert_file(tmp_path / "nowhere.pt", tmp_path / "out")


# Hostile files


@pytest.fixture
def bounded() -> Iterator[None]:
    """Half a gigabyte more memory than there is now, and ten seconds of the processor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), hard))
    started = time.process_time()
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - started < 10


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is bounded by means of Linux")
@pytest.mark.parametrize("attack", ATTACKS)
def test_attack(bounded: None, tmp_path: Path, attack: str) -> None:
    for outcome in attempt(ATTACKS[attack], tmp_path):
        assert isinstance(outcome, CheckpointError)
        assert not isinstance(outcome.__cause__, MemoryError)
        message = str(outcome)
        assert message.endswith(".") and "\n" not in message and len(message) < 1000, message
    assert not os.path.exists(CANARY)


SAMPLES = samples()
EDIT: st.SearchStrategy[Edit] = st.tuples(
    st.sampled_from(EDITS), st.integers(0, 1 << 15), st.binary(min_size=1, max_size=8)
)


@pytest.mark.parametrize("format", SAMPLES)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(EDIT, min_size=1, max_size=4))
def test_a_damaged_file_is_refused_or_still_a_ghn(tmp_path: Path, format: str, edits: list[Edit]) -> None:
    for outcome in attempt(damaged(SAMPLES[format], edits), tmp_path):
        assert isinstance(outcome, CheckpointError | GHN)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x04", b"\x78\x9c", SAMPLES["legacy"][:14]]), rest=st.binary())
def test_noise_is_refused(tmp_path: Path, start: bytes, rest: bytes) -> None:
    assert all(isinstance(outcome, CheckpointError) for outcome in attempt(start + rest, tmp_path))
