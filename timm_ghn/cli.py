"""The command line, ``timm-ghn``: every module of `timm_ghn.commands` is a sub-command.

Such a module is called as its command. It has `add_arguments`, which gives a parser the command's arguments, and `run`,
which takes what was parsed; its text is the command's help, of which ``timm-ghn --help`` has the first line. It is
imported only when it is asked for, and imports torch only where it runs.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from . import commands
from .command_line import EXIT_STATUS, Help, Parser, exit_status

_SHELLS = ("bash", "zsh", "fish")
_EXAMPLES = """examples:

    timm-ghn create resnet50 --num-classes 10 -o resnet50.safetensors
    timm-ghn rank 'resnet*' --data torch/cifar10 --download --top 5
    timm-ghn train --help

"""


class _CommandParser(Parser):
    """The parser of a command, which learns its arguments when there is something to parse."""

    def __init__(self, *, module: str, **options: Any):
        super().__init__(formatter_class=Help, **options)
        self._module = module
        self._learned = False

    def learn(self) -> None:
        """Takes text and arguments from the command's module."""
        if self._learned:
            return
        self._learned = True
        command = importlib.import_module(self._module)
        self.description, _, examples = (command.__doc__ or "").partition("\n\nExamples:\n")
        self.epilog = f"examples:\n\n{examples}" if examples else None
        command.add_arguments(self)
        self.set_defaults(run=command.run)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        self.learn()
        return super().parse_known_args(args, namespace)


class _PrintCompletion(argparse.Action):
    """Prints what makes a shell complete commands, options and files."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.error('a completion is made by shtab: pip install "timm-ghn[completion]"')
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    command.learn()
        sys.stdout.write(shtab.complete(parser, values))
        parser.exit()


def command_parser() -> argparse.ArgumentParser:
    """The parser of it all."""
    parser = Parser(
        prog="timm-ghn", description="Predicted weights for timm models.", epilog=_EXAMPLES + EXIT_STATUS,
        formatter_class=Help,
    )  # fmt: skip
    parser.add_argument(
        "--print-completion", choices=_SHELLS, action=_PrintCompletion, metavar="SHELL", default=argparse.SUPPRESS,
        help=f"print what makes a shell complete this command line: {', '.join(_SHELLS)}",
    )  # fmt: skip
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_CommandParser)
    for _, name, _ in pkgutil.iter_modules(commands.__path__):
        module = f"{commands.__name__}.{name}"
        subparsers.add_parser(name, help=_first_line(module), module=module)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""

    def run() -> None:
        args = command_parser().parse_args(argv)
        args.run(args)

    return exit_status("timm-ghn", run)


def _first_line(module: str) -> str:
    """Of a module's text, without importing the module or, which takes as long as all the rest, parsing it."""
    source: str = find_spec(module).loader.get_source(module)  # type: ignore[union-attr]
    line = source.removeprefix('"""').partition("\n")[0].removesuffix('"""')
    return line[:1].lower() + line[1:].removesuffix(".")
