"""Tiles: the part of which a parameter is made of copies."""

from __future__ import annotations

import itertools

import torch


def tile(source: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Repeats `source` along every dimension until `shape` is covered, and cuts what is over; differentiable.

    Dimensions that `source` lacks at the end count as 1: a constant fits all, a matrix fits a 1x1 convolution.
    """
    source = _with_dims(source, len(shape))
    if source.shape == tuple(shape):
        return source
    repeats = [-(-wanted // have) for wanted, have in zip(shape, source.shape, strict=True)]
    return source.repeat(repeats)[tuple(slice(wanted) for wanted in shape)]


def tile_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """Writes ``tile(source, target.shape)`` into `target`, each element once and without a temporary of its size."""
    source = _with_dims(source, target.ndim)
    segments = []
    for wanted, have in zip(target.shape, source.shape, strict=True):
        whole = wanted // have * have
        segments.append([(0, whole)] * (whole > 0) + [(whole, wanted - whole)] * (wanted > whole))
    for block in itertools.product(*segments):
        view, part = target, source
        for dim in reversed(range(len(block))):
            start, length = block[dim]
            have = min(source.shape[dim], length)
            view = view.narrow(dim, start, length).unflatten(dim, (length // have, have))
            part = part.narrow(dim, 0, have).unsqueeze(dim)
        view.copy_(part)


def _with_dims(source: torch.Tensor, dims: int) -> torch.Tensor:
    return source.view((*source.shape, *(1,) * (dims - source.ndim)))
