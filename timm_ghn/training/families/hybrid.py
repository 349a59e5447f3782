"""Convolutions and attention in one network: MobileViT, CoAtNet, MaxViT."""

from __future__ import annotations

from functools import partial

from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from torch import nn

from timm_ghn.training.sampling import Config, Draw, Family

# --- MobileViT: inverted residuals, with transformers over every patch's pixels of the same place in between ---


def _sample_mobilevit(draw: Draw, block: str) -> Config:
    stages = draw.between(2, 4)
    first = draw.choice((16, 16, 24, 32, 48))
    widths = [first]
    while len(widths) < stages:
        widths.append(round(widths[-1] * draw.uniform(1.2, 2) / 8) * 8)
    return {
        "block": block,
        "stem_width": draw.choice((16, 16, 24, 32)),
        "widths": widths,
        "depths": [draw.between(1, 3) for _ in range(stages)],
        "expand": draw.choice((2, 2, 4)),
        # Transformers in the stages from this one on, and their blocks and widths there, as multiples of four heads.
        "first_transformer": draw.between(1, stages - 1),
        "transformer_depths": [draw.between(1, 3) for _ in range(stages)],
        "transformer_ratio": draw.choice((0.5, 0.5, 0.75)) if block == "mobilevit2" else draw.choice((1, 1.25, 1.5)),
        "features": draw.choice((0, 128, 320)) if block == "mobilevit" else 0,
    }


def _build_mobilevit(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    blocks: list[tuple[ByoBlockCfg, ...]] = []
    for stage, (width, depth) in enumerate(zip(config["widths"], config["depths"], strict=True)):
        inverted = ByoBlockCfg(
            type="bottle",
            d=depth,
            c=width,
            s=2 if stage > 0 else 1,
            gs=1,
            br=float(config["expand"]),
            block_kwargs={"bottle_in": True, "linear_out": True},
        )
        if stage < config["first_transformer"]:
            blocks.append((inverted,))
            continue
        transformer = ByoBlockCfg(
            type=config["block"],
            d=1,
            c=width,
            s=1,
            gs=1 if config["block"] == "mobilevit2" else None,
            block_kwargs={
                "transformer_dim": round(width * config["transformer_ratio"] / 8) * 8,
                "transformer_depth": config["transformer_depths"][stage],
                "patch_size": 2,
            },
        )
        blocks.append((inverted, transformer))
    cfg = ByoModelCfg(
        blocks=tuple(blocks),
        stem_type="3x3",
        stem_pool="",
        stem_chs=config["stem_width"],
        downsample="",
        act_layer="silu",
        num_features=config["features"],
    )
    return ByobNet(cfg, num_classes, in_chans)


# --- CoAtNet and MaxViT ---


def _sample_maxxvit(draw: Draw, kind: str) -> Config:
    stages = draw.choice((2, 3, 3) if kind == "coatnet" else (2, 2, 3))
    head = draw.choice((8, 16, 16, 32))
    first = head * draw.between(1, max(1, 32 // head))
    convolutions = draw.between(1, stages - 1) if kind == "coatnet" else 0
    return {
        "kind": kind,
        "stem_width": draw.choice((16, 24, 32)),
        "widths": [first * 2**stage for stage in range(stages)],
        "head": head,
        "depths": [draw.between(1, 2 if kind == "maxvit" else 3) for _ in range(stages)],
        "convolutions": convolutions,
        "position": draw.choice(("bias", "bias", "bias_tf", "mlp")),
        "expand_first": draw.chance(0.5),
        "expand_output": draw.chance(0.5),
        "stride": draw.choice(("dw", "dw", "pool")),
        "hidden_head": draw.chance(0.3),
    }


def _build_maxxvit(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    stages = len(config["depths"])
    # Windows and grids are as large as the last map, so that they divide all of them.
    window = (image_size >> (stages + 1),) * 2
    blocks = ("C",) * config["convolutions"] + ("T",) * (stages - config["convolutions"])
    cfg = MaxxVitCfg(
        embed_dim=tuple(config["widths"]),
        depths=tuple(config["depths"]),
        block_type=("M",) * stages if config["kind"] == "maxvit" else blocks,
        stem_width=config["stem_width"],
        conv_cfg=MaxxVitConvCfg(expand_output=config["expand_output"], stride_mode=config["stride"], act_layer="silu"),
        transformer_cfg=MaxxVitTransformerCfg(
            dim_head=config["head"],
            expand_first=config["expand_first"],
            rel_pos_type=config["position"],
            rel_pos_dim=64,
            window_size=window,
        ),
        head_hidden_size=config["widths"][-1] if config["hidden_head"] else None,
    )
    model = MaxxVit(cfg, image_size, in_chans, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the MLPs of relative positions have some of their own
    return model


FAMILIES = (
    Family("mobilevit", 3, partial(_sample_mobilevit, block="mobilevit"), _build_mobilevit),
    Family("mobilevitv2", 3, partial(_sample_mobilevit, block="mobilevit2"), _build_mobilevit),
    Family("coatnet", 3, partial(_sample_maxxvit, kind="coatnet"), _build_maxxvit, fixed_size=True),
    Family("maxvit", 3, partial(_sample_maxxvit, kind="maxvit"), _build_maxxvit, fixed_size=True),
)
