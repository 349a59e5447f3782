"""A look inside a predicted network: what each layer got, what becomes of real images in it, and what looks wrong."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import timm
import torch
from torch import Tensor, nn

from ..checkpoints.load import load_ghn
from ..errors import GHNError
from ..graph import ComputationGraph
from ..graph.primitives import NORMS
from ..hypernet import GHN
from ..plan import Role, roles
from ..prediction import Prediction, Report, write
from ..predictor import Predictor
from ..preparation import branches_without_norm
from .accuracy import create_model
from .batches import check_images
from .calibration import calibrate, device_of, modes_kept

_LARGEST_OUTPUT = 1e4  # beyond, a softmax knows one class only, and training starts with gradients as large
_LEAST_DIFFERENCE = 0.01  # of two images' outputs, next to how much they vary over the classes
_FAR = 10.0  # times timm's init, up or down
_GROWTH = 100.0  # from the first layer's output on
_LEAST_VALUES = 16  # of a channel; with fewer, any two can be multiples of each other
_MOST = 0.5  # of a layer's channels
_LEAST_DISTINCT = 1e-3  # share of a layer's output that differs from image to image


@dataclass(frozen=True)
class InspectedParameter:
    """A parameter of a predicted network.

    Attributes:
        name: Of the parameter.
        shape: In full.
        role: What it is: "weight", "bias", "norm_weight", …; None for what has no node in the graph.
        kept: Why it was not predicted; None if it was.
        tiles: How many copies of what was decoded it consists of, parts of copies counted as such; 0 if it was kept.
        scale: Root mean square of its values.
        init_scale: The same before, from timm's own init.
        rank: Effective rank of a predicted weight as a matrix [out, in · kernel]: the exponential of the entropy of
            its singular values (Roy and Vetterli 2007); None for anything else.
        full_rank: The largest that it could have.
    """

    name: str
    shape: tuple[int, ...]
    role: str | None
    kept: str | None
    tiles: float
    scale: float
    init_scale: float
    rank: float | None = None
    full_rank: int | None = None


@dataclass(frozen=True)
class InspectedActivation:
    """What comes out of a layer on a batch of images.

    Attributes:
        name: Of the module.
        kind: Its class.
        shape: Without the batch dimension.
        scale: Root mean square.
        largest: Largest magnitude; infinite or NaN where something is not finite.
        dead: Share of channels that are constant over all images and positions.
        alike: Share of the other channels that are a multiple of an earlier one; NaN if there are too few values.
        difference: Share of the output's norm that differs from image to image; NaN for a single image.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    scale: float
    largest: float
    dead: float
    alike: float
    difference: float


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong.

    Attributes:
        what: What it is.
        where: The layers or parameters; the first ones first.
        cause: The likely cause, in one sentence.
    """

    what: str
    where: tuple[str, ...]
    cause: str


@dataclass
class Inspection:
    """What was found in a network.

    Attributes:
        report: Of the prediction.
        parameters: In the order of the model.
        activations: In the order of execution; empty without images.
        output: "ok", or what is wrong with what the network says of the images; None without images.
        findings: What looks wrong, what matters most first.
    """

    report: Report
    parameters: list[InspectedParameter]
    activations: list[InspectedActivation] = field(default_factory=list)
    output: str | None = None
    findings: list[Finding] = field(default_factory=list)


def inspect(
    model: str | nn.Module,
    ghn: str | os.PathLike[str] | GHN = "ghn2",
    images: Tensor | None = None,
    head: str = "auto",
) -> Inspection:
    """Predicts a network's parameters and looks at them, and at what they make of images.

    Args:
        model: A name of timm's, which is created for the GHN's classes and the images' size; or a module, which is left
            as it is, and whose present parameters count as its init.
        ghn: A loaded GHN, or whatever `load_ghn` takes.
        images: float [N, channels, H, W], prepared as the network wants them. Norms take their statistics from them
            before anything is measured.
        head: As for `predict`.

    Raises:
        CheckpointError: If the GHN cannot be loaded.
        GHNError: If the network's output for the images is not one tensor.
        PredictionError, TraceError: As for `predict`.
        ValueError: If `images` are none.
    """
    loaded = ghn if isinstance(ghn, GHN) else load_ghn(ghn)
    if images is not None:
        check_images(images)
    size = None if images is None else tuple(images.shape[1:])
    if not isinstance(model, str):
        network = copy.deepcopy(model)
    elif size is None:
        network = timm.create_model(model, num_classes=loaded.config.num_classes)
    else:
        network = create_model(model, loaded.config.num_classes, size[-2:])
    prediction = Predictor(loaded, head, size).predict(network)
    before = {name: _scale(parameter) for name, parameter in network.named_parameters()}
    write(network, prediction)
    result = Inspection(prediction.report, _parameters(network, prediction, before))
    norms = [name for name, norm in network.named_modules() if getattr(norm, "num_batches_tracked", None) == 0]
    if images is not None:
        result.activations, outputs = _run(network, images)
        result.output = judge(outputs)
    elif norms:
        cause = "Predicted weights come without statistics: use calibrate or adapt before the network is evaluated."
        result.findings.append(Finding("norms without statistics of data", tuple(norms), cause))
    result.findings += _findings(result, prediction.graph, loaded)
    return result


# ---- parameters -----------------------------------------------------------------------------------------------------


def _parameters(model: nn.Module, prediction: Prediction, before: dict[str, float]) -> list[InspectedParameter]:
    known = roles(prediction.graph)
    kept = prediction.report.kept
    rows = []
    for name, parameter in model.named_parameters():
        role, tile, rank, full_rank = known.get(name), prediction.tiles.get(name), None, None
        if role is None and tile is not None and name.endswith("bias"):
            role = Role.NORM_BIAS  # whose node is the weight's
        if tile is not None and role in (Role.WEIGHT, Role.CLASS_WEIGHT) and parameter.ndim > 1:
            # Copies add no directions, so those of the tile are all that there are.
            rank = _effective_rank(tile.flatten(1))
            full_rank = min(parameter.shape[0], parameter[0].numel())
        rows.append(
            InspectedParameter(
                name=name,
                shape=tuple(parameter.shape),
                role=role and role.name.lower(),
                kept=kept.get(name),
                tiles=0.0 if tile is None else parameter.numel() / tile.numel(),
                scale=_scale(parameter),
                init_scale=before[name],
                rank=rank,
                full_rank=full_rank,
            )
        )
    return rows


def _scale(tensor: Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item() if tensor.is_floating_point() else math.nan


def _effective_rank(matrix: Tensor) -> float:
    singular = torch.linalg.svdvals(matrix.double())
    shares = singular[singular > 0] / singular.sum()
    return math.exp(-(shares * shares.log()).sum().item())


# ---- activations ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _run(model: nn.Module, images: Tensor) -> tuple[list[InspectedActivation], Tensor]:
    """What comes out of each layer, and of the model, [N, outputs]."""
    rows: list[InspectedActivation] = []
    dim = [1]  # of the channels, as the last layer with a weight had them

    def measure(name: str, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim < 2:
            return
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            size = weight.shape[0]
            dim[0] = 1 if output.ndim == 4 and output.shape[1] == size else -1
        if output.shape[0] == len(images):
            rows.append(_measured(name, type(module).__name__, output, dim[0] if output.ndim == 4 else -1))

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ValueError):  # statistics that are not finite; the layers tell where it begins
            calibrate(model, [images])
        for name, module in _layers(model):
            hook = module.register_forward_hook(
                lambda module, inputs, output, name=name: measure(name, module, inputs, output)
            )
            stack.callback(hook.remove)
        stack.enter_context(modes_kept(model))
        outputs = model.eval()(images.to(device_of(model)))
    if not isinstance(outputs, Tensor):
        raise GHNError(f"{type(model).__name__} returns a {type(outputs).__name__}; only one tensor can be judged.")
    return rows, outputs.flatten(1)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with parameters of their own, and activation functions that are not within one."""
    within: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in within):
            continue
        if next(module.parameters(recurse=False), None) is not None and name:
            if next(module.children(), None) is None or isinstance(module, nn.modules.batchnorm._BatchNorm):
                within.append(name)
            yield name, module
        elif "activation" in type(module).__module__ and not list(module.children()):
            yield name, module


