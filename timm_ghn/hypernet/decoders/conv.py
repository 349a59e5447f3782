"""The decoder of GHN-1, GHN-2 and GHN-3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ...plan import Shape4d
from .base import Decoder, weight_and_bias
from .sliced_linear import sliced_linear

if TYPE_CHECKING:
    from ..config import GHNConfig


class ConvDecoder(Decoder):
    """A vector per position of the largest kernel, then two 1x1 convolutions (arXiv 2110.13100, fig. 2)."""

    name = "conv"

    @classmethod
    def implied(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
        if "decoder.conv.2.weight" not in shapes:
            return None
        out = shapes["decoder.class_layer_predictor.1.weight"][1]
        into = shapes["decoder.conv.2.weight"][0] // out
        features, hid = shapes["decoder.fc.0.weight"]
        side = math.isqrt(features // (4 * hid))
        return {"max_shape": (out, into, side, side)}

    def __init__(self, config: GHNConfig):
        super().__init__(config)
        # GHN-2 reads kernels from the top-left corner of the largest one, GHN-3 from its centre.
        self.centred = config.centred
        hid, (out, into, height, width) = config.hid, config.max_shape
        self.fc = nn.Sequential(nn.Linear(hid, 4 * hid * height * width), nn.ReLU())
        self.conv = nn.Sequential(
            _pointwise(4 * hid, 8 * hid, self.centred), nn.ReLU(), _pointwise(8 * hid, out * into, self.centred)
        )
        if config.predicts_head:
            self.class_layer_predictor = nn.Sequential(nn.ReLU(), _pointwise(out, config.num_classes, self.centred))

    def _window(self, size: int, limit: int) -> slice:
        start = max(0, limit // 2 - size // 2) if self.centred else 0
        return slice(start, start + min(size, limit))

    def output_layers(self) -> list[nn.Module]:
        return [self.conv[-1], *([self.class_layer_predictor[-1]] if hasattr(self, "class_layer_predictor") else [])]

    def forward(self, states: Sequence[torch.Tensor], shapes: Sequence[Shape4d]) -> list[torch.Tensor]:
        """States, an [n, d] for each of the shapes, to kernels [n, out, in, h, w] of their `decoded_shape`."""
        max_out, max_in, max_height, max_width = self.max_shape
        decoded = [self.decoded_shape(shape) for shape in shapes]
        windows = [
            (slice(None), self._window(shape[2], max_height), self._window(shape[3], max_width)) for shape in shapes
        ]
        weight, bias = weight_and_bias(self.fc[0])
        channels = len(bias) // (max_height * max_width)
        weight, bias = (tensor.view(channels, max_height, max_width, *tensor.shape[1:]) for tensor in (weight, bias))
        positions = sliced_linear(states, weight, bias, windows)
        rows = [F.relu(x).view(len(x), channels, -1).transpose(1, 2).flatten(0, 1) for x in positions]
        x = F.relu(F.linear(torch.cat(rows), *weight_and_bias(self.conv[0])))

        weight, bias = weight_and_bias(self.conv[2])
        corners = [(slice(out), slice(into)) for out, into, *_ in decoded]
        kernels = sliced_linear(
            x.split([len(row) for row in rows]), weight.view(max_out, max_in, -1), bias.view(max_out, max_in), corners
        )
        return [
            kernel.view(-1, height, width, out, into).permute(0, 3, 4, 1, 2)
            for kernel, (out, into, height, width) in zip(kernels, decoded, strict=True)
        ]

    def class_weight(self, x: torch.Tensor, in_features: int) -> torch.Tensor:
        """States [n, d] to class weights [n, num_classes, in]: a linear map over the out channels of a 1x1 kernel."""
        (kernel,) = self([x], [(self.max_shape[0], in_features, 1, 1)])
        kernel = kernel[..., 0, 0]
        return F.linear(F.relu(kernel).transpose(1, 2), *weight_and_bias(self.class_layer_predictor[1])).transpose(1, 2)


def _pointwise(features: int, out: int, linear: bool) -> nn.Linear | nn.Conv2d:
    """A map over channels, stored as published checkpoints do: GHN-3's are matrices, earlier ones 1x1 kernels."""
    return nn.Linear(features, out) if linear else nn.Conv2d(features, out, 1)
