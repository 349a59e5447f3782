"""Vision transformers of one resolution."""

from __future__ import annotations

from functools import partial

from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from torch import nn

from timm_ghn.training.sampling import Config, Cost, Draw, Family


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


def _affordable_depth(draw: Draw, width: int, tokens: int) -> int:
    """Two blocks or more, of some sixteen million multiply-accumulates at most if their proportions are the usual."""
    block = 12 * width * width * tokens + 2 * width * tokens * tokens
    return draw.between(2, max(2, min(12, 16_000_000 // block)))


# --- vision transformers of small patches, with all that timm's have: registers, kinds of pooling, DeiT-3's parts ---


def _sample_vit_patches(draw: Draw, patch: int) -> Config:
    head = draw.choice((8, 16, 16) if patch == 2 else (16, 16, 32, 32, 64))
    width = head * draw.between(max(1, 16 // head), max(1, (32 if patch == 2 else 128) // head))
    pool = draw.choice(("token", "token", "avg", "avg", "map"))
    return {
        "patch": patch,
        "width": width,
        "head": head,
        "depth": _affordable_depth(draw, width, (32 // patch) ** 2),
        "mlp_ratio": draw.choice((2, 3, 4, 4, 4)),
        "pool": pool,
        "class_token": pool == "token" or draw.chance(0.2),
        "registers": draw.choice((0, 0, 0, 1, 4)),
        "embed_class": draw.chance(0.5),
        "layer_scale": draw.chance(0.3),
        "qkv_bias": draw.chance(0.7),
        "qk_norm": draw.chance(0.15),
        "pre_norm": draw.chance(0.15),
    }


def _build_vit_patches(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    return VisionTransformer(
        image_size,
        config["patch"],
        in_chans,
        num_classes,
        global_pool=config["pool"],
        embed_dim=config["width"],
        depth=config["depth"],
        num_heads=config["width"] // config["head"],
        mlp_ratio=config["mlp_ratio"],
        qkv_bias=config["qkv_bias"],
        qk_norm=config["qk_norm"],
        init_values=1e-5 if config["layer_scale"] else None,
        class_token=config["class_token"],
        no_embed_class=not config["embed_class"],
        reg_tokens=config["registers"],
        pre_norm=config["pre_norm"],
    )


# --- EVA and its kin: separate or fused projections, rotary embeddings, gated MLPs ---


def _sample_eva(draw: Draw) -> Config:
    patch, head = draw.choice((4, 4, 8)), draw.choice((16, 16, 32, 32, 64))
    width = head * draw.between(max(1, 32 // head), max(1, (96 if patch == 4 else 192) // head))
    rope = draw.choice(("", "cat", "cat", "mixed", "dinov3"))
    token = draw.chance(0.5)
    swiglu = draw.chance(0.6)
    return {
        "patch": patch,
        "width": width,
        "head": head,
        "depth": _affordable_depth(draw, width, (32 // patch) ** 2),
        "mlp_ratio": 2.667 if swiglu else 4.0,
        "swiglu": swiglu,
        "scale_mlp": draw.chance(0.3),
        "scale_attention": draw.chance(0.2),
        "fused": draw.chance(0.5),
        "qkv_bias": draw.chance(0.8),
        "rope": rope,
        # The later ones with rotary embeddings have a simpler attention, and do without other positions.
        "attention": "rope" if rope in ("mixed", "dinov3") else "eva",
        "positions": not rope or draw.chance(0.5),
        "class_token": token,
        "registers": draw.choice((0, 0, 1, 4)),
        "layer_scale": draw.chance(0.3),
    }


def _build_eva(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    return Eva(
        image_size,
        config["patch"],
        in_chans,
        num_classes,
        global_pool="token" if config["class_token"] else "avg",
        embed_dim=config["width"],
        depth=config["depth"],
        num_heads=config["width"] // config["head"],
        qkv_bias=config["qkv_bias"],
        qkv_fused=config["fused"],
        mlp_ratio=config["mlp_ratio"],
        swiglu_mlp=config["swiglu"],
        scale_mlp=config["scale_mlp"],
        scale_attn_inner=config["scale_attention"],
        attn_type=config["attention"],
        init_values=1e-5 if config["layer_scale"] else None,
        class_token=config["class_token"],
        num_reg_tokens=config["registers"],
        use_abs_pos_emb=config["positions"],
        use_rot_pos_emb=bool(config["rope"]),
        rope_type=config["rope"] or None,
        rope_rotate_half=config["rope"] == "dinov3",
    )


# --- CaiT: talking heads, and a class token that only the last blocks know ---


def _sample_cait(draw: Draw) -> Config:
    patch, head = draw.choice((4, 8, 8)), draw.choice((16, 16, 32, 48))
    width = head * draw.between(max(1, 32 // head), max(1, (96 if patch == 4 else 192) // head))
    return {
        "patch": patch,
        "width": width,
        "head": head,
        "depth": _affordable_depth(draw, width, (32 // patch) ** 2),
        "class_depth": draw.choice((1, 2, 2, 2)),
        "mlp_ratio": draw.choice((2, 3, 4, 4, 4)),
        "class_mlp_ratio": draw.choice((2, 4, 4)),
        "qkv_bias": draw.chance(0.8),
    }


def _build_cait(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    return Cait(
        image_size,
        config["patch"],
        in_chans,
        num_classes,
        embed_dim=config["width"],
        depth=config["depth"],
        num_heads=config["width"] // config["head"],
        mlp_ratio=config["mlp_ratio"],
        qkv_bias=config["qkv_bias"],
        init_values=1e-5,
        depth_token_only=config["class_depth"],
        mlp_ratio_token_only=config["class_mlp_ratio"],
    )


# --- XCiT: attention between channels instead of positions ---


def _sample_xcit(draw: Draw) -> Config:
    patch, head = draw.choice((8, 8, 8, 16)), draw.choice((16, 16, 32, 32, 48))
    width = head * draw.between(max(1, 32 // head), max(1, 128 // head))
    return {
        "patch": patch,
        "width": width,
        "head": head,
        "depth": _affordable_depth(draw, width, (32 // patch) ** 2),
        "class_depth": draw.choice((1, 2, 2, 2)),
        "mlp_ratio": draw.choice((2, 3, 4, 4, 4)),
        "qkv_bias": draw.chance(0.8),
        "layer_scale": draw.choice((1e-5, 1.0, 1.0)),
        "tokens_norm": draw.chance(0.7),
    }


def _build_xcit(config: Config, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    return Xcit(
        image_size,
        config["patch"],
        in_chans,
        num_classes,
        embed_dim=config["width"],
        depth=config["depth"],
        num_heads=config["width"] // config["head"],
        mlp_ratio=config["mlp_ratio"],
        qkv_bias=config["qkv_bias"],
        cls_attn_layers=config["class_depth"],
        eta=config["layer_scale"],
        tokens_norm=config["tokens_norm"],
    )


FAMILIES = (
    Family("vit", 2, _sample_vit, _build_vit, _cost_vit, fixed_size=True),
    *(
        Family(f"vit_patch{patch}", 3, partial(_sample_vit_patches, patch=patch), _build_vit_patches, fixed_size=True)
        for patch in (2, 4)
    ),
    Family("eva", 3, _sample_eva, _build_eva, fixed_size=True),
    Family("cait", 3, _sample_cait, _build_cait, fixed_size=True),
    Family("xcit", 3, _sample_xcit, _build_xcit),
)
