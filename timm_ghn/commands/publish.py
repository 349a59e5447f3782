"""Put a GHN and its model card on the Hub.

Examples:
    timm-ghn publish runs/mine org/name
    timm-ghn publish runs/mine org/name --upload
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..command_line import add_json_argument, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What goes where, and whether it really does."""
    parser.add_argument("directory", type=Path, help="directory with model.safetensors and config.json")
    parser.add_argument("repository", help="organisation/name")
    parser.add_argument("--upload", action="store_true", help="really do it; without this, it is only shown")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Shows the files, what pins them, and the card unless it was sent."""
    from rich.console import Console

    from ..checkpoints.publish import publish

    publication = publish(args.directory, args.repository, args.upload)
    sizes = {
        name: file.stat().st_size if isinstance(file, Path) else len(file) for name, file in publication.files.items()
    }
    if args.json:
        print_json({"uploaded": args.upload, "files": sizes, "pin": publication.pin})
        return
    console = Console()
    for name, size in sizes.items():
        console.print(f"{size:>13,} bytes  {name}", highlight=False, markup=False)
    console.print_json(data=publication.pin)
    if not args.upload:
        card = publication.files["README.md"]
        assert isinstance(card, bytes)
        console.print(card.decode(), highlight=False, markup=False)
        console.print("Nothing was sent; --upload sends it.")
