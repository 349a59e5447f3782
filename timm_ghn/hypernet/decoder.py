"""Decoders: from a node's state to the values of its parameter.

Only what a target needs is computed: the kernel positions of its size, and the channels that are not tiled copies. That
is exact, since both linear maps of the decoder treat every output on its own.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from .config import GHNConfig
from .encoder import Shape4d
from .message_passing import MLP


class Decoder(nn.Module):
    """A decoder that makes kernels of up to `max_shape`."""

    def __init__(self, config: GHNConfig):
        super().__init__()
        self.max_shape = config.max_shape

    def decoded_shape(self, shape: Shape4d) -> Shape4d:
        """What is decoded for a parameter of this shape: the whole, or a part of which the whole is made."""
        out, into, height, width = (min(size, limit) for size, limit in zip(shape, self.max_shape, strict=True))
        return out, into, height, width

    def output_layers(self) -> list[nn.Module]:
        """Its last layers, which GHN-3's program makes small before it trains."""
        return []

    def class_weight(self, x: torch.Tensor, in_features: int) -> torch.Tensor:
        """States [n, d] to class weights [n, num_classes, in]."""
        raise NotImplementedError


class ConvDecoder(Decoder):
    """A vector per position of the largest kernel, then two 1x1 convolutions (arXiv 2110.13100, fig. 2)."""

    def __init__(self, config: GHNConfig):
        super().__init__(config)
        # GHN-2 reads kernels from the top-left corner of the largest one, GHN-3 from its centre.
        self.centred = config.hypernet == "graphormer"
        hid, (out, into, height, width) = config.hid, config.max_shape
        self.fc = nn.Sequential(nn.Linear(hid, 4 * hid * height * width), nn.ReLU())
        self.conv = nn.Sequential(
            _pointwise(4 * hid, 8 * hid, self.centred), nn.ReLU(), _pointwise(8 * hid, out * into, self.centred)
        )
        self.class_layer_predictor = nn.Sequential(nn.ReLU(), _pointwise(out, config.num_classes, self.centred))

    def output_layers(self) -> list[nn.Module]:
        return [self.conv[-1], self.class_layer_predictor[-1]]

    def _window(self, size: int, limit: int) -> slice:
        start = max(0, limit // 2 - size // 2) if self.centred else 0
        return slice(start, start + min(size, limit))

    def forward(self, x: torch.Tensor, shape: Shape4d) -> torch.Tensor:
        """States [n, d] to kernels [n, out, in, h, w] of `decoded_shape`."""
        max_out, max_in, max_height, max_width = self.max_shape
        out, into, *_ = self.decoded_shape(shape)
        rows, columns = self._window(shape[2], max_height), self._window(shape[3], max_width)
        weight, bias = _tensors(self.fc[0])
        channels = len(bias) // (max_height * max_width)
        weight = weight.view(channels, max_height, max_width, -1)[:, rows, columns]
        bias = bias.view(channels, max_height, max_width)[:, rows, columns]
        size = weight.shape[1:3]
        x = F.relu(F.linear(x, weight.flatten(0, 2), bias.flatten()))
        x = x.view(-1, channels, *size).permute(0, 2, 3, 1)
        x = F.relu(F.linear(x, *_tensors(self.conv[0])))

        weight, bias = _tensors(self.conv[2])
        weight, bias = weight.view(max_out, max_in, -1)[:out, :into], bias.view(max_out, max_in)[:out, :into]
        x = F.linear(x, weight.flatten(0, 1), bias.flatten())
        return x.view(-1, *size, out, into).permute(0, 3, 4, 1, 2)

    def class_weight(self, x: torch.Tensor, in_features: int) -> torch.Tensor:
        """States [n, d] to class weights [n, num_classes, in]: a linear map over the out channels of a 1x1 kernel."""
        kernel = self(x, (self.max_shape[0], in_features, 1, 1))[..., 0, 0]
        return F.linear(F.relu(kernel).transpose(1, 2), *_tensors(self.class_layer_predictor[1])).transpose(1, 2)


class MLPDecoder(Decoder):
    """The MLP decoder of GHN-1's ablation: all values of the largest kernel at once."""

    def __init__(self, config: GHNConfig):
        super().__init__(config)
        out, into, height, width = config.max_shape
        self.mlp = MLP(config.hid, 2 * config.hid, out * into * height * width)
        self.class_layer_predictor = nn.Sequential(nn.ReLU(), nn.Linear(2 * config.hid, config.num_classes * out))

    def output_layers(self) -> list[nn.Module]:
        return [self.mlp.fc[-1], self.class_layer_predictor[-1]]

    def forward(self, x: torch.Tensor, shape: Shape4d) -> torch.Tensor:
        """States [n, d] to kernels [n, out, in, h, w] of `decoded_shape`."""
        out, into, height, width = self.decoded_shape(shape)
        weight, bias = _tensors(self.mlp.fc[2])
        weight = weight.view(*self.max_shape, -1)[:out, :into, :height, :width]
        bias = bias.view(self.max_shape)[:out, :into, :height, :width]
        hidden = F.relu(self.mlp.fc[0](x))
        return F.linear(hidden, weight.flatten(0, 3), bias.flatten()).view(-1, out, into, height, width)

    def class_weight(self, x: torch.Tensor, in_features: int) -> torch.Tensor:
        """States [n, d] to class weights [n, num_classes, in]."""
        weights = self.class_layer_predictor(self.mlp.fc[0](x))
        return weights.view(len(x), -1, self.max_shape[1])[..., :in_features]


class LowRankDecoder(Decoder):
    """LoGAH's decoder: any width without tiled copies, as the product of two thin matrices (arXiv 2405.16287, §3).

    A kernel of [out, in, h, w] is a matrix [out·h, in·w] = A Bᵀ of rank r. A node decodes to 2r vectors, and one linear
    map stretches each of them to the width of the widest matrix.
    """

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

    def forward(self, x: torch.Tensor, shape: Shape4d) -> torch.Tensor:
        """States [n, d] to kernels [n, out, in, h, w] of `decoded_shape`."""
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
        return self.l2(vectors[:, :needed]).flatten(1)[:, : rows * self.rank].view(-1, rows, self.rank)

    def class_weight(self, x: torch.Tensor, in_features: int) -> torch.Tensor:
        """States [n, d] to class weights [n, num_classes, in]."""
        return self(x, (self.num_classes, in_features, 1, 1))[..., 0, 0]


DECODERS: dict[str, type[Decoder]] = {"conv": ConvDecoder, "mlp": MLPDecoder, "lowrank": LowRankDecoder}


def _tensors(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight, as a matrix, and bias of a linear map."""
    layer = cast(nn.Linear, layer)
    return layer.weight.flatten(1), layer.bias


def _pointwise(features: int, out: int, linear: bool) -> nn.Linear | nn.Conv2d:
    """A map over channels, stored as published checkpoints do: GHN-3's are matrices, earlier ones 1x1 kernels."""
    return nn.Linear(features, out) if linear else nn.Conv2d(features, out, 1)
