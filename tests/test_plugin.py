"""The hook in timm: what it adds, and that nothing else about timm changes."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm import create_model
from timm.models import _builder, _factory, _registry
from torch import nn

from timm_ghn import plugin
from timm_ghn.checkpoints.catalog import CATALOG
from timm_ghn.checkpoints.load import load_ghn
from timm_ghn.errors import CheckpointError, GHNError
from timm_ghn.export import export
from timm_ghn.hypernet import Images
from timm_ghn.predictor import Predictor, predict

MODEL = "test_resnet"
TAG = "ghn-test"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def installed(tags: None, ghn_file: Path) -> Iterator[None]:
    """The plugin, and a random GHN for ten classes under TAG."""
    plugin.install()
    CATALOG.register(TAG, ghn_file)
    yield
    plugin.uninstall()
    plugin.install()


def is_predicted(model: nn.Module, ghn: str = TAG, head: str = "auto") -> bool:
    prediction = predict(model, ghn, head)
    assert prediction
    return all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in prediction.items())


def snapshot() -> dict[str, Any]:
    """Everything timm's factory, builder and registry hold, deep enough to see an added entry."""
    return {
        f"{module.__name__}.{name}": copy.copy(value) if isinstance(value, dict | set | list) else value
        for module in (timm, timm.models, _factory, _builder, _registry)
        for name, value in vars(module).items()
        if name != "__builtins__"
    }


# What the hook adds


def test_argument_predicts_whether_or_not_pretrained() -> None:
    for pretrained in (False, True):
        assert is_predicted(create_model(MODEL, pretrained, pretrained_cfg=TAG))
        assert is_predicted(timm.create_model(MODEL, pretrained=pretrained, pretrained_cfg=TAG))


def test_name_predicts_if_pretrained() -> None:
    assert is_predicted(create_model(f"{MODEL}.{TAG}", pretrained=True))
    torch.manual_seed(0)
    model = create_model(f"{MODEL}.{TAG}")
    torch.manual_seed(0)
    assert equal(model, create_model(MODEL))


def test_argument_wins_over_name() -> None:
    assert is_predicted(create_model(f"{MODEL}.r160_in1k", pretrained_cfg=TAG))
    assert is_predicted(create_model(f"{MODEL}.{TAG}", pretrained_cfg=TAG))


def test_predictions_are_the_same_every_time() -> None:
    assert equal(create_model(MODEL, pretrained_cfg=TAG, num_classes=10),
                 create_model(f"{MODEL}.{TAG}", pretrained=True, num_classes=10))  # fmt: skip


def test_pretrained_cfg_of_the_model() -> None:
    plain, predicted = (create_model(MODEL, **kwargs).pretrained_cfg for kwargs in ({}, {"pretrained_cfg": TAG}))
    assert predicted["tag"] == TAG
    assert predicted["architecture"] == MODEL
    assert not any(field in predicted for field in ("url", "file", "hf_hub_id", "license", "origin_url"))
    for field in ("input_size", "mean", "std", "num_classes", "interpolation", "crop_pct", "pool_size", "classifier"):
        assert predicted[field] == plain[field]
    registered = timm.get_pretrained_cfg(f"{MODEL}.{TAG}").to_dict()
    assert registered == predicted


PREPARED: dict[str, Any] = {
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.1),
    "crop_pct": 0.9,
    "interpolation": "bilinear",
}
NAMES = tuple("abcdefghij")


@pytest.fixture
def informed(save_ghn: Callable[..., Path], tmp_path: Path) -> str:
    """The tag of a GHN that says what images it was trained with."""
    images = {**PREPARED, "input_size": [3, 24, 24], "label_names": NAMES}
    CATALOG.register("ghn-informed", save_ghn(tmp_path / "informed.safetensors", images=Images(**images)))
    return "ghn-informed"


