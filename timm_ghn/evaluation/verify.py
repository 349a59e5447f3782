"""Whether a GHN predicts what its authors' own code predicted: the norms they published, and ours."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from ..checkpoints.load import load_ghn
from ..errors import GHNError
from ..predictor import initialize

# Networks of five kinds whose parameters are all predicted.
ARCHITECTURES = ("resnet18", "resnet50", "densenet121", "mobilenet_v2", "vgg11_bn")
_TOLERANCE = 0.01  # that of the authors' own check
_TABLE = Path(__file__).with_name("published_norms.json")


@dataclasses.dataclass(frozen=True)
class NormCheck:
    """The L2 norm over all of a network's parameters, by this package and as published.

    Parameters that the GHN leaves alone count with their initial values, as they did when the norms were published.
    """

    architecture: str
    predicted: float
    published: float

    @property
    def agrees(self) -> bool:
        return abs(self.predicted - self.published) < _TOLERANCE


def verify(source: str | os.PathLike[str], architectures: Sequence[str] = ARCHITECTURES) -> Iterator[NormCheck]:
    """Predicts torchvision networks and compares the norms with the published ones, one network after the other.

    Args:
        source: What `load_ghn` takes: a tag, or a directory with a converted checkpoint of GHN-2, GHN-3-T or GHN-3-XL.
        architectures: Names in `torchvision.models`.

    Raises:
        GHNError: If no norms were published for the GHN or a network.
        CheckpointError: If the GHN cannot be loaded.
    """
    ghn = load_ghn(source)
    config = ghn.config.to_dict()
    published = json.loads(_TABLE.read_text(encoding="utf-8"))["checkpoints"]
    matching = [
        entry["norms"]
        for entry in published.values()
        if all(config[name] == value for name, value in entry["config"].items())
    ]
    if not matching:
        own = {name: config[name] for entry in published.values() for name in entry["config"]}
        known = (f"{name} ({_told(entry['config'])})" for name, entry in published.items())
        raise GHNError(
            f"No norms were published for a GHN like {source} ({_told(own)}); there are those of {', '.join(known)}."
        )
    norms: dict[str, float] = matching[0]
    for architecture in architectures:
        if architecture not in norms:
            raise GHNError(f"No norm was published for {architecture!r}; there are those of {', '.join(norms)}.")
    for architecture in architectures:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = torchvision.models.get_model(architecture)
        initialize(model, ghn, head="predict")
        yield NormCheck(architecture, _norm(model), norms[architecture])


def _told(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items())


def _norm(model: nn.Module) -> float:
    squares = (float(torch.linalg.vector_norm(p.detach(), dtype=torch.float64)) ** 2 for p in model.parameters())
    return math.sqrt(sum(squares))
