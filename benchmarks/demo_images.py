"""Makes the demo's images: 20 of each class of CIFAR-10, from the 5,000 training images that `ghn2` was not trained on.

They are the first of each class among the last 5,000 rows of a parquet file in the schema of the Hub's uoft-cs/cifar10,
as the JPEG bytes that are there, in a folder for each class; a file's name is its row.
"""

from __future__ import annotations

import argparse
import collections
import sys
from pathlib import Path

import pyarrow.parquet as pq

from timm_ghn.command_line import Parser, exit_status, output_directory
from timm_ghn.demo import CLASSES, IMAGES

HELD_OUT = 5_000
OF_EACH = 20


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="parquet file with all 50,000 training images")
    parser.add_argument("--out", type=output_directory, default=str(IMAGES), help="(default: %(default)s)")
    arguments = parser.parse_args()
    rows = pq.read_table(arguments.data, columns=["img", "label"])
    first = len(rows) - HELD_OUT
    seen = collections.Counter[str]()
    for row, (image, label) in enumerate(zip(*rows.slice(first).to_pydict().values(), strict=True), first):
        name = CLASSES[label]
        if seen[name] < OF_EACH:
            seen[name] += 1
            (arguments.out / name).mkdir(parents=True, exist_ok=True)
            (arguments.out / name / f"{row}.jpg").write_bytes(image["bytes"])


if __name__ == "__main__":
    sys.exit(exit_status("demo_images.py", main))
