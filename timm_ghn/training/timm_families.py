"""Random networks made of timm's own classes: what the zoo is built of, narrower and shallower, for small images.

Each family has three functions side by side: one draws a configuration, one builds it, one adds up its cost. The
proportions surround those of the real models: channels that double from stage to stage, bottlenecks that expand by
four, a 7×7 stem with max-pooling that leaves 1×1 maps in the last stage of a 32×32 image, one linear classifier.
"""

from __future__ import annotations

from functools import partial

from timm.layers import ClassifierHead
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vgg import VGG
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


# --- plain stacks of convolution, batch norm, ReLU ---------------------------------------------------------------


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
        layers = [layer for width, depth in zip(widths, depths) for layer in [width] * depth + ["M"]]
        model = VGG(layers[:-1], num_classes, in_chans, mlp_ratio=1 / 4096, norm_layer=nn.BatchNorm2d)
        # VGG's own head is a family of its own: here the features go straight to one linear layer.
        model.pre_logits = nn.Identity()
        model.head = ClassifierHead(widths[-1], num_classes)
        model.head_hidden_size = widths[-1]
        return model
    blocks = [
        [
            {"block_type": "cn", "out_chs": width, "stride": stride if layer == 0 else 1, "act_layer": None,
             "kernel_size": 3, "skip": False}
            for layer in range(depth)
        ]
        for width, depth, stride in zip(widths, depths, [config["first_stride"]] + [2] * (len(widths) - 1))
    ]  # fmt: skip
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
    for stage, (width, depth) in enumerate(zip(config["widths"], config["depths"])):
        if stage > 0:
            size = size // 2 if pooled else halve(size)
        elif config["first_stride"] == 2:
            size = halve(size)
        for _ in range(depth):
            cost.conv(channels, width, 3, size * size, bias=pooled, norm=True)
            channels = width
    cost.conv(channels, num_classes, 1, 1, bias=True)
    return cost


# --- ResNet: residual and bottleneck blocks, squeeze-excite and grouped variants -----------------------------------


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
        "depths": _depths(draw, stages, 3),
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
    for stage, (planes, depth) in enumerate(zip(config["widths"], config["depths"])):
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


def _resnet_family(name: str, tier: int, block: str, variant: str = "") -> Family:
    return Family(name, tier, partial(_sample_resnet, block=block, variant=variant), _build_resnet, _cost_resnet)


TIMM_FAMILIES = (
    Family("plain", 0, _sample_plain, _build_plain, _cost_plain),
    _resnet_family("residual", 0, "basic"),
    _resnet_family("bottleneck", 0, "bottleneck"),
    _resnet_family("se_residual", 1, "basic", "se"),
    _resnet_family("resnext", 1, "bottleneck", "grouped"),
)
