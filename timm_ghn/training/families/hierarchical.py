"""Transformers whose resolution falls from stage to stage."""

from __future__ import annotations

from timm.models.swin_transformer import SwinTransformer
from torch import nn

from timm_ghn.training.sampling import Config, Cost, Draw, Family, halve


def _sample_swin(draw: Draw) -> Config:
    head = draw.choice((8, 16, 16, 32, 32))
    return {
        "patch": draw.choice((2, 4, 4)),
        "width": head * draw.between(1, max(1, 64 // head)),
        "head": head,
        "depths": [draw.choice((1, 2, 2)) for _ in range(draw.choice((2, 3, 4)))],
        "window": draw.choice((4, 7)),
    }


def _build_swin(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    stages = range(len(config["depths"]))
    return SwinTransformer(
        image_size,
        config["patch"],
        in_chans,
        num_classes,
        embed_dim=config["width"],
        depths=tuple(config["depths"]),
        num_heads=tuple(config["width"] // config["head"] * 2**stage for stage in stages),
        window_size=config["window"],
        drop_path_rate=0.0,
    )


def _cost_swin(config: Config, num_classes: int, in_chans: int, image_size: int) -> Cost:
    cost, size, width = Cost(), image_size // config["patch"], config["width"]
    cost.conv(in_chans, width, config["patch"], size * size, bias=True, norm=True)
    for stage, depth in enumerate(config["depths"]):
        if stage > 0:
            size = halve(size)
            cost.vector(8 * width)
            cost.conv(4 * width, 2 * width, 1, size * size)
            width *= 2
        window = min(config["window"], size)
        windows = (-(-size // window)) ** 2
        padded = windows * window * window
        for _ in range(depth):
            cost.vector(4 * width, (2 * window - 1) ** 2 * (width // config["head"]))
            cost.conv(width, 3 * width, 1, padded, bias=True)
            cost.attention(width, window * window, windows)
            cost.conv(width, width, 1, padded, bias=True)
            cost.conv(width, 4 * width, 1, size * size, bias=True)
            cost.conv(4 * width, width, 1, size * size, bias=True)
    cost.vector(2 * width)
    cost.conv(width, num_classes, 1, 1, bias=True)
    return cost


FAMILIES = (Family("swin", 2, _sample_swin, _build_swin, _cost_swin, fixed_size=True),)
