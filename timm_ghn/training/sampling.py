"""What both architecture sources are made of: reproducible draws, cost accounting, and the description of a family."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Config = dict[str, Any]
T = TypeVar("T")


class Draw:
    """A stream of random choices that is a pure function of its key.

    Every choice goes through `random.Random.random`, the one method whose sequence Python promises to keep between
    versions, so that an index means the same architecture everywhere.
    """

    def __init__(self, *key: object) -> None:
        digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
        self._random = random.Random(int.from_bytes(digest, "little")).random

    def choice(self, options: Sequence[T]) -> T:
        return options[int(self._random() * len(options))]

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def between(self, low: int, high: int, step: int = 1) -> int:
        """An integer of low, low + step, … up to and including high."""
        return low + step * int(self._random() * ((high - low) // step + 1))

    def uniform(self, low: float, high: float) -> float:
        """A float with three decimals, so that it survives JSON unchanged."""
        return round(low + (high - low) * self._random(), 3)


@dataclass
class Cost:
    """Multiply-accumulates of one image, and parameters, added up layer by layer."""

    macs: int = 0
    params: int = 0

    def conv(
        self,
        cin: int,
        cout: int,
        kernel: int,
        positions: int,
        *,
        groups: int = 1,
        bias: bool = False,
        norm: bool = False,
    ) -> None:
        """A convolution (kernel 1: a linear layer) evaluated at `positions` places, with its bias and norm."""
        weights = cin // groups * cout * kernel * kernel
        self.macs += weights * positions
        self.params += weights + cout * (int(bias) + 2 * int(norm))

    def attention(self, dim: int, tokens: int, windows: int = 1) -> None:
        """The two products of self-attention, over `windows` separate groups of tokens."""
        self.macs += 2 * dim * tokens * tokens * windows

    def vector(self, *elements: int) -> None:
        """Parameters that cost no multiplications worth counting: norms, scales, tokens."""
        self.params += sum(elements)


def measured_cost(model: nn.Module, image: torch.Tensor) -> Cost:
    """What a model in eval mode costs, counted as it runs on one image [1, channels, height, width].

    Both may be on the meta device, where the result is the same and takes neither arithmetic nor memory. The model's
    parameters are without gradients afterwards.
    """
    model.requires_grad_(False)  # under no_grad instead, the counter fails on modules that are called with a parameter
    # As plain products, attention is counted on every device.
    with image.device, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    return Cost(counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters()))


@dataclass(frozen=True)
class Family:
    """One kind of network.

    Attributes:
        name: What `Architecture.family` says.
        tier: Difficulty for a hypernetwork, from 0 (plain and residual) to 2 (attention and token mixing); 3 for
            kinds that joined later.
        sample: Draws a configuration of plain numbers, strings, lists and dicts.
        build: (config, num_classes, in_chans, image_size) to a fresh module.
        cost: (config, num_classes, in_chans, image_size) to its `Cost`, without building anything. None where it is
            counted on the module's skeleton, which takes a thousand times as long.
        fixed_size: Whether the module only takes images of the size it was built for.
    """

    name: str
    tier: int
    sample: Callable[[Draw], Config]
    build: Callable[[Config, int, int, int], nn.Module] = field(repr=False)
    cost: Callable[[Config, int, int, int], Cost] | None = field(default=None, repr=False)
    fixed_size: bool = False


def built_by(network: Callable[..., nn.Module], sized: bool = False) -> Callable[[Config, int, int, int], nn.Module]:
    """A family's `build`, where its configurations are arguments of a class.

    Args:
        network: The class.
        sized: Whether it is told the size of its images.
    """

    def build(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        size = {"img_size": image_size} if sized else {}
        return network(**config, **size, num_classes=num_classes, in_chans=in_chans)

    return build


def halve(size: int) -> int:
    """Side of a feature map after a padded stride-2 layer."""
    return (size + 1) // 2


# Narrow enough to be cheap, with most of the weight on the widths that real stems have.
STEM_WIDTHS = (16, 24, 32, 32, 32, 40, 48, 48, 64, 64, 64, 64, 80, 96, 128)


def stage_widths(draw: Draw, first: int, stages: int) -> list[int]:
    """Channels per stage: doubling, as nearly every hierarchical network of the zoo does, or less regular."""
    doubling = draw.chance(0.7)
    widths = [first]
    while len(widths) < stages:
        growth = 2 if doubling else draw.choice((1, 1.5, 2, 2.5))
        widths.append(round(widths[-1] * growth / 8) * 8)
    return widths


def stage_depths(draw: Draw, stages: int, most: int) -> list[int]:
    """Blocks per stage, 1 to `most`."""
    return [draw.between(1, most) for _ in range(stages)]
