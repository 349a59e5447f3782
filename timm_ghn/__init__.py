"""Predicted weights for every architecture in timm.

Importing this package makes graph hypernetworks known to timm:
``timm.create_model("resnet50", pretrained_cfg="ghn2")``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, GHNError, PredictionError, RequestError, TraceError
from .with_timm import install_with_timm

if TYPE_CHECKING:
    from .checkpoints.catalog import list_ghns, register
    from .checkpoints.load import load_ghn
    from .evaluation.adaptation import AdaptReport, adapt
    from .evaluation.calibration import calibrate
    from .evaluation.drawing import draw_graph
    from .evaluation.embedding import embed
    from .evaluation.inspection import Inspection, inspect
    from .evaluation.ranking import rank
    from .graph import ComputationGraph, trace
    from .hypernet import GHN, GHNConfig, sketch
    from .plugin import install, uninstall
    from .prediction import Prediction, Report
    from .predictor import initialize, predict

__all__ = [
    "GHN",
    "AdaptReport",
    "CheckpointError",
    "ComputationGraph",
    "GHNConfig",
    "GHNError",
    "Inspection",
    "Prediction",
    "PredictionError",
    "Report",
    "RequestError",
    "TraceError",
    "adapt",
    "calibrate",
    "draw_graph",
    "embed",
    "initialize",
    "inspect",
    "install",
    "list_ghns",
    "load_ghn",
    "predict",
    "rank",
    "register",
    "sketch",
    "trace",
    "uninstall",
]

# Where they are imported from when they are first used: torch and timm take seconds, which the command line's help and
# programs that only may need this package do without.
_HOMES = {
    "AdaptReport": "evaluation.adaptation",
    "GHN": "checkpoints.load",  # not from hypernet, since `from_pretrained` needs what loads
    "ComputationGraph": "graph",
    "GHNConfig": "hypernet",
    "Inspection": "evaluation.inspection",
    "Prediction": "prediction",
    "Report": "prediction",
    "adapt": "evaluation.adaptation",
    "calibrate": "evaluation.calibration",
    "draw_graph": "evaluation.drawing",
    "embed": "evaluation.embedding",
    "initialize": "predictor",
    "inspect": "evaluation.inspection",
    "install": "plugin",
    "list_ghns": "checkpoints.catalog",
    "load_ghn": "checkpoints.load",
    "predict": "predictor",
    "rank": "evaluation.ranking",
    "register": "checkpoints.catalog",
    "sketch": "hypernet",
    "trace": "graph",
    "uninstall": "plugin",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install_with_timm()
