"""Random networks made of timm's own classes: what the zoo is built of, narrower and shallower, for small images.

Each family has three functions side by side: one draws a configuration, one builds it, one adds up its cost. The
proportions surround those of the real models: channels that double from stage to stage, bottlenecks that expand by
four, a 7×7 stem with max-pooling that leaves 1×1 maps in the last stage of a 32×32 image, one linear classifier.
"""

from __future__ import annotations

import math
from functools import partial

from timm.layers import ClassifierHead, GroupNorm1, make_divisible
from timm.models import metaformer
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.convmixer import ConvMixer
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.efficientnet import EfficientNet
from timm.models.mlp_mixer import MlpMixer
from timm.models.mobilenetv3 import MobileNetV3, SqueezeExcite
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vgg import VGG
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from timm_ghn.training.sampling import Config, Cost, Draw, Family, halve

# Narrow enough to be cheap, with most of the weight on the widths that real stems have.
_STEM_WIDTHS = (16, 24, 32, 32, 32, 40, 48, 48, 64, 64, 64, 64, 80, 96, 128)


def _widths(draw: Draw, first: int, stages: int) -> list[int]:
    """Channels per stage: doubling, as nearly every hierarchical network of the zoo does, or less regular."""
    doubling = draw.chance(0.7)
    widths = [first]
    while len(widths) < stages:
        growth = 2 if doubling else draw.choice((1, 1.5, 2, 2.5))
        widths.append(round(widths[-1] * growth / 8) * 8)
    return widths


def _depths(draw: Draw, stages: int, most: int) -> list[int]:
    return [draw.between(1, most) for _ in range(stages)]


# --- plain stacks of convolution, batch norm, ReLU ---


