"""List the GHNs that can be used by their tag.

Examples:
    timm-ghn list
    timm-ghn list --families
"""

from __future__ import annotations

import argparse

from ..command_line import add_json_argument, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is listed."""
    parser.add_argument(
        "--families", action="store_true", help="instead the families of random networks, on which GHNs are trained"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """A row for each."""
    from rich.table import Table

    rows = _families() if args.families else _ghns()
    if args.json:
        print_json(rows)
        return
    table = Table(*(rows[0] if rows else ()))
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    print_table(table)


def _ghns() -> list[dict[str, object]]:
    from ..checkpoints.catalog import CATALOG

    rows: list[dict[str, object]] = []
    for tag in CATALOG.list_ghns():
        pin = None if tag in CATALOG.registered else CATALOG.published[tag]
        rows.append({
            "tag": tag,
            "trained on": pin and pin.trained_on,
            "classes": pin and pin.config["num_classes"],
            "licence": pin and pin.license,
            "from": pin.repo_id if pin else str(CATALOG.find(tag)),
        })  # fmt: skip
    return rows


def _families() -> list[dict[str, object]]:
    from ..training.families import FAMILIES

    return [
        {"source": source, "tier": family.tier, "family": name}
        for source, found in FAMILIES.items()
        for name, family in sorted(found.items(), key=lambda item: item[1].tier)
    ]
