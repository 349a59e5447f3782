"""Predicted weights for every architecture in timm.

Importing this package makes graph hypernetworks known to timm:
``timm.create_model("resnet50", pretrained_cfg="ghn2")``.
"""

from __future__ import annotations

from .errors import CheckpointError, GHNError, PredictionError, TraceError
from .evaluation import calibrate, rank
from .graph import ComputationGraph, trace
from .hub import list_ghns, load_ghn, register
from .hypernet import GHN, GHNConfig
from .plugin import install, uninstall
from .prediction import Prediction, Report
from .predictor import initialize, predict

__all__ = [
    "GHN",
    "CheckpointError",
    "ComputationGraph",
    "GHNConfig",
    "GHNError",
    "Prediction",
    "PredictionError",
    "Report",
    "TraceError",
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
