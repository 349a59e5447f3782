"""The exceptions a user of timm-ghn can meet; every message is one sentence that says what to do."""

from __future__ import annotations


class GHNError(Exception):
    """Base of everything this package raises on purpose."""


class TraceError(GHNError):
    """A model could not be turned into a computation graph."""


class CheckpointError(GHNError):
    """A GHN checkpoint is missing, unreadable, altered, or disagrees with its config."""


class PredictionError(GHNError):
    """Predicted parameters do not fit the model, or are not finite."""


class RequestError(GHNError, ValueError):
    """What is asked of a GHN is not what it can predict."""
