"""The hook goes into timm when timm is there, so that importing this package does not take the seconds that timm takes.

In whatever order the two are imported, whoever has imported both has the hook.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PLUGIN = f"{__package__}.plugin"


def install_with_timm() -> None:
    """Installs the hook now if timm has been imported, and else as soon as it is.

    Raises:
        GHNError: As `timm_ghn.install` does; later, whoever imports timm gets it.
    """
    if "timm" in sys.modules:
        importlib.import_module(_PLUGIN).install()
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds timm, and the plugin, where others find them, and installs the hook when both are complete."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in ("timm", _PLUGIN) or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            self._follow(name, spec.loader)
        return spec

    def _follow(self, name: str, loader: Any) -> None:
        execute = loader.exec_module

        def execute_and_install(module: ModuleType) -> None:
            del loader.exec_module  # this instance's; its class has the one before
            execute(module)
            # The plugin imports timm: if it came first, it is not complete yet, and will be here itself.
            if self in sys.meta_path and (name == _PLUGIN or _PLUGIN not in sys.modules):
                sys.meta_path.remove(self)
                importlib.import_module(_PLUGIN).install()

        loader.exec_module = execute_and_install
