"""Residual networks: ResNet with its variants, RegNet, and ByobNet's blocks, RepVGG's parallel branches among them."""

from __future__ import annotations

import math
from functools import partial

from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from timm_ghn.training.sampling import STEM_WIDTHS, Config, Cost, Draw, Family, halve, stage_depths, stage_widths

# --- ResNet: residual and bottleneck blocks, squeeze-excite and grouped variants ---


def _sample_resnet(draw: Draw, block: str, variant: str = "") -> Config:
    stages = draw.choice((2, 3, 3, 4, 4, 4))
    stem = draw.choice(("7x7", "7x7", "7x7", "3x3", "3x3", "deep", "tiered"))
    width = draw.choice(STEM_WIDTHS)
    config: Config = {
        "block": block,
        "stem": stem,
        "stem_width": width,
        "stem_stride": 1 if stem == "3x3" and draw.chance(0.3) else 2,
        "pool": draw.chance(0.7 if stem == "7x7" else 0.4),
        "widths": stage_widths(draw, width if draw.chance(0.8) else draw.choice(STEM_WIDTHS), stages),
        "depths": stage_depths(draw, stages, draw.choice((2, 3, 3, 3, 6))),
        "avg_down": draw.chance(0.2),
        "groups": 1,
        "base_width": 64,
        "se": False,
    }
    if variant == "se":
        config["se"] = True
    if variant == "grouped":  # ResNeXt: 32 groups of 4 channels at 64 planes; here fewer of them
        config["groups"] = draw.choice((2, 4, 8, 16, 32))
        config["base_width"] = draw.choice((4, 4, 8, 16))
        config["se"] = draw.chance(0.3)
    return config


