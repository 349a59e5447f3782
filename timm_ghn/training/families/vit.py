"""Vision transformers of one resolution."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from timm_ghn.training.sampling import Config, Cost, Draw, Family


def _sample_vit(draw: Draw) -> Config:
    head = draw.choice((16, 32, 32, 64, 64))
    return {
        "patch": draw.choice((4, 4, 8, 8, 16)),
        "width": head * draw.between(max(1, 48 // head), max(1, 256 // head)),
        "head": head,
        "depth": draw.between(2, 12),
        "mlp_ratio": draw.choice((2, 3, 4, 4, 4)),
        "class_token": draw.chance(0.7),
        "layer_scale": draw.chance(0.2),
    }


def _build_vit(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    return VisionTransformer(
        image_size,
        config["patch"],
        in_chans,
        num_classes,
        global_pool="token" if config["class_token"] else "avg",
        embed_dim=config["width"],
        depth=config["depth"],
        num_heads=config["width"] // config["head"],
        mlp_ratio=config["mlp_ratio"],
        init_values=1e-5 if config["layer_scale"] else None,
        class_token=config["class_token"],
    )


def _cost_vit(config: Config, num_classes: int, in_chans: int, image_size: int) -> Cost:
    cost, width = Cost(), config["width"]
    patches = (image_size // config["patch"]) ** 2
    tokens = patches + int(config["class_token"])
    cost.conv(in_chans, width, config["patch"], patches, bias=True)
    cost.vector(tokens * width, width if config["class_token"] else 0)
    for _ in range(config["depth"]):
        cost.vector(4 * width, 2 * width if config["layer_scale"] else 0)
        cost.conv(width, 3 * width, 1, tokens, bias=True)
        cost.attention(width, tokens)
        cost.conv(width, width, 1, tokens, bias=True)
        cost.conv(width, config["mlp_ratio"] * width, 1, tokens, bias=True)
        cost.conv(config["mlp_ratio"] * width, width, 1, tokens, bias=True)
    cost.vector(2 * width)
    cost.conv(width, num_classes, 1, 1, bias=True)
    return cost


FAMILIES = (Family("vit", 2, _sample_vit, _build_vit, _cost_vit, fixed_size=True),)
