"""What a program has told torch does not reach predictions; what it wants of its model's dtype and device does."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from timm_ghn import initialize, load_ghn, plugin, predict, trace
from timm_ghn.checkpoints.catalog import CATALOG
from timm_ghn.export import export
from timm_ghn.predictor import Predictor

TAG = "ghn-ambient"
MODELS = ("test_resnet", "test_vit")


@pytest.fixture(autouse=True)
def installed(tags: None, ghn_file: Path) -> None:
    plugin.install()
    CATALOG.register(TAG, ghn_file)


class _Louder(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is nn.functional.linear else result


class _Shifted(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result + 1 if func is torch.ops.aten.addmm.default else result


@contextlib.contextmanager
def _set(setter: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextlib.contextmanager
def _empty_weights() -> Iterator[None]:
    """As accelerate's `init_empty_weights`: every parameter that is registered goes to meta."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype bfloat16": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default dtype float64": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "device context": lambda: torch.device("meta"),
    "default device": lambda: _set(torch.set_default_device, "meta", None),
    "empty weights": _empty_weights,
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "saved tensors": torch.autograd.graph.save_on_cpu,
    "no saved-tensor hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
    "precision high": lambda: _set(torch.set_float32_matmul_precision, "high", "highest"),
    "precision medium": lambda: _set(torch.set_float32_matmul_precision, "medium", "highest"),
    "attention backend": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "function mode": _Louder,
    "dispatch mode": _Shifted,
    "fake tensors": FakeTensorMode,
}
ON_META = ("device context", "default device", "empty weights")
DTYPES = {"default dtype bfloat16": torch.bfloat16, "default dtype float64": torch.float64}


def _settings() -> tuple[Any, ...]:
    """What of torch's state can be asked for."""
    mkldnn: Any = torch.backends.mkldnn
    products = (torch.backends.cuda.matmul, mkldnn.matmul)
    return (
        _get_current_function_mode_stack(), _get_current_dispatch_mode_stack(), torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled(),
        [product.fp32_precision for product in products],
    )  # fmt: skip


def _equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module", params=MODELS)
def plain(request: pytest.FixtureRequest, ghn_file: Path) -> tuple[Any, dict[str, Tensor]]:
    """A model and its prediction in a program that has set nothing."""
    model = timm.create_model(request.param, num_classes=10)
    return model, dict(predict(model, str(ghn_file)))


@pytest.mark.parametrize("state", STATES)
def test_a_prediction_is_the_same(state: str, plain: tuple[Any, dict[str, Tensor]], ghn_file: Path) -> None:
    model, expected = plain
    with STATES[state]():
        before = _settings()
        prediction = predict(model, str(ghn_file))
        assert _settings() == before
    assert _equal(dict(prediction), expected)
    assert all(tensor.dtype == torch.float32 and not tensor.is_inference() for tensor in prediction.values())


@pytest.mark.parametrize("state", [state for state in STATES if state != "fake tensors"])
def test_a_model_made_by_prediction(state: str, plain: tuple[Any, dict[str, Tensor]]) -> None:
    """It has timm's dtype and device, and, where it has values, those predicted in float32."""
    model, expected = plain
    with STATES[state]():
        before = _settings()
        created = timm.create_model(model.pretrained_cfg["architecture"], num_classes=10, pretrained_cfg=TAG)
        assert _settings() == before
    assert {parameter.is_meta for parameter in created.parameters()} == {state in ON_META}
    if state not in ON_META:
        dtype = DTYPES.get(state, torch.float32)
        parameters = {name: parameter for name, parameter in created.named_parameters() if name in expected}
        assert _equal(parameters, {name: tensor.to(dtype) for name, tensor in expected.items()})


@pytest.mark.parametrize("state", STATES)
def test_a_trace_is_the_same(state: str, plain: tuple[Any, dict[str, Tensor]]) -> None:
    model, _ = plain
    expected = trace(model).to_dict()
    with STATES[state]():
        graph = trace(model)
    assert graph.to_dict() == expected


@pytest.fixture(scope="module")
def initialized(ghn_file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of a model before and after, in a program that has set nothing."""
    model = timm.create_model("test_vit", num_classes=10)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    initialize(model, str(ghn_file), finetune="conditioned", head="predict")
    return before, model.state_dict()


@pytest.mark.parametrize("state", [state for state in STATES if state not in DTYPES])
def test_initialize_writes_the_same(
    state: str, initialized: tuple[dict[str, Tensor], dict[str, Tensor]], ghn_file: Path
) -> None:
    before, expected = initialized
    found = timm.create_model("test_vit", num_classes=10)
    found.load_state_dict(before)
    torch.manual_seed(0)
    with STATES[state]():
        initialize(found, str(ghn_file), finetune="conditioned", head="predict")
    assert _equal(found.state_dict(), expected)


@pytest.mark.parametrize("state", STATES)
def test_a_ghn_that_is_loaded_meanwhile_is_whole(state: str, ghn_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "again.safetensors"
    file.write_bytes(ghn_file.read_bytes())
    with STATES[state]():
        ghn = load_ghn(file)
    assert _equal(ghn.state_dict(), load_ghn(ghn_file).state_dict())
    assert not any(tensor.is_inference() for tensor in ghn.parameters())


def test_a_precision_of_products_that_is_inherited_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    backends: Any = torch.backends
    monkeypatch.setattr(backends, "fp32_precision", "tf32")
    predict(timm.create_model("test_resnet", num_classes=10))
    backends.fp32_precision = "ieee"
    assert backends.cuda.matmul.fp32_precision == backends.mkldnn.matmul.fp32_precision == "ieee"


def test_a_model_of_another_precision() -> None:
    """Its buffers too: Swin's masks are added to what its weights make."""
    model = timm.create_model("swin_tiny_patch4_window7_224")
    expected = trace(model).to_dict()
    for dtype in (torch.bfloat16, torch.float64):
        assert trace(model.to(dtype)).to_dict() == expected


def test_a_model_without_values_is_told_so(ghn_file: Path) -> None:
    with torch.device("meta"):
        model = timm.create_model("test_resnet", num_classes=10)
    assert len(predict(model, str(ghn_file))) == predict(model, str(ghn_file)).report.predicted_fraction * 47
    report = initialize(model, str(ghn_file))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not report.predicted and report.predicted_fraction == 0
    assert report.kept.keys() == dict(model.named_parameters()).keys()
    assert "nothing was written: it is on the meta device" in str(report)
    with FakeTensorMode():
        fake = timm.create_model("test_resnet", num_classes=10)
    assert not initialize(fake, str(ghn_file)).predicted


def test_a_model_that_is_partly_on_meta(ghn_file: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    model.layer1.to("meta")
    report = initialize(model, str(ghn_file))
    assert {name for name in report.kept if name.startswith("layer1.")} == report.kept.keys()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert report.predicted_fraction == pytest.approx(sum(report.predicted.values()) / sum(sizes.values()))
    assert 0 < report.predicted_fraction < 1


@pytest.mark.parametrize("state", ["autocast", "default dtype bfloat16", "device context"])
def test_files_are_the_same(state: str, ghn_file: Path, tmp_path: Path) -> None:
    for folder, context in (("plain", contextlib.nullcontext), (state, STATES[state])):
        torch.manual_seed(0)
        with context():
            export("test_vit", tmp_path / folder, Predictor(load_ghn(ghn_file)), "ghn", num_classes=10)
    plain, found = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("plain", state))
    assert plain == found
