"""Join GHNs that were each trained on a kind of networks to one that chooses by the network.

The kinds are attention, layer_norm and depthwise, and the first of them that fits a network counts; the first GHN
predicts all other networks.

Examples:
    timm-ghn join runs/convolution attention=runs/attention layer_norm=runs/layer_norm -o joined
    timm-ghn join ghn2_split attention=runs/attention -o joined
"""

from __future__ import annotations

import argparse

from ..command_line import add_json_argument, output_directory, print_json
from ..errors import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is joined, and where the result goes."""
    parser.add_argument("general", help="a GHN: a tag, directory, .safetensors file or hf-hub:org/repo")
    parser.add_argument("experts", nargs="+", type=_expert, metavar="KIND=GHN", help="and who predicts a kind instead")
    parser.add_argument(
        "-o", "--output", type=output_directory, required=True, metavar="DIR", help="where the result goes"
    )
    add_json_argument(parser)


def _expert(text: str) -> tuple[str, str]:
    from ..hypernet.experts import KINDS

    kind, _, source = text.partition("=")
    if kind not in KINDS or not source:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND=GHN with one of {', '.join(KINDS)}")
    return kind, source


def run(args: argparse.Namespace) -> None:
    """Says where the result is."""
    from rich.console import Console

    from ..checkpoints.card import DIRECTORY, model_card
    from ..checkpoints.load import load_ghn
    from ..files import whole_files

    kinds = [kind for kind, _ in args.experts]
    if twice := {kind for kind in kinds if kinds.count(kind) > 1}:
        raise CheckpointError(f"{min(twice)} is given more than once; one GHN can predict a kind.")
    try:
        joined = load_ghn(args.general).with_experts({kind: load_ghn(source) for kind, source in args.experts})
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    parts = "".join(f"| {kind} | `{source}` |\n" for kind, source in (*args.experts, ("all other", args.general)))
    card = model_card(
        joined.config, name="A graph hypernetwork with experts", license="apache-2.0", source=DIRECTORY,
        trained_on="what its parts were trained on", details=f"| networks | predicted by |\n|---|---|\n{parts}",
    )  # fmt: skip
    with whole_files(args.output) as unfinished:
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        joined._save_pretrained(unfinished)
    if args.json:
        print_json({"output": args.output, "experts": joined.config.experts})
    else:
        Console().print(f"joined in {args.output}: load it by this path", highlight=False, markup=False, soft_wrap=True)
