"""Residual networks that normalise otherwise: before each convolution, over groups of channels, or not at all."""

from __future__ import annotations

from functools import partial

from timm.layers import BatchNormAct2d, GroupNorm, GroupNormAct, StdConv2d, create_conv2d
from timm.models.nfnet import NfCfg, NormFreeNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn

from timm_ghn.training.families.residual import without_unused
from timm_ghn.training.sampling import STEM_WIDTHS, Config, Draw, Family, stage_depths, stage_widths

# --- ResNetV2: norm and activation before each convolution, BiT's with groups and standardised weights ---


def _sample_resnetv2(draw: Draw, norm: str) -> Config:
    stages = draw.choice((2, 3, 3, 4, 4))
    basic = draw.chance(0.3)
    # Norms have 32 groups, as in the whole zoo: every width is a multiple of that.
    first = draw.choice((32, 64)) if norm == "group" else draw.choice(STEM_WIDTHS)
    widths = [first * 2**stage for stage in range(stages)] if norm == "group" else stage_widths(draw, first, stages)
    deep = draw.chance(0.25)
    return {
        "norm": norm,
        "standardised": norm == "group" and draw.chance(0.7),
        "stem": draw.choice(("deep", "deep_fixed")) if deep else draw.choice(("", "", "fixed")),
        "stem_width": 64 if deep else draw.choice((32, 64)),
        "basic": basic,
        "preact": basic or draw.chance(0.85),
        "widths": widths if basic else [4 * width for width in widths],
        "depths": stage_depths(draw, stages, draw.choice((2, 3, 3, 6))),
        "avg_down": deep and draw.chance(0.5),
        "act": draw.choice(("relu", "relu", "silu")),
    }


def _build_resnetv2(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    return ResNetV2(
        config["depths"],
        config["widths"],
        num_classes,
        in_chans,
        stem_chs=config["stem_width"],
        stem_type=config["stem"],
        avg_down=config["avg_down"],
        preact=config["preact"],
        basic=config["basic"],
        bottle_ratio=1.0 if config["basic"] else 0.25,
        act_layer=config["act"],
        norm_layer=GroupNormAct if config["norm"] == "group" else BatchNormAct2d,
        conv_layer=partial(StdConv2d, eps=1e-8) if config["standardised"] else create_conv2d,
    )


# --- ResNet with group norm ---


def _sample_grouped(draw: Draw) -> Config:
    stages = draw.choice((2, 3, 3, 4))
    first = draw.choice((32, 64))
    return {
        "block": draw.choice(("basic", "bottleneck")),
        "pool": draw.chance(0.7),
        "widths": [first * 2**stage for stage in range(stages)],
        "depths": stage_depths(draw, stages, draw.choice((2, 3, 6))),
    }


def _build_grouped(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    model = ResNet(
        BasicBlock if config["block"] == "basic" else Bottleneck,
        tuple(config["depths"]),
        num_classes=num_classes,
        in_chans=in_chans,
        channels=tuple(config["widths"]),
        norm_layer=GroupNorm,
    )
    return without_unused(model, config)


# --- NFNet: scaled and standardised weights in the place of norms ---


def _sample_nfnet(draw: Draw) -> Config:
    stages = draw.between(2, 4)
    kind = draw.choice(("resnet", "regnet", "nfnet", "nfnet"))
    depths = stage_depths(draw, stages, draw.choice((2, 3, 6)))
    if kind == "resnet":
        widths = [4 * width for width in stage_widths(draw, draw.choice((16, 32, 48, 64)), stages)]
        attention = draw.choice((None, None, "se", "eca"))
        return {
            "depths": depths, "channels": widths, "stem_type": draw.choice(("7x7_pool", "7x7_pool", "deep_pool")),
            "stem_chs": draw.choice((32, 64)), "bottle_ratio": 0.25, "act_layer": draw.choice(("relu", "silu")),
            "attn_layer": attention, "attn_kwargs": {"rd_ratio": 1 / 16} if attention == "se" else {},
        }  # fmt: skip
    if kind == "regnet":
        widths = stage_widths(draw, draw.choice((24, 32, 48)), stages)
        return {
            "depths": depths, "channels": widths, "stem_type": "3x3", "group_size": 8, "bottle_ratio": 2.25,
            "num_features": 3 * widths[-1], "reg": True, "attn_layer": "se", "attn_kwargs": {"rd_ratio": 0.5},
        }  # fmt: skip
    widths = stage_widths(draw, draw.choice((32, 64, 64, 96, 128)), stages)
    attention = draw.choice(("se", "se", "eca"))
    ratio = draw.choice((0.25, 0.5, 0.5))
    published = draw.chance(0.4)  # as their authors have them; timm's own are quicker
    return {
        "depths": depths, "channels": widths, "stem_type": "deep_quad", "stem_chs": draw.choice((32, 64)),
        "group_size": min(draw.choice((8, 16, 32)), int(ratio * widths[0])), "bottle_ratio": ratio, "extra_conv": True,
        "num_features": round(draw.choice((1.5, 2)) * widths[-1]), "act_layer": draw.choice(("gelu", "silu")),
        "attn_layer": attention, "attn_kwargs": {"rd_ratio": 0.5} if attention == "se" else {},
        "gamma_in_act": published, "same_padding": published, "skipinit": published,
    }  # fmt: skip


def _build_nfnet(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    return NormFreeNet(NfCfg(**config), num_classes, in_chans)


FAMILIES = (
    Family("resnetv2", 3, partial(_sample_resnetv2, norm="batch"), _build_resnetv2),
    Family("resnetv2_group", 3, partial(_sample_resnetv2, norm="group"), _build_resnetv2),
    Family("residual_group", 3, _sample_grouped, _build_grouped),
    Family("nfnet", 3, _sample_nfnet, _build_nfnet),
)
