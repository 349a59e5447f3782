"""Sources of a GHN: tags, directories, files, Hub repositories; and everything that can be wrong with them."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from attacks.samples import joblib_bytes
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from timm_ghn.checkpoints.catalog import CATALOG, Catalog, list_ghns, register
from timm_ghn.checkpoints.load import SHARED, load_ghn, stated_config
from timm_ghn.checkpoints.source import CONFIG_NAME, WEIGHTS_NAME, HubConfig, embedded_config
from timm_ghn.errors import CheckpointError
from timm_ghn.hypernet import GHN, GHNConfig
from timm_ghn.predictor import predict

REPO = "someone/ghn"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(ghn_file: Path) -> dict[str, bytes]:
    """A GHN repository's contents."""
    return {WEIGHTS_NAME: ghn_file.read_bytes(), CONFIG_NAME: json.dumps(config_of(ghn_file)).encode()}


@pytest.fixture
def publish(server: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Callable[..., HubConfig]:
    """Publishes the GHN on the server and ships its pin under the tag ``published``; arguments falsify the pin."""

    def publish(**changes: Any) -> HubConfig:
        weights = files[WEIGHTS_NAME]
        pin = HubConfig(
            repo_id=REPO,
            filename=WEIGHTS_NAME,
            revision=server.commit(REPO, files),
            sha256=hashlib.sha256(weights).hexdigest(),
            size=len(weights),
            format="safetensors",
            config=json.loads(files[CONFIG_NAME]),
            trained_on="nothing",
            license="Apache-2.0",
            citation="",
            results={},
        )
        pin = dataclasses.replace(pin, **changes)
        monkeypatch.setattr(CATALOG, "published", {"published": pin})
        return pin

    return publish


def config_of(file: Path) -> dict[str, Any]:
    (config,) = embedded_config(file).values()
    return dict(config)


def assert_is(ghn: GHN, file: Path) -> None:
    expected = load_file(file)
    assert ghn.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ghn.state_dict().items())
    assert not ghn.training
    assert ghn.config.to_dict() == config_of(file)


# Local sources


def test_a_file_with_its_config_inside(ghn_file: Path) -> None:
    assert_is(load_ghn(ghn_file), ghn_file)
    assert_is(load_ghn(str(ghn_file)), ghn_file)


def test_a_directory(ghn_file: Path, tmp_path: Path) -> None:
    save_file(load_file(ghn_file), tmp_path / WEIGHTS_NAME)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config_of(ghn_file)))
    assert_is(load_ghn(tmp_path), ghn_file)
    assert_is(load_ghn(tmp_path / WEIGHTS_NAME), ghn_file)  # the file, with the config beside it


