"""Put a GHN and its model card on the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from ..checkpoints.publish import publish


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What goes where, and whether it really does."""
    parser.add_argument("directory", type=Path, help="directory with model.safetensors and config.json")
    parser.add_argument("repository", help="organisation/name")
    parser.add_argument("--upload", action="store_true", help="really do it; without this, it is only shown")


def run(args: argparse.Namespace) -> None:
    """Shows the files, what pins them, and the card unless it was sent."""
    console = Console()
    publication = publish(args.directory, args.repository, args.upload)
    for name, file in publication.files.items():
        size = file.stat().st_size if isinstance(file, Path) else len(file)
        console.print(f"{size:>13,} bytes  {name}", highlight=False, markup=False)
    console.print_json(data=publication.pin)
    if not args.upload:
        card = publication.files["README.md"]
        assert isinstance(card, bytes)
        console.print(card.decode(), highlight=False, markup=False)
        console.print("Nothing was sent; --upload sends it.")
