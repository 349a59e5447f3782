"""Hostile checkpoints, which every loader has to refuse: cheaply, and with a `CheckpointError`."""

from .containers import containers
from .headers import headers
from .pickles import pickles

__all__ = ["attacks"]


def attacks(canary: str) -> dict[str, bytes]:
    """All of them by name. Code in one of them, if it ran, would make the file `canary`."""
    return {**pickles(canary), **containers(), **headers()}
