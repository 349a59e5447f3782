"""What a GHN is, as data: everything needed to build its module and to check a checkpoint against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class GHNConfig:
    """Configuration of a graph hypernetwork; field names are those of the published checkpoints.

    Attributes:
        num_classes: Classes of the data set the GHN was trained on.
        max_shape: (out, in, height, width) of the largest kernel the decoder makes; larger ones are tiled.
        hid: Width d of a node's state.
        hypernet: Message passing: ``gatedgnn`` (GHN-1, GHN-2), ``graphormer`` (GHN-3) or ``mlp`` (no messages).
        decoder: ``conv`` (GHN-1 to GHN-3) or ``mlp`` (the MLP baseline of arXiv 2110.13100).
        weight_norm: Fan-in normalisation of predicted parameters (arXiv 2110.13100, §3.2.3).
        ve: Virtual edges (ibid., eq. 4).
        layernorm: A layer norm before the decoders.
        heads: Attention heads of a Graphormer layer.
        layers: Graphormer layers.
        branch_scale: Value of residual-branch scales (layer scale, skip-init gain) that the GHN was trained with. Inits
            such as 1e-6 switch branches off until training switches them on, and with them what was predicted for the
            branch. None, as in the published checkpoints, leaves them as they are.
    """

    num_classes: int
    max_shape: tuple[int, int, int, int] = (64, 64, 11, 11)
    hid: int = 32
    hypernet: str = "gatedgnn"
    decoder: str = "conv"
    weight_norm: bool = True
    ve: bool = True
    layernorm: bool = True
    heads: int = 8
    layers: int = 1
    branch_scale: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("hypernet", ("gatedgnn", "graphormer", "mlp")), ("decoder", ("conv", "mlp"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"GHN config: {name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        sizes = (self.num_classes, self.hid, self.heads, self.layers, *self.max_shape)
        if len(self.max_shape) != 4 or not all(isinstance(size, int) and 0 < size <= 1 << 20 for size in sizes):
            raise ValueError(
                f"GHN config: num_classes, hid, heads, layers and the four max_shape entries must be positive integers, "
                f"got {self.to_dict()}."
            )
        if self.hid % 4 or (self.hypernet == "graphormer" and self.hid % self.heads):
            raise ValueError(f"GHN config: hid={self.hid} must be a multiple of 4 and of heads={self.heads}.")

    @property
    def max_channels(self) -> int:
        """Length of a decoded vector (norm weight, bias)."""
        return max(self.max_shape[:2])

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {**dataclasses.asdict(self), "max_shape": list(self.max_shape)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GHNConfig:
        """Builds a config from a checkpoint's dictionary.

        A dictionary with ``layers`` but without ``hypernet`` is one of GHN-3's, whose code has no other message passing.

        Raises:
            ValueError: If a key is unknown or missing, or a value is out of range.
        """
        data = dict(data)
        unknown = data.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown or "num_classes" not in data:
            problem = f"unknown keys {sorted(unknown)}" if unknown else "no num_classes"
            raise ValueError(f"GHN config has {problem}; expected the fields of GHNConfig.")
        data.setdefault("hypernet", "graphormer" if "layers" in data else "gatedgnn")
        if "max_shape" in data:
            data["max_shape"] = tuple(data["max_shape"])
        return cls(**data)