def test_a_file_that_carries_its_config_ignores_what_lies_beside_it(ghn_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(ghn_file.read_bytes())
    (tmp_path / CONFIG_NAME).write_text('{"architectures": ["SomethingElse"]}')
    assert_is(load_ghn(file), ghn_file)


def test_the_published_layouts_load(shared: Path) -> None:
    for name in ("ghn2", "ghn3"):
        file = shared / "golden" / f"{name}.safetensors"
        ghn = load_ghn(file)
        assert all(torch.equal(tensor, ghn.state_dict()[key]) for key, tensor in load_file(file).items())


def test_loading_leaves_the_random_state_alone(ghn_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(ghn_file.read_bytes())
    before = torch.get_rng_state()
    load_ghn(copy)
    assert torch.equal(torch.get_rng_state(), before)


HELD = """
import sys, torch, timm_ghn
file = sys.argv[1]
ghn = timm_ghn.load_ghn(file)
before = {name: tensor.clone() for name, tensor in ghn.state_dict().items()}
with open(file, "r+b") as stream:
    stream.seek(4096)
    stream.write(bytes(4096))
assert all(torch.equal(tensor, before[name]) for name, tensor in ghn.state_dict().items()), "overwritten"
open(file, "wb").close()
assert all(torch.equal(tensor, before[name]) for name, tensor in ghn.state_dict().items()), "cut"
timm_ghn.predict(torch.nn.Conv2d(3, 8, 3), ghn)
print("unchanged")
"""


@pytest.mark.slow
def test_a_held_ghn_owns_its_weights(ghn_file: Path, tmp_path: Path) -> None:
    """Whatever happens to the file; in a process of its own, since reading what was cut from a mapped file ends one."""
    file = tmp_path / "held.safetensors"
    file.write_bytes(ghn_file.read_bytes())
    process = subprocess.run(
        [sys.executable, "-c", HELD, str(file)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout == "unchanged\n", (process.returncode, process.stderr)


@pytest.mark.parametrize(
    ("source", "spelling"),
    [
        ("someone/ghn", "hf-hub:someone/ghn"),
        ("someone/ghn@v1.0", "hf-hub:someone/ghn@v1.0"),
        ("https://huggingface.co/someone/ghn", "hf-hub:someone/ghn"),
        ("https://huggingface.co/someone/ghn/", "hf-hub:someone/ghn"),
        ("https://huggingface.co/someone/ghn-3.1/tree/main", "hf-hub:someone/ghn-3.1@main"),
        ("https://huggingface.co/someone/ghn/blob/abc/model.safetensors", "hf-hub:someone/ghn@abc"),
        ("hf://someone/ghn", "hf-hub:someone/ghn"),
        ("s3://bucket/some/where/else.safetensors", "hf-hub:org/repo"),
    ],
)
def test_a_repository_in_other_spellings(source: str, spelling: str) -> None:
    for take in (load_ghn, lambda source: register("mine", source)):
        with pytest.raises(CheckpointError, match=f"a repository on the Hub, write '{re.escape(spelling)}'"):
            take(source)


def test_a_path_of_two_parts_is_a_path(ghn_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match=r"There is no GHN checkpoint at .*runs/mine\.safetensors: give"):
        load_ghn("runs/mine.safetensors")
    (tmp_path / "runs" / "mine.safetensors").write_bytes(ghn_file.read_bytes())
    assert_is(load_ghn("runs/mine.safetensors"), ghn_file)


IMAGES = {
    "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "input_size": [3, 24, 24], "crop_pct": 0.9,
    "interpolation": "bilinear", "label_names": list("abcdefghij"),
}  # fmt: skip


def test_images_are_stated_anywhere_or_nowhere(ghn_file: Path, tmp_path: Path, save_ghn: Callable[..., Path]) -> None:
    """A published config without them still loads, and one place that knows them suffices."""
    assert load_ghn(ghn_file).config.images is None and "images" not in load_ghn(ghn_file).config.to_dict()
    (tmp_path / WEIGHTS_NAME).write_bytes(ghn_file.read_bytes())
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**config_of(ghn_file), "images": IMAGES}))
    ghn = load_ghn(tmp_path)
    assert ghn.config == load_ghn(ghn_file).config
    assert ghn.config.to_dict()["images"] == IMAGES
    ghn.save_pretrained(tmp_path / "saved")
    assert load_ghn(tmp_path / "saved").config.images == ghn.config.images
    assert load_ghn(tmp_path / "saved" / WEIGHTS_NAME).config.images == ghn.config.images
    (tmp_path / "saved" / CONFIG_NAME).write_text(
        json.dumps({**config_of(ghn_file), "images": {**IMAGES, "crop_pct": 1.0}})
    )
    with pytest.raises(CheckpointError, match="disagree about images"):
        load_ghn(tmp_path / "saved")


@pytest.mark.parametrize(
    "images",
    [
        {"mean": [0.5]}, {"std": [0, 1, 1]}, {"input_size": [3, 32]}, {"input_size": [3, 0, 32]}, {"unknown": 1},
        {"label_names": ["a"]}, {"mean": "red"}, {"std": None},
    ],
)  # fmt: skip
def test_images_that_cannot_be(images: dict[str, Any], ghn_file: Path, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_NAME).write_bytes(ghn_file.read_bytes())
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**config_of(ghn_file), "images": {**IMAGES, **images}}))
    with pytest.raises(CheckpointError, match="is not a GHN's"):
        load_ghn(tmp_path)


