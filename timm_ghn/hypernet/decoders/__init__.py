"""The decoders, by the name that a config calls them by: every one that a file of this folder defines."""

from __future__ import annotations

import importlib
import pkgutil

from .base import DECODERS, Decoder

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["DECODERS", "Decoder"]
