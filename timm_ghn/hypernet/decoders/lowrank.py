"""LoGAH's decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from ...plan import Shape4d
from .base import Decoder

if TYPE_CHECKING:
    from ..config import GHNConfig


class LowRankDecoder(Decoder):
    """LoGAH's decoder: any width without tiled copies, as the product of two thin matrices (arXiv 2405.16287, §3).

    A kernel of [out, in, h, w] is a matrix [out·h, in·w] = A Bᵀ of rank r. A node decodes to 2r vectors, and one linear
    map stretches each of them to the width of the widest matrix. So `max_shape` starts with the largest channels times
    kernel size, or classes, of any layer.
    """

    name = "lowrank"

    @classmethod
    def check(cls, config: GHNConfig) -> None:
        """Raises ValueError if it cannot be built by a config."""
        if config.num_classes > config.max_channels:
            raise ValueError(
                f"GHN config: with decoder=lowrank, max_shape={config.max_shape} must be as wide as the widest layer, "
                f"of which num_classes={config.num_classes} is one."
            )

    def __init__(self, config: GHNConfig):
        super().__init__(config)
        self.rank, self.width, self.num_classes = config.rank, config.max_channels, config.num_classes
        hid = config.hid
        layers = [nn.Linear(hid, 4 * hid), nn.ReLU(), nn.Linear(4 * hid, 8 * hid), nn.ReLU()]
        self.mlp = nn.ModuleDict({"fc": nn.Sequential(*layers, nn.Linear(8 * hid, 2 * self.rank**2))})
        self.l2 = nn.Linear(self.rank, self.width)

    def decoded_shape(self, shape: Shape4d) -> Shape4d:
        """What is decoded for a parameter of this shape: out·h and in·w are limited, not out and in."""
        height, width = min(shape[2], self.max_shape[2]), min(shape[3], self.max_shape[3])
        return min(shape[0], self.width // height), min(shape[1], self.width // width), height, width

    def forward(self, states: Sequence[torch.Tensor], shapes: Sequence[Shape4d]) -> list[torch.Tensor]:
        """States, an [n, d] for each of the shapes, to kernels [n, out, in, h, w] of their `decoded_shape`."""
        return [self._kernels(x, shape) for x, shape in zip(states, shapes, strict=True)]

    def _kernels(self, x: torch.Tensor, shape: Shape4d) -> torch.Tensor:
        out, into, height, width = self.decoded_shape(shape)
        a, b = F.relu(self.mlp["fc"](x)).view(-1, 2, self.rank, self.rank).unbind(1)
        kernels = self._factor(a, out * height) @ self._factor(b, into * width).transpose(1, 2)
        return kernels.view(-1, out, height, into, width).transpose(2, 3)

    def _factor(self, vectors: torch.Tensor, rows: int) -> torch.Tensor:
        """Vectors [n, r, r] to the first `rows` rows of a factor [n, width, r].

        As published, the stretched vectors are read row by row as if they were the factor. Transposed instead, they
        would give all parameters of all networks one column space, that of the shared map.
        """
        needed = -(-rows * self.rank // self.width)
        stretched: torch.Tensor = self.l2(vectors[:, :needed])
        return stretched.flatten(1)[:, : rows * self.rank].view(-1, rows, self.rank)

    def class_weight(self, x: torch.Tensor, in_features: int) -> torch.Tensor:
        """States [n, d] to class weights [n, num_classes, in]."""
        return self._kernels(x, (self.num_classes, in_features, 1, 1))[..., 0, 0]
