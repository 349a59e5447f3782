"""The command line, ``timm-ghn``: every module of `timm_ghn.commands` is a sub-command.

Such a module is called as its command. It has `add_arguments`, which gives a parser the command's arguments, and `run`,
which takes what was parsed; the first line of its text is what ``timm-ghn --help`` says. It is imported only when it is
asked for, since most of them need torch.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import pkgutil
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from . import commands
from .command_line import EXIT_STATUS, Parser, exit_status


class _CommandParser(Parser):
    """The parser of a command, which learns its arguments when there is something to parse."""

    def __init__(self, *, module: str, **options: Any):
        super().__init__(**options)
        self._module = module

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        command = importlib.import_module(self._module)
        command.add_arguments(self)
        self.set_defaults(run=command.run)
        return super().parse_known_args(args, namespace)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    about = "Predicted weights for timm models."
    parser: argparse.ArgumentParser = Parser(prog="timm-ghn", description=about, epilog=EXIT_STATUS)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_CommandParser)
    for _, name, _ in pkgutil.iter_modules(commands.__path__):
        module = f"{commands.__name__}.{name}"
        subparsers.add_parser(name, help=_first_line(module), module=module)

    def run() -> None:
        args = parser.parse_args(argv)
        args.run(args)

    return exit_status("timm-ghn", run)


def _first_line(module: str) -> str:
    """Of a module's text, without importing the module."""
    source = find_spec(module).loader.get_source(module)  # type: ignore[union-attr]
    line = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return line[:1].lower() + line[1:].removesuffix(".")
