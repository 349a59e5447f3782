"""Predicted weights prepared for training.

Predicted weights work at once, but two things about them hold training back. Where a layer is wider than the largest
kernel a GHN makes, its channels are copies of one another, and copies that get the same gradients stay copies. And the
rows of a weight are far from orthogonal, so that few directions of its input get through (arXiv 2207.10049).
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .errors import PredictionError
from .graph.tape import input_candidates

if TYPE_CHECKING:
    from .assign import Prediction

PREPARATIONS = ("orthogonal", "diversified")

_PROBES = 2  # images that tell which channels are copies
_SAME = 1e-4  # of the largest: channels whose projections are this close are copies


def check_preparation(name: str | None) -> None:
    """Raises ValueError for a preparation that there is not."""
    if name is not None and name not in PREPARATIONS:
        raise ValueError(f"finetune is {name!r}; it must be None or one of {', '.join(PREPARATIONS)}.")


def prepare(
    model: nn.Module, prediction: Prediction, name: str, input_size: int | tuple[int, ...] | None = None
) -> Prediction:
    """A prediction that is a better point to start training from, for all layers but the classification layer.

    ``"orthogonal"``: each weight becomes its nearest matrix with orthogonal rows (or columns), at He's scale;
    directions that copies leave open are drawn at random. The function is lost, what the directions know is not.

    ``"diversified"``: the weights that copies of a channel meet in the next layer get random numbers that add up to
    zero over the copies. The function stays exactly what it was, but the copies now get different gradients.

    Args:
        model: What the prediction is for; it is not changed, but for "diversified" it must hold what is kept, and run.
        prediction: What was predicted for it.
        name: One of `PREPARATIONS`. Random numbers are drawn from torch's generator of the CPU.
        input_size: As for `timm_ghn.predict`.

    Returns:
        The prediction with the prepared weights in full instead of tiles.

    Raises:
        PredictionError: If the model cannot run on random images of the size it was traced at.
    """
    head = set(prediction.graph.head)
    weights = {
        node: prediction[node]
        for op, node in zip(prediction.graph.ops, prediction.graph.names, strict=True)
        if op in ("conv", "sep_conv", "dil_conv") and node in prediction and node not in head
    }
    with torch.no_grad():
        if name == "orthogonal":
            return prediction.replaced(_orthogonal(model, weights))
        return prediction.replaced(_diversified(weights, _copies(model, prediction, weights, input_size)))


def _orthogonal(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The orthogonal factors of weights' polar decompositions, group by group."""
    groups = {f"{name}.weight": getattr(module, "groups", 1) for name, module in model.named_modules()}
    changed = {}
    for name, weight in weights.items():
        matrices = weight.reshape(groups.get(name, 1), -1, weight[0].numel())
        # Copies make the rank deficient. Noise far below what was predicted decides about the rest, and nothing else.
        noise = torch.randn(matrices.shape).to(matrices) * 1e-3 * matrices.square().mean().sqrt()
        u, _, v = torch.linalg.svd(matrices + noise, full_matrices=False)
        factor = u @ v
        factor *= _he(weight) / factor.square().mean().sqrt()
        changed[name] = factor.view_as(weight)
    return changed


def _diversified(weights: dict[str, Tensor], all_copies: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with noise that adds up to zero over the copies of each channel."""
    changed = {}
    for name, copies in all_copies.items():
        weight = weights[name]
        noise = torch.randn(weight.shape).to(weight) * weight.square().mean().sqrt()
        per_group = weight.shape[1]
        for out, members in zip(noise.chunk(len(copies) // per_group), copies.split(per_group), strict=True):
            _, members = members.unique(return_inverse=True)
            sums = torch.zeros_like(out[:, : int(members.max()) + 1]).index_add_(1, members, out)
            sums /= members.bincount().view(-1, *(1,) * (out.ndim - 2))
            out -= sums[:, members]
        changed[name] = weight + noise
    return changed


def _copies(
    model: nn.Module, prediction: Prediction, weights: dict[str, Tensor], input_size: int | tuple[int, ...] | None
) -> dict[str, Tensor]:
    """For each weight, a number for each channel of its layer's input, the same for channels that are always equal."""
    layers = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and f"{name}.weight" in weights
    }
    names: dict[nn.Module, str] = {module: name for name, module in layers.items()}
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        channels = inputs[0].movedim(-1 if isinstance(module, nn.Linear) else 1, 0).flatten(1).double().cpu()
        projection = torch.randn(channels.shape[1], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        projected = channels @ projection
        seen[names[module]].append((projected / (_SAME * projected.abs().max() + 1e-300)).round())

    _run(model, prediction, input_size, [(module, look) for module in names])
    copies = {}
    for name, projections in seen.items():
        codes = torch.cat(projections, dim=1)
        _, number = codes.unique(dim=0, return_inverse=True)
        # A channel that is silent on the probes need not be so on images.
        silent = (codes == 0).all(1)
        number[silent] = len(number) + torch.arange(int(silent.sum()))
        copies[name] = number.to(weights[name].device)
    return copies


def _run(
    model: nn.Module,
    prediction: Prediction,
    input_size: int | tuple[int, ...] | None,
    hooks: list[tuple[nn.Module, Any]],
) -> None:
    """Runs the model with predicted parameters on random images; nothing about it is changed afterwards."""
    parameters = dict(model.named_parameters())
    state = {name: prediction[name].to(parameters[name]) for name in prediction}
    state |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = {module: module.training for module in model.modules()}
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    problem: Exception | None = None
    try:
        for module in model.modules():
            # Statistics of the batch: fresh running ones would let activations grow from layer to layer.
            module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
        for size in input_candidates(model, input_size):
            images = torch.randn(_PROBES, *size, generator=torch.Generator().manual_seed(0))
            try:
                functional_call(model, state, (images.to(next(iter(parameters.values()))),))
                return
            except Exception as error:  # whatever a model raises on a size that is not its own
                problem = error
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    raise PredictionError(
        f"finetune='diversified' must run the model, which failed ({problem}); pass the input_size it expects."
    )


def _he(weight: Tensor) -> float:
    """He's standard deviation for a weight."""
    return math.sqrt(2 / weight[0].numel())
