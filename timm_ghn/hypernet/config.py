"""What a GHN is, as data: everything needed to build its module and to check a checkpoint against it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

from ..graph import PRIMITIVES
from .decoders import DECODERS
from .experts import KINDS
from .message_passing import HYPERNETS

PUBLISHED_PRIMITIVES = (
    "max_pool", "avg_pool", "sep_conv", "dil_conv", "conv", "msa", "cse", "sum",
    "concat", "input", "bias", "bn", "ln", "pos_enc", "glob_avg",
)  # fmt: skip
"""Those of DeepNets-1M; what a checkpoint knows that says nothing of it."""

_CHOICES: dict[str, tuple[str | bool, ...]] = {
    "hypernet": tuple(HYPERNETS),
    "decoder": tuple(DECODERS),
    "weight_norm": (True, False),
    "ve": (True, False),
    "layernorm": (True, False),
    "split_attention": (True, False),
    "predicts_head": (True, False),
    "conditioned": (True, False),
    "bounded": (True, False),
}
# Whatever a file says, its tensors' sizes fit 63 bits, and it is built in seconds or refused.
_LIMITS = {
    "num_classes": 1 << 20, "max_shape": 1 << 16, "hid": 1 << 12, "heads": 1 << 12, "layers": 256, "rank": 1 << 12
}  # fmt: skip
_MAX_ELEMENTS = 1 << 34
_MAX_PRIMITIVES = 256


@dataclasses.dataclass(frozen=True)
class Images:
    """How the images were prepared that a GHN was trained with; fields are named as in timm's pretrained cfgs.

    Attributes:
        mean: Per channel, of pixels scaled to 0…1.
        std: Likewise.
        input_size: (channels, height, width).
        crop_pct: Share of the resized image that evaluation looks at.
        interpolation: Of the resizing; None if nothing was resized.
        label_names: The classes' names, in the order of the outputs; None if unknown.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, ...]
    crop_pct: float = 1.0
    interpolation: str | None = None
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        channels = self.input_size[0] if len(self.input_size) == 3 else 0
        finite = all(math.isfinite(value) for value in (*self.mean, *self.std))
        counts = len(self.mean) == len(self.std) == channels > 0
        if not (finite and counts and min(self.input_size) > 0 and min(self.std) > 0):
            raise ValueError(
                f"GHN config: images has mean {short(self.mean)}, std {short(self.std)} and input_size "
                f"{short(self.input_size)}; it must be a mean and a std above 0 for each channel of (channels, height, "
                "width)."
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Images:
        """Inverse of `dataclasses.asdict`, from JSON."""
        fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in data.items()}
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class GHNConfig:
    """Configuration of a graph hypernetwork; field names are those of the published checkpoints.

    Attributes:
        num_classes: Classes of the data set the GHN was trained on.
        max_shape: (out, in, height, width) of the largest kernel the decoder makes; larger ones are tiled.
        hid: Width d of a node's state.
        hypernet: Message passing: ``gatedgnn`` (GHN-1, GHN-2), ``graphormer`` (GHN-3) or ``mlp`` (no messages).
        decoder: ``conv`` (GHN-1 to GHN-3), or the name of another one in `timm_ghn.hypernet.decoders`.
        weight_norm: Fan-in normalisation of predicted parameters (arXiv 2110.13100, §3.2.3).
        ve: Virtual edges (ibid., eq. 4).
        layernorm: A layer norm before the decoders.
        heads: Attention heads of a Graphormer layer.
        layers: Graphormer layers.
        rank: Rank of the low-rank decoder's matrices.
        branch_scale: Value of residual-branch scales (layer scale) that the GHN was trained with. Inits such as 1e-6
            switch branches off until training switches them on, and with them what was predicted for the branch. None,
            as in the published checkpoints, leaves them as they are; so do networks without norms.
        position_bias: Likewise, value of the relative-position tables that are added to attention's logits. 0 prefers
            no position, which is also the mean of timm's inits.
        split_attention: Queries, keys and values are predicted each on its own, from nodes that know which they are,
            also where they are the parts of one parameter. The published checkpoints repeat one tile over all three.
        predicts_head: It has weights for the classification layer of its own classes. Without, that layer is always
            left alone, for somebody to fit.
        conditioned: What it predicts can depend on a task, of which it is given a `sketch`.
        bounded: The scales of what it predicts are bounded where nothing normalises activations, whatever other
            preparation is asked for, see `timm_ghn.preparation.prepare`; networks with norms are not changed by it. It
            decides nothing about the module. The published checkpoints are without.
        experts: The kinds of networks, of `timm_ghn.hypernet.experts.KINDS`, that are predicted by a GHN of their own
            inside this one, with weights of its own and otherwise this config.
        primitives: What a node can be for it, in the order of the embedding's rows. What others there are is contracted
            away before it sees a graph.
        images: What it was trained with, for whoever prepares images for a predicted model. None if unknown. It decides
            nothing about the module, and configs are equal without regard to it.
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
    rank: int = 32
    branch_scale: float | None = None
    position_bias: float | None = None
    split_attention: bool = False
    predicts_head: bool = True
    conditioned: bool = False
    bounded: bool = False
    experts: tuple[str, ...] = ()
    primitives: tuple[str, ...] = tuple(PRIMITIVES)
    images: Images | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(map(str, allowed))
                raise ValueError(f"GHN config: {name} is {short(getattr(self, name))}; it must be one of {expected}.")
        if len(self.max_shape) != 4 or math.prod(self.max_shape) > _MAX_ELEMENTS:
            raise ValueError(f"GHN config: max_shape is {short(self.max_shape)}; it must be four sizes of a kernel.")
        sizes = [(name, getattr(self, name)) for name in _LIMITS if name != "max_shape"]
        for name, size in (*sizes, *(("max_shape", size) for size in self.max_shape)):
            if type(size) is not int or not 0 < size <= _LIMITS[name]:
                limit = _LIMITS[name]
                raise ValueError(f"GHN config: {name} has {short(size)}; sizes must be positive integers to {limit}.")
        if self.hid % 4:
            raise ValueError(f"GHN config: hid={self.hid} must be a multiple of 4.")
        names = self.primitives
        if not all(isinstance(name, str) for name in names) or len({"input", *names}) != len(names) <= _MAX_PRIMITIVES:
            raise ValueError(
                f"GHN config: primitives is {short(names)}; it must be different names, input among them, at most "
                f"{_MAX_PRIMITIVES}."
            )
        if not set(self.experts) <= KINDS.keys() or len(set(self.experts)) != len(self.experts):
            kinds = ", ".join(KINDS)
            raise ValueError(f"GHN config: experts is {short(self.experts)}; it must be different ones of {kinds}.")
        HYPERNETS[self.hypernet].check(self)
        DECODERS[self.decoder].check(self)
        for name in ("branch_scale", "position_bias"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"GHN config: {name} is {short(value)}; it must be finite.")
        labels = self.images.label_names if self.images else None
        if labels is not None and len(labels) != self.num_classes:
            raise ValueError(f"GHN config: images names {len(labels)} classes; num_classes is {self.num_classes}.")

    @property
    def centred(self) -> bool:
        """Whether kernels are read from the centre of the largest one, and not from its top-left corner."""
        return HYPERNETS[self.hypernet].centred

    @property
    def max_channels(self) -> int:
        """Length of a decoded vector (norm weight, bias)."""
        return max(self.max_shape[:2])

    @property
    def without_experts(self) -> GHNConfig:
        """That of each of its experts, or of this GHN alone."""
        return dataclasses.replace(self, experts=())

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON, without what an ordinary GHN has nothing to say of.

        That is `images` if they are unknown, `primitives` if they are the published, and `experts` if there are none.
        """
        fields = {**dataclasses.asdict(self), "max_shape": list(self.max_shape), "experts": list(self.experts)}
        if not self.experts:
            del fields["experts"]
        if fields.pop("primitives") != PUBLISHED_PRIMITIVES:
            fields["primitives"] = list(self.primitives)
        images = fields.pop("images")
        if images is not None:
            known = {name: value for name, value in images.items() if value is not None}
            fields["images"] = {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}
        return fields

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GHNConfig:
        """Builds a config from a checkpoint's dictionary.

        A dictionary with ``layers`` and no ``hypernet`` is one of GHN-3's, whose code has no other message passing.

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
        data["primitives"] = tuple(data.get("primitives", PUBLISHED_PRIMITIVES))
        data["experts"] = tuple(data.get("experts", ()))
        if data.get("images") is not None:
            data["images"] = Images.from_dict(data["images"])
        return cls(**data)