def test_the_shipped_ghns_say_what_they_were_trained_with() -> None:
    for tag in CATALOG.published:
        config = stated_config(tag)
        assert config is not None and config.images is not None
        assert config.images.mean == (0.485, 0.456, 0.406) and config.images.std == (0.229, 0.224, 0.225)
    assert load_ghn("ghn2").config.images == stated_config("ghn2").images  # type: ignore[union-attr]


def test_a_changed_file_is_loaded_again(save_ghn: Callable[..., Path], tmp_path: Path) -> None:
    file = save_ghn(tmp_path / "g.safetensors", seed=1)
    first = load_ghn(file)
    assert load_ghn(file) is first
    save_ghn(file, seed=2)
    os.utime(file, ns=(1, 1))  # a coarse clock must not hide the change
    second = load_ghn(file)
    assert second is not first
    assert_is(second, file)


def test_threads_share_one_module(save_ghn: Callable[..., Path], tmp_path: Path) -> None:
    file = save_ghn(tmp_path / "g.safetensors")
    found: list[GHN] = []
    threads = [threading.Thread(target=lambda: found.append(load_ghn(file))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(ghn is found[0] for ghn in found)


# Tags


def test_every_shipped_config_is_complete() -> None:
    for tag, pin in CATALOG.published.items():
        config = GHNConfig.from_dict(pin.config)
        assert config.num_classes > 0
        assert pin.format in ("safetensors", "joblib")
        assert (pin.sha256 is None) == (pin.size is None)
        assert tag in list_ghns()


def test_the_embedded_checkpoint_is_the_pinned_one() -> None:
    embedded = ROOT / "timm_ghn" / "weights" / "ghn2.safetensors"
    if not embedded.exists():
        with pytest.raises(CheckpointError, match="'ghn2' has no checkpoint"):
            load_ghn("ghn2")
        pytest.skip("this version embeds no checkpoint")
    pin = CATALOG.published["ghn2"]
    ghn = load_ghn("ghn2")
    assert ghn.config == GHNConfig.from_dict(pin.config)
    assert embedded.stat().st_size == pin.size


def test_an_embedded_checkpoint_needs_no_network_and_must_be_the_pinned_one(
    server: HubServer, publish: Callable[..., HubConfig], ghn_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    publish()
    monkeypatch.setattr("timm_ghn.checkpoints.source.EMBEDDED", tmp_path)
    embedded = tmp_path / "published.safetensors"
    embedded.write_bytes(ghn_file.read_bytes())
    assert_is(load_ghn("published"), ghn_file)
    assert not server.requests

    embedded.write_bytes(flip_a_byte(ghn_file.read_bytes()))
    SHARED.clear()
    with pytest.raises(CheckpointError, match=r"sha256.*reinstall timm-ghn"):
        load_ghn("published")


def test_register_and_replace(tags: None, save_ghn: Callable[..., Path], tmp_path: Path) -> None:
    one, two = (save_ghn(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2))
    register("mine", one)
    assert "mine" in list_ghns()
    assert_is(load_ghn("mine"), one)
    register("mine", str(two))
    assert_is(load_ghn("mine"), two)


def test_register_keeps_a_relative_path(
    tags: None, ghn_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ghn_file.parent)
    register("mine", ghn_file.name)
    monkeypatch.chdir(tmp_path)
    assert_is(load_ghn("mine"), ghn_file)


@pytest.mark.parametrize(
    ("tag", "source", "message"),
    [
        ("a.b", "hf-hub:a/b", "letters, digits"),
        ("", "hf-hub:a/b", "letters, digits"),
        ("ok", "hf-hub:", "not a Hub repository"),
        ("ok", "hf-hub:a/b/c", "not a Hub repository"),
        ("ok", "no/such/directory", "no GHN checkpoint at"),
    ],
)
def test_register_refuses(tags: None, tag: str, source: str, message: str) -> None:
    before = list_ghns()
    with pytest.raises(CheckpointError, match=message):
        register(tag, source)
    assert list_ghns() == before


def test_an_unknown_tag_names_the_nearest(tags: None, ghn_file: Path) -> None:
    register("my-own-ghn", ghn_file)
    with pytest.raises(CheckpointError, match="Unknown GHN 'my-own-gnh': did you mean 'my-own-ghn'"):
        load_ghn("my-own-gnh")


def test_a_broken_shipped_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"repo_id": "a/b"}')
    with pytest.raises(CheckpointError, match=r"x\.json must be a JSON object with exactly the fields repo_id"):
        Catalog(tmp_path).list_ghns()


# Files that are not what they should be


def flip_a_byte(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def with_header(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A safetensors file with another header over the same bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]


def rewritten(file: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Path:
    """The checkpoint with other tensors, or with another config."""
    state = load_file(file)
    change(state)
    save_file(state, target, metadata={"config": json.dumps({**config_of(file), **config})})
    return target


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-100], "not a whole safetensors file"),
        (lambda data: data[:5], "not a whole safetensors file"),
        (lambda data: b"", "not a whole safetensors file"),
        (lambda data: data + b"more", "not a whole safetensors file"),
        (lambda data: struct.pack("<Q", 1 << 60) + data[8:], "not a whole safetensors file"),
        (lambda data: b"\x80\x05}q\x00." + data, "not a whole safetensors file"),
        (lambda data: with_header(data, lambda h: h["ln.bias"].update(data_offsets=[0, 8])), "not a whole"),
        (lambda data: with_header(data, lambda h: h.pop("__metadata__")), "has no config"),
        (lambda data: with_header(data, lambda h: h["__metadata__"].update(config="{")), "is not a GHN's"),
        (lambda data: with_header(data, lambda h: h["__metadata__"].update(config="[]")), "is not a GHN's"),
        (lambda data: with_header(data, lambda h: h["__metadata__"].update(config="{}")), "no num_classes"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(
    ghn_file: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(damage(ghn_file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        load_ghn(file)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda s: s.pop("ln.bias"), {}, "disagrees with its config: ln.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), {}, "extra does not belong there"),
        (lambda s: s.update({"ln.bias": torch.zeros(3)}), {}, r"ln.bias has shape \(3,\), the config asks for \(16,\)"),
        (lambda s: s.update({"ln.bias": torch.zeros(16).double()}), {}, "ln.bias has dtype F64, a GHN's is F32 or F16"),
        (lambda s: None, {"hid": 32}, r"has shape .* the config asks for .* \(and \d+ more\)"),
        (lambda s: None, {"num_classes": 7}, "disagrees with its config"),
        (lambda s: None, {"hypernet": "graphormer"}, "disagrees with its config"),
        (lambda s: None, {"hid": -4}, "must be positive integers"),
        (lambda s: None, {"nonsense": 1}, r"unknown keys \['nonsense'\]"),
        (lambda s: s["ln.bias"].fill_(float("nan")), {}, "NaN or infinite values in ln.bias"),
        (lambda s: s["embed.weight"][0].fill_(float("-inf")), {}, "NaN or infinite values in embed.weight"),
    ],
)
def test_a_checkpoint_that_disagrees_with_itself_is_refused(
    ghn_file: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], config: dict[str, Any],
    message: str,
) -> None:  # fmt: skip
    with pytest.raises(CheckpointError, match=message):
        load_ghn(rewritten(ghn_file, tmp_path / "bad.safetensors", change, **config))


def test_two_configs_that_differ_are_refused(ghn_file: Path, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_NAME).write_bytes(ghn_file.read_bytes())
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**config_of(ghn_file), "weight_norm": False}))
    with pytest.raises(CheckpointError, match="disagree about weight_norm"):
        load_ghn(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl", ".joblib"])
def test_a_pickle_is_never_opened(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"ghn{suffix}"
    file.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    for source in (file, tmp_path):
        with pytest.raises(CheckpointError, match=rf"pickle.*`timm-ghn convert .*ghn\{suffix} -o DIRECTORY`"):
            load_ghn(source)
    assert not (tmp_path / "owned").exists()


def test_a_directory_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has no model\.safetensors"):
        load_ghn(tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no GHN checkpoint at"):
        load_ghn(tmp_path / "missing.safetensors")


# The Hub


def test_download_by_tag(server: HubServer, publish: Callable[..., HubConfig], ghn_file: Path) -> None:
    pin = publish()
    assert_is(load_ghn("published"), ghn_file)
    assert all(f"/resolve/{pin.revision}/" in request for request in server.requests)

    requests = len(server.requests)
    SHARED.clear()
    assert_is(load_ghn("published"), ghn_file)  # the cache has it, and a commit never changes
    assert len(server.requests) == requests


def test_download_by_repository(server: HubServer, files: dict[str, bytes], ghn_file: Path) -> None:
    commit = server.commit(REPO, files)
    assert_is(load_ghn(f"hf-hub:{REPO}"), ghn_file)
    assert_is(load_ghn(f"hf-hub:{REPO}@{commit}"), ghn_file)
    weights = [request for request in server.requests if WEIGHTS_NAME in request]
    assert weights and all(commit in request for request in weights)  # the very commit the config came from


def test_a_registered_repository(tags: None, server: HubServer, files: dict[str, bytes], ghn_file: Path) -> None:
    commit = server.commit(REPO, files)
    register("mine", f"hf-hub:{REPO}@{commit}")
    assert not server.requests
    assert_is(load_ghn("mine"), ghn_file)


def test_a_private_repository(
    server: HubServer, files: dict[str, bytes], ghn_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.commit(REPO, files)
    server.token = "hf_secret"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(CheckpointError, match="log in if it is private"):
        load_ghn(f"hf-hub:{REPO}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert_is(load_ghn(f"hf-hub:{REPO}"), ghn_file)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], flip_a_byte, lambda data: data + b"more"])
def test_a_tampered_download_is_refused(
    server: HubServer, publish: Callable[..., HubConfig], files: dict[str, bytes],
    damage: Callable[[bytes], bytes],
) -> None:  # fmt: skip
    publish()
    server.served[WEIGHTS_NAME] = damage(files[WEIGHTS_NAME])
    for source in ("published", f"hf-hub:{REPO}"):
        with pytest.raises(CheckpointError, match=r"not the published file|the download failed"):
            load_ghn(source)


def test_a_tampered_cache_is_refused_until_deleted(
    server: HubServer, publish: Callable[..., HubConfig], ghn_file: Path
) -> None:
    publish()
    load_ghn("published")
    (cached,) = Path(huggingface_hub.constants.HF_HUB_CACHE).glob("models--*/snapshots/*/model.safetensors")
    cached.resolve().write_bytes(flip_a_byte(ghn_file.read_bytes()))
    for source in ("published", f"hf-hub:{REPO}"):
        SHARED.clear()
        with pytest.raises(CheckpointError, match=r"sha256 .*delete it and it will be downloaded again"):
            load_ghn(source)
    cached.resolve().unlink()
    assert_is(load_ghn("published"), ghn_file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "0" * 40}, f"Cannot get model.safetensors of {REPO}@0+: the repository has no such revision"),
        ({"repo_id": "someone/else"}, "the Hub has no repository someone/else"),
        ({"filename": "missing.safetensors"}, "Cannot get missing.safetensors .* no such file"),
        ({"sha256": "0" * 64}, "sha256 .* instead of 0000"),
        ({"size": 1}, r"\d+ bytes instead of 1"),
        ({"revision": None}, "no checkpoint in this version"),
        ({"format": "joblib"}, "Cannot convert .*neither torch's format nor joblib's"),
        ({"config": {"num_classes": 10, "hid": 64}}, "disagree about max_shape, hid"),
    ],
)
def test_a_wrong_pin_is_refused(publish: Callable[..., HubConfig], changes: dict[str, Any], message: str) -> None:
    publish(**changes)
    with pytest.raises(CheckpointError, match=message):
        load_ghn("published")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"hf-hub:{REPO}@{'0' * 40}", "the repository has no such revision"),
        (f"hf-hub:{REPO}@no-such-branch", "the repository has no such revision"),
        ("hf-hub:someone/else", "the Hub has no repository someone/else"),
        ("hf-hub:someone/--else..x", "the download failed"),
        ("hf-hub:someone/pickled", "no such file; .*timm-ghn convert"),
        ("hf-hub:someone/not-json", r"config.json is not JSON"),
    ],
)
def test_a_wrong_repository_is_refused(server: HubServer, files: dict[str, bytes], source: str, message: str) -> None:
    server.commit(REPO, files)
    server.commit("someone/pickled", {"config.json": files[CONFIG_NAME], "pytorch_model.bin": b"\x80"})
    server.commit("someone/not-json", {**files, "config.json": b"nonsense"})
    with pytest.raises(CheckpointError, match=message):
        load_ghn(source)


