"""Transformers whose resolution falls from stage to stage."""

from __future__ import annotations

from functools import partial

from timm.models.levit import Levit
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
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


# --- Swins deeper and more varied than those above, and the second version's cosine attention ---


def _sample_deep_swin(draw: Draw, version: int) -> Config:
    patch, head = draw.choice((2, 4, 4)), draw.choice((8, 16, 16, 32))
    stages = draw.choice((2, 3, 3, 4))
    width = head * draw.between(max(1, 16 // head), max(1, (32 if patch == 2 else 64) // head))
    depths = [draw.choice((1, 2, 2)) for _ in range(stages)]
    depths[min(2, stages - 1)] = draw.choice((2, 2, 4, 6))  # most of a real one's blocks are in its third stage
    return {
        "version": version,
        "patch": patch,
        "width": width,
        "head": head,
        "depths": depths,
        # The first version takes a size for each stage.
        "windows": [draw.choice((2, 4, 4, 8)) for _ in range(stages if version == 1 else 1)],
        "mlp_ratio": draw.choice((2, 3, 4, 4, 4)),
        "qkv_bias": draw.chance(0.8),
    }


def _build_deep_swin(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    stages, windows = range(len(config["depths"])), config["windows"]
    cls = SwinTransformer if config["version"] == 1 else SwinTransformerV2
    return cls(
        image_size,
        config["patch"],
        in_chans,
        num_classes,
        embed_dim=config["width"],
        depths=tuple(config["depths"]),
        num_heads=tuple(config["width"] // config["head"] * 2**stage for stage in stages),
        window_size=windows if len(windows) > 1 else windows[0],
        mlp_ratio=config["mlp_ratio"],
        qkv_bias=config["qkv_bias"],
        drop_path_rate=0.0,
    )


# --- PVT-v2: keys and values of coarser positions, a depthwise convolution in the MLP ---


def _sample_pvt(draw: Draw) -> Config:
    head = draw.choice((8, 16, 16, 32))
    first = head * draw.between(1, max(1, 32 // head))
    return {
        "widths": [first, 2 * first, (5 if draw.chance(0.5) else 4) * first, 8 * first],
        "head": head,
        "depths": [draw.between(1, 2), draw.between(1, 2), draw.between(1, 4), draw.between(1, 2)],
        "mlp_ratios": [draw.choice((4, 8)), draw.choice((4, 8)), 4, 4],
        "linear": draw.chance(0.3),
        "qkv_bias": draw.chance(0.8),
    }


def _build_pvt(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    return PyramidVisionTransformerV2(
        in_chans,
        num_classes,
        depths=tuple(config["depths"]),
        embed_dims=tuple(config["widths"]),
        num_heads=tuple(width // config["head"] for width in config["widths"]),
        mlp_ratios=tuple(config["mlp_ratios"]),
        qkv_bias=config["qkv_bias"],
        linear=config["linear"],
    )


# --- LeViT: batch norms, attention that shrinks the map, values wider than keys ---


def _sample_levit(draw: Draw) -> Config:
    key, stages = draw.choice((8, 16, 16, 32)), draw.choice((2, 2, 3))
    heads = [draw.between(2, 5)]
    while len(heads) < stages:
        heads.append(heads[-1] + draw.between(1, 3))
    return {
        "key": key,
        "heads": heads,
        "widths": [8 * draw.between(max(6, key * count // 8), max(10, key * count // 4)) for count in heads],
        "depths": [draw.between(1, 4) for _ in range(stages)],
        "conv": draw.chance(0.4),
        "act": draw.choice(("hard_swish", "hard_swish", "silu")),
    }


def _build_levit(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    model = Levit(
        image_size,
        in_chans,
        num_classes,
        embed_dim=tuple(config["widths"]),
        key_dim=config["key"],
        depth=tuple(config["depths"]),
        num_heads=tuple(config["heads"]),
        stem_type="s8",  # the other one would leave two pixels by two
        act_layer=config["act"],
        use_conv=config["conv"],
    )
    model.img_size = (image_size, image_size)  # where tracing finds the only size it takes
    return model


FAMILIES = (
    Family("swin", 2, _sample_swin, _build_swin, _cost_swin, fixed_size=True),
    Family("swin_deep", 3, partial(_sample_deep_swin, version=1), _build_deep_swin, fixed_size=True),
    Family("swinv2", 3, partial(_sample_deep_swin, version=2), _build_deep_swin, fixed_size=True),
    Family("pvtv2", 3, _sample_pvt, _build_pvt),
    Family("levit", 3, _sample_levit, _build_levit, fixed_size=True),
)
