"""Run a Python script, such as timm's train.py, with the hook in timm.

Examples:
    timm-ghn run train.py --model resnet18.ghn2 --pretrained --data-dir images
    timm-ghn run -m my_package.train --help
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from ..errors import GHNError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The script and its own arguments."""
    parser.add_argument("-m", dest="module", action="store_true", help="run a module instead, as python -m does")
    parser.add_argument("script", help="a script's file; with -m, a module's name")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="all that follows is for the script, options too")


def run(args: argparse.Namespace) -> None:
    """Ends as the script does."""
    launch(args.script, args.arguments, args.module)


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
        _import_as_the_script_will()
    importlib.import_module("timm")  # with the hook; what stands in its way is told here, not by the script
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


def _import_as_the_script_will() -> None:
    """Exchanges timm for the one that `sys.path` leads to by now, such as the clone's beside its train.py.

    Another one may have been imported before the script's folder was known. Nothing has used it yet.
    """
    spec, imported = PathFinder.find_spec("timm"), sys.modules.get("timm")
    if imported is None or spec is None or spec.origin is None or Path(spec.origin).samefile(str(imported.__file__)):
        return
    importlib.invalidate_caches()
    package = sys.modules["timm_ghn"]
    for name in list(sys.modules):
        # What reports errors stays, so that whoever called us knows them.
        if name.partition(".")[0] in ("timm", "timm_ghn") and name not in ("timm_ghn", "timm_ghn.errors"):
            del sys.modules[name]
    importlib.reload(package)  # from where it is, which need not be on the path any more