def test_no_network(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not in the cache and the Hub cannot be reached; check the network"):
        load_ghn("hf-hub:someone/new")
    assert not server.requests


LOAD = """
import sys
from timm_ghn import load_ghn, register
register("mine", sys.argv[1])
print(sum(float(p.double().sum()) for p in load_ghn("mine").parameters()))
"""


@pytest.mark.slow
def test_two_processes_at_once_then_offline(server: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    """The real client, configured by its environment variables as a user would."""
    source = f"hf-hub:{REPO}@{server.commit(REPO, files)}"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
    }

    def start(**more: str) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", LOAD, source], env={**environment, **more}, **pipes)

    printed = []
    for process in [start(), start()]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        printed.append(out)
    requests = len(server.requests)
    assert requests

    offline = start(HF_HUB_OFFLINE="1")
    out, err = offline.communicate(timeout=300)
    assert offline.returncode == 0, err
    assert [out, out] == printed
    assert len(server.requests) == requests


def test_a_loaded_ghn_can_be_copied(ghn_file: Path) -> None:
    ghn = load_ghn(ghn_file)
    assert copy.deepcopy(ghn).state_dict().keys() == ghn.state_dict().keys()


# Published pickles


@pytest.fixture
def pickled(server: HubServer, ghn_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Publishes the GHN as joblib's pickle under the tag ``pickled``, whose pin knows neither commit nor hash."""

    def pickled(data: bytes | None = None, **changes: Any) -> str:
        data = data or joblib_bytes(load_file(ghn_file))
        commit = server.commit(REPO, {"ghn.pt": data})
        config = {**config_of(ghn_file), "heads": 8}
        pin = HubConfig(REPO, "ghn.pt", None, None, None, "joblib", config, "nothing", "MIT", "", {})
        monkeypatch.setattr(CATALOG, "published", {"pickled": dataclasses.replace(pin, **changes)})
        SHARED.clear()
        return commit

    return pickled


def converted() -> Path:
    return Path(huggingface_hub.constants.HF_HUB_CACHE).with_name("timm-ghn") / "pickled"


def test_a_published_pickle_is_converted_once(server: HubServer, pickled: Callable[..., str], ghn_file: Path) -> None:
    commit = pickled()
    assert_is(load_ghn("pickled"), ghn_file)
    record = json.loads((converted() / "source.json").read_text())
    assert record["revision"] == commit
    assert record["sha256"] == hashlib.sha256(server.repos[REPO][commit]["ghn.pt"]).hexdigest()

    requests = len(server.requests)
    SHARED.clear()
    assert_is(load_ghn("pickled"), ghn_file)
    assert len(server.requests) == requests


def test_a_published_pickle_stays_the_one_of_its_first_use(
    server: HubServer, pickled: Callable[..., str], ghn_file: Path, save_ghn: Callable[..., Path], tmp_path: Path
) -> None:
    first = pickled()
    load_ghn("pickled")
    other = save_ghn(tmp_path / "other.safetensors", seed=1)
    pickled(joblib_bytes(load_file(other)))  # the main branch moves on
    (converted() / WEIGHTS_NAME).unlink()
    assert_is(load_ghn("pickled"), ghn_file)

    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    (converted() / WEIGHTS_NAME).unlink()
    server.repos[REPO][first] = server.repos[REPO]["main"]  # history is rewritten
    SHARED.clear()
    with pytest.raises(CheckpointError, match=rf"not the published file: .*; delete {converted()} if you trust it"):
        load_ghn("pickled")
    shutil.rmtree(converted())
    assert_is(load_ghn("pickled"), other)


def test_a_tampered_conversion_is_refused(pickled: Callable[..., str], ghn_file: Path) -> None:
    pickled()
    load_ghn("pickled")
    weights = converted() / WEIGHTS_NAME
    data = flip_a_byte(weights.read_bytes())
    weights.unlink()  # the loaded GHN has it in memory
    weights.write_bytes(data)
    SHARED.clear()
    with pytest.raises(CheckpointError, match=rf"sha256 .*delete {converted()} and it will be made again"):
        load_ghn("pickled")
    shutil.rmtree(converted())
    assert_is(load_ghn("pickled"), ghn_file)


def test_a_published_pickle_that_is_not_the_pinned_one(pickled: Callable[..., str]) -> None:
    pickled(sha256="0" * 64)
    with pytest.raises(CheckpointError, match=r"sha256 .* instead of 0000"):
        load_ghn("pickled")
    assert not converted().exists()
    pickled()
    load_ghn("pickled")
    pickled(sha256="0" * 64)
    with pytest.raises(CheckpointError, match="converted from a file with another sha256 than this version pins"):
        load_ghn("pickled")


def test_a_published_pickle_that_runs_code(pickled: Callable[..., str], tmp_path: Path) -> None:
    pickled(b"\x80\x02cposix\nsystem\nX\x05\x00\x00\x00false\x85R.")
    with pytest.raises(CheckpointError, match=r"it names posix\.system"):
        load_ghn("pickled")
    assert not converted().exists()


# Precision


def test_half_precision_is_close(shared: Path) -> None:
    file = shared / "golden" / "ghn3.safetensors"
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.Conv2d(64, 32, 3))
    exact = predict(model, load_ghn(file), input_size=(3, 16, 16))
    for dtype, error in ((torch.float16, 0.002), (torch.bfloat16, 0.02)):
        half = load_ghn(file, dtype=dtype)
        assert half is load_ghn(file, dtype=dtype) is not load_ghn(file)
        assert {parameter.dtype for parameter in half.parameters()} == {dtype}
        prediction = predict(model, half, input_size=(3, 16, 16))
        for name, tensor in exact.items():
            assert (prediction[name].float() - tensor).norm() < error * tensor.norm(), name


def test_a_gated_gnn_stays_in_single_precision(ghn_file: Path) -> None:
    with pytest.raises(ValueError, match=r"a GatedGNN computes in torch\.float32"):
        load_ghn(ghn_file, dtype=torch.float16)


def test_a_refused_tag_leaves_the_others(tmp_path: Path, ghn_file: Path) -> None:
    catalog = Catalog(tmp_path)

    def refuse(tag: str) -> None:
        if tag == "refused":
            catalog.register("meanwhile", ghn_file)  # as another thread may
            raise CheckpointError("no")

    catalog.on_register.append(refuse)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no"):
            catalog.register("refused", ghn_file)
        assert catalog.list_ghns() == ["meanwhile"]
