"""Predicted weights prepared for training.

Predicted weights work at once, but only few directions of a layer's input get through them, and gradients come back
through the same few: singular values fall off fast, and where a layer is wider than the largest kernel a GHN makes, its
channels are copies of one another (arXiv 2207.10049 calls it a lack of diversity). Two preparations keep the singular
vectors, which hold what the GHN knows, and change the singular values. The third is for networks in which activations
grow without bounds, because nothing normalises them: it changes the scale of weights only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from . import derived
from .graph import ComputationGraph
from .graph.primitives import NORMS, WEIGHTS
from .plan import Role, roles
from .prediction import Prediction

_FLOOR = 0.3  # of a matrix's root mean square singular value


def check_preparation(name: str | None) -> None:
    """Raises ValueError for a preparation that there is not."""
    if name is not None and name not in PREPARATIONS:
        raise ValueError(f"finetune is {name!r}; it must be None or one of {', '.join(PREPARATIONS)}.")


def prepare(model: nn.Module, prediction: Prediction, name: str | None, bounded: bool = False) -> Prediction:
    """A prediction that is a better point to start training from, for all layers but the classification layer.

    With W = U S Vᵀ the weight of a layer (of a group, where it has several) as a matrix [out, in · kernel], and s the
    root mean square of its singular values:

    ``"conditioned"``: W becomes U √(S² + (0.3 s)²) Vᵀ at the norm that was predicted. The strong directions, and with
    them most of the function, stay as they are; the others are lifted to where gradients can use them.

    ``"orthogonal"``: W becomes U Vᵀ at He's scale, its nearest matrix with orthogonal rows (or columns). The function
    is lost, what the directions know is not.

    ``"bounded"``: Networks with norms stay as they are, but for residual branches of nothing but weights, such as
    convolutional position encodings: each of n is divided by n, since every one multiplies what it is added to. In a
    network without any norm, a layer that reads n copies of its input channels, which add up, is divided by √n, and a
    bias by all that is before it; with rectifiers and no branches, only the scale of the output is another.

    Args:
        model: What the prediction is for; only read.
        prediction: What was predicted for it.
        name: One of `PREPARATIONS`, or None. Directions that copies leave open are drawn from torch's generator of the
            CPU.
        bounded: ``"bounded"`` whatever the name is, as for a GHN that is `GHNConfig.bounded`: what is bounded is then
            conditioned, which keeps scales; what is orthogonal, at scales of its own and without copies, is bounded.

    Returns:
        The prediction with what is prepared: weights with other singular values in full instead of tiles.
    """
    changed = False
    for step, change in PREPARATIONS.items():
        if (step == name or (bounded and step == "bounded")) and (tensors := change(model, prediction)):
            prediction, changed = prediction.replaced(tensors), True
    return prediction.replaced(*derived.solve(model, prediction)) if changed else prediction


# ---- singular values ------------------------------------------------------------------------------------------------


def _reshaped(
    model: nn.Module,
    prediction: Prediction,
    singular_values: Callable[[Tensor], Tensor],
    scale: Callable[[Tensor], float],
) -> dict[str, Tensor]:
    """Weights with other singular values.

    Args:
        model: What the prediction is for.
        prediction: What was predicted for it.
        singular_values: The new singular values [g, k] for those that were predicted.
        scale: The root mean square of the new weight, for the weight that was predicted.
    """
    groups = {
        f"{prefix}.{name}".removeprefix("."): module.groups
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd)
        for name, _ in module.named_parameters()
    }
    changed = {}
    for parameter, role in roles(prediction.graph).items():
        if role is Role.WEIGHT and parameter in prediction:
            weight = prediction[parameter]
            matrices = weight.reshape(groups.get(parameter, 1), -1, weight[0].numel())
            shaped = _with_singular_values(matrices, singular_values)
            shaped *= scale(weight) / _rms(shaped)
            changed[parameter] = shaped.to(weight).contiguous().view_as(weight)
    return changed


def _lifted(singular: Tensor) -> Tensor:
    return (singular**2 + _FLOOR**2 * singular.square().mean(-1, keepdim=True)).sqrt()


def _with_singular_values(matrices: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Matrices [g, m, n] with the same singular vectors and other singular values [g, min(m, n)], in float64."""
    # Noise far below what was predicted decides about directions that copies leave open, and about nothing else.
    noise = torch.randn(matrices.shape).to(matrices) * 3e-3 * matrices.square().mean().sqrt()
    tall = (matrices + noise).double()
    if wide := tall.shape[1] < tall.shape[2]:
        tall = tall.mT
    # Where copies were, singular values are 1e-7 of the largest, and a Gram matrix would square them away. The triangle
    # of a QR decomposition keeps every digit, and its SVD takes less time than the matrix's own.
    q, r = torch.linalg.qr(tall)
    u, singular, v = torch.linalg.svd(r)
    changed: Tensor = q @ ((u * change(singular).unsqueeze(-2)) @ v)
    return changed.mT if wide else changed


