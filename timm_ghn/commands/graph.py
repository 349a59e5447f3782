"""Draw the computation graph that a GHN sees of an architecture.

Equal blocks that follow each other are one box with a count. In a browser a box opens when it is clicked, and names and
shapes of parameters appear under the pointer.

Examples:
    timm-ghn graph resnet50 -o resnet50.svg
    timm-ghn graph vit_tiny_patch16_224 --ghn ghn2_split --virtual-edges -o vit.html
"""

from __future__ import annotations

import argparse

from ..command_line import add_ghn_argument, architecture_name, output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The architecture, whose view of it, and where the picture goes."""
    parser.add_argument("name", type=architecture_name, help="architecture, as in timm.create_model")
    add_ghn_argument(parser)
    parser.add_argument(
        "--virtual-edges", action="store_true", help="also draw the edges between nodes that are further apart"
    )
    parser.add_argument(
        "-o", "--output", type=output_file(".svg", ".html"), default="graph.svg", metavar="FILE",
        help="the picture, for a browser (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Writes the file."""
    import timm
    from rich.console import Console

    from ..checkpoints.load import load_ghn
    from ..evaluation.drawing import draw_graph
    from ..files import whole_file
    from ..graph import trace
    from ..lazy_init import DeferredFills
    from ..plan import as_read

    config = load_ghn(args.ghn).config
    with DeferredFills():  # a graph needs no values
        model = timm.create_model(args.name)
    graph = as_read(trace(model), config)
    picture = draw_graph(graph, args.name, args.virtual_edges)
    if args.output.suffix == ".html":
        picture = (
            f'<!doctype html>\n<meta charset="utf-8">\n<meta name="color-scheme" content="light dark">\n'
            f"<title>{args.name}</title>\n<style>body {{ margin: 0 }}</style>\n{picture}"
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(args.output) as part:
        part.write_text(picture, encoding="utf-8")
    Console().print(f"{graph!r} is drawn in {args.output}", highlight=False, markup=False, soft_wrap=True)
