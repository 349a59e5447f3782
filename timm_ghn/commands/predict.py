"""Write a model's predicted weights to files, however large it is.

Beside them is the config.json with which timm makes the model of the directory.

Examples:
    timm-ghn predict vit_giant_patch14_224 -o predicted --max-shard-size 5GB
    timm-ghn predict resnet50 -o for_training --num-classes 10 --finetune conditioned
"""

from __future__ import annotations

import argparse

from ..command_line import (
    add_ghn_argument,
    add_json_argument,
    architecture_name,
    file_size,
    integer,
    output_directory,
    print_report,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The architecture, what predicts it, and what the files are like."""
    parser.add_argument("name", type=architecture_name, help="architecture, as in timm.create_model")
    parser.add_argument(
        "-o", "--output", type=output_directory, required=True, metavar="DIR", help="where the files go"
    )
    add_ghn_argument(parser)
    parser.add_argument("--num-classes", type=integer(0), help="classes of the model; timm's default if not given")
    parser.add_argument(
        "--head", default="auto", choices=("auto", "predict", "keep"),
        help="the classification layer (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--finetune", choices=("conditioned", "orthogonal", "bounded"),
        help="prepare the weights for training in this way",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="default: %(default)s"
    )
    parser.add_argument(
        "--max-shard-size", type=file_size, metavar="SIZE",
        help="begin another file beyond, e.g. 5GB; timm itself loads only one file",
    )  # fmt: skip
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the report of the prediction, and the files."""
    import torch

    from ..checkpoints.catalog import CATALOG
    from ..checkpoints.load import load_ghn
    from ..export import export
    from ..predictor import Predictor

    predictor = Predictor(load_ghn(args.ghn), args.head, preparation=args.finetune)
    dtype = getattr(torch, args.dtype)
    report, files = export(
        args.name, args.output, predictor, CATALOG.tag_of(args.ghn), args.num_classes, dtype, args.max_shard_size
    )
    print_report(args, report, files)
