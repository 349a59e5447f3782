"""Node features: what primitive a node is, and the shape of its parameter."""

from __future__ import annotations

import bisect

import torch
from torch import nn

from ..plan import Shape4d, shape_to_4d
from .config import GHNConfig


def channel_vocabulary(num_classes: int) -> list[int]:
    """Channel counts with an embedding of their own: fine steps for narrow layers, coarse ones for wide."""
    steps = [*range(8, 64, 8), *range(64, 4096, 16), *range(4096, 8193, 32)]
    return sorted({1, 3, num_classes, *steps})


def spatial_vocabulary(max_size: int) -> list[int]:
    """Kernel sizes with an embedding of their own."""
    return sorted({*range(1, max(12, max_size), 2), 14, 16})


class ShapeEncoder(nn.Module):
    """Embeds a 4-d shape as four vectors of d/4, concatenated (arXiv 2110.13100, appendix B)."""

    def __init__(self, config: GHNConfig):
        super().__init__()
        self.channels = channel_vocabulary(config.num_classes)
        self.spatial = spatial_vocabulary(config.max_shape[3])
        # One row more than the vocabulary, at the end, for "no shape".
        self.embed_spatial = nn.Embedding(len(self.spatial) + 1, config.hid // 4)
        self.embed_channel = nn.Embedding(len(self.channels) + 1, config.hid // 4)

    def rows(self, shape: tuple[int, ...] | None) -> Shape4d:
        """Embedding rows of a shape's four entries."""
        if shape is None:
            return len(self.channels), len(self.channels), len(self.spatial), len(self.spatial)
        out, into, height, width = shape_to_4d(shape)
        return (
            _nearest(self.channels, 8 if 4 <= out < 8 else out),
            _nearest(self.channels, 8 if 4 <= into < 8 else into),
            _nearest(self.spatial, 3 if height == 2 else height),
            _nearest(self.spatial, 3 if width == 2 else width),
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """int64 [N, 4] rows to [N, d] codes."""
        channels, spatial = self.embed_channel(rows[:, :2]), self.embed_spatial(rows[:, 2:])
        return torch.cat((channels.flatten(1), spatial.flatten(1)), dim=1)


def _nearest(vocabulary: list[int], value: int) -> int:
    """Index of the nearest entry, the smaller one on a tie."""
    above = bisect.bisect_left(vocabulary, value)
    if above == len(vocabulary):
        return above - 1
    if above and value - vocabulary[above - 1] <= vocabulary[above] - value:
        return above - 1
    return above
