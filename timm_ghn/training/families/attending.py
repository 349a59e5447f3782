"""Transformers with an attention of their own, or a place of its own for it, whose classes take configurations."""

from __future__ import annotations

from timm.models.beit import Beit
from timm.models.convit import ConVit
from timm.models.davit import DaVit
from timm.models.efficientvit_mit import EfficientVit
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.pit import PoolingVisionTransformer
from timm.models.swiftformer import SwiftFormer
from timm.models.tnt import TNT
from timm.models.twins import Twins
from torch import nn

from timm_ghn.training.sampling import Config, Draw, Family, built_by, stage_depths, stage_widths


def _widths_and_heads(draw: Draw, stages: int) -> tuple[list[int], list[int]]:
    """Widths that double from stage to stage, and heads of one width."""
    head = draw.choice((8, 16, 16, 32, 32))
    first = draw.between(1, max(1, 64 // head))
    heads = [first * 2**stage for stage in range(stages)]
    return [head * count for count in heads], heads


def _sample_davit(draw: Draw) -> Config:
    stages = draw.choice((2, 3, 3, 4))
    widths, heads = _widths_and_heads(draw, stages)
    return {
        "embed_dims": widths,
        "num_heads": heads,
        "depths": stage_depths(draw, stages, 2),
        "window_size": draw.choice((4, 7)),
        "down_kernel_size": draw.choice((2, 2, 3)),
    }


def _sample_twins(draw: Draw) -> Config:
    widths, heads = _widths_and_heads(draw, 4)
    return {
        "patch_size": 4,
        "embed_dims": widths,
        "num_heads": heads,
        "mlp_ratios": draw.choice(([4, 4, 4, 4], [8, 8, 4, 4])),
        "depths": stage_depths(draw, 4, 2),
        "sr_ratios": [8, 4, 2, 1],
        "wss": draw.choice((None, [7, 7, 7, 7])),
    }


def _sample_pit(draw: Draw) -> Config:
    stages = draw.choice((2, 3, 3))
    patch = draw.choice((2, 4, 4, 8))
    first = draw.choice((2, 2, 3, 4))
    return {
        "patch_size": patch,
        "stride": max(2, patch // draw.choice((1, 2))),
        "base_dims": [draw.choice((16, 24, 32, 48))] * stages,
        "depth": stage_depths(draw, stages, 3),
        "heads": [first * 2**stage for stage in range(stages)],
    }


def _vit_sizes(draw: Draw) -> Config:
    head = draw.choice((16, 32, 32, 64))
    heads = draw.between(1, max(1, 192 // head))
    return {
        "patch_size": draw.choice((4, 4, 8)),
        "embed_dim": head * heads,
        "num_heads": heads,
        "depth": draw.between(2, 8),
    }


def _sample_beit(draw: Draw) -> Config:
    return {
        **_vit_sizes(draw),
        "use_abs_pos_emb": False,
        **draw.choice(({"use_rel_pos_bias": True}, {"use_shared_rel_pos_bias": True})),
        "init_values": draw.choice((0.1, 1e-5)),
    }


def _sample_convit(draw: Draw) -> Config:
    sizes = _vit_sizes(draw)
    heads = draw.choice((4, 9))  # their places are a square
    return {
        **sizes,
        "num_heads": heads,
        "embed_dim": draw.choice((12, 16, 24) if heads == 9 else (16, 24, 48)),  # of one head
        "local_up_to_layer": draw.between(1, sizes["depth"] - 1),
        "locality_strength": 1.0,
    }


def _sample_swiftformer(draw: Draw) -> Config:
    stages = draw.choice((3, 3, 4))
    return {
        "embed_dims": stage_widths(draw, draw.choice((24, 32, 48)), stages),
        "layers": stage_depths(draw, stages, 3),
        "downsamples": [False] + [True] * (stages - 1),
    }


def _sample_efficientvit(draw: Draw) -> Config:
    stages = draw.between(4, 5)
    widths = stage_widths(draw, draw.choice((8, 8, 16)), stages)
    features = draw.choice((256, 512, 1024))
    return {
        "widths": [-(-width // 16) * 16 if stage >= 2 else width for stage, width in enumerate(widths)],
        "depths": [1, *stage_depths(draw, stages - 1, 2)],
        "head_dim": 16,
        "head_widths": [features, features + draw.choice((0, 256))],
    }


def _sample_mvit(draw: Draw) -> Config:
    stages = draw.choice((2, 3, 3))
    widths, heads = _widths_and_heads(draw, stages)
    patch = draw.choice(((3, 2, 1), (7, 4, 3)))
    return {
        "depths": stage_depths(draw, stages, 2),
        "embed_dim": widths,
        "num_heads": heads,
        "patch": patch,
        "expand": draw.chance(0.6),
        "class_token": draw.chance(0.2),
    }


def _build_mvit(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    kernel, stride, padding = ((size, size) for size in config["patch"])
    cfg = MultiScaleVitCfg(
        depths=tuple(config["depths"]),
        embed_dim=tuple(config["embed_dim"]),
        num_heads=tuple(config["num_heads"]),
        expand_attn=config["expand"],
        use_cls_token=config["class_token"],
        stride_q=((1, 1),) + ((2, 2),) * (len(config["depths"]) - 1),
        patch_kernel=kernel,
        patch_stride=stride,
        patch_padding=padding,
    )
    return MultiScaleVit(cfg, (image_size, image_size), in_chans, num_classes=num_classes)


def _sample_tnt(draw: Draw) -> Config:
    head = draw.choice((16, 32, 32, 64))
    heads = draw.between(1, max(1, 192 // head))
    stride = draw.choice((2, 4))
    return {
        "patch_size": stride * draw.choice((2, 4)),
        "first_stride": stride,
        "embed_dim": head * heads,
        "inner_dim": draw.choice((12, 16, 24)),
        "depth": draw.between(2, 8),
        "num_heads_outer": heads,
        "legacy": draw.chance(0.2),
    }


FAMILIES = (
    Family("davit", 3, _sample_davit, built_by(DaVit)),
    Family("twins", 3, _sample_twins, built_by(Twins, sized=True), fixed_size=True),
    Family("pit", 3, _sample_pit, built_by(PoolingVisionTransformer, sized=True), fixed_size=True),
    Family("beit", 3, _sample_beit, built_by(Beit, sized=True), fixed_size=True),
    Family("convit", 3, _sample_convit, built_by(ConVit, sized=True), fixed_size=True),
    Family("swiftformer", 3, _sample_swiftformer, built_by(SwiftFormer)),
    Family("efficientvit", 3, _sample_efficientvit, built_by(EfficientVit)),
    Family("mvit", 3, _sample_mvit, _build_mvit, fixed_size=True),
    Family("tnt", 3, _sample_tnt, built_by(TNT, sized=True), fixed_size=True),
)
