"""What users do to their models before they are traced: wrapped methods, hooks, attributes of all kinds."""

from __future__ import annotations

import functools
import gc
import logging
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from timm_ghn import TraceError, initialize, predict, trace

old_forward: Any = None
calls: list[str] = []


def resnet() -> nn.Module:
    """In train mode, where a forward pass counts up `num_batches_tracked`, and with a hook that says that it ran."""
    model = timm.create_model("test_resnet", num_classes=10).train()
    model.ran = ran = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: ran.append(type(module)))
        module.register_forward_pre_hook(lambda module, args: ran.append(type(module)))
    return model


@pytest.fixture(scope="module")
def expected() -> list[str]:
    return trace(timm.create_model("test_resnet", num_classes=10)).names


def assert_only_read(model: nn.Module) -> None:
    assert all(not buffer.any() for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked"))
    assert not model.ran


# ---- what holds on to the model past its copy -----------------------------------------------------------------------


def closure(model: nn.Module) -> None:
    old = model.forward
    model.forward = lambda x: old(x)


def global_name(model: nn.Module) -> None:
    global old_forward
    old_forward = model.forward
    model.forward = lambda x: old_forward(x)


def default_argument(model: nn.Module) -> None:
    model.forward = lambda x, old=model.forward: old(x)


def decorated(model: nn.Module) -> None:
    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return wrapper

    model.forward = timed(timed(model.forward))


def method(model: nn.Module) -> None:
    model.plain_forward = model.forward
    model.forward = types.MethodType(lambda self, x: self.plain_forward(x), model)


def partial(model: nn.Module) -> None:
    """In the manner of accelerate."""

    def forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module._old_forward(x)

    model._old_forward = model.forward
    model.forward = functools.update_wrapper(functools.partial(forward, model), model.forward)


def callable_object(model: nn.Module) -> None:
    class Wrapper:
        def __init__(self, function: Callable[..., Any]):
            self.function = function

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return self.function(x)

    model.forward = Wrapper(model.forward)


def of_a_submodule(model: nn.Module) -> None:
    closure(model.bn1)
    closure(model.layer1[0].conv1)


def weak_reference(model: nn.Module) -> None:
    reference = weakref.ref(model)
    model.forward = lambda x: type(reference()).forward(reference(), x)


def bound_call(model: nn.Module) -> None:
    whole = model.bn1.__call__
    model.bn1.forward = lambda x, old=model.bn1.forward: old(x)
    model.layer1[0].norm = whole


@pytest.mark.parametrize(
    "wrap",
    [closure, global_name, default_argument, decorated, method, partial, callable_object, of_a_submodule,
     weak_reference, bound_call],
)  # fmt: skip
def test_a_wrapped_method_runs_on_the_copy(wrap: Callable[[nn.Module], None], expected: list[str]) -> None:
    model = resnet()
    wrap(model)
    calls.clear()
    assert trace(model).names == expected
    assert initialize(model).predicted_fraction == 1
    assert_only_read(model)
    assert not calls


@pytest.mark.parametrize("batch_norm_only", [False, True])
def test_what_reaches_the_model_all_the_same_is_an_error(batch_norm_only: bool) -> None:
    model = resnet()
    wrapped = model.bn1 if batch_norm_only else model
    wrapped.forward = functools.lru_cache(wrapped.forward)  # keeps the method where nothing can exchange it
    with pytest.raises(TraceError, match="reaches the model itself.*predict before you wrap or patch"):
        predict(model)
    assert all(not buffer.any() for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked"))


def test_a_module_in_a_plain_list_is_copied_as_well() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.rest = [nn.BatchNorm1d(4), nn.Linear(4, 5)]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in (self.first, *self.rest):
                x = layer(x)
            return x

    model = Listed()
    assert trace(model, (3,)).names[:3] == ["input", "first.weight", "first.bias"]
    assert model.rest[0].num_batches_tracked == 0


def test_a_compiled_model_is_traced() -> None:
    model = timm.create_model("test_resnet")
    assert trace(torch.compile(model)).head == ("_orig_mod.fc.weight", "_orig_mod.fc.bias")
    model.compile()
    assert trace(model).head == ("fc.weight", "fc.bias")


# ---- hooks ----------------------------------------------------------------------------------------------------------


def test_hooks_do_not_run(expected: list[str]) -> None:
    model = resnet()
    features = {"x": "mine"}
    model.layer1.register_forward_hook(lambda module, args, output: features.__setitem__("x", output))
    model.layer2.register_forward_hook(lambda module, args, output: print(output.mean().item()))
    model.layer2.register_forward_pre_hook(lambda module, args: print(args[0].numpy()))
    model.layer3.register_full_backward_hook(lambda module, into, out: None)
    model.layer3.register_full_backward_pre_hook(lambda module, out: None)
    handles = [
        torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: features.clear()),
        torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: features.clear()),
        torch.nn.modules.module.register_module_full_backward_hook(lambda module, into, out: features.clear()),
    ]
    try:
        graph = trace(model)
    finally:
        for handle in handles:
            handle.remove()
    assert graph.names == expected
    assert features == {"x": "mine"}
    assert not model.ran


