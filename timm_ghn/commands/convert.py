"""Make safetensors of an official GHN checkpoint, executing nothing.

Examples:
    timm-ghn convert ghn2_imagenet.pt -o converted
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..command_line import add_json_argument, output_directory, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint and where the result goes."""
    parser.add_argument("file", type=Path, help="a ghn*.pt of ppuda (GHN-1, GHN-2) or of ghn3")
    parser.add_argument(
        "-o", "--output", type=output_directory, required=True, metavar="DIR", help="where the result goes"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Says where the result is."""
    from rich.console import Console

    from ..checkpoints.convert import convert_file

    directory = convert_file(args.file, args.output)
    if args.json:
        print_json({"output": directory})
    else:
        Console().print(
            f"converted to {directory}: load it by this path", highlight=False, markup=False, soft_wrap=True
        )