def _build_resnet(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    width = config["stem_width"]
    block = BasicBlock if config["block"] == "basic" else Bottleneck
    # ResNet fixes a shallow stem at 64 channels; the deep one takes any width, and its first layer can be replaced.
    model = ResNet(
        block,
        tuple(config["depths"]),
        num_classes=num_classes,
        in_chans=in_chans,
        cardinality=config["groups"],
        base_width=config["base_width"],
        stem_width=width // 2,
        stem_type="deep_tiered" if config["stem"] == "tiered" else "deep",
        avg_down=config["avg_down"],
        channels=tuple(config["widths"]),
        block_args={"attn_layer": "se"} if config["se"] else None,
    )
    if config["stem"] in ("7x7", "3x3"):
        kernel = int(config["stem"][0])
        model.conv1 = nn.Conv2d(in_chans, width, kernel, config["stem_stride"], kernel // 2, bias=False)
    return without_unused(model, config)


def without_unused(model: ResNet, config: Config) -> ResNet:
    """A ResNet without the pool and those of its forward pass's four stages that its configuration leaves out."""
    if not config["pool"]:
        model.maxpool = nn.Identity()
    for stage in range(len(config["depths"]), 4):
        setattr(model, f"layer{stage + 1}", nn.Identity())
    return model


def _cost_resnet(config: Config, num_classes: int, in_chans: int, image_size: int) -> Cost:
    cost = Cost()
    size = halve(image_size) if config["stem_stride"] == 2 else image_size
    width = config["stem_width"]
    if config["stem"] in ("7x7", "3x3"):
        cost.conv(in_chans, width, int(config["stem"][0]), size * size, norm=True)
    else:
        first = 3 * (width // 2 // 4) if config["stem"] == "tiered" else width // 2
        cost.conv(in_chans, first, 3, size * size, norm=True)
        cost.conv(first, width // 2, 3, size * size, norm=True)
        cost.conv(width // 2, width, 3, size * size, norm=True)
    if config["pool"]:
        size = halve(size)
    channels = width
    expansion = 1 if config["block"] == "basic" else 4
    for stage, (planes, depth) in enumerate(zip(config["widths"], config["depths"], strict=True)):
        before, size = size, halve(size) if stage > 0 else size
        out = planes * expansion
        for layer in range(depth):
            if layer == 0 and (stage > 0 or channels != out):
                cost.conv(channels, out, 1, size * size, norm=True)
            if config["block"] == "basic":
                cost.conv(channels, planes, 3, size * size, norm=True)
                cost.conv(planes, planes, 3, size * size, norm=True)
            else:
                inner = planes * config["base_width"] // 64 * config["groups"]
                cost.conv(channels, inner, 1, (before if layer == 0 else size) ** 2, norm=True)
                cost.conv(inner, inner, 3, size * size, groups=config["groups"], norm=True)
                cost.conv(inner, out, 1, size * size, norm=True)
            if config["se"]:
                squeezed = max(8, (out // 16 + 4) // 8 * 8)
                cost.conv(out, squeezed, 1, 1, bias=True)
                cost.conv(squeezed, out, 1, 1, bias=True)
            channels = out
    cost.conv(channels, num_classes, 1, 1, bias=True)
    return cost


# --- RegNet ---


def _regnet_stages(config: Config) -> tuple[list[int], list[int]] | None:
    """Widths and depths of the four stages that RegNet's formula gives.

    None when it gives another number of stages, or when a rounding is too close to call between this double precision
    and the single precision that RegNet itself computes in.
    """
    widths = []
    for block in range(config["depth"]):
        exponent = math.log(1 + config["wa"] * block / config["w0"]) / math.log(config["wm"])
        width = config["w0"] * config["wm"] ** round(exponent) / 8
        if abs(exponent % 1 - 0.5) < 1e-3 or abs(width % 1 - 0.5) < 1e-3:
            return None
        widths.append(round(width) * 8)
    stages = sorted(set(widths))
    return (stages, [widths.count(width) for width in stages]) if len(stages) == 4 else None


def _sample_regnet(draw: Draw) -> Config:
    group_size = draw.choice((4, 8, 8, 16, 16, 24))
    se = draw.chance(0.4)
    while True:
        config = {
            "w0": draw.between(16, 56, 8),
            "wa": draw.uniform(12, 40),
            "wm": draw.uniform(1.8, 2.8),
            "depth": draw.between(5, 14),
            "group_size": group_size,
            "stem_width": draw.choice((16, 24, 32, 32, 32, 48)),
            "se": se,
        }
        if _regnet_stages(config):
            return config


def _build_regnet(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    cfg = RegNetCfg(
        depth=config["depth"],
        w0=config["w0"],
        wa=config["wa"],
        wm=config["wm"],
        group_size=config["group_size"],
        stem_width=config["stem_width"],
        se_ratio=0.25 if config["se"] else 0.0,
    )
    return RegNet(cfg, in_chans, num_classes)


def _cost_regnet(config: Config, num_classes: int, in_chans: int, image_size: int) -> Cost:
    stages = _regnet_stages(config)
    assert stages is not None, "a RegNet configuration is drawn until it has four stages"
    cost, size, channels = Cost(), halve(image_size), config["stem_width"]
    cost.conv(in_chans, channels, 3, size * size, norm=True)
    for width, depth in zip(*stages, strict=True):
        group = min(config["group_size"], width)
        out = round(width / group) * group
        for layer in range(depth):
            before, size = size, halve(size) if layer == 0 else size
            if layer == 0:
                cost.conv(channels, out, 1, size * size, norm=True)
            cost.conv(channels, out, 1, before * before, norm=True)
            cost.conv(out, out, 3, size * size, groups=out // group, norm=True)
            if config["se"]:
                cost.conv(out, round(channels * 0.25), 1, 1, bias=True)
                cost.conv(round(channels * 0.25), out, 1, 1, bias=True)
            cost.conv(out, out, 1, size * size, norm=True)
            channels = out
    cost.conv(channels, num_classes, 1, 1, bias=True)
    return cost


# --- ByobNet: RepVGG's parallel branches, and residual blocks with grouped convolutions ---


def _sample_byobnet(draw: Draw, block: str) -> Config:
    stages = draw.choice((3, 4, 4))
    first = draw.choice(STEM_WIDTHS)
    pool = block != "rep" and draw.chance(0.4)
    # Beyond a total stride of 32, ByobNet would dilate instead.
    first_stride = 2 if block == "rep" else 1 if pool else draw.choice((1, 2))
    return {
        "block": block,
        "stem": "rep" if block == "rep" else draw.choice(("3x3", "7x7", "tiered")),
        "stem_width": min(64, first),
        "pool": pool,
        "widths": stage_widths(draw, first, stages),
        "depths": stage_depths(draw, stages, 3),
        "strides": [first_stride] + [2] * (stages - 1),
        "group_size": 0 if block == "rep" else draw.choice((0, 8, 16)),
    }


def _build_byobnet(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    blocks = tuple(
        ByoBlockCfg(
            type=config["block"],
            d=depth,
            c=width,
            s=stride,
            gs=config["group_size"],
            br=0.25 if config["block"] == "bottle" else 1.0,
        )
        for width, depth, stride in zip(_byobnet_widths(config), config["depths"], config["strides"], strict=True)
    )
    cfg = ByoModelCfg(
        blocks=blocks,
        stem_type=config["stem"],
        stem_pool="maxpool" if config["pool"] else "",
        stem_chs=config["stem_width"],
    )
    return ByobNet(cfg, num_classes, in_chans)


def _byobnet_widths(config: Config) -> list[int]:
    """Output channels per stage: four times the nominal width behind a bottleneck, in whole groups inside it."""
    whole = config["group_size"] or 8
    inner = [-(-width // whole) * whole for width in config["widths"]]
    return [4 * width for width in inner] if config["block"] == "bottle" else inner


def _cost_byobnet(config: Config, num_classes: int, in_chans: int, image_size: int) -> Cost:
    cost, size, channels = Cost(), halve(image_size), config["stem_width"]
    if config["stem"] == "tiered":
        chain = (in_chans, 3 * channels // 8, channels // 2, channels)
        # With a pool behind it, only the first of the stem's convolutions is strided.
        sizes = (size, size, size if config["pool"] else halve(size))
        for cin, cout, side in zip(chain[:-1], chain[1:], sizes, strict=True):
            cost.conv(cin, cout, 3, side * side, norm=True)
        size = sizes[-1]
    else:
        cost.conv(in_chans, channels, 7 if config["stem"] == "7x7" else 3, size * size, norm=True)
        if config["block"] == "rep":
            cost.conv(in_chans, channels, 1, size * size, norm=True)
    if config["pool"]:
        size = halve(size)
    for out, depth, stride in zip(_byobnet_widths(config), config["depths"], config["strides"], strict=True):
        inner = out // 4 if config["block"] == "bottle" else out
        groups = inner // config["group_size"] if config["group_size"] else 1
        for layer in range(depth):
            before = size
            if layer == 0 and stride == 2:
                size = halve(size)
            changes = layer == 0 and (stride == 2 or channels != out)
            if config["block"] == "rep":
                cost.conv(channels, out, 3, size * size, norm=True)
                cost.conv(channels, out, 1, size * size, norm=True)
                cost.vector(0 if changes else 2 * out)
            else:
                if changes:
                    cost.conv(channels, out, 1, size * size, norm=True)
                if config["block"] == "basic":
                    cost.conv(channels, out, 3, size * size, norm=True)
                    cost.conv(out, out, 3, size * size, groups=groups, norm=True)
                else:
                    cost.conv(channels, inner, 1, before * before, norm=True)
                    cost.conv(inner, inner, 3, size * size, groups=groups, norm=True)
                    cost.conv(inner, out, 1, size * size, norm=True)
            channels = out
    cost.conv(channels, num_classes, 1, 1, bias=True)
    return cost


def _resnet_family(name: str, tier: int, block: str, variant: str = "") -> Family:
    return Family(name, tier, partial(_sample_resnet, block=block, variant=variant), _build_resnet, _cost_resnet)


def _byobnet_family(name: str, block: str) -> Family:
    return Family(name, 1, partial(_sample_byobnet, block=block), _build_byobnet, _cost_byobnet)


FAMILIES = (
    _resnet_family("residual", 0, "basic"),
    _resnet_family("bottleneck", 0, "bottleneck"),
    _resnet_family("se_residual", 1, "basic", "se"),
    _resnet_family("resnext", 1, "bottleneck", "grouped"),
    Family("regnet", 1, _sample_regnet, _build_regnet, _cost_regnet),
    _byobnet_family("repvgg", "rep"),
    _byobnet_family("byob_basic", "basic"),
    _byobnet_family("byob_bottle", "bottle"),
)
