"""Predicted weights for every architecture in timm.

Importing this package makes graph hypernetworks known to timm:
``timm.create_model("resnet50", pretrained_cfg="ghn2")``.
"""

from __future__ import annotations

from .assign import Prediction, Report, initialize, predict
from .checkpoints.catalog import list_ghns, register
from .checkpoints.load import load_ghn
from .errors import CheckpointError, GHNError, PredictionError, TraceError
from .evaluation.adaptation import AdaptReport, adapt
from .evaluation.calibration import calibrate
from .evaluation.ranking import rank
from .graph import ComputationGraph, trace
from .hypernet import GHN, GHNConfig
from .plugin import install, uninstall

__all__ = [
    "GHN",
    "AdaptReport",
    "CheckpointError",
    "ComputationGraph",
    "GHNConfig",
    "GHNError",
    "Prediction",
    "PredictionError",
    "Report",
    "TraceError",
    "adapt",
    "calibrate",
    "initialize",
    "install",
    "list_ghns",
    "load_ghn",
    "predict",
    "rank",
    "register",
    "trace",
    "uninstall",
]

install()
