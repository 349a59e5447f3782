"""The model card of a GHN: what it is, how it is used, and whatever its maker knows besides."""

from __future__ import annotations

import math

from ..hypernet import GHN, GHNConfig

DIRECTORY = "path/to/this/directory"
"""Stands in a card for the place of a GHN that has none yet."""

_CARD = """---
library_name: timm-ghn
license: {license}
tags:
- graph-hypernetwork
- timm
- image-classification
---

# {name}

It reads a network's architecture as a graph and predicts the network's parameters in one forward pass, with
{parameters:,} parameters of its own. Trained on {trained_on}.
{usage}
{details}"""
_USAGE = """
## Usage

```python
import timm, timm_ghn  # pip install timm-ghn

timm_ghn.register("mine", "{source}")
model = timm.create_model("resnet50", pretrained_cfg="mine", {options})
```
"""
_DATA = 'num_classes=37, ghn_kwargs={"data": batches}'  # whose classes a layer is fitted to


def model_card(config: GHNConfig, *, name: str, license: str, trained_on: str, source: str, details: str) -> str:
    """The README of a GHN.

    Args:
        config: The GHN's.
        name: The heading.
        license: SPDX identifier, in lower case.
        trained_on: How the sentence "Trained on …" goes on, without its full stop.
        source: What `timm_ghn.register` takes, or `DIRECTORY`.
        details: Markdown that comes last.
    """
    parameters = sum(math.prod(shape) for shape in GHN.parameter_shapes(config).values())
    return _CARD.format(
        name=name, license=license, parameters=parameters, trained_on=trained_on, usage=usage(config, source),
        details=details,
    )  # fmt: skip


def usage(config: GHNConfig, source: str) -> str:
    """The section that says how a GHN is used."""
    return _USAGE.format(source=source, options=f"num_classes={config.num_classes}" if config.predicts_head else _DATA)