@pytest.mark.parametrize("name", [MODEL, "test_vit", "test_resnet.r160_in1k"])
def test_images_are_prepared_as_in_the_training_of_the_ghn(name: str, informed: str) -> None:
    plain = create_model(name).pretrained_cfg
    model = create_model(name, pretrained_cfg=informed, num_classes=10)
    arch = name.partition(".")[0]
    random = create_model(f"{arch}.{informed}", num_classes=10)
    whole = create_model(arch, pretrained=True, pretrained_cfg=timm.get_pretrained_cfg(f"{arch}.{informed}").to_dict())
    direct = timm.model_entrypoint(arch)(pretrained=True, pretrained_cfg=informed)
    for made in (model, random, whole, direct):
        found = timm.data.resolve_model_data_config(made)
        assert {key: found[key] for key in PREPARED} == PREPARED
        assert timm.data.resolve_model_data_config(made, use_test_size=True)["crop_pct"] == PREPARED["crop_pct"]
        assert found["input_size"] == plain["input_size"]  # what the architecture takes
    assert timm.get_pretrained_cfg(f"{arch}.{informed}").mean == PREPARED["mean"]
    assert (model.pretrained_cfg["label_names"], model.pretrained_cfg["num_classes"]) == (NAMES, 10)
    kept = create_model(name, pretrained_cfg=informed, num_classes=10, ghn_kwargs={"head": "keep"})
    for made in (random, whole, kept):
        assert "label_names" not in made.pretrained_cfg


def test_classes_are_named_in_files(informed: str, tmp_path: Path) -> None:
    export(MODEL, tmp_path / "out", Predictor(load_ghn(informed)), informed, num_classes=10)
    model = create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert tuple(model.pretrained_cfg["label_names"]) == NAMES
    assert tuple(model.pretrained_cfg["mean"]) == PREPARED["mean"]


def test_a_tag_that_is_registered_again(informed: str, ghn_file: Path) -> None:
    CATALOG.register(informed, ghn_file)
    assert timm.get_pretrained_cfg(f"test_vit.{informed}").mean == timm.get_pretrained_cfg("test_vit").mean
    with pytest.raises(CheckpointError, match="timm's own"):
        CATALOG.register("r160_in1k", ghn_file)
    assert "r160_in1k" not in CATALOG.list_ghns() and timm.is_model_pretrained("test_resnet.r160_in1k")


def test_listing() -> None:
    everything = {f"{name}.{TAG}" for name in timm.list_models()}
    assert set(timm.list_models(f"*.{TAG}", pretrained=True)) == everything
    assert set(timm.list_pretrained(f"*.{TAG}")) == everything
    vgg = {f"{name}.{TAG}" for name in timm.list_models(module="vgg")}
    assert set(timm.list_models("*.ghn-t*", pretrained=True, module="vgg")) == vgg
    assert f"{MODEL}.{TAG}" not in timm.list_models(f"*.{TAG}", pretrained=True, exclude_filters="test_*")
    assert timm.list_models([f"vgg11.{TAG}", "vgg11.tv_in1k"], pretrained=True) == [f"vgg11.{TAG}", "vgg11.tv_in1k"]
    assert set(timm.list_models("*.ghn*", pretrained=True)) >= {f"vgg11.{TAG}", "vgg11.ghn2"}
    assert timm.is_model_pretrained(f"vgg11.{TAG}") and timm.is_model(f"vgg11.{TAG}")
    assert timm.list_models(f"*.{TAG}") == []  # without tags asked for, names are architectures


@pytest.mark.parametrize("head", ["keep", "predict"])
def test_ghn_kwargs_reach_initialize(head: str) -> None:
    model = create_model(MODEL, pretrained_cfg=TAG, num_classes=7, ghn_kwargs={"head": head})
    assert is_predicted(model, head=head)
    assert ("fc.weight" in predict(model, TAG, head)) == (head == "predict")