def _measured(name: str, kind: str, output: Tensor, dim: int) -> InspectedActivation:
    channels = output.movedim(dim, 1).flatten(2) if output.ndim > 2 else output.unsqueeze(2)  # [N, C, positions]
    finite = bool(channels.isfinite().all())
    scale = channels.double().square().mean().sqrt()
    values = channels.movedim(1, 0).flatten(1).double()  # [C, N · positions]
    values = values - values.mean(1, keepdim=True)
    sizes = torch.linalg.vector_norm(values, dim=1)
    live = sizes > 1e-6 * scale * math.sqrt(values.shape[1])
    alike = math.nan
    if finite and live.any() and values.shape[1] >= _LEAST_VALUES:
        # Channels are told apart by what a few fixed directions see of them.
        directions = torch.randn(values.shape[1], 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        seen = (values[live] / sizes[live, None]) @ directions.to(values.device)
        seen = seen * seen[:, :1].sign()
        alike = 1 - len(seen.mul(1e3).round().unique(dim=0)) / len(seen)
    difference = math.nan
    if finite and len(output) > 1:
        whole = channels.double()
        apart = torch.linalg.vector_norm(whole - whole.mean(0, keepdim=True))
        difference = float(apart / torch.linalg.vector_norm(whole)) if whole.any() else 0.0
    return InspectedActivation(
        name=name,
        kind=kind,
        shape=tuple(output.shape[1:]),
        scale=scale.item(),
        largest=channels.abs().max().item(),
        dead=1 - live.double().mean().item() if finite else math.nan,
        alike=alike,
        difference=difference,
    )


# ---- what looks wrong -----------------------------------------------------------------------------------------------


def _findings(found: Inspection, graph: ComputationGraph, ghn: GHN) -> Iterator[Finding]:
    layers = found.activations
    if layers:
        yield from _growth(layers, graph, ghn)
        yield from _sameness(layers)
        yield from _dead(layers, found.parameters)
    far = [p for p in found.parameters if p.tiles and p.init_scale and not 1 / _FAR <= p.scale / p.init_scale <= _FAR]
    weights = [p for p in far if p.role in ("weight", "class_weight")]
    if weights:
        worst = max(weights, key=lambda p: abs(math.log(p.scale / p.init_scale)))
        yield Finding(
            f"weights far from timm's scale, up to {worst.scale / worst.init_scale:.3g} times in {worst.name}",
            tuple(p.name for p in weights),
            "The prediction is scaled by the number of inputs of a filter, whatever scale timm starts the layer with.",
        )
    fused = [name for name, operands in graph.operands.items() if len(operands.parts) > 1]
    if fused and not ghn.config.split_attention:
        yield Finding(
            "queries, keys and values are equal",
            tuple(fused),
            "This GHN repeats one tile over the whole of a fused projection; one with split_attention does not.",
        )
    if alike := [layer for layer in layers if layer.alike > _MOST]:
        out, into = ghn.config.max_shape[:2]
        yield Finding(
            f"channels that repeat others, {max(layer.alike for layer in alike):.0%} of them at most",
            tuple(layer.name for layer in alike),
            f"These layers are wider than the {out} × {into} channels that the GHN decodes, and made of copies.",
        )


def _growth(layers: list[InspectedActivation], graph: ComputationGraph, ghn: GHN) -> Iterator[Finding]:
    first = next(layer.scale for layer in layers)
    grown = [layer for layer in layers if not layer.scale <= _GROWTH * first]
    if not grown:
        return
    largest = max(layer.largest for layer in grown)
    infinite = next((layer.name for layer in grown if not math.isfinite(layer.largest)), None)
    what = f"activations grow to {largest:.0e}" if infinite is None else f"not finite from {infinite} on"
    cause = "What comes in here is added to again and again, and normalised in the branches at most."
    if not ghn.config.bounded:
        if NORMS.isdisjoint(graph.ops):
            cause = (
                "There is no norm, and channels that are copies of each other add up, √n times more with each layer "
                'that reads n copies; finetune="bounded" takes that back.'
            )
        elif bare := branches_without_norm(graph):
            cause = (
                f"Residual branches of nothing but weights ({bare[0][-1]}, {len(bare)} in all) each multiply what they "
                'are added to, and no norm comes between; finetune="bounded" divides them by their number.'
            )
    yield Finding(what, tuple(layer.name for layer in grown), cause)


def _sameness(layers: list[InspectedActivation]) -> Iterator[Finding]:
    if layers[-1].difference < _LEAST_DISTINCT:
        same = [layer.name for layer in reversed(layers) if layer.difference < _LEAST_DISTINCT]
        cause = "What differs between images is lost on the way, under biases or in channels that cancel out."
        yield Finding("the output is the same for all images", tuple(reversed(same)), cause)


def _dead(layers: list[InspectedActivation], parameters: list[InspectedParameter]) -> Iterator[Finding]:
    dead = [layer for layer in layers if layer.dead > _MOST]
    zero = [p.name for p in parameters if p.kept and p.scale == 0]
    switched_off = [layer.name for layer in dead if any(name.rpartition(".")[0] == layer.name for name in zero)]
    if switched_off:
        yield Finding(
            "layers that are switched off",
            tuple(switched_off),
            f"A scale that timm starts at zero was kept ({zero[0]}, {len(zero)} in all), until training changes it.",
        )
    if others := [layer for layer in dead if layer.name not in switched_off]:
        worst = max(others, key=lambda layer: layer.dead)
        yield Finding(
            f"channels that no image changes, {worst.dead:.0%} of {worst.name}",
            tuple(layer.name for layer in others),
            "Biases push them to where the activation function is flat, or all that they read is constant.",
        )


def judge(outputs: Tensor) -> str:
    """Whether a network's answers to images [N, outputs] are of use: "ok", or what is wrong with them."""
    if not outputs.isfinite().all():
        return "not finite"
    outputs = outputs.double()
    largest = outputs.abs().max().item()
    variation = torch.linalg.vector_norm(outputs, dim=1)
    if outputs.shape[1] > 1:  # a single one has no others to differ from
        outputs = outputs - outputs.mean(1, keepdim=True)
        variation = torch.linalg.vector_norm(outputs, dim=1)
        if variation.min() <= 1e-6 * largest * outputs.shape[1] ** 0.5:
            return "constant over the classes"
    if len(outputs) > 1:
        apart = torch.linalg.vector_norm(outputs[1:] - outputs[:1], dim=1).max()
        difference = float(apart / variation.max()) if largest else 0.0
        if difference < _LEAST_DIFFERENCE:
            return f"almost the same for all images, a difference of {difference:.2%}"
    return "ok" if largest < _LARGEST_OUTPUT else f"as large as {largest:.0e}"
