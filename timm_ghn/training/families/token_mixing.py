"""Networks that mix positions otherwise than by attention: gates, modulation, MLPs, dense connections."""

from __future__ import annotations

from functools import partial

from timm.models.focalnet import FocalNet
from timm.models.mambaout import MambaOut
from timm.models.mlp_mixer import Affine, GatedMlp, MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.rdnet import RDNet

from timm_ghn.training.sampling import Config, Draw, Family, built_by, stage_depths, stage_widths


def _sample_mambaout(draw: Draw) -> Config:
    widths = stage_widths(draw, draw.choice((16, 24, 32, 48)), draw.choice((3, 4, 4)))
    return {
        "dims": widths,
        "depths": stage_depths(draw, len(widths), draw.choice((2, 3))),
        "downsample": draw.choice(("conv", "conv", "conv_nf")),
        "stem_mid_norm": draw.chance(0.6),
        "ls_init_value": draw.choice((None, None, 1e-6)),
    }


def _sample_focalnet(draw: Draw) -> Config:
    stages = draw.choice((3, 4, 4))
    large = draw.chance(0.3)
    return {
        "embed_dim": draw.choice((16, 24, 32, 48)),
        "depths": stage_depths(draw, stages, draw.choice((2, 3))),
        "focal_levels": [draw.choice((2, 2, 3))] * stages,
        "focal_windows": [3] * stages,
        "use_overlap_down": large,
        "use_post_norm": large,
        "layerscale_value": 1e-4 if large else None,
        "drop_path_rate": 0.0,
    }


def _sample_rdnet(draw: Draw) -> Config:
    layers = draw.between(3, 5)
    rates = stage_widths(draw, draw.choice((16, 24, 32)), layers)
    return {
        "growth_rates": [min(rate, 96) for rate in rates],
        "num_blocks_list": stage_depths(draw, layers, 3),
        "block_type": ["Block" if layer < 2 else "BlockESE" for layer in range(layers)],
        "is_downsample_block": [None] + [layer <= 2 or layer == layers - 1 for layer in range(1, layers)],
        "num_init_features": draw.choice((24, 32, 64)),
    }


def _sample_mlp(draw: Draw, widest: int) -> Config:
    return {
        "patch_size": draw.choice((2, 4, 4, 8)),
        "num_blocks": draw.between(2, 8),
        "embed_dim": draw.between(48, 256, 16),
        "mlp_ratio": draw.between(2, widest),
    }


_GMLP = partial(MlpMixer, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp)
_RESMLP = partial(MlpMixer, block_layer=ResBlock, norm_layer=Affine)

FAMILIES = (
    Family("mambaout", 3, _sample_mambaout, built_by(MambaOut)),
    Family("focalnet", 3, _sample_focalnet, built_by(FocalNet)),
    Family("rdnet", 3, _sample_rdnet, built_by(RDNet)),
    Family("gmlp", 3, partial(_sample_mlp, widest=6), built_by(_GMLP, sized=True), fixed_size=True),
    Family("resmlp", 3, partial(_sample_mlp, widest=4), built_by(_RESMLP, sized=True), fixed_size=True),
)
