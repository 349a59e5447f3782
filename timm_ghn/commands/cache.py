"""Say what is kept on this machine, and remove what was computed.

Graphs that were traced before, converted checkpoints and the compiled graph layer are made again when they are needed.
Downloaded checkpoints are in huggingface_hub's own cache (`hf cache ls`), and data sets are never removed.

Examples:
    timm-ghn cache
    timm-ghn cache --clear
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from ..command_line import add_json_argument, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whether it is emptied."""
    parser.add_argument(
        "--clear", action="store_true", help="remove graphs, converted checkpoints and the compiled graph layer"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """A row for each kind, with its folder."""
    from rich.table import Table

    from ..checkpoints.catalog import CATALOG
    from ..checkpoints.source import RECORD_NAME, converted_folder
    from ..files import remove_unfinished
    from ..graph import cache
    from ..ops import native
    from ..training.data import default_root

    made = [("graphs", cache.directory()), ("graph layer, compiled", native.directory())]
    made += [
        (f"{tag}, converted", converted_folder(tag))
        for tag, pin in CATALOG.published.items()
        if pin.format == "joblib"
    ]  # fmt: skip
    removed = 0
    for _, folder in made if args.clear else ():
        remove_unfinished(folder)
        for file in folder.glob("*"):
            if file.name != RECORD_NAME:
                with contextlib.suppress(FileNotFoundError):  # another process may be removing old graphs
                    removed += file.stat().st_size
                    file.unlink()
    rows = [_row(what, folder) for what, folder in [*made, ("data sets", default_root())]]
    if args.json:
        print_json({"kept": rows, "removed_bytes": removed})
        return
    table = Table("what", "files", "bytes", "where")
    for row in rows:
        table.add_row(str(row["what"]), f"{row['files']:,}", f"{row['bytes']:,}", str(row["where"]))
    print_table(table)
    if args.clear:
        from rich.console import Console

        Console().print(f"removed {removed:,} bytes", highlight=False)


def _row(what: str, folder: Path) -> dict[str, object]:
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []
    return {"what": what, "files": len(sizes), "bytes": sum(sizes), "where": folder}
