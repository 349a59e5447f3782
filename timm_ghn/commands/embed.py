"""Embed architectures by a GHN, as vectors.

The file holds `embeddings`, float32 [n, d]; its metadata has "names", a JSON list in the order of the rows, and "ghn":

    with safetensors.safe_open("embeddings.safetensors", "pt") as file:
        embeddings = file.get_tensor("embeddings")
        names = json.loads(file.metadata()["names"])

Examples:
    timm-ghn embed 'resnet*' -o embeddings.safetensors
    timm-ghn embed '*' --ghn ghn2_split --plot zoo.svg
"""

from __future__ import annotations

import argparse
import json
import logging

from ..command_line import (
    add_ghn_argument,
    add_json_argument,
    architecture_patterns,
    output_file,
    picture_file,
    print_json,
)
from ..errors import GHNError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which architectures, what embeds them, and where the result goes."""
    parser.add_argument(
        "patterns", nargs="+", type=architecture_patterns, help="names or wildcards of architectures, such as 'resnet*'"
    )
    add_ghn_argument(parser)
    parser.add_argument(
        "-o", "--output", type=output_file(".safetensors"), default="embeddings.safetensors", metavar="FILE",
        help="where the vectors and names go (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=picture_file, metavar="FILE",
        help="draw the plane in which they vary most, coloured by family",
    )  # fmt: skip
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Says what is where; an architecture that cannot be traced is left out and named."""
    import timm
    from rich.console import Console
    from rich.progress import track
    from safetensors.torch import save_file

    from ..checkpoints.load import load_ghn
    from ..errors import TraceError
    from ..evaluation.embedding import architecture_graph, embed
    from ..evaluation.pictures import plot_embeddings
    from ..files import whole_file

    logging.basicConfig(format="%(message)s")
    ghn = load_ghn(args.ghn)
    graphs, failed = {}, {}
    names = list(dict.fromkeys(name for found in args.patterns for name in found))
    for name in track(names, "tracing", console=Console(stderr=True)):
        try:
            graphs[name] = architecture_graph(name)
        except TraceError as error:
            failed[name] = str(error)
    if not graphs:
        raise GHNError(f"None of {len(names)} architectures can be traced; the first, {names[0]}: {failed[names[0]]}")
    names = list(graphs)
    embeddings = embed(graphs.values(), ghn)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(args.output) as part:
        save_file({"embeddings": embeddings}, part, metadata={"names": json.dumps(names), "ghn": args.ghn})
    if args.plot:
        families = [timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in names]
        plot_embeddings(embeddings, names, families, args.plot, args.ghn)
    if args.json:
        result = {"ghn": args.ghn, "output": args.output, "failed": failed}
        print_json({**result, "embeddings": dict(zip(names, embeddings.tolist(), strict=True))})
        return
    console = Console()
    for name, reason in failed.items():
        console.print(f"{name} is left out: {reason}", highlight=False, markup=False)
    shape = " x ".join(map(str, embeddings.shape))
    console.print(f"{shape} embeddings by {args.ghn} in {args.output}", highlight=False, markup=False, soft_wrap=True)
