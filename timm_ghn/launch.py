"""``timm-ghn run``: somebody else's script, such as timm's train.py, with the hook installed."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import GHNError


def launch(target: str, arguments: Sequence[str], module: bool = False) -> None:
    """Runs a script or module in this process as ``python TARGET`` or ``python -m TARGET`` would.

    `SystemExit` passes through. Any other exception is reported by `sys.excepthook` as if the script had been started
    by Python itself, and becomes exit status 1, or 130 after Ctrl-C.

    Args:
        target: The script's file, or the module's name.
        arguments: What the script finds in ``sys.argv[1:]``.
        module: Whether `target` is a module.

    Raises:
        GHNError: If there is nothing to run.
    """
    if not module and not Path(target).is_file():
        raise GHNError(
            f"There is no script {target!r} in {os.getcwd()}: give its path; timm's train.py and validate.py are in the"
            " repository huggingface/pytorch-image-models, not in the package."
        )
    sys.argv = [target, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # python -P; before 3.11 there is none
        sys.path[0] = os.getcwd() if module else str(Path(target).resolve().parent)
    try:
        if module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(os.path.abspath(target), run_name="__main__")
    except (Exception, KeyboardInterrupt) as error:
        trace = error.__traceback__
        trace = trace and trace.tb_next
        while trace and trace.tb_frame.f_globals.get("__name__") == "runpy":
            trace = trace.tb_next
        if trace is None and isinstance(error, (ImportError, OSError)):
            raise GHNError(f"Cannot run {target!r}: {error}.") from error
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