def test_all_that_initialize_takes_reaches_it() -> None:
    """Example inputs of another size than the cfg's give what that size as `input_size` gives."""
    by_size = create_model(MODEL, pretrained_cfg=TAG, num_classes=10, ghn_kwargs={"input_size": 96, "head": "predict"})
    example = {"inputs": torch.zeros(1, 3, 96, 96), "head": "predict"}
    by_inputs = create_model(MODEL, pretrained_cfg=TAG, num_classes=10, ghn_kwargs=example)
    for name, parameter in by_inputs.named_parameters():
        assert torch.equal(parameter, by_size.get_parameter(name)), name
    with pytest.raises(ValueError, match="Pass input_size or inputs, not both"):
        create_model(MODEL, pretrained_cfg=TAG, ghn_kwargs={**example, "input_size": 96})


def test_an_overlay_has_the_last_word(informed: str) -> None:
    overlay = {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.5}
    for name, options in ((MODEL, {"pretrained_cfg": informed}), (f"{MODEL}.{informed}", {"pretrained": True})):
        model = create_model(name, **options, pretrained_cfg_overlay=overlay)
        found = timm.data.resolve_model_data_config(model)
        assert {**PREPARED, **overlay} == {key: found[key] for key in PREPARED}


def test_ghn_kwargs_are_checked() -> None:
    with pytest.raises(ValueError, match="head is 'nonsense'"):
        create_model(MODEL, pretrained_cfg=TAG, ghn_kwargs={"head": "nonsense"})
    with pytest.raises(ValueError, match="ghn_kwargs has data, to which a head is fitted"):
        create_model(MODEL, pretrained_cfg=TAG, ghn_kwargs={"head": "predict", "data": []})
    with pytest.raises(TypeError, match=r"ghn_kwargs is .*, not a dictionary"):
        create_model(MODEL, pretrained_cfg=TAG, ghn_kwargs="{head: keep}")
    with pytest.raises(TypeError, match=r"ghn_kwargs has the key 'haed'; those it may have are head, input_size, fine"):
        create_model(MODEL, pretrained_cfg=TAG, ghn_kwargs={"haed": "keep"})
    for internal in ("key", "build", "ghn"):
        with pytest.raises(TypeError, match="those it may have are"):
            create_model(MODEL, pretrained_cfg=TAG, ghn_kwargs={internal: None})
    with pytest.raises(TypeError, match="ghn_kwargs"):
        create_model(MODEL, ghn_kwargs={})  # timm's own answer


