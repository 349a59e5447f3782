"""What a GHN is told of a task: a sketch of its images, and how that modulates the states of nodes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .message_passing import MLP

_SIDE = 32  # images are looked at in no more detail
_IMAGES = 2000  # that are enough for a sketch
_SMALL = 1e-2  # added before logarithms
_HIDDEN = 64
_CLASSES = 10  # that a sketch counts from
_STATISTICS = 13  # of an image
_SIZE = -2  # its place in a sketch

# First and second derivatives, from the orthonormal cosine basis of three points.
_BASIS = torch.tensor([[3**-0.5] * 3, [2**-0.5, 0.0, -(2**-0.5)], [6**-0.5, -2 * 6**-0.5, 6**-0.5]])
_DERIVATIVES = ((0, 1), (1, 0), (0, 2), (2, 0), (1, 1))

SKETCH = 3 * _STATISTICS + math.comb(_STATISTICS, 2) + 2
"""Numbers of a sketch."""


def sketch(batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Describes a task by some of its labelled images.

    Each image is described by 13 numbers: its mean brightness and colour, and how strongly a fixed bank of filters
    responds, at two scales. A sketch has their mean, spread and correlations over the images, how much of their
    variance lies between classes, the size of the images and the number of classes.

    Args:
        batches: Normalised images [n, channels, height, width], and labels [n]; so many are looked at as are needed for
            2,000 images.

    Returns:
        float32 [`SKETCH`], on the CPU.

    Raises:
        ValueError: If there is no image, or one that is not finite.
    """
    described, labels, seen, side = [], [], 0, 0.0
    for images, of_batch in batches:
        described.append(_statistics(images.float()).cpu())
        labels.append(of_batch.cpu())
        seen, side = seen + len(images), math.sqrt(images.shape[-2] * images.shape[-1])
        if seen >= _IMAGES:
            break
    if not seen:
        raise ValueError("There are no images to sketch a task from; give at least one.")
    x, y = torch.cat(described), torch.cat(labels).unique(return_inverse=True)[1]
    if not x.isfinite().all():
        raise ValueError("There are images with values that are not finite: a task cannot be sketched from them.")
    mean, classes = x.mean(0), int(y.max()) + 1
    x = x - mean
    covariance = x.T @ x / len(x)
    variance = covariance.diagonal()
    counts = y.bincount(minlength=classes)[:, None]
    between = (x.new_zeros(classes, _STATISTICS).index_add_(0, y, x).square() / counts).sum(0) / len(x)
    # Of labels that say nothing, this much is expected.
    share = between / (variance + _SMALL**2) - (classes - 1) / max(len(x) - 1, 1)
    scale = (variance + _SMALL**2).sqrt()
    correlation = covariance / scale[:, None] / scale
    above = torch.triu_indices(_STATISTICS, _STATISTICS, 1)
    counted = torch.tensor([math.log2(side / _SIDE), math.log(classes / _CLASSES)])
    return torch.cat((mean, scale.log(), correlation[above[0], above[1]], share, counted))


def _statistics(images: Tensor) -> Tensor:
    """[n, channels, height, width] to [n, 13]."""
    if max(images.shape[-2:]) > _SIDE:
        images = F.adaptive_avg_pool2d(images, _SIDE)
    bright = images.mean(1, keepdim=True)
    means = [bright.mean((1, 2, 3))]
    if images.shape[1] == 3:
        red, green, blue = images.mean((2, 3)).unbind(1)
        means += [red - green, blue - (red + green) / 2]
    else:
        means += [torch.zeros_like(means[0])] * 2
    basis = _BASIS.to(images.device)
    filters = torch.stack([basis[down].outer(right) for down, right in ((d, basis[r]) for d, r in _DERIVATIVES)])
    scales = (bright, F.avg_pool2d(bright, 2, ceil_mode=True))
    responses = [F.conv2d(F.pad(x, [1] * 4, mode="replicate"), filters[:, None]).abs().mean((2, 3)) for x in scales]
    return torch.cat((torch.stack(means, 1), (torch.cat(responses, 1) + _SMALL).log()), 1)


def check_task(task: object) -> None:
    """Raises ValueError for what `sketch` does not make."""
    if not isinstance(task, Tensor) or task.shape != (SKETCH,):
        found = f"a tensor of shape {tuple(task.shape)}" if isinstance(task, Tensor) else f"a {type(task).__name__}"
        raise ValueError(f"A task is what timm_ghn.sketch makes of images, {SKETCH} numbers, not {found}.")
    if not task.isfinite().all():
        raise ValueError("A task has values that are NaN or infinite; make it by timm_ghn.sketch.")


class TaskModulation(nn.Module):
    """Scales and shifts the states of a network's nodes by what a sketch says (FiLM, arXiv 1709.07871).

    It begins as the identity, and is one for networks without a task.
    """

    def __init__(self, hid: int):
        super().__init__()
        self.mlp = MLP(SKETCH, _HIDDEN, 2 * hid)
        for parameter in self.mlp.fc[-1].parameters():
            nn.init.zeros_(parameter)
        # Where all images of a training have one size, nothing is learnt of it, and another one must change nothing.
        nn.init.zeros_(self.mlp.tensors()[0][:, _SIZE])

    def forward(self, states: Tensor, sizes: Sequence[int], tasks: Sequence[Tensor | None]) -> Tensor:
        """States [N, d] of the nodes of networks that have so many each, and the networks' sketches."""
        told = [torch.zeros(SKETCH) if task is None else task for task in tasks]
        known = states.new_tensor([task is not None for task in tasks])[:, None]
        scales, shifts = (self.mlp(torch.stack(told).to(states)) * known).chunk(2, dim=1)
        networks = torch.tensor(list(itertools.chain(*([i] * size for i, size in enumerate(sizes)))))
        networks = networks.to(states.device)
        modulated: Tensor = states * (1 + scales[networks]) + shifts[networks]
        return modulated
