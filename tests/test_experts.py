"""GHNs that leave kinds of networks to others."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

from timm_ghn import GHN, GHNConfig, demo, embed, initialize, load_ghn, trace
from timm_ghn.cli import main
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.data import ImageDataset
from timm_ghn.training.trainer import Trainer, new_ghn

OWNERS = {
    "test_resnet": None,
    "regnetx_002": None,  # groups of several channels
    "test_efficientnet": "depthwise",
    "test_vit": "attention",
    "convnext_atto": "layer_norm",
    "test_mambaout": "layer_norm",
}
SMALL = {"hid": 8, "max_shape": (8, 8, 3, 3)}


@pytest.fixture
def parts(tmp_path: Path, save_ghn: Callable[..., Path]) -> dict[str | None, GHN]:
    """GHNs of one config by the kind that they are for."""
    kinds = (None, "attention", "depthwise", "layer_norm")
    return {
        kind: load_ghn(save_ghn(tmp_path / f"{kind}.safetensors", seed=seed, **SMALL))
        for seed, kind in enumerate(kinds)
    }


@pytest.fixture
def joined(parts: dict[str | None, GHN]) -> GHN:
    return parts[None].with_experts({kind: ghn for kind, ghn in parts.items() if kind})


def test_each_network_is_predicted_by_the_expert_for_its_kind(joined: GHN, parts: dict[str | None, GHN]) -> None:
    graphs = [trace(timm.create_model(name, num_classes=10)) for name in OWNERS]
    with torch.no_grad():
        for graph, kind, tiles in zip(graphs, OWNERS.values(), joined(graphs), strict=True):
            (expected,) = parts[kind]([graph])
            assert tiles.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(tiles[name], tensor, msg=f"{kind} {name}")
    assert joined([]) == []


def test_embeddings_of_all_kinds_are_the_general_ones(joined: GHN, parts: dict[str | None, GHN]) -> None:
    general = parts[None]
    assert general is not None
    torch.testing.assert_close(embed(list(OWNERS), joined), embed(list(OWNERS), general))


def test_taking_apart_and_joining_change_nothing_else(joined: GHN) -> None:
    before = torch.random.get_rng_state()
    general, expert = joined.double().alone(), joined.alone("attention")
    again = general.with_experts({"attention": expert})
    assert torch.equal(torch.random.get_rng_state(), before), "nothing is drawn"
    for ghn in (general, expert, again):
        assert {tensor.dtype for tensor in ghn.state_dict().values()} == {torch.float64}
    with torch.no_grad():
        general.embed.weight.zero_()
    assert joined.embed.weight.any() and again.embed.weight.any(), "they share no memory"


def test_a_file_is_in_half_precision_and_read_in_single(joined: GHN, tmp_path: Path) -> None:
    joined.save_pretrained(tmp_path / "joined")
    config = json.loads((tmp_path / "joined" / "config.json").read_text())
    assert config["experts"] == ["attention", "depthwise", "layer_norm"]
    loaded = load_ghn(str(tmp_path / "joined"))
    assert loaded.config == joined.config
    for name, tensor in joined.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())
    numbers = sum(tensor.numel() for tensor in joined.state_dict().values())
    assert 2 * numbers < (tmp_path / "joined" / "model.safetensors").stat().st_size < 3 * numbers


def test_joining_by_the_command(
    joined: GHN, parts: dict[str | None, GHN], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = {kind: str(tmp_path / f"{kind}.safetensors") for kind in parts}
    out = str(tmp_path / "one")
    main(["join", file[None], f"layer_norm={file['layer_norm']}", "-o", out, "--json"])
    assert json.loads(capsys.readouterr().out) == {"output": out, "experts": ["layer_norm"]}
    more = [f"{kind}={file[kind]}" for kind in ("attention", "depthwise")]
    main(["join", out, *more, "-o", str(tmp_path / "both")])
    both = load_ghn(str(tmp_path / "both"))
    for name, tensor in joined.state_dict().items():
        assert torch.equal(both.state_dict()[name], tensor.half().float()), "what was joined before is kept"
    model = timm.create_model("test_vit", num_classes=10)
    assert initialize(model, both).predicted
    card = (tmp_path / "both" / "README.md").read_text()
    assert f"| attention | `{file['attention']}` |" in card and f"| all other | `{out}` |" in card
    assert main(["publish", str(tmp_path / "both"), "org/joined"]) == 0, "it can go to the Hub as it is"


def test_going_on_with_one_of_them(joined: GHN, parts: dict[str | None, GHN]) -> None:
    for kind, ghn in parts.items():
        alone = joined.alone(kind)
        assert alone.config == ghn.config
        assert all(torch.equal(tensor, ghn.state_dict()[name]) for name, tensor in alone.state_dict().items())
    with pytest.raises(ValueError, match="no expert for 'vision'; it has attention, depthwise, layer_norm"):
        joined.alone("vision")


def test_training_one_tells_of_networks_of_other_kinds(
    parts: dict[str | None, GHN], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {kind: tmp_path / f"{kind}.safetensors" for kind in parts}
    experts = [f"{kind}={file}" for kind, file in files.items() if kind]
    assert main(["join", str(files[None]), *experts, "-o", str(tmp_path / "joined")]) == 0
    train = [
        "train", "--data", str(demo.IMAGES), "--holdout", "20", "--init", str(tmp_path / "joined"),
        "--expert", "layer_norm", "--steps", "1", "--meta-batch", "1", "--batch-size", "4", "--workers", "0",
        "--val-architectures", "4", "--val-images", "4",
    ]  # fmt: skip
    for families, told in (("convnext,vit", True), ("convnext", False)):
        caplog.clear()
        run = ["-o", str(tmp_path / families), "--architectures", f"timm:{families}:2e6"]
        assert main([*train, *run]) == 0
        assert ("networks to validate on are not for the expert layer_norm" in caplog.text) is told
        assert ("vit (attention); leave such out" in caplog.text) is told


def test_what_does_not_fit_is_refused(
    parts: dict[str | None, GHN], tmp_path: Path, save_ghn: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(save_ghn(tmp_path / "other.safetensors", **SMALL, split_attention=True))
    general = str(tmp_path / "None.safetensors")
    assert main(["join", general, f"attention={other}", "-o", str(tmp_path / "out")]) == 1
    assert "The expert for attention differs from this GHN in split_attention; both must" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["join", general, f"vision={other}", "-o", str(tmp_path / "out")])
    assert "is not KIND=GHN with one of attention, layer_norm" in capsys.readouterr().err
    assert main(["join", general, f"attention={general}", f"attention={other}", "-o", str(tmp_path / "out")]) == 1
    assert "attention is given more than once" in capsys.readouterr().err
    train = ["train", "--data", "torch/cifar10", "--expert", "attention", "-o", str(tmp_path / "run")]
    assert main(train) == 1 and "--expert attention is given without --init" in capsys.readouterr().err
    plain = load_ghn(general)
    with pytest.raises(ValueError, match="it must be different ones of attention, layer_norm"):
        plain.with_experts({"vision": plain})
    for experts in (("vision",), ("attention", "attention")):
        with pytest.raises(ValueError, match="it must be different ones of attention, layer_norm"):
            GHNConfig(10, experts=experts)


def test_published_configs_have_neither_the_field_nor_the_tensors() -> None:
    config = GHNConfig(10)
    assert "experts" not in config.to_dict() and GHNConfig.from_dict(config.to_dict()) == config
    assert not any("experts" in name for name in GHN.parameter_shapes(config))


def test_a_fresh_ghn_3_is_small_in_all_its_parts() -> None:
    fields = {"num_classes": 10, "hypernet": "graphormer", "hid": 16, "heads": 2, "max_shape": (8, 8, 3, 3)}
    ghn = new_ghn(GHNConfig(**fields, experts=("attention",)), seed=0)  # type: ignore[arg-type]
    for kind in (None, "attention"):
        assert not ghn.alone(kind).state_dict()["decoder_1d.fc.2.bias"].any()


@pytest.mark.parametrize("change", [{"split_attention": True}, {"conditioned": True}, {"predicts_head": False}])
def test_experts_start_from_weights_like_any_ghn(change: dict[str, bool], joined: GHN) -> None:
    images = ImageDataset(torch.zeros(20, 3, 32, 32), torch.arange(20) % 10, 10)
    fields = {
        "ghn": {**joined.config.to_dict(), **change}, "steps": 1, "val_architectures": 1, "val_images": 4,
        "architectures": [{"source": "timm", "families": ["vit"], "max_macs": 2_000_000}],
    }  # fmt: skip
    if not change.get("predicts_head", True):
        fields |= {"head": "ridge", "ways": [2]}
    with tempfile.TemporaryDirectory() as folder:
        run = Trainer(TrainConfig.from_dict(fields), images, images, Path(folder), init=joined, workers=0)
    for kind in (None, *joined.config.experts):
        theirs, ours = joined.alone(kind).state_dict(), run.ghn.alone(kind).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())


def test_training_experts_of_a_plain_ghn(parts: dict[str | None, GHN], tmp_path: Path) -> None:
    """They start as the whole, and each learns from its own networks alone."""
    init = parts[None]
    assert init is not None
    config = TrainConfig.from_dict(
        {
            "ghn": {**init.config.to_dict(), "experts": ["attention"]}, "steps": 1, "meta_batch": 1, "batch_size": 4,
            "architectures": [{"source": "timm", "families": ["vit"], "max_macs": 2_000_000}], "warmup": 0,
            "optimizer": "adamw", "weight_decay": 0.0, "val_architectures": 1, "val_images": 4,
        }
    )  # fmt: skip
    images = ImageDataset(torch.zeros(8, 3, 32, 32), torch.arange(8), 10)
    run = Trainer(config, images, images, tmp_path / "run", init=init, workers=0)
    start = {name: tensor.clone() for name, tensor in run.ghn.state_dict().items()}
    for name, tensor in init.state_dict().items():
        assert torch.equal(start[name], tensor) and torch.equal(start[f"experts.attention.{name}"], tensor)
    run.run()
    changed = {name for name, tensor in run.ghn.state_dict().items() if not torch.equal(tensor, start[name])}
    assert changed and all(name.startswith("experts.attention.") for name in changed)
    assert dataclasses.replace(run.ghn.config, images=None).experts == ("attention",)
