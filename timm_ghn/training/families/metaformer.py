"""Mixers of positions and mixers of channels in turn: ConvNeXt, MetaFormer and its kin, MLP-Mixer, ConvMixer."""

from __future__ import annotations

from functools import partial

from timm.layers import GroupNorm1
from timm.models import metaformer
from timm.models.convmixer import ConvMixer
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from timm_ghn.training.sampling import Config, Cost, Draw, Family, halve, stage_widths

# --- ConvNeXt ---


def _sample_convnext(draw: Draw) -> Config:
    return {
        "widths": stage_widths(draw, draw.choice((16, 24, 24, 32, 32, 40, 40, 48, 64)), 4),
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


# --- MLP-Mixer and ConvMixer ---


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


def _metaformer_family(name: str) -> Family:
    return Family(name, 2, partial(_sample_metaformer, kind=name), _build_metaformer, _cost_metaformer)


FAMILIES = (
    Family("convnext", 2, _sample_convnext, _build_convnext, _cost_convnext),
    _metaformer_family("poolformer"),
    _metaformer_family("poolformerv2"),
    _metaformer_family("convformer"),
    _metaformer_family("caformer"),
    Family("mixer", 2, _sample_mixer, _build_mixer, _cost_mixer, fixed_size=True),
    Family("convmixer", 2, _sample_convmixer, _build_convmixer, _cost_convmixer),
)
