"""The decoder of GHN-1's ablation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ...plan import Shape4d
from ..message_passing import MLP
from .base import Decoder, weight_and_bias
from .sliced_linear import sliced_linear

if TYPE_CHECKING:
    from ..config import GHNConfig


class MLPDecoder(Decoder):
    """The MLP decoder of GHN-1's ablation: all values of the largest kernel at once."""

    name = "mlp"

    @classmethod
    def implied(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
        if "decoder.mlp.fc.2.weight" not in shapes:
            return None
        # Its tensors show the number of elements only; every published one is square.
        widest = shapes["bias_class.1.weight"][1]
        side = math.isqrt(shapes["decoder.mlp.fc.2.weight"][0] // widest**2)
        return {"max_shape": (widest, widest, side, side)}

    def __init__(self, config: GHNConfig):
        super().__init__(config)
        out, into, height, width = config.max_shape
        self.mlp = MLP(config.hid, 2 * config.hid, out * into * height * width)
        if config.predicts_head:
            self.class_layer_predictor = nn.Sequential(nn.ReLU(), nn.Linear(2 * config.hid, config.num_classes * into))

    def output_layers(self) -> list[nn.Module]:
        return [self.mlp.fc[-1], *([self.class_layer_predictor[-1]] if hasattr(self, "class_layer_predictor") else [])]

    def forward(self, states: Sequence[torch.Tensor], shapes: Sequence[Shape4d]) -> list[torch.Tensor]:
        """States, an [n, d] for each of the shapes, to kernels [n, out, in, h, w] of their `decoded_shape`."""
        decoded = [self.decoded_shape(shape) for shape in shapes]
        hidden = F.relu(self.mlp.fc[0](torch.cat(list(states)))).split([len(x) for x in states])
        weight, bias = weight_and_bias(self.mlp.fc[2])
        corners = [tuple(slice(size) for size in shape) for shape in decoded]
        kernels = sliced_linear(hidden, weight.view(*self.max_shape, -1), bias.view(self.max_shape), corners)
        return [kernel.view(-1, *shape) for kernel, shape in zip(kernels, decoded, strict=True)]

    def class_weight(self, x: torch.Tensor, in_features: int) -> torch.Tensor:
        """States [n, d] to class weights [n, num_classes, in]."""
        weights: torch.Tensor = self.class_layer_predictor(self.mlp.fc[0](x))
        return weights.view(len(x), -1, self.max_shape[1])[..., :in_features]
