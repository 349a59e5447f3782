"""Compare what an official GHN predicts with what its authors published.

Examples:
    timm-ghn verify ghn3_tm8
    timm-ghn verify ghn3_xlm16 resnet50 densenet121
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..command_line import add_json_argument, print_json, print_table
from ..errors import GHNError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The GHN and what it is to predict."""
    parser.add_argument("ghn", help="tag, directory, .safetensors file or hf-hub:org/repo@revision")
    parser.add_argument("architectures", nargs="*", help="names in torchvision.models; five of them if none is given")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """A row for each architecture; fails if one differs."""
    from rich.table import Table

    from ..evaluation.verify import ARCHITECTURES, verify

    checks = list(verify(args.ghn, args.architectures or ARCHITECTURES))
    if args.json:
        print_json([{**asdict(check), "agrees": check.agrees} for check in checks])
    else:
        table = Table("architecture", "norm", "published", "", title=f"L2 norm over all parameters, by {args.ghn}")
        for check in checks:
            sign = "[green]the same" if check.agrees else "[red]different"
            table.add_row(check.architecture, f"{check.predicted:.4f}", f"{check.published:.4f}", sign)
        print_table(table)
    different = [check.architecture for check in checks if not check.agrees]
    if different:
        raise GHNError(f"{args.ghn} does not predict what its authors published for {', '.join(different)}.")
