"""List the GHNs that can be used by their tag."""

from __future__ import annotations

import argparse

from rich.table import Table

from ..checkpoints.source import hub_configs, list_ghns, resolve
from ..command_line import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> None:
    """A row for each tag."""
    table = Table("tag", "trained on", "classes", "licence", "repository")
    for tag in list_ghns():
        pin = hub_configs().get(tag)
        if pin is None:
            table.add_row(tag, "", "", "", resolve(tag))
        else:
            table.add_row(tag, pin.trained_on, str(pin.config["num_classes"]), pin.license, pin.repo_id)
    print_table(table)
