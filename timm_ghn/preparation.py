"""Predicted weights prepared for training.

Predicted weights work at once, but only few directions of a layer's input get through them, and gradients come back
through the same few: singular values fall off fast, and where a layer is wider than the largest kernel a GHN makes, its
channels are copies of one another (arXiv 2207.10049 calls it a lack of diversity). Both preparations keep the singular
vectors, which hold what the GHN knows, and change the singular values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import derived
from .plan import Role, roles
from .prediction import Prediction

_FLOOR = 0.3  # of a matrix's root mean square singular value


def check_preparation(name: str | None) -> None:
    """Raises ValueError for a preparation that there is not."""
    if name is not None and name not in PREPARATIONS:
        raise ValueError(f"finetune is {name!r}; it must be None or one of {', '.join(PREPARATIONS)}.")


def prepare(model: nn.Module, prediction: Prediction, name: str) -> Prediction:
    """A prediction that is a better point to start training from, for all layers but the classification layer.

    With W = U S Vᵀ the weight of a layer (of a group, where it has several) as a matrix [out, in · kernel], and s the
    root mean square of its singular values:

    ``"conditioned"``: W becomes U √(S² + (0.3 s)²) Vᵀ at the norm that was predicted. The strong directions, and with
    them most of the function, stay as they are; the others are lifted to where gradients can use them.

    ``"orthogonal"``: W becomes U Vᵀ at He's scale, its nearest matrix with orthogonal rows (or columns). The function
    is lost, what the directions know is not.

    Args:
        model: What the prediction is for; only read.
        prediction: What was predicted for it.
        name: One of `PREPARATIONS`. Directions that copies leave open are drawn from torch's generator of the CPU.

    Returns:
        The prediction with the prepared weights in full instead of tiles.
    """
    groups = {
        f"{prefix}.{name}".removeprefix("."): module.groups
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd)
        for name, _ in module.named_parameters()
    }
    changed, preparation = {}, PREPARATIONS[name]
    for parameter, role in roles(prediction.graph).items():
        if role is Role.WEIGHT and parameter in prediction:
            weight = prediction[parameter]
            matrices = weight.reshape(groups.get(parameter, 1), -1, weight[0].numel())
            shaped = _with_singular_values(matrices, preparation.singular_values)
            shaped *= preparation.scale(weight) / _rms(shaped)
            changed[parameter] = shaped.to(weight).contiguous().view_as(weight)
    prediction = prediction.replaced(changed)
    return prediction.replaced(*derived.solve(model, prediction))


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


class Preparation(NamedTuple):
    """What becomes of a layer's weight.

    Attributes:
        singular_values: The new singular values [g, k] for those that were predicted.
        scale: The root mean square of the new weight, for the weight that was predicted.
    """

    singular_values: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor], float]


PREPARATIONS = {
    "conditioned": Preparation(_lifted, _rms),
    "orthogonal": Preparation(torch.ones_like, _he),
}