@pytest.mark.parametrize(
    ("name", "kwargs", "check"),
    [
        (MODEL, {"num_classes": 10}, lambda m: m.num_classes == 10 and m(torch.zeros(1, 3, 64, 64)).shape == (1, 10)),
        (MODEL, {"num_classes": 0}, lambda m: m(torch.zeros(1, 3, 64, 64)).ndim == 2),
        (MODEL, {"in_chans": 1}, lambda m: m(torch.zeros(1, 1, 64, 64)).shape == (1, 1000)),
        ("test_vit", {"img_size": 96}, lambda m: m(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)),
        (MODEL, {"features_only": True, "out_indices": (1, 2)}, lambda m: len(m(torch.zeros(1, 3, 64, 64))) == 2),
        (MODEL, {"dtype": torch.bfloat16}, lambda m: all(p.dtype == torch.bfloat16 for p in m.parameters())),
        (MODEL, {"device": "cpu"}, lambda m: all(p.device.type == "cpu" for p in m.parameters())),
        (MODEL, {"scriptable": True}, lambda m: torch.jit.script(m)(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)),
        (MODEL, {"exportable": True}, lambda m: True),
        (MODEL, {"drop_rate": 0.5, "global_pool": "max"}, lambda m: m.drop_rate == 0.5),
        (MODEL, {"pretrained_cfg_overlay": {"num_classes": 5}}, lambda m: m.num_classes == 5),
        (MODEL, {"num_classes": None}, lambda m: m.num_classes == 1000),
    ],
)
def test_arguments_keep_timms_meaning(name: str, kwargs: dict[str, Any], check: Callable[[nn.Module], bool]) -> None:
    model = create_model(name, pretrained_cfg=TAG, **kwargs)
    with torch.no_grad():
        assert check(model.eval())
    prediction = predict(model, TAG)
    for parameter, tensor in prediction.items():
        assert torch.equal(model.get_parameter(parameter), tensor.to(model.get_parameter(parameter).dtype))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("botnet26t_256", {"img_size": 64}),
        ("coat_tiny", {"img_size": 64}),
        ("efficientformerv2_s0", {"img_size": 64}),
        ("gcvit_xxtiny", {"img_size": 64}),
        ("hiera_tiny_224", {"img_size": 64}),
        ("levit_128s", {"img_size": 64}),
        ("visformer_tiny", {"img_size": 64, "in_chans": 1}),
        ("volo_d1_224", {"img_size": (32, 64)}),
        ("tresnet_m", {"in_chans": 1}),
    ],
)
def test_networks_that_do_not_say_what_input_they_take(name: str, kwargs: dict[str, Any]) -> None:
    model = create_model(name, pretrained_cfg=TAG, num_classes=10, **kwargs).eval()
    size = kwargs.get("img_size", 224)
    size = size if isinstance(size, tuple) else (size, size)
    with torch.no_grad():
        assert model(torch.randn(1, kwargs.get("in_chans", 3), *size)).shape == (1, 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_cuda() -> None:
    model = create_model(MODEL, pretrained_cfg=TAG, device="cuda")
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert is_predicted(model.cpu())


def test_checkpoint_path_is_loaded_after(tmp_path: Path) -> None:
    saved = create_model(MODEL)
    torch.save(saved.state_dict(), tmp_path / "saved.pth")
    assert equal(create_model(MODEL, pretrained_cfg=TAG, checkpoint_path=tmp_path / "saved.pth"), saved)


def test_another_weight_source_wins(tmp_path: Path) -> None:
    """A file given in the overlay is what timm loads instead of a tag's weights."""
    saved = create_model(MODEL)
    torch.save(saved.state_dict(), tmp_path / "saved.pth")
    overlay = {"file": str(tmp_path / "saved.pth")}
    assert equal(create_model(f"{MODEL}.{TAG}", pretrained=True, pretrained_cfg_overlay=overlay), saved)


def test_entrypoints_called_directly() -> None:
    assert is_predicted(timm.models.test_resnet(pretrained=True, pretrained_cfg=TAG))
    cfg = timm.get_pretrained_cfg(f"{MODEL}.{TAG}")
    assert is_predicted(timm.models.test_resnet(pretrained=True, pretrained_cfg=cfg))


def test_a_whole_cfg_is_understood() -> None:
    cfg = timm.get_pretrained_cfg(f"{MODEL}.{TAG}")
    for given in (cfg, cfg.to_dict()):
        assert is_predicted(create_model(MODEL, pretrained=True, pretrained_cfg=given))
        torch.manual_seed(0)
        model = create_model(MODEL, pretrained_cfg=given)
        torch.manual_seed(0)
        assert equal(model, create_model(MODEL))
        assert model.pretrained_cfg["tag"] == TAG


@pytest.mark.skipif(not hasattr(timm.models, "resolve_model_input_args"), reason="this timm's scripts do without it")
def test_the_way_of_timms_scripts() -> None:
    args = timm.models.resolve_model_input_args(f"{MODEL}.{TAG}", {"in_chans": 1}, ghn_kwargs={"head": "keep"})
    model = create_model(**args, pretrained=True, num_classes=10)
    assert is_predicted(model, head="keep")
    assert "ghn_kwargs" not in model._model_args


@pytest.mark.slow
def test_architectures_chosen_by_tag() -> None:
    """A few of timm's entrypoints look at the tag; they have to see the default one."""
    for name in timm.list_models(["qwen3_vit*", "inception_v3"]):
        with torch.device("meta"):
            expected = create_model(name)
            found = create_model(f"{name}.{TAG}")
        assert {n: p.shape for n, p in found.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
        assert found.pretrained_cfg["tag"] == TAG


def test_a_deprecated_name() -> None:
    name = next(name for name, now in timm.models.get_deprecated_models().items() if now)
    with torch.device("meta"), pytest.warns(UserWarning, match="deprecated"):
        assert create_model(f"{name}.{TAG}").pretrained_cfg["tag"] == TAG


def test_an_exported_model_is_not_predicted_again(tmp_path: Path) -> None:
    model = create_model(MODEL, pretrained_cfg=TAG, num_classes=10, ghn_kwargs={"head": "auto"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert equal(create_model(f"local-dir:{tmp_path}", pretrained=True), model)
    assert "ghn_kwargs" not in (tmp_path / "config.json").read_text()


def test_a_model_registered_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def late_model(pretrained: bool = False, **kwargs: Any) -> Any:
        return timm.models.test_resnet(pretrained=pretrained, **kwargs)

    module = types.ModuleType("late_models")
    cfgs = {"late_model.late_tag": {"input_size": (3, 96, 96)}}
    vars(module)["default_cfgs"] = timm.models.generate_default_cfgs(cfgs)
    monkeypatch.setitem(sys.modules, "late_models", module)
    late_model.__module__ = "late_models"
    timm.models.register_model(late_model)
    try:
        assert is_predicted(create_model("late_model", pretrained_cfg=TAG))
        assert is_predicted(create_model(f"late_model.{TAG}", pretrained=True))
        assert f"late_model.{TAG}" in timm.list_models(f"*.{TAG}", pretrained=True)
    finally:
        plugin.uninstall()
        if hasattr(_registry, "_clear_model_entries"):
            _registry._clear_model_entries("late_model")
        _registry._model_entrypoints.pop("late_model")


def test_a_failure_leaves_no_state_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"pretrained_cfg": TAG, "nonsense": 1}, {"pretrained_cfg": "ghn-tset", "ghn_kwargs": {}}):
        with pytest.raises((TypeError, CheckpointError)):
            create_model(MODEL, **wrong)
        torch.manual_seed(0)
        model = create_model(MODEL)
        torch.manual_seed(0)
        assert equal(model, create_model(MODEL))


def test_the_ghn_is_loaded_before_the_model_is_built(tags: None, ghn_file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "g.safetensors"
    moved.write_bytes(ghn_file.read_bytes())
    CATALOG.register("ghn-gone", moved)
    moved.unlink()
    before = torch.get_rng_state()
    with pytest.raises(CheckpointError, match="no GHN checkpoint at"):
        create_model(MODEL, pretrained_cfg="ghn-gone")
    assert torch.equal(torch.get_rng_state(), before)


# Names that are not there


@pytest.mark.parametrize("kwargs", [
    {"model_name": MODEL, "pretrained_cfg": "ghn-tset"},
    {"model_name": f"{MODEL}.ghn-tset", "pretrained": True},
    {"model_name": f"{MODEL}.ghn-tset"},
])  # fmt: skip
def test_an_unknown_ghn(kwargs: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="Unknown GHN 'ghn-tset': did you mean 'ghn-test'"):
        create_model(**kwargs)


def test_a_tag_of_timms_is_refused(ghn_file: Path) -> None:
    with pytest.raises(CheckpointError, match="'a1_in1k' is timm's own"):
        CATALOG.register("a1_in1k", ghn_file)
    assert "a1_in1k" not in CATALOG.list_ghns()
    plugin.uninstall()
    CATALOG.register("a1_in1k", ghn_file)
    with pytest.raises(CheckpointError, match="'a1_in1k' is timm's own"):
        plugin.install()
    del CATALOG.registered["a1_in1k"]


# What stays as it was

CALLS: dict[str, Callable[[], Any]] = {
    "all": lambda: timm.list_models(),
    "all pretrained": lambda: timm.list_models(pretrained=True),
    "list_pretrained": lambda: timm.list_pretrained(),
    "filter": lambda: timm.list_models("*resnet*"),
    "filter pretrained": lambda: timm.list_models("resnet*", pretrained=True),
    "filter tag": lambda: timm.list_models("*.in1k", pretrained=True),
    "filter tag wildcard": lambda: timm.list_models("*.*", pretrained=True),
    "filter tag letter": lambda: timm.list_models("*.g*", pretrained=True),
    "filter tag without pretrained": lambda: timm.list_models("vgg*", include_tags=True),
    "filter nothing": lambda: timm.list_models("no_such*", pretrained=True),
    "filter untrained": lambda: timm.list_models("test_vit4", pretrained=True),
    "filters": lambda: timm.list_models(["resnet18*", "vit_tiny*"], "", True, exclude_filters=["*.a1*", "*384*"]),
    "module": lambda: timm.list_models(module="resnet", pretrained=True),
    "modules": lambda: timm.list_models(module=["resnet", "vgg"], exclude_filters="*50*"),
    "exclude": lambda: timm.list_models("*res*", pretrained=True, exclude_filters="*resnet*"),
    "name_matches_cfg": lambda: timm.list_models(name_matches_cfg=True),
    "list_modules": lambda: timm.list_modules(),
    "is_model": lambda: [timm.is_model(name) for name in ("resnet18", "resnet18.a1_in1k", "no_such", "")],
    "is_model_pretrained": lambda: [timm.is_model_pretrained(n) for n in ("vgg11", "vgg11.tv_in1k", "vgg11.no")],
    "model_entrypoint": lambda: timm.model_entrypoint("resnet18"),
    "model_entrypoint unknown": lambda: timm.model_entrypoint("no_such"),
    "get_pretrained_cfg": lambda: timm.get_pretrained_cfg("resnet18.a1_in1k"),
    "get_pretrained_cfg invalid": lambda: timm.get_pretrained_cfg("resnet18.no_such"),
    "get_pretrained_cfg_value": lambda: timm.get_pretrained_cfg_value("resnet18", "input_size"),
    "get_arch_pretrained_cfgs": lambda: timm.models.get_arch_pretrained_cfgs("resnet18"),
    "get_deprecated_models": lambda: timm.models.get_deprecated_models(),
    "parse_model_name": lambda: timm.models.parse_model_name("hf-hub:timm/resnet18.a1_in1k@main"),
    "parse_model_name invalid": lambda: timm.models.parse_model_name("no-such-source:resnet18"),
    "safe_model_name": lambda: timm.models.safe_model_name("hf-hub:timm/resnet18.a1_in1k"),
    "split_model_name_tag": lambda: timm.models.split_model_name_tag("resnet18.ghn2"),
    "create": lambda: create_model(MODEL),
    "create by tag": lambda: create_model(f"{MODEL}.r160_in1k"),
    "create by cfg": lambda: create_model(MODEL, pretrained_cfg="r160_in1k"),
    "create by dict": lambda: create_model(MODEL, pretrained_cfg={"num_classes": 3, "tag": "mine"}),
    "create with arguments": lambda: create_model(MODEL, num_classes=10, in_chans=1, drop_rate=0.1),
    "create features": lambda: create_model(MODEL, features_only=True),
    "create features with indices": lambda: create_model("test_vit", features_only=True, out_indices=(0, 1)),
    "create with overlay": lambda: create_model(MODEL, pretrained_cfg_overlay={"num_classes": 4}),
    "create fixed size": lambda: create_model("test_vit", img_size=80),
    "create scriptable": lambda: create_model(MODEL, scriptable=True, exportable=True),
    "create without weights": lambda: create_model("test_vit4", pretrained=True, pretrained_cfg={"tag": "x"}),
    "create deprecated": lambda: create_model("seresnext26_32x4d"),
    "create unknown": lambda: create_model("no_such_model"),
    "create unknown with tag": lambda: create_model("no_such_model.ghn2"),
    "create empty tag": lambda: create_model(f"{MODEL}."),
    "create wrong tag": lambda: create_model(f"{MODEL}.no_such"),
    "create wrong cfg": lambda: create_model(MODEL, pretrained_cfg="no_such"),
    "create wrong argument": lambda: create_model(MODEL, nonsense=1),
    "create by path": lambda: create_model("some/path"),
    "create from missing folder": lambda: create_model("local-dir:/no/such/folder"),
    "create from hub with cfg": lambda: create_model("hf-hub:timm/x", pretrained_cfg="ghn2"),
    "entrypoint": lambda: timm.models.test_resnet(),
}


def outcome(call: Callable[[], Any]) -> tuple[Any, ...]:
    """All that can be seen of a call: result or error, warnings with their place, random numbers used."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
        except Exception as error:
            result = (type(error), str(error))
    if isinstance(result, nn.Module):
        state = {name: tensor.tolist() for name, tensor in result.state_dict().items()}
        result = (type(result), str(result), state, result.pretrained_cfg, getattr(result, "_model_args", None))
    seen = [(str(w.message), w.category, w.filename, w.lineno) for w in caught]
    return result, seen, torch.get_rng_state().tolist()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_every_other_call_is_as_before(call: Callable[[], Any]) -> None:
    after = outcome(call)
    plugin.uninstall()
    assert outcome(call) == after


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Coming and going


def test_uninstall_leaves_timm_as_it_was() -> None:
    plugin.uninstall()
    before = snapshot()
    for _ in range(2):
        plugin.install()
        plugin.install()
        CATALOG.register("ghn-another", str(CATALOG.registered[TAG]))
        create_model(MODEL, pretrained_cfg=TAG)
        timm.list_models(f"*.{TAG}", pretrained=True)
        assert snapshot() != before
        plugin.uninstall()
        plugin.uninstall()
        after = snapshot()
        assert after.keys() == before.keys()
        assert [name for name in before if after[name] is not before[name] and after[name] != before[name]] == []
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        create_model(MODEL, pretrained_cfg=TAG)


FRESH = """
from timm import create_model, list_models
import timm
from timm.models import _builder, _factory, _registry
modules = (timm, timm.models, _factory, _builder, _registry)
copied = lambda value: value.copy() if isinstance(value, (dict, set, list)) else value
before = [{name: copied(value) for name, value in vars(module).items() if name != "__builtins__"} for module in modules]
import timm_ghn
from timm_ghn import plugin
from timm_ghn.checkpoints.catalog import CATALOG
plugin.install()
import sys
CATALOG.register("mine", sys.argv[1])
assert len(list_models("*.mine", pretrained=True)) == len(list_models())
create_model("test_resnet", pretrained_cfg="mine")
plugin.uninstall()
after = [{name: copied(value) for name, value in vars(module).items() if name != "__builtins__"} for module in modules]
assert after == before
print("as before")
"""


@pytest.mark.slow
def test_in_a_fresh_process(ghn_file: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", FRESH, str(ghn_file)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout == "as before\n", process.stderr


RELOADED = """
import importlib, itertools, sys, timm
from timm import create_model
from timm.models import _builder, _factory, _registry
modules = (timm, timm.models, _factory, _builder, _registry)
copied = lambda value: value.copy() if isinstance(value, (dict, set, list)) else value
look = lambda: [{n: copied(v) for n, v in vars(m).items() if n != "__builtins__"} for m in modules]
before = look()

def purge(*names):
    for name in [n for n in sys.modules if n in names or (not names and n.partition(".")[0] == "timm_ghn")]:
        del sys.modules[name]
    return importlib.import_module("timm_ghn.plugin")

def plugin():
    return importlib.import_module("timm_ghn.plugin")

steps = {
    "reload the plugin": lambda: importlib.reload(plugin()),
    "reload the package": lambda: importlib.reload(importlib.import_module("timm_ghn")),
    "purge the plugin": lambda: purge("timm_ghn.plugin"),
    "purge everything": lambda: purge(),
    "install": lambda: plugin().install(),
    "uninstall": lambda: plugin().uninstall(),
    "register": lambda: importlib.import_module("timm_ghn").register("mine", sys.argv[1]),
}
for name in itertools.chain(*itertools.product(steps, repeat=2)):
    steps[name]()
    assert create_model("test_resnet", pretrained_cfg="r160_in1k").pretrained_cfg["tag"] == "r160_in1k"
    if name == "uninstall":
        assert look() == before
plugin().install()
steps["register"]()
assert create_model("test_resnet", pretrained_cfg="mine").pretrained_cfg["tag"] == "mine"
assert sum(name.endswith((".mine", ".ghn2")) for name in _registry._model_has_pretrained) == 2 * len(timm.list_models())
plugin().uninstall()
assert look() == before
print("right")
"""


@pytest.mark.slow
def test_reloaded_and_imported_again_in_any_order(ghn_file: Path) -> None:
    """As notebooks do; timm is right after each step, and as it was after `uninstall`."""
    process = subprocess.run(
        [sys.executable, "-c", RELOADED, str(ghn_file)], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout == "right\n", process.stderr


def test_a_module_of_timms_that_is_reloaded() -> None:
    """It has its own functions back, so the hook has to come again, and later leave those."""
    importlib.reload(_factory)
    plugin.install()
    assert is_predicted(_factory.create_model(MODEL, pretrained_cfg=TAG))
    plugin.uninstall()
    assert _factory.model_entrypoint is _registry.model_entrypoint
    assert _factory.split_model_name_tag is _registry.split_model_name_tag


def test_a_patch_on_top_of_ours_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's wrapper around the name we replaced keeps working through every coming and going of ours."""
    ours, calls = _factory.model_entrypoint, []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return ours(*args, **kwargs)

    monkeypatch.setattr(_factory, "model_entrypoint", theirs)
    plugin.uninstall()
    assert _factory.model_entrypoint is theirs
    create_model(MODEL)
    plugin.install()
    assert is_predicted(create_model(MODEL, pretrained_cfg=TAG))
    assert len(calls) == 2
    monkeypatch.undo()
    assert is_predicted(create_model(MODEL, pretrained_cfg=TAG))


@pytest.mark.parametrize("name", ["model_entrypoint", "split_model_name_tag"])
def test_a_timm_without_our_names(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plugin.uninstall()
    monkeypatch.delattr(_factory, name)
    with pytest.raises(GHNError, match=rf"lacks timm\.models\._factory\.{name}; timm-ghn is tested with timm 1\.0"):
        plugin.install()
    monkeypatch.undo()


def test_threads() -> None:
    """Predicted and plain models are made at the same time, while names come and go."""
    expected = create_model(MODEL, pretrained_cfg=TAG, num_classes=10)
    problems: list[str] = []

    def work(index: int) -> None:
        try:
            for _ in range(5):
                if index % 2:
                    if not equal(create_model(MODEL, pretrained_cfg=TAG, num_classes=10), expected):
                        problems.append("a prediction differs")
                elif create_model(MODEL, num_classes=10).pretrained_cfg["tag"] != "r160_in1k":
                    problems.append("a plain model was labelled as predicted")
                plugin.install()
        except Exception as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for index in range(5):
        CATALOG.register(f"ghn-{index}", str(CATALOG.registered[TAG]))
    for thread in threads:
        thread.join()
    assert problems == []


def test_inside_another_creation(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entrypoint that calls create_model itself, with another tag or none."""
    inner: list[nn.Module] = []
    original = timm.model_entrypoint(MODEL)

    def nested(**kwargs: Any) -> Any:
        inner.append(create_model("test_vit"))
        inner.append(create_model("test_vit", pretrained_cfg=TAG))
        return original(**kwargs)

    monkeypatch.setitem(_registry._model_entrypoints, MODEL, nested)
    assert is_predicted(create_model(MODEL, pretrained_cfg=TAG, ghn_kwargs={"head": "keep"}), head="keep")
    assert not is_predicted(inner[0]) and is_predicted(inner[1])
