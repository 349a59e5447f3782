"""List the GHNs that can be used by their tag."""

from __future__ import annotations

import argparse

from rich.table import Table

from ..checkpoints.catalog import CATALOG
from ..command_line import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> None:
    """A row for each tag."""
    table = Table("tag", "trained on", "classes", "licence", "repository")
    for tag in CATALOG.list_ghns():
        pin = CATALOG.published.get(tag)
        if pin is None:
            table.add_row(tag, "", "", "", str(CATALOG.find(tag)))
        else:
            table.add_row(tag, pin.trained_on, str(pin.config["num_classes"]), pin.license, pin.repo_id)
    print_table(table)
