"""Random networks, a module for each kind. What the kinds share is in `timm_ghn.training.sampling`.

Those of timm are made of its own classes: what the zoo is built of, narrower and shallower, for small images. Each
family has its functions side by side: one draws a configuration, one builds it, one adds up its cost. The proportions
surround those of the real models: channels that double from stage to stage, bottlenecks that expand by four, a 7×7 stem
with max-pooling that leaves 1×1 maps in the last stage of a 32×32 image, one linear classifier.
"""

from timm_ghn.training.families import (
    attending,
    convolutional,
    deepnets,
    hierarchical,
    hybrid,
    metaformer,
    mobile,
    normalisation,
    plain,
    residual,
    token_mixing,
    vit,
)
from timm_ghn.training.sampling import Family

_OF_TIMM = (
    plain, residual, mobile, metaformer, vit, hierarchical, hybrid,
    normalisation, convolutional, token_mixing, attending,
)  # fmt: skip

FAMILIES: dict[str, dict[str, Family]] = {
    "timm": {family.name: family for kind in _OF_TIMM for family in kind.FAMILIES},
    "deepnets": {family.name: family for family in deepnets.FAMILIES},
}
"""Every family by source and name."""
