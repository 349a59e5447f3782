"""Make safetensors of an official GHN checkpoint, executing nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from ..checkpoints.convert import convert_file
from ..command_line import output_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint and where the result goes."""
    parser.add_argument("file", type=Path, help="a ghn*.pt of ppuda (GHN-1, GHN-2) or of ghn3")
    parser.add_argument("-o", "--output", type=output_directory, required=True, metavar="DIR", help="for the result")


def run(args: argparse.Namespace) -> None:
    """Says where the result is."""
    directory = convert_file(args.file, args.output)
    Console().print(f"converted to {directory}: load it by this path", highlight=False, markup=False)
