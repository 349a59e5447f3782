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


def resnet() -> Any:
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


def closure(model: Any) -> None:
    old = model.forward
    model.forward = lambda x: old(x)


def global_name(model: Any) -> None:
    global old_forward
    old_forward = model.forward
    model.forward = lambda x: old_forward(x)


def default_argument(model: Any) -> None:
    model.forward = lambda x, old=model.forward: old(x)


def decorated(model: Any) -> None:
    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return wrapper

    model.forward = timed(timed(model.forward))


def method(model: Any) -> None:
    model.plain_forward = model.forward
    model.forward = types.MethodType(lambda self, x: self.plain_forward(x), model)


def partial(model: Any) -> None:
    """In the manner of accelerate."""

    def forward(module: Any, x: torch.Tensor) -> Any:
        return module._old_forward(x)

    model._old_forward = model.forward
    model.forward = functools.update_wrapper(functools.partial(forward, model), model.forward)


def callable_object(model: Any) -> None:
    class Wrapper:
        def __init__(self, function: Callable[..., Any]):
            self.function = function

        def __call__(self, x: torch.Tensor) -> Any:
            return self.function(x)

    model.forward = Wrapper(model.forward)


def of_a_submodule(model: Any) -> None:
    closure(model.bn1)
    closure(model.layer1[0].conv1)


def weak_reference(model: Any) -> None:
    reference: Any = weakref.ref(model)
    model.forward = lambda x: type(reference()).forward(reference(), x)


def weak_proxy(model: Any) -> None:
    proxy = weakref.proxy(model)
    model.forward = lambda x: proxy.forward_head(proxy.forward_features(x))


def list_of_methods(model: Any) -> None:
    steps = [model.forward_features, model.forward_head]
    model.forward = lambda x: functools.reduce(lambda value, step: step(value), steps, x)


def bound_call(model: Any) -> None:
    whole = model.bn1.__call__
    model.bn1.forward = lambda x, old=model.bn1.forward: old(x)
    model.layer1[0].norm = whole


@pytest.mark.parametrize(
    "wrap",
    [closure, global_name, default_argument, decorated, method, partial, callable_object, of_a_submodule,
     weak_reference, weak_proxy, list_of_methods, bound_call],
)  # fmt: skip
def test_a_wrapped_method_runs_on_the_copy(wrap: Callable[[Any], None], expected: list[str]) -> None:
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
    with pytest.raises(TraceError, match=r"reaches the model itself.*predict before you wrap or patch"):
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
    compiled: Any = torch.compile(model, backend="eager")
    assert trace(compiled).head == ("_orig_mod.fc.weight", "_orig_mod.fc.bias")
    model.compile(backend="eager")
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


def own_hook(layer: Any) -> None:
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
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 3))
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


def test_methods_of_a_users_object_do_not_run() -> None:
    class Tracker:
        def __init__(self) -> None:
            self.seen: list[float] = []

        def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self.seen.append(output.mean().item())

    model, tracker = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), Tracker()
    mine: list[Any] = []
    model[0].register_forward_hook(tracker)
    model[0].register_forward_hook(tracker.__call__)
    model[0].register_forward_pre_hook(mine.append)  # type: ignore[arg-type]  # fails if it runs
    model[1].register_forward_hook(functools.partial(Tracker.__call__, tracker))
    vars(model)["tracker"] = tracker  # makes it a part of the model, whose copy fails without values
    assert len(trace(model, (3,))) == 5
    assert not tracker.seen
    assert not mine


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
        self.owner: Any = weakref.ref(self.layer)
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


# ---- models that one image cannot drive -----------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(3, 4), nn.Embedding(7, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, image: torch.Tensor, text: torch.Tensor, *, scale: float = 1.0) -> Any:
        return self.head(self.image(image) * scale + self.text(text).mean(1))


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.rand(2, 3), torch.zeros(2, 5, dtype=torch.long)),
        [torch.rand(2, 3), torch.zeros(2, 5, dtype=torch.long)],
        {"text": torch.zeros(2, 5, dtype=torch.long), "image": torch.rand(2, 3).half(), "scale": 2.0},
    ],
    ids=["tuple", "list", "dict"],
)
def test_inputs_drive_a_model_of_several(inputs: Any) -> None:
    model = Two()
    report = initialize(model, inputs=inputs, head="predict")
    assert report.predicted.keys() >= {"image.weight", "image.bias", "head.weight", "head.bias"}
    assert trace(model, inputs=inputs).head == ("head.weight", "head.bias")
    assert predict(model, inputs=inputs).report.kept.keys() == report.kept.keys() | {"head.weight", "head.bias"}


def test_inputs_may_be_nested_or_one_tensor() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, images: list[torch.Tensor]) -> Any:
            return self.layer(torch.stack(images))

    names = trace(Listed(), inputs=([torch.rand(3), torch.rand(3)],)).names
    assert names == ["input", "layer.weight", "layer.bias"]
    assert trace(nn.Linear(3, 4), inputs=torch.rand(5, 3)).names == ["input", "weight", "bias"]


def test_several_inputs_are_one_node() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return self.left(x) + self.right(y)

    graph = trace(Siamese(), inputs=(torch.rand(1, 3), torch.rand(1, 3)))
    assert [edge[:2] for edge in graph.edges.tolist() if edge[2] == 1] == [[0, 1], [0, 2], [1, 3], [2, 3]]


def test_inputs_and_a_size_are_too_much() -> None:
    with pytest.raises(ValueError, match="input_size or inputs, not both"):
        trace(nn.Linear(3, 4), 3, torch.rand(1, 3))


