"""Convolutional networks whose classes take their configuration as arguments: mostly kinds of one paper each."""

from __future__ import annotations

from functools import partial

from timm.layers import make_divisible
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.efficientnet import EfficientNet
from timm.models.fasternet import FasterNet
from timm.models.fastvit import FastVit
from timm.models.ghostnet import GhostNet
from timm.models.hgnet import HighPerfGpuNet
from timm.models.inception_next import MetaNeXt
from timm.models.mobilenetv3 import MobileNetV3, SqueezeExcite
from timm.models.repvit import RepVit
from timm.models.starnet import StarNet
from timm.models.tresnet import TResNet
from torch import nn

from timm_ghn.training.sampling import Config, Draw, Family, built_by, stage_depths, stage_widths


def _stages(draw: Draw, first: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Widths and depths of two to four stages."""
    widths = stage_widths(draw, draw.choice(first), draw.choice((2, 3, 3, 4, 4)))
    return widths, stage_depths(draw, len(widths), 3)


def _sample_fasternet(draw: Draw) -> Config:
    return {
        "embed_dim": draw.choice((24, 32, 40, 64)),
        "depths": stage_depths(draw, draw.between(2, 4), draw.choice((2, 3, 6))),
        "patch_size": draw.choice((2, 4, 4)),
        "feature_dim": draw.choice((320, 640, 1280)),
        "drop_path_rate": 0.0,
    }


def _sample_starnet(draw: Draw) -> Config:
    return {
        "base_dim": draw.choice((16, 24, 24, 32)),
        "depths": stage_depths(draw, draw.between(2, 4), draw.choice((2, 3, 6))),
        "mlp_ratio": draw.choice((3, 4, 4)),
    }


def _sample_inception_next(draw: Draw) -> Config:
    widths, depths = _stages(draw, (24, 32, 40, 64, 96))
    return {"depths": depths, "dims": widths, "mlp_ratios": [4] * (len(widths) - 1) + [3], "ls_init_value": 1e-6}


def _sample_repvit(draw: Draw) -> Config:
    widths, depths = _stages(draw, (24, 32, 40, 48, 64))
    return {"embed_dim": widths, "depth": depths, "distillation": False, "legacy": draw.chance(0.5)}


def _sample_fastvit(draw: Draw) -> Config:
    depths = stage_depths(draw, draw.choice((2, 3, 3, 4, 4)), 3)
    first = draw.choice((24, 32, 48, 64))
    widths = [first * 2**stage for stage in range(len(depths))]  # convolutions in between have groups of one input
    return {
        "layers": depths,
        "embed_dims": widths,
        "token_mixers": ["repmixer"] * len(widths),
        "mlp_ratios": [draw.choice((3, 3, 4))] * len(widths),
        "downsamples": [False] + [True] * (len(widths) - 1),
        "se_downsamples": [False] * len(widths),
        "pos_embs": [None] * len(widths),
        "lkc_use_act": draw.chance(0.3),
    }


def _sample_tresnet(draw: Draw) -> Config:
    return {
        "layers": stage_depths(draw, 4, 2),
        "width_factor": draw.choice((0.25, 0.375, 0.5, 0.5)),
        "v2": draw.chance(0.3),
    }


def _sample_hgnet(draw: Draw) -> Config:
    first, stages = draw.choice((16, 24, 32, 48)), []
    width, inner, large = first, draw.choice((16, 24, 32)), draw.chance(0.6)
    for stage in range(4):
        out = round(width * draw.choice((1.5, 2, 2, 3)) / 8) * 8
        light = large and stage >= 2
        kernel = 5 if light else 3
        # input, inner and output channels, blocks, whether it halves the map, depthwise convolutions, kernel, layers
        stages.append([width, inner, out, draw.between(1, 2), stage > 0, light, kernel, draw.between(2, 4)])
        width, inner = out, round(inner * draw.choice((1, 1.5, 2)) / 8) * 8
    stem = [first // 2, first] if large else [first // 2, first // 2, first]
    return {
        "cfg": {
            "stem_type": "v2" if large else "v1",
            "stem_chs": stem,
            **{f"stage{number}": stage for number, stage in enumerate(stages, 1)},
        },
        "head_hidden_size": draw.choice((256, 512, 1024)),
        "use_lab": large and draw.chance(0.3),
    }


def _sample_ghostnet(draw: Draw) -> Config:
    """Bottlenecks of kernel, inner and output channels, squeeze-excite and stride, as in the class's own table."""
    width, rows = draw.choice((8, 12, 16, 16)), []
    for stage in range(draw.between(3, 5)):
        blocks = []
        for layer in range(draw.between(1, 3)):
            inner = round(width * draw.choice((2, 3, 4, 6)) / 4) * 4
            se = draw.choice((0, 0.25)) if stage >= 2 else 0
            kernel = draw.choice((3, 5)) if stage >= 2 else 3
            blocks.append([kernel, inner, width, se, 2 if stage > 0 and layer == 0 else 1])
        rows += [[block] for block in blocks]
        width = round(width * draw.uniform(1.4, 2) / 4) * 4
    return {"cfgs": rows, "drop_rate": 0.0}


# --- depthwise separable: MobileNet, PP-LCNet, and MixNet's kernels of several sizes ---


def _sample_separable(draw: Draw) -> Config:
    hard = draw.chance(0.6)  # PP-LCNet, or the first MobileNet
    width, stages = draw.choice((16, 16, 24, 32)), []
    count = draw.between(3, 5)
    for stage in range(count):
        stages.append(
            {
                "width": width,
                "depth": 1 if stage == 0 else draw.between(1, 3),
                "stride": 1 if stage == 0 else 2,
                "kernel": draw.choice((3, 5)) if hard and stage >= 2 else 3,
                "se": hard and stage == count - 1,
            }
        )
        width = make_divisible(width * draw.choice((1.5, 2, 2)))
    return {
        "hard": hard,
        "stem_width": draw.choice((8, 16, 32)),
        "stages": stages,
        "features": draw.choice((256, 640, 1280)),
    }


def _build_separable(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    blocks = [
        [
            {
                "block_type": "ds", "out_chs": stage["width"], "stride": stage["stride"] if layer == 0 else 1,
                "act_layer": None, "dw_kernel_size": stage["kernel"], "pw_kernel_size": 1, "pw_act": True,
                "noskip": True, "s2d": False, "se_ratio": 0.25 if stage["se"] else 0.0,
            }
            for layer in range(stage["depth"])
        ]
        for stage in config["stages"]
    ]  # fmt: skip
    if config["hard"]:
        se = partial(SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU)
        return MobileNetV3(
            blocks, num_classes, in_chans, config["stem_width"], num_features=config["features"],
            act_layer=nn.Hardswish, se_layer=se,
        )  # fmt: skip
    return EfficientNet(blocks, num_classes, 0, in_chans, config["stem_width"], act_layer=nn.ReLU6)


def _sample_mixnet(draw: Draw) -> Config:
    width, stages = draw.choice((16, 16, 24)), []
    for stage in range(draw.between(3, 5)):
        stages.append(
            {
                "width": width,
                "depth": draw.between(1, 2),
                "stride": 1 if stage == 0 else 2,
                "kernels": [3, 5, 7, 9][: draw.between(1, 4 if stage >= 2 else 3)],
                "mixed": stage > 0 and draw.chance(0.5),
                "expand": draw.choice((3, 6)),
                "se": draw.choice((0, 0.25, 0.5)) if stage >= 2 else 0,
            }
        )
        width = make_divisible(width * draw.choice((1.25, 1.5, 2)))
    return {"stem_width": draw.choice((16, 24)), "stages": stages, "features": draw.choice((256, 768, 1536))}


def _build_mixnet(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    blocks = []
    for stage in config["stages"]:
        pointwise = [1, 1] if stage["mixed"] else 1
        blocks.append(
            [
                {
                    "block_type": "ir", "out_chs": stage["width"], "stride": stage["stride"] if layer == 0 else 1,
                    "act_layer": nn.SiLU if stage["se"] else None, "exp_ratio": float(stage["expand"]),
                    "exp_kernel_size": pointwise, "pw_kernel_size": pointwise, "noskip": False, "s2d": False,
                    "dw_kernel_size": stage["kernels"], "se_ratio": stage["se"],
                }
                for layer in range(stage["depth"])
            ]
        )  # fmt: skip
    return EfficientNet(blocks, num_classes, config["features"], in_chans, config["stem_width"], act_layer=nn.ReLU)


# --- MobileOne: branches of depthwise separable convolutions ---


def _sample_mobileone(draw: Draw) -> Config:
    widths, depths = _stages(draw, (24, 32, 48, 64))
    return {
        "stem_width": draw.choice((24, 32, 48)),
        "widths": widths,
        "depths": depths,
        "branches": draw.choice((1, 1, 2, 4)),
        "se": draw.chance(0.2),
    }


def _build_mobileone(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    stages, before = [], config["stem_width"]
    for width, depth in zip(config["widths"], config["depths"], strict=True):
        blocks = []
        gate = "se" if config["se"] and width == config["widths"][-1] else None
        branches = {"num_conv_branches": config["branches"]}
        for layer in range(depth):
            blocks += [
                ByoBlockCfg(
                    type="one", d=1, c=before, s=1 if layer else 2, gs=1, attn_layer=gate, block_kwargs=branches
                ),
                ByoBlockCfg(
                    type="one", d=1, c=width, gs=0, attn_layer=gate, block_kwargs={**branches, "kernel_size": 1}
                ),
            ]
            before = width
        stages.append(tuple(blocks))
    cfg = ByoModelCfg(tuple(stages), stem_type="one", stem_chs=config["stem_width"])
    return ByobNet(cfg, num_classes, in_chans)


FAMILIES = (
    Family("separable", 3, _sample_separable, _build_separable),
    Family("mixnet", 3, _sample_mixnet, _build_mixnet),
    Family("mobileone", 3, _sample_mobileone, _build_mobileone),
    Family("ghostnet", 3, _sample_ghostnet, built_by(GhostNet)),
    Family("fasternet", 3, _sample_fasternet, built_by(FasterNet)),
    Family("starnet", 3, _sample_starnet, built_by(StarNet)),
    Family("inception_next", 3, _sample_inception_next, built_by(MetaNeXt)),
    Family("repvit", 3, _sample_repvit, built_by(RepVit)),
    Family("fastvit", 3, _sample_fastvit, built_by(FastVit)),
    Family("tresnet", 3, _sample_tresnet, built_by(TResNet)),
    Family("hgnet", 3, _sample_hgnet, built_by(HighPerfGpuNet)),
)
