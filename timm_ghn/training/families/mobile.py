"""Inverted residuals: MobileNets and EfficientNets."""

from __future__ import annotations

from functools import partial

from timm.layers import make_divisible
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3, SqueezeExcite
from torch import nn

from timm_ghn.training.sampling import Config, Cost, Draw, Family, halve

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


def _sample_same(draw: Draw) -> Config:
    """As TensorFlow pads: all on one side, where a stride leaves it an odd number of zeros."""
    return {**_sample_inverted(draw, draw.choice(tuple(_INVERTED_ACTIVATIONS))), "pad": "same"}


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
    if "pad" in config:
        args |= {"pad_type": config["pad"], "norm_layer": partial(nn.BatchNorm2d, eps=1e-3)}
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


FAMILIES = (
    *(
        Family(kind, 1, partial(_sample_inverted, kind=kind), _build_inverted, _cost_inverted)
        for kind in _INVERTED_ACTIVATIONS
    ),
    Family("mobile_same", 3, _sample_same, _build_inverted, _cost_inverted),
)
