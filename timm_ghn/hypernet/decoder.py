"""Decoders: from a node's state to the values of its parameter.

Only what a target needs is computed: the kernel positions of its size, and the channels that are not tiled copies. That
is exact, since both linear maps of the decoder treat every output on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
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

    def forward(self, states: Sequence[torch.Tensor], shapes: Sequence[Shape4d]) -> list[torch.Tensor]:
        """States, an [n, d] for each of the shapes, to kernels [n, out, in, h, w] of their `decoded_shape`."""
        raise NotImplementedError

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

    def forward(self, states: Sequence[torch.Tensor], shapes: Sequence[Shape4d]) -> list[torch.Tensor]:
        """States, an [n, d] for each of the shapes, to kernels [n, out, in, h, w] of their `decoded_shape`."""
        max_out, max_in, max_height, max_width = self.max_shape
        decoded = [self.decoded_shape(shape) for shape in shapes]
        windows = [
            (slice(None), self._window(shape[2], max_height), self._window(shape[3], max_width)) for shape in shapes
        ]
        weight, bias = _tensors(self.fc[0])
        channels = len(bias) // (max_height * max_width)
        weight, bias = (tensor.view(channels, max_height, max_width, *tensor.shape[1:]) for tensor in (weight, bias))
        positions = sliced_linear(states, weight, bias, windows)
        rows = [F.relu(x).view(len(x), channels, -1).transpose(1, 2).flatten(0, 1) for x in positions]
        x = F.relu(F.linear(torch.cat(rows), *_tensors(self.conv[0])))

        weight, bias = _tensors(self.conv[2])
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

    def forward(self, states: Sequence[torch.Tensor], shapes: Sequence[Shape4d]) -> list[torch.Tensor]:
        """States, an [n, d] for each of the shapes, to kernels [n, out, in, h, w] of their `decoded_shape`."""
        decoded = [self.decoded_shape(shape) for shape in shapes]
        hidden = F.relu(self.mlp.fc[0](torch.cat(list(states)))).split([len(x) for x in states])
        weight, bias = _tensors(self.mlp.fc[2])
        corners = [tuple(slice(size) for size in shape) for shape in decoded]
        kernels = sliced_linear(hidden, weight.view(*self.max_shape, -1), bias.view(self.max_shape), corners)
        return [kernel.view(-1, *shape) for kernel, shape in zip(kernels, decoded, strict=True)]

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
        return self.l2(vectors[:, :needed]).flatten(1)[:, : rows * self.rank].view(-1, rows, self.rank)

    def class_weight(self, x: torch.Tensor, in_features: int) -> torch.Tensor:
        """States [n, d] to class weights [n, num_classes, in]."""
        return self._kernels(x, (self.num_classes, in_features, 1, 1))[..., 0, 0]


DECODERS: dict[str, type[Decoder]] = {"conv": ConvDecoder, "mlp": MLPDecoder, "lowrank": LowRankDecoder}


def sliced_linear_reference(
    xs: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, slices: Sequence[tuple[slice, ...]]
) -> list[torch.Tensor]:
    """What `sliced_linear` computes, plainly: for each input, the linear map made of a slice of the weight."""
    return [F.linear(x, weight[part].flatten(0, -2), bias[part].flatten()) for x, part in zip(xs, slices, strict=True)]


def sliced_linear(
    xs: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, slices: Sequence[tuple[slice, ...]]
) -> list[torch.Tensor]:
    """Linear maps by slices of one weight.

    Autograd gives every slice a gradient of the whole weight's size, zeros around it, and adds these up: with dozens of
    kernel shapes, more work than the maps themselves. Here all slices add into one gradient.

    Args:
        xs: An [n, k] for each slice.
        weight: [*sizes, k].
        bias: [*sizes].
        slices: For each input, which outputs to compute: a slice of each of `sizes`.

    Returns:
        For each input, [n, outputs], the slice's outputs flattened. They can be differentiated once.
    """
    return list(_SlicedLinear.apply(weight, bias, slices, *xs))


class _SlicedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, bias: torch.Tensor, slices: Sequence[tuple[slice, ...]], *xs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(weight, *xs)
        ctx.slices = slices
        return tuple(sliced_linear_reference(xs, weight, bias, slices))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *xs = ctx.saved_tensors
        of_weight, of_bias = torch.zeros_like(weight), weight.new_zeros(weight.shape[:-1])
        of_xs = []
        for x, gradient, part in zip(xs, gradients, ctx.slices, strict=True):
            of_xs.append(gradient @ weight[part].flatten(0, -2))
            target = of_weight[part]
            if target.is_contiguous():
                target.view(-1, target.shape[-1]).addmm_(gradient.t(), x)
            else:
                target += (gradient.t() @ x).view_as(target)
            of_bias[part] += gradient.sum(0).view_as(of_bias[part])
        return of_weight, of_bias, None, *of_xs


def _tensors(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight, as a matrix, and bias of a linear map."""
    layer = cast(nn.Linear, layer)
    return layer.weight.flatten(1), layer.bias


def _pointwise(features: int, out: int, linear: bool) -> nn.Linear | nn.Conv2d:
    """A map over channels, stored as published checkpoints do: GHN-3's are matrices, earlier ones 1x1 kernels."""
    return nn.Linear(features, out) if linear else nn.Conv2d(features, out, 1)
