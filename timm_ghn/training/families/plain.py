"""Plain stacks of convolutions, VGGs with their own head, and DenseNets."""

from __future__ import annotations

from timm.layers import ClassifierHead
from timm.models.densenet import DenseNet
from timm.models.efficientnet import EfficientNet
from timm.models.vgg import VGG
from torch import nn

from timm_ghn.training.sampling import STEM_WIDTHS, Config, Cost, Draw, Family, halve, stage_depths, stage_widths

# --- plain stacks of convolution, batch norm, ReLU ---


def _sample_plain(draw: Draw) -> Config:
    stages = draw.between(2, 5)
    pooled = draw.chance(0.5)
    return {
        "widths": stage_widths(draw, draw.choice(STEM_WIDTHS), stages),
        "depths": stage_depths(draw, stages, 3),
        "down": "pool" if pooled else "stride",
        "stem_kernel": 3 if pooled else draw.choice((3, 7)),
        "first_stride": 1 if pooled else draw.choice((1, 2)),
    }


def _build_plain(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    widths, depths = config["widths"], config["depths"]
    if config["down"] == "pool":
        layers = [layer for width, depth in zip(widths, depths, strict=True) for layer in [width] * depth + ["M"]]
        model = VGG(layers[:-1], num_classes, in_chans, mlp_ratio=1 / 4096, norm_layer=nn.BatchNorm2d)
        # VGG's own head is a family of its own: here the features go straight to one linear layer.
        model.pre_logits = nn.Identity()
        model.head = ClassifierHead(widths[-1], num_classes)
        model.head_hidden_size = widths[-1]
        return model
    strides = [config["first_stride"]] + [2] * (len(widths) - 1)
    block: Config = {"block_type": "cn", "act_layer": None, "kernel_size": 3, "skip": False}
    blocks = [
        [{**block, "out_chs": width, "stride": stride if layer == 0 else 1} for layer in range(depth)]
        for width, depth, stride in zip(widths, depths, strides, strict=True)
    ]
    return EfficientNet(
        blocks,
        num_classes,
        num_features=0,
        in_chans=in_chans,
        stem_size=widths[0],
        stem_kernel_size=config["stem_kernel"],
    )


def _cost_plain(config: Config, num_classes: int, in_chans: int, image_size: int) -> Cost:
    cost, size, channels = Cost(), image_size, in_chans
    pooled = config["down"] == "pool"
    if not pooled:
        size = halve(size)
        cost.conv(in_chans, config["widths"][0], config["stem_kernel"], size * size, norm=True)
        channels = config["widths"][0]
    for stage, (width, depth) in enumerate(zip(config["widths"], config["depths"], strict=True)):
        if stage > 0:
            size = size // 2 if pooled else halve(size)
        elif config["first_stride"] == 2:
            size = halve(size)
        for _ in range(depth):
            cost.conv(channels, width, 3, size * size, bias=pooled, norm=True)
            channels = width
    cost.conv(channels, num_classes, 1, 1, bias=True)
    return cost


# --- VGG with its own head ---


def _sample_vgg(draw: Draw) -> Config:
    stages = draw.choice((3, 4, 5, 5))
    widths = stage_widths(draw, draw.choice((16, 16, 24, 32, 32, 48, 64)), stages)
    if stages == 5 and draw.chance(0.7):
        widths[4] = widths[3]  # as in every real one
    return {
        "widths": widths,
        "depths": stage_depths(draw, stages, 2),
        "norm": draw.chance(0.5),
        "hidden": draw.choice((64, 128, 256, 512, 1024)),
    }


def _build_vgg(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    layers = [
        layer
        for width, depth in zip(config["widths"], config["depths"], strict=True)
        for layer in [width] * depth + ["M"]
    ]
    norm = nn.BatchNorm2d if config["norm"] else None
    return VGG(layers, num_classes, in_chans, mlp_ratio=config["hidden"] / 4096, norm_layer=norm)


def _cost_vgg(config: Config, num_classes: int, in_chans: int, image_size: int) -> Cost:
    cost, size, channels = Cost(), image_size, in_chans
    for width, depth in zip(config["widths"], config["depths"], strict=True):
        for _ in range(depth):
            cost.conv(channels, width, 3, size * size, bias=True, norm=config["norm"])
            channels = width
        size //= 2
    positions = (max(7, size) - 6) ** 2  # smaller maps are stretched to the head's 7×7
    cost.conv(channels, config["hidden"], 7, positions, bias=True)
    cost.conv(config["hidden"], 4096, 1, positions, bias=True)
    cost.conv(4096, num_classes, 1, 1, bias=True)
    return cost


# --- DenseNet ---


def _sample_densenet(draw: Draw) -> Config:
    return {
        "growth": draw.choice((8, 12, 16, 16, 24, 32, 32)),
        "depths": [draw.between(2, 6) for _ in range(draw.choice((3, 4, 4)))],
        "bottleneck": draw.choice((2, 4, 4, 4)),
        "stem": draw.choice(("", "", "", "deep")),
    }


def _build_densenet(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    return DenseNet(
        config["growth"],
        tuple(config["depths"]),
        num_classes,
        in_chans,
        bn_size=config["bottleneck"],
        stem_type=config["stem"],
    )


def _cost_densenet(config: Config, num_classes: int, in_chans: int, image_size: int) -> Cost:
    cost, size, growth = Cost(), halve(image_size), config["growth"]
    channels = 2 * growth
    if config["stem"] == "deep":
        for cin, cout in ((in_chans, growth), (growth, growth), (growth, channels)):
            cost.conv(cin, cout, 3, size * size, norm=True)
    else:
        cost.conv(in_chans, channels, 7, size * size, norm=True)
    size = halve(size)
    for stage, depth in enumerate(config["depths"]):
        if stage > 0:
            cost.vector(2 * channels)
            cost.conv(channels, channels // 2, 1, size * size)
            channels, size = channels // 2, size // 2
        for _ in range(depth):
            cost.vector(2 * channels)
            cost.conv(channels, config["bottleneck"] * growth, 1, size * size, norm=True)
            cost.conv(config["bottleneck"] * growth, growth, 3, size * size)
            channels += growth
    cost.vector(2 * channels)
    cost.conv(channels, num_classes, 1, 1, bias=True)
    return cost


FAMILIES = (
    Family("plain", 0, _sample_plain, _build_plain, _cost_plain),
    Family("vgg", 1, _sample_vgg, _build_vgg, _cost_vgg),
    Family("densenet", 1, _sample_densenet, _build_densenet, _cost_densenet),
)