def _sample_plain(draw: Draw) -> Config:
    stages = draw.between(2, 5)
    pooled = draw.chance(0.5)
    return {
        "widths": _widths(draw, draw.choice(_STEM_WIDTHS), stages),
        "depths": _depths(draw, stages, 3),
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


# --- ResNet: residual and bottleneck blocks, squeeze-excite and grouped variants ---


def _sample_resnet(draw: Draw, block: str, variant: str = "") -> Config:
    stages = draw.choice((2, 3, 3, 4, 4, 4))
    stem = draw.choice(("7x7", "7x7", "7x7", "3x3", "3x3", "deep", "tiered"))
    width = draw.choice(_STEM_WIDTHS)
    config: Config = {
        "block": block,
        "stem": stem,
        "stem_width": width,
        "stem_stride": 1 if stem == "3x3" and draw.chance(0.3) else 2,
        "pool": draw.chance(0.7 if stem == "7x7" else 0.4),
        "widths": _widths(draw, width if draw.chance(0.8) else draw.choice(_STEM_WIDTHS), stages),
        "depths": _depths(draw, stages, draw.choice((2, 3, 3, 3, 6))),
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
    if not config["pool"]:
        model.maxpool = nn.Identity()
    for stage in range(len(config["depths"]), 4):  # ResNet's forward pass names four
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
    first = draw.choice(_STEM_WIDTHS)
    pool = block != "rep" and draw.chance(0.4)
    # Beyond a total stride of 32, ByobNet would dilate instead.
    first_stride = 2 if block == "rep" else 1 if pool else draw.choice((1, 2))
    return {
        "block": block,
        "stem": "rep" if block == "rep" else draw.choice(("3x3", "7x7", "tiered")),
        "stem_width": min(64, first),
        "pool": pool,
        "widths": _widths(draw, first, stages),
        "depths": _depths(draw, stages, 3),
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


# --- MobileNet and EfficientNet: inverted residuals ---

# Output channels and strides of the stages of MobileNet-V2; its relatives differ little.
_INVERTED_WIDTHS = (16, 24, 32, 64, 96, 160, 320)
_INVERTED_STRIDES = (1, 2, 2, 2, 1, 2, 1)


def _sample_inverted(draw: Draw, kind: str) -> Config:
    multiplier = draw.choice((0.25, 0.35, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0))
    left_out = {draw.between(1, 6) for _ in range(draw.between(0, 3))}
    stages: list[Config] = []
    for stage, (width, stride) in enumerate(zip(_INVERTED_WIDTHS, _INVERTED_STRIDES, strict=True)):
        if stage in left_out:
            continue
        if stage == 0:
            block = "cn" if kind == "efficientnetv2" else "ds"
        else:
            block = "er" if kind == "efficientnetv2" and stage < 3 else "ir"
        stages.append(
            {
                "block": block,
                "depth": 1 if stage in (0, 6) else draw.between(1, 3),
                "kernel": 3 if kind in ("mobilenetv2", "efficientnetv2") else draw.choice((3, 3, 5)),
                "stride": stride,
                "expand": draw.choice((3, 4, 6, 6)),
                "width": make_divisible(width * multiplier * draw.uniform(0.8, 1.25)),
                "se": {
                    "mobilenetv2": False,
                    "mobilenetv3": draw.chance(0.5),
                    "efficientnet": True,
                    "efficientnetv2": block == "ir",
                }[kind],
            }
        )
    return {
        "kind": kind,
        "stem_width": draw.choice((16, 24, 32, 32)),
        "stages": stages,
        "features": draw.choice((128, 256, 512, 960, 1280)),
    }


_INVERTED_ACTIVATIONS = {
    "mobilenetv2": nn.ReLU6,
    "mobilenetv3": nn.Hardswish,
    "efficientnet": nn.SiLU,
    "efficientnetv2": nn.SiLU,
}


def _inverted_block_args(stage: Config, layer: int) -> Config:
    args: Config = {
        "block_type": stage["block"],
        "out_chs": stage["width"],
        "stride": stage["stride"] if layer == 0 else 1,
        "act_layer": None,
    }
    if stage["block"] == "cn":
        return {**args, "kernel_size": stage["kernel"], "skip": True}
    args |= {"pw_kernel_size": 1, "noskip": False, "se_ratio": 0.25 if stage["se"] else 0.0}
    if stage["block"] == "ds":
        return {**args, "dw_kernel_size": stage["kernel"], "pw_act": False, "s2d": False}
    args["exp_ratio"] = float(stage["expand"])
    if stage["block"] == "er":
        return {**args, "exp_kernel_size": stage["kernel"], "force_in_chs": 0}
    return {**args, "dw_kernel_size": stage["kernel"], "exp_kernel_size": 1, "s2d": False}


def _build_inverted(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    args: Config = {
        "block_args": [
            [_inverted_block_args(stage, layer) for layer in range(stage["depth"])] for stage in config["stages"]
        ],
        "num_classes": num_classes,
        "num_features": config["features"],
        "in_chans": in_chans,
        "stem_size": config["stem_width"],
        "act_layer": _INVERTED_ACTIVATIONS[config["kind"]],
    }
    if config["kind"] != "mobilenetv3":
        return EfficientNet(**args)
    se = partial(SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU, rd_round_fn=make_divisible)
    return MobileNetV3(**args, se_layer=se)


def _cost_inverted(config: Config, num_classes: int, in_chans: int, image_size: int) -> Cost:
    v3 = config["kind"] == "mobilenetv3"
    cost, size, channels = Cost(), halve(image_size), config["stem_width"]
    cost.conv(in_chans, channels, 3, size * size, norm=True)
    for stage in config["stages"]:
        kernel, out = stage["kernel"], stage["width"]
        for layer in range(stage["depth"]):
            before = size
            if layer == 0 and stage["stride"] == 2:
                size = halve(size)
            if stage["block"] == "cn":
                cost.conv(channels, out, kernel, size * size, norm=True)
                channels = out
                continue
            inner = channels if stage["block"] == "ds" else make_divisible(channels * stage["expand"])
            if stage["block"] == "ir":
                cost.conv(channels, inner, 1, before * before, norm=True)
            if stage["block"] == "er":
                cost.conv(channels, inner, kernel, size * size, norm=True)
            else:
                cost.conv(inner, inner, kernel, size * size, groups=inner, norm=True)
            if stage["se"]:
                ratio = 0.25 if v3 or stage["block"] == "ds" else 0.25 / stage["expand"]
                squeezed = make_divisible(inner * ratio) if v3 else round(inner * ratio)
                cost.conv(inner, squeezed, 1, 1, bias=True)
                cost.conv(squeezed, inner, 1, 1, bias=True)
            cost.conv(inner, out, 1, size * size, norm=True)
            channels = out
    # MobileNet-V3 pools before its last convolution, the others behind it.
    cost.conv(channels, config["features"], 1, 1 if v3 else size * size, bias=v3, norm=not v3)
    cost.conv(config["features"], num_classes, 1, 1, bias=True)
    return cost


# --- VGG with its own head ---


def _sample_vgg(draw: Draw) -> Config:
    stages = draw.choice((3, 4, 5, 5))
    widths = _widths(draw, draw.choice((16, 16, 24, 32, 32, 48, 64)), stages)
    if stages == 5 and draw.chance(0.7):
        widths[4] = widths[3]  # as in every real one
    return {
        "widths": widths,
        "depths": _depths(draw, stages, 2),
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


# --- ConvNeXt ---


def _sample_convnext(draw: Draw) -> Config:
    return {
        "widths": _widths(draw, draw.choice((16, 24, 24, 32, 32, 40, 40, 48, 64)), 4),
        "depths": [draw.between(1, 2), draw.between(1, 2), draw.between(1, 6), draw.between(1, 2)],
        "kernel": draw.choice((3, 5, 7, 7, 7, 7)),
        "patch": draw.choice((2, 4, 4, 4)),
        "conv_mlp": draw.chance(0.5),
        "layer_scale": draw.chance(0.6),
        "grn": draw.chance(0.25),
    }


def _build_convnext(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    return ConvNeXt(
        in_chans,
        num_classes,
        depths=tuple(config["depths"]),
        dims=tuple(config["widths"]),
        kernel_sizes=config["kernel"],
        patch_size=config["patch"],
        conv_mlp=config["conv_mlp"],
        ls_init_value=1e-6 if config["layer_scale"] else None,
        use_grn=config["grn"],
    )


def _cost_convnext(config: Config, num_classes: int, in_chans: int, image_size: int) -> Cost:
    cost, size, channels = Cost(), image_size // config["patch"], config["widths"][0]
    cost.conv(in_chans, channels, config["patch"], size * size, bias=True, norm=True)
    for stage, (width, depth) in enumerate(zip(config["widths"], config["depths"], strict=True)):
        if stage > 0 or config["patch"] == 2:
            size //= 2
            cost.vector(2 * channels)
            cost.conv(channels, width, 2, size * size, bias=True)
        channels = width
        for _ in range(depth):
            cost.conv(width, width, config["kernel"], size * size, groups=width, bias=True, norm=True)
            cost.conv(width, 4 * width, 1, size * size, bias=True, norm=config["grn"])
            cost.conv(4 * width, width, 1, size * size, bias=True)
            cost.vector(width if config["layer_scale"] else 0)
    cost.vector(2 * channels)
    cost.conv(channels, num_classes, 1, 1, bias=True)
    return cost


# --- MetaFormer: PoolFormer, its second version, ConvFormer, CAFormer ---


def _sample_metaformer(draw: Draw, kind: str) -> Config:
    first = draw.choice((32, 64)) if kind == "caformer" else draw.choice((16, 24, 32, 32, 48, 64, 64))
    # Attention splits channels into heads of 32, and only a change of width makes a stage downsample.
    irregular = kind != "caformer" and draw.chance(0.5)
    return {
        "kind": kind,
        "widths": [first, 2 * first, (5 if irregular else 4) * first, 8 * first],
        "depths": [draw.between(1, 2), draw.between(1, 2), draw.between(1, 4), draw.between(1, 2)],
    }


def _build_metaformer(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    kind_args: dict[str, Config] = {
        "poolformer": {
            "downsample_norm": None,
            "mlp_act": nn.GELU,
            "mlp_bias": True,
            "norm_layers": GroupNorm1,
            "layer_scale_init_values": 1e-5,
            "res_scale_init_values": None,
            "use_mlp_head": False,
        },
        "poolformerv2": {"norm_layers": metaformer.GroupNorm1NoBias, "use_mlp_head": False},
        "convformer": {"token_mixers": metaformer.SepConv, "norm_layers": metaformer.LayerNorm2dNoBias},
        "caformer": {
            "token_mixers": [metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
            "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
        },
    }
    return metaformer.MetaFormer(
        in_chans,
        num_classes,
        depths=tuple(config["depths"]),
        dims=tuple(config["widths"]),
        **kind_args[config["kind"]],
    )


def _cost_metaformer(config: Config, num_classes: int, in_chans: int, image_size: int) -> Cost:
    first_version = config["kind"] == "poolformer"
    norm = 2 if first_version else 1  # parameters per channel: the later versions' norms have no bias
    cost, size, channels = Cost(), (image_size - 3) // 4 + 1, config["widths"][0]
    cost.conv(in_chans, channels, 7, size * size, bias=True)
    cost.vector(0 if first_version else channels)
    for stage, (width, depth) in enumerate(zip(config["widths"], config["depths"], strict=True)):
        if stage > 0:
            size = halve(size)
            cost.vector(0 if first_version else channels)
            cost.conv(channels, width, 3, size * size, bias=True)
            channels = width
        for _ in range(depth):
            cost.vector(2 * norm * width)
            if config["kind"] == "caformer" and stage >= 2:
                cost.conv(width, 3 * width, 1, size * size)
                cost.attention(width, size * size)
                cost.conv(width, width, 1, size * size)
            elif config["kind"] in ("caformer", "convformer"):
                cost.conv(width, 2 * width, 1, size * size)
                cost.conv(2 * width, 2 * width, 7, size * size, groups=2 * width)
                cost.conv(2 * width, width, 1, size * size)
                cost.vector(2)  # StarReLU's scale and bias
            cost.conv(width, 4 * width, 1, size * size, bias=first_version)
            cost.conv(4 * width, width, 1, size * size, bias=first_version)
            # Layer scale everywhere, or StarReLU's two numbers and residual scale in the last two stages.
            cost.vector(2 * width if first_version else 2 + (2 * width if stage >= 2 else 0))
    cost.vector(2 * channels)
    if config["kind"] in ("convformer", "caformer"):
        cost.conv(channels, 4 * channels, 1, 1, bias=True, norm=True)
        channels *= 4
    cost.conv(channels, num_classes, 1, 1, bias=True)
    return cost


# --- Vision transformer, MLP-Mixer, ConvMixer, Swin ---


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


def _sample_mixer(draw: Draw) -> Config:
    return {
        "patch": draw.choice((4, 4, 8, 8, 16, 32)),
        "width": draw.between(48, 512, 16),
        "depth": draw.between(2, 8),
        "token_ratio": draw.choice((0.5, 0.5, 0.5, 1.0)),
        "channel_ratio": draw.choice((2, 4, 4, 4)),
    }


def _build_mixer(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    return MlpMixer(
        num_classes,
        image_size,
        in_chans,
        config["patch"],
        num_blocks=config["depth"],
        embed_dim=config["width"],
        mlp_ratio=(config["token_ratio"], config["channel_ratio"]),
    )


def _cost_mixer(config: Config, num_classes: int, in_chans: int, image_size: int) -> Cost:
    cost, width = Cost(), config["width"]
    tokens = (image_size // config["patch"]) ** 2
    cost.conv(in_chans, width, config["patch"], tokens, bias=True)
    for _ in range(config["depth"]):
        cost.vector(4 * width)
        cost.conv(tokens, int(config["token_ratio"] * width), 1, width, bias=True)
        cost.conv(int(config["token_ratio"] * width), tokens, 1, width, bias=True)
        cost.conv(width, config["channel_ratio"] * width, 1, tokens, bias=True)
        cost.conv(config["channel_ratio"] * width, width, 1, tokens, bias=True)
    cost.vector(2 * width)
    cost.conv(width, num_classes, 1, 1, bias=True)
    return cost


def _sample_convmixer(draw: Draw) -> Config:
    return {
        "width": draw.between(32, 256, 16),
        "depth": draw.between(2, 10),
        "kernel": draw.choice((3, 5, 7, 7, 9)),
        "patch": draw.choice((2, 4, 4, 7, 7)),
    }


def _build_convmixer(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    return ConvMixer(
        config["width"], config["depth"], config["kernel"], config["patch"], in_chans=in_chans, num_classes=num_classes
    )


def _cost_convmixer(config: Config, num_classes: int, in_chans: int, image_size: int) -> Cost:
    cost, width = Cost(), config["width"]
    positions = (image_size // config["patch"]) ** 2
    cost.conv(in_chans, width, config["patch"], positions, bias=True, norm=True)
    for _ in range(config["depth"]):
        cost.conv(width, width, config["kernel"], positions, groups=width, bias=True, norm=True)
        cost.conv(width, width, 1, positions, bias=True, norm=True)
    cost.conv(width, num_classes, 1, 1, bias=True)
    return cost


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


def _resnet_family(name: str, tier: int, block: str, variant: str = "") -> Family:
    return Family(name, tier, partial(_sample_resnet, block=block, variant=variant), _build_resnet, _cost_resnet)


def _byobnet_family(name: str, block: str) -> Family:
    return Family(name, 1, partial(_sample_byobnet, block=block), _build_byobnet, _cost_byobnet)


def _inverted_family(name: str) -> Family:
    return Family(name, 1, partial(_sample_inverted, kind=name), _build_inverted, _cost_inverted)


def _metaformer_family(name: str) -> Family:
    return Family(name, 2, partial(_sample_metaformer, kind=name), _build_metaformer, _cost_metaformer)


TIMM_FAMILIES = (
    Family("plain", 0, _sample_plain, _build_plain, _cost_plain),
    _resnet_family("residual", 0, "basic"),
    _resnet_family("bottleneck", 0, "bottleneck"),
    _resnet_family("se_residual", 1, "basic", "se"),
    _resnet_family("resnext", 1, "bottleneck", "grouped"),
    Family("regnet", 1, _sample_regnet, _build_regnet, _cost_regnet),
    _byobnet_family("repvgg", "rep"),
    _byobnet_family("byob_basic", "basic"),
    _byobnet_family("byob_bottle", "bottle"),
    _inverted_family("mobilenetv2"),
    _inverted_family("mobilenetv3"),
    _inverted_family("efficientnet"),
    _inverted_family("efficientnetv2"),
    Family("vgg", 1, _sample_vgg, _build_vgg, _cost_vgg),
    Family("densenet", 1, _sample_densenet, _build_densenet, _cost_densenet),
    Family("convnext", 2, _sample_convnext, _build_convnext, _cost_convnext),
    _metaformer_family("poolformer"),
    _metaformer_family("poolformerv2"),
    _metaformer_family("convformer"),
    _metaformer_family("caformer"),
    Family("vit", 2, _sample_vit, _build_vit, _cost_vit, fixed_size=True),
    Family("mixer", 2, _sample_mixer, _build_mixer, _cost_mixer, fixed_size=True),
    Family("convmixer", 2, _sample_convmixer, _build_convmixer, _cost_convmixer),
    Family("swin", 2, _sample_swin, _build_swin, _cost_swin, fixed_size=True),
)
