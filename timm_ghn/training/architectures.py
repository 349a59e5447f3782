"""A million architectures by index, none of them stored.

`architecture(source, split, index)` is a pure function: the same arguments give the same network on every machine, and
in less than a millisecond, because only a small configuration is drawn; `Architecture.build` then makes the module.
Splits cannot overlap: a hash of its configuration decides which of train, val and test a network belongs to, and draws
that belong elsewhere are skipped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from timm_ghn.lazy_init import NoInitialisation
from timm_ghn.training.families import FAMILIES
from timm_ghn.training.sampling import Config, Cost, Draw, measured_cost


@dataclass(frozen=True)
class Split:
    """How many networks a split has, and what it draws unless told otherwise."""

    size: int
    families: tuple[str, ...]
    max_macs: int
    max_params: int


# Lists that never change: one family more would put another network at every index. Those that join are drawn by name.
_TIMM_SPLIT = (
    "plain", "residual", "bottleneck", "se_residual", "resnext", "regnet", "repvgg", "byob_basic", "byob_bottle",
    "mobilenetv2", "mobilenetv3", "efficientnet", "efficientnetv2", "vgg", "densenet", "convnext", "poolformer",
    "poolformerv2", "convformer", "caformer", "vit", "mixer", "convmixer", "swin",
)  # fmt: skip

SPLITS: dict[str, dict[str, Split]] = {
    "timm": {
        split: Split(size, _TIMM_SPLIT, 25_000_000, 10_000_000)
        for split, size in (("train", 1_000_000), ("val", 500), ("test", 500))
    },
    "deepnets": {
        **{
            split: Split(size, ("cells", "transformer_cells"), 50_000_000, 10_000_000)
            for split, size in (("train", 1_000_000), ("val", 500), ("test", 500))
        },
        **{
            split: Split(100, (f"{split}_cells", f"{split}_transformer_cells"), 200_000_000, 40_000_000)
            for split in ("wide", "deep", "dense", "bnfree")
        },
    },
}

# Enough that even a family that seldom fits the limits is found, few enough that impossible limits end soon.
_MAX_DRAWS = 20_000


@dataclass(frozen=True)
class Architecture:
    """A network's description.

    Attributes:
        source: "timm" or "deepnets".
        family: Name of the family, a key of `FAMILIES[source]`.
        config: Its configuration: numbers, strings, lists and dicts only.
    """

    source: str
    family: str
    config: Config

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that identify the network."""
        text = json.dumps([self.source, self.family, self.config], sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def fixed_size(self) -> bool:
        """Whether the module only takes images of the size it is built for.

        All others are best traced at the size that users trace at: where the last maps of a small image are down to
        one pixel, a squeeze-excite can no longer be told from a global pooling.
        """
        return FAMILIES[self.source][self.family].fixed_size

    def build(self, num_classes: int, in_chans: int = 3, image_size: int = 32) -> nn.Module:
        """A fresh module, on whatever device context is active.

        Args:
            num_classes: Outputs of the classifier.
            in_chans: Input channels.
            image_size: Side of the square input; networks with a fixed number of tokens depend on it.
        """
        return FAMILIES[self.source][self.family].build(self.config, num_classes, in_chans, image_size)

    def skeleton(self, num_classes: int, in_chans: int = 3, image_size: int = 32) -> nn.Module:
        """The module on the meta device, several times faster than `build` there: initialisers are not run."""
        with torch.device("meta"), NoInitialisation():
            return self.build(num_classes, in_chans, image_size)

    def cost(self, num_classes: int = 10, in_chans: int = 3, image_size: int = 32) -> Cost:
        """Multiply-accumulates of one image, and number of parameters."""
        added_up = FAMILIES[self.source][self.family].cost
        if added_up is not None:
            return added_up(self.config, num_classes, in_chans, image_size)
        # On the CPU, with whatever is in memory: a forward pass on the meta device takes three times as long.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), NoInitialisation():
            model = self.build(num_classes, in_chans, image_size).eval()
            return measured_cost(model, torch.empty(1, in_chans, image_size, image_size))


def families(source: str, max_tier: int) -> tuple[str, ...]:
    """Names of the families to train on up to a difficulty tier: the split's, and those that joined later."""
    in_splits = {name for split in SPLITS[source].values() for name in split.families}
    names = [*SPLITS[source]["train"].families, *(name for name in FAMILIES[source] if name not in in_splits)]
    return tuple(name for name in names if FAMILIES[source][name].tier <= max_tier)


def architecture(
    source: str,
    split: str,
    index: int,
    *,
    families: Sequence[str] | None = None,
    max_macs: int | None = None,
    max_params: int | None = None,
    image_size: int = 32,
) -> Architecture:
    """The architecture at a place of a split.

    Args:
        source: "timm" or "deepnets".
        split: A key of `SPLITS[source]`.
        index: 0 to the split's size - 1.
        families: Families to draw from, each as likely as it is often named; by default the split's.
        max_macs: Upper limit for the multiply-accumulates of one image; costlier draws are skipped. By default the
            split's: 25 million for timm's kind, 50 for DeepNets-1M's, 200 for its four out-of-distribution splits.
        max_params: Upper limit for the number of parameters, likewise: 10 million, or 40 out of distribution.
        image_size: Side of the image that the limits are meant for.

    Raises:
        ValueError: Unknown source, split or family, index outside the split, or limits that nothing meets.
    """
    if source not in FAMILIES:
        raise ValueError(f"Unknown architecture source {source!r}; choose from {', '.join(FAMILIES)}.")
    if split not in SPLITS[source]:
        raise ValueError(f"Source {source!r} has no split {split!r}; choose from {', '.join(SPLITS[source])}.")
    plan = SPLITS[source][split]
    if not 0 <= index < plan.size:
        raise ValueError(f"Index {index} is outside split {split!r} of {plan.size} architectures.")
    names = plan.families if families is None else tuple(families)
    max_macs = plan.max_macs if max_macs is None else max_macs
    max_params = plan.max_params if max_params is None else max_params
    unknown = sorted(set(names) - set(FAMILIES[source]))
    if unknown or not names:
        raise ValueError(f"Families {unknown} are not among source {source!r}'s: {', '.join(FAMILIES[source])}.")

    draw = Draw(source, split, index)
    family = FAMILIES[source][draw.choice(names)]
    for _ in range(_MAX_DRAWS):
        config = family.sample(draw)
        candidate = Architecture(source, family.name, config)
        if split in ("train", "val", "test") and _owner(candidate) != split:
            continue
        cost = candidate.cost(image_size=image_size)
        if cost.macs <= max_macs and cost.params <= max_params:
            return candidate
    raise ValueError(
        f"No {family.name!r} network within {max_macs:,} multiply-accumulates and {max_params:,} parameters at "
        f"{image_size}x{image_size}; raise the limits or leave the family out."
    )


def _owner(candidate: Architecture) -> str:
    """The split that a network belongs to: one in sixteen to val, one to test, the others to train."""
    return {"0": "val", "1": "test"}.get(candidate.key[0], "train")
