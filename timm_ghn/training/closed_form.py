"""Ridge regression as a part of a loss: a classifier that some features determine, judged by others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_RIDGES = torch.logspace(-2, 2, 13)  # relative to the mean squared norm of centred features
_SHARPNESS = torch.logspace(0, 2, 9)


def ridge_logits(features: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """Logits by the classifier that minimises Σ ‖y − Wx − b‖² + λ‖W‖² for the indicators y of the labels.

    It is solved in its dual form, one small linear system, which is differentiable in all features (arXiv 1805.08136).
    λ is the one that is best when each image is left out in turn, and the logits are scaled so that the softmax of
    those left out fits their labels best: what `timm_ghn.adapt` does; neither choice is differentiated.

    Args:
        features: float32 [n, d], to fit the classifier to.
        labels: int64 [n].
        asked: float32 [m, d].

    Returns:
        [m, classes].
    """
    count = len(features)
    wanted = F.one_hot(labels).to(features.dtype)
    priors = wanted.mean(0)
    wanted = wanted - priors
    mean = features.mean(0)
    rows, asked = features - mean, asked - mean
    scale = rows.square().sum() / count + torch.finfo(rows.dtype).tiny
    products = rows @ rows.T / scale
    with torch.no_grad():
        ridge, sharpness = _chosen(products, wanted, priors, labels)
    eye = torch.eye(count, dtype=rows.dtype, device=rows.device)
    weights = torch.linalg.solve(products + ridge * eye, wanted)
    logits: Tensor = sharpness * (asked @ rows.T / scale @ weights + priors)
    return logits


def _chosen(products: Tensor, wanted: Tensor, priors: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The ridge by the squared error of what is left out, and the sharpness by its cross-entropy."""
    # It would raise for what is not finite; that network is left out by its gradient.
    values, vectors = torch.linalg.eigh(products.nan_to_num(0.0, 0.0, 0.0))
    ridges = _RIDGES.to(products)[:, None]
    shrunk = values.clamp(min=0) / (values.clamp(min=0) + ridges)  # [ridges, n]
    fitted = torch.einsum("in,rn,nc->ric", vectors, shrunk, vectors.T @ wanted)
    leverage = torch.einsum("in,rn->ri", vectors.square(), shrunk) + 1 / len(products)
    left_out = wanted - (wanted - fitted) / (1 - leverage).clamp(min=1e-3)[..., None]
    best = (left_out - wanted).square().sum((1, 2)).argmin()
    logits = left_out[best] + priors
    sharpness = _SHARPNESS.to(products)
    losses = torch.stack([F.cross_entropy(logits * each, labels) for each in sharpness])
    return ridges[best, 0], sharpness[losses.argmin()]