def weight_norm(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer)


def spectral_norm(layer: nn.Module) -> None:
    nn.utils.spectral_norm(layer)


def pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.5)


def pruned_twice(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.5)
    prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)


def own_hook(layer: nn.Module) -> None:
    layer.raw = layer.weight
    del layer.weight
    layer.weight = layer.raw.detach().clone()
    layer.register_forward_pre_hook(lambda module, args: setattr(module, "weight", module.raw.tanh()))


def parametrized(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (weight_norm, {"1.weight_g", "1.weight_v"}),
        (spectral_norm, {"1.weight_orig"}),
        (pruned, {"1.weight_orig"}),
        (pruned_twice, {"1.weight_orig"}),
        (own_hook, {"1.raw"}),
        (parametrized, {"1.parametrizations.weight.original0", "1.parametrizations.weight.original1"}),
    ],
)
def test_hooks_that_make_weights_run(make: Callable[[nn.Module], None], names: set[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 3))
    make(model[1])
    counted = []
    model[1].register_forward_pre_hook(lambda module, args: counted.append(args[0]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight = model[1].weight.detach().clone()
    graph = trace(model, (3, 16, 16))
    assert not counted
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model[1].weight.detach(), weight)
    assert names <= {*graph.names, *graph.kept}
    assert not any(name in graph.kept and "not used" in graph.kept[name] for name in names)
    assert names & set(graph.names)


def test_hooks_that_are_a_part_of_the_model_run() -> None:
    model = timm.create_model("efficientnet_b0", features_only=True, feature_location="expansion")
    assert model.feature_hooks is not None
    assert "blocks.5.3.bn1.weight" in trace(model).names
    assert not any(model.feature_hooks._feature_outputs.values())


# ---- attributes -----------------------------------------------------------------------------------------------------


class Source:
    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.count = 0


class Records(nn.Module):
    """A model that keeps all sorts of things."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.lock = threading.Lock()
        self.file = (folder / "log").open("w")
        self.numbers = (number for number in range(3))
        self.log = logging.getLogger("user")
        self.store: dict[str, Any] = {"lock": threading.RLock(), "seen": [], "features": None}
        self.owner = weakref.ref(self.layer)
        self.owners = weakref.WeakValueDictionary({"layer": self.layer})
        self.random = torch.Generator()
        self.source = Source()
        self.again = [self.source]
        self.module = threading
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock, self.store["lock"], self.source.condition:
            self.source.count += 1
            self.store["seen"].append(x)
            self.store["features"] = self.last = self.owner()(x)
        assert self.again[0] is self.source
        return self.last


def test_attributes_of_any_kind_do_not_matter(tmp_path: Path) -> None:
    model = Records(tmp_path)
    model(torch.rand(2, 3))  # what it stores has a gradient's history from now on
    stored = dict(model.store), model.last
    assert trace(model, (3,)).names == ["input", "layer.weight", "layer.bias"]
    assert model.store == stored[0]
    assert model.last is stored[1]
    assert len(model.store["seen"]) == model.source.count == 1
    assert next(model.numbers) == 0
    model.file.close()


def test_a_class_that_refuses_to_be_copied_is_named() -> None:
    class Unique(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("there is only one")

    with pytest.raises(TraceError, match=r"Unique cannot be copied for tracing \(there is only one\)"):
        trace(Unique(3, 4), (3,))


def test_a_copy_does_not_keep_the_model_alive() -> None:
    model = resnet()
    reference = weakref.ref(model)
    trace(model)
    del model
    gc.collect()
    assert reference() is None