def _rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def _he(weight: Tensor) -> float:
    """He's standard deviation for a weight."""
    return math.sqrt(2 / weight[0].numel())


# ---- scales ---------------------------------------------------------------------------------------------------------


def _bounded(model: nn.Module, prediction: Prediction) -> dict[str, Tensor]:
    """Weights, biases and gains of layers that nothing normalises, with other scales."""
    graph, tiles = prediction.graph, prediction.tiles
    factors: dict[str, float] = defaultdict(lambda: 1.0)
    branches = branches_without_norm(graph)
    for branch in branches:
        for name in branch:
            factors[name] /= len(branches)
    gains: dict[str, Tensor] = {}
    if NORMS.isdisjoint(graph.ops):
        sources = graph.sources
        so_far = [1.0] * len(graph)
        for node, (op, name) in enumerate(zip(graph.ops, graph.names, strict=True)):
            so_far[node] = max((so_far[source] for source in sources[node]), default=1.0)
            if op == "bias":
                factors[name] *= so_far[node]
            elif op in WEIGHTS and name in tiles and tiles[name].ndim > 1:
                factor = math.sqrt(tiles[name].shape[1] / prediction.shapes[name][1])
                so_far[node] *= factor
                module = model.get_submodule(name.rpartition(".")[0])
                gain = getattr(module, "gain", None)
                if isinstance(gain, nn.Parameter) and gain.numel() == prediction.shapes[name][0]:
                    # The weight is standardised before it is used, so that its own scale counts for nothing.
                    # timm starts it at 1, so that this is the same however often, or at 0 to switch a branch off.
                    if derived.has_values(gain) and gain.any():
                        gains[f"{name.rpartition('.')[0]}.gain"] = torch.full_like(gain, factor)
                else:
                    factors[name] *= factor
    return {**gains, **{name: tiles[name] * factor for name, factor in factors.items() if name in tiles}}


def branches_without_norm(graph: ComputationGraph) -> list[list[str]]:
    """Residual branches of nothing but weights and biases, by the names of the last weight and of biases behind it.

    Nothing normalises what they read, or what they are added to, before it is read by the next of them.
    """
    sources, found = graph.sources, []
    for node, op in enumerate(graph.ops):
        for end in sources[node] if op == "sum" else ():
            names: list[str] = []
            last: list[str] = []
            while len(sources[end]) == 1 and graph.ops[end] in (*WEIGHTS, "bias"):
                names.append(graph.names[end])
                if graph.ops[end] in WEIGHTS:
                    last = last or names.copy()
                (end,) = sources[end]
            if last and end in sources[node]:
                found.append(last)
    return found


PREPARATIONS: dict[str, Callable[[nn.Module, Prediction], dict[str, Tensor]]] = {
    "orthogonal": partial(_reshaped, singular_values=torch.ones_like, scale=_he),
    "bounded": _bounded,
    "conditioned": partial(_reshaped, singular_values=_lifted, scale=_rms),
}
"""What `prepare` puts in place of what was predicted, by name, in the order in which it does; all else stays."""