class Valued(nn.Linear):
    """Its forward pass depends on values."""

    look: Callable[[torch.Tensor], Any]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.look(x)
        return super().forward(x)


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: x.detach().numpy(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.cpu(),
    ],
)
def test_a_forward_pass_that_looks_at_values_is_told_so(look: Callable[[torch.Tensor], Any]) -> None:
    model = Valued(3, 4)
    model.look = look
    with pytest.raises(TraceError, match=r"looks at values.*pass the submodule that takes the image"):
        trace(model, (3,))


def test_a_detector_is_told_to_pass_its_backbone() -> None:
    detection = pytest.importorskip("torchvision").models.detection
    with torch.device("meta"):
        model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    with pytest.raises(TraceError, match="pass the submodule that takes the image, such as its backbone"):
        trace(model)
    assert len(trace(model.backbone)) > 100


def test_what_a_failing_forward_pass_takes_is_named() -> None:
    with pytest.raises(TraceError, match=r"takes \(image, text\): pass examples of them as inputs"):
        trace(Two())
    with pytest.raises(TraceError, match=r"Two fails on the given inputs"):
        trace(Two(), inputs=(torch.rand(2, 4), torch.zeros(2, 5, dtype=torch.long)))


def test_a_forward_pass_with_a_device_of_its_own_is_told_so() -> None:
    class Mixed(nn.Linear):
        def forward(self, x: torch.Tensor, device: str | None = "cpu") -> torch.Tensor:
            return torch.ones(4, device=device) * super().forward(x)

    with pytest.raises(TraceError, match="makes tensors on a device of its own"):
        trace(Mixed(3, 4), (3,))
    assert trace(Mixed(3, 4), inputs=(torch.rand(1, 3), None)).names == ["input", "weight", "bias"]  # the default one


# ---- arguments and models that are none -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [224.0, -3, 0, True, "224", (), (3, 224.0, 224), (3, -1, 4), ("3", 4, 4), (True, 4, 4), {3: 4}, {224}],
    ids=repr,
)
def test_a_malformed_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=r"input_size is .*; it must be a side length or a size without the batch"):
        trace(nn.Conv2d(3, 4, 3), size)


@pytest.mark.parametrize("size", [16, [3, 16, 16], torch.Size((3, 16, 16)), (3, torch.tensor(16), 16)])
def test_a_size_may_be_any_whole_numbers(size: Any) -> None:
    assert trace(nn.Conv2d(3, 4, 3), size).names == ["input", "weight", "bias"]


@pytest.mark.parametrize("function", [trace, predict, initialize])
@pytest.mark.parametrize("model", ["resnet18", nn.Linear, None, {"weight": torch.zeros(3)}], ids=str)
def test_what_is_no_model_is_refused(function: Callable[[Any], Any], model: Any) -> None:
    with pytest.raises(TypeError, match=r"is no model: pass a module, such as timm\.create_model makes from a name"):
        function(model)


@pytest.mark.parametrize("layer", [nn.LazyLinear(4), nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()], ids=repr)
def test_a_lazy_model_is_told_to_run_first(layer: nn.Module) -> None:
    with pytest.raises(TraceError, match=r"Sequential.1 has no shape for its \w+ yet: run the model once"):
        trace(nn.Sequential(nn.Conv2d(3, 4, 3), layer))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_scripted_child_is_named() -> None:
    for scripted in (torch.jit.script(nn.Conv2d(3, 3, 1)), torch.jit.trace(nn.Conv2d(3, 3, 1), torch.rand(1, 3, 4, 4))):
        with pytest.raises(TraceError, match=r"Sequential\.1 is scripted: pass the eager model"):
            trace(nn.Sequential(nn.Conv2d(3, 3, 1), scripted))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("head", ["auto", "predict", "keep"])
def test_empty_parameters_are_kept(head: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 0), nn.Linear(0, 10))
    report = initialize(model, head=head, input_size=(3,))
    assert report.kept["1.weight"] == report.kept["1.bias"] == report.kept["2.weight"] == "empty"
    assert "0.weight" in report.predicted


def test_a_model_made_in_inference_mode_is_written() -> None:
    with torch.inference_mode():
        model = timm.create_model("test_resnet", num_classes=10)
    expected = predict(model)
    assert initialize(model).predicted_fraction == 1
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    assert model.fc.weight.is_inference()


# ---- what autograd does not see -------------------------------------------------------------------------------------


def test_what_is_used_without_gradients_has_its_reason() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.detached, self.auxiliary = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)
            self.token = nn.Parameter(torch.zeros(1, 3))

        def forward(self, x: torch.Tensor) -> Any:
            self.auxiliary(x)
            with torch.no_grad():
                x = self.frozen(torch.cat([self.token, x]))
            return self.used(self.detached(x).detach())

    kept = trace(Partly(), (3,)).kept
    assert {name: reason for name, reason in kept.items() if name.endswith(("weight", "token"))} == {
        "frozen.weight": "used without gradients (no_grad)",
        "token": "used without gradients (no_grad)",
        "detached.weight": "not part of the output, or detached from it",
        "auxiliary.weight": "not part of the output, or detached from it",
        "unused.weight": "not used by the forward pass",
    }


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_forward_pass_without_gradients_is_told_so(context: Callable[[], Any]) -> None:
    model: Any = nn.Linear(3, 4)
    model.forward = context()(model.forward)
    with pytest.raises(TraceError, match="must not be detached or computed under no_grad"):
        trace(model, (3,))
