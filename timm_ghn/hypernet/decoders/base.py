"""Decoders: from a node's state to the values of its parameter.

Only what a target needs is computed: the kernel positions of its size, and the channels that are not tiled copies. That
is exact, since both linear maps of the decoder treat every output on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from ...plan import Shape4d

if TYPE_CHECKING:
    from ..config import GHNConfig


DECODERS: dict[str, type[Decoder]] = {}


class Decoder(nn.Module):
    """A decoder that makes kernels of up to `max_shape`.

    A subclass in a file of this folder is known by its `name`, the one that a config calls it by.
    """

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        DECODERS[cls.name] = cls

    @classmethod
    def check(cls, config: GHNConfig) -> None:
        """Raises ValueError if it cannot be built by a config."""

    @classmethod
    def implied(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
        """What the shapes of a published checkpoint's tensors say of its fields of the config.

        Returns:
            The fields; None if the tensors are not its own, as always for a decoder without published checkpoints.
        """
        return None

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


def weight_and_bias(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight, as a matrix, and bias of a linear map."""
    layer = cast(nn.Linear, layer)
    return layer.weight.flatten(1), layer.bias
