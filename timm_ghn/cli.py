"""The command line, ``timm-ghn``: one function for each sub-command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_model

from .command_line import (
    EXIT_STATUS,
    Parser,
    architecture_name,
    exit_status,
    file_size,
    integer,
    output_directory,
    output_file,
    print_table,
)
from .convert import convert_file
from .errors import GHNError
from .hub import hub_configs, list_ghns, load_ghn, resolve
from .launch import launch
from .predictor import HEADS, initialize
from .publish import publish
from .verify import ARCHITECTURES, verify

console = Console()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    about = "Predicted weights for timm models."
    parser: argparse.ArgumentParser = Parser(prog="timm-ghn", description=about, epilog=EXIT_STATUS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add in (
        _add_list, _add_create, _add_predict, _add_demo, _add_zoo, _add_train, _add_evaluate, _add_convert, _add_verify,
        _add_publish, _add_run,
    ):  # fmt: skip
        add(commands)
    args = parser.parse_args(argv)
    return exit_status("timm-ghn", lambda: args.run(args))


def _add_list(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("list", help="list the GHNs that can be used by their tag")
    parser.set_defaults(run=_list)


def _list(args: argparse.Namespace) -> None:
    table = Table("tag", "trained on", "classes", "licence", "repository")
    for tag in list_ghns():
        pin = hub_configs().get(tag)
        if pin is None:
            table.add_row(tag, "", "", "", resolve(tag))
        else:
            table.add_row(tag, pin.trained_on, str(pin.config["num_classes"]), pin.license, pin.repo_id)
    print_table(table)


def _add_create(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("create", help="predict a model's weights, say what was predicted, save them if asked")
    parser.add_argument("name", type=architecture_name, help="architecture, as in timm.create_model")
    parser.add_argument("--ghn", default="ghn2", help="tag, directory, .safetensors file or hf-hub:org/repo@revision")
    parser.add_argument("--num-classes", type=integer(0), help="classes of the model; timm's default if not given")
    parser.add_argument(
        "--output", type=output_file(".safetensors"), metavar="FILE", help="save the weights to this .safetensors file"
    )
    parser.set_defaults(run=_create)


def _create(args: argparse.Namespace) -> None:
    ghn = load_ghn(args.ghn)
    model = timm.create_model(args.name, num_classes=args.num_classes)
    report = initialize(model, ghn)
    console.print(f"{args.name} by {args.ghn}", style="bold")
    console.print(str(report), highlight=False, markup=False)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, str(args.output))
        console.print(f"saved to {args.output}", highlight=False, markup=False)


def _add_predict(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("predict", help="write a model's predicted weights to files, however large it is")
    parser.add_argument("name", type=architecture_name, help="architecture, as in timm.create_model")
    parser.add_argument("-o", "--output", type=output_directory, required=True, metavar="DIR", help="for the files")
    parser.add_argument("--ghn", default="ghn2", help="tag, directory, .safetensors file or hf-hub:org/repo@revision")
    parser.add_argument("--num-classes", type=integer(0), help="classes of the model; timm's default if not given")
    parser.add_argument("--head", default="auto", choices=HEADS, help="the classification layer (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--max-shard-size", type=file_size, metavar="SIZE",
        help="begin another file beyond, e.g. 5GB; timm itself loads only one file",
    )  # fmt: skip
    parser.set_defaults(run=_predict)


def _predict(args: argparse.Namespace) -> None:
    from .export import export

    ghn = load_ghn(args.ghn)
    tag = args.ghn if args.ghn in list_ghns() else "ghn"
    dtype = getattr(torch, args.dtype)
    report, files = export(args.name, args.output, ghn, tag, args.num_classes, args.head, dtype, args.max_shard_size)
    console.print(f"{args.name} by {args.ghn}", style="bold")
    console.print(str(report), highlight=False, markup=False)
    for file in files:
        console.print(f"{file.stat().st_size:>15,} bytes  {file}", highlight=False, markup=False)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from .demo import add_demo_arguments

    add_demo_arguments(commands.add_parser("demo", help="predict several architectures, and classify images with some"))


def _add_zoo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("zoo", help="trace, predict and run every architecture of timm, and sum up the result")
    parser.add_argument("filter", nargs="*", help="names or wildcards; all architectures if none is given")
    parser.add_argument("--ghn", default="ghn2", help="tag, directory, .safetensors file or hf-hub:org/repo@revision")
    parser.add_argument("--workers", type=integer(1), default=1, help="processes to use (default: %(default)s)")
    parser.add_argument(
        "--images", metavar="DATA",
        help="also run each model on two images of a parquet file, a folder, torch/cifar10 or hfds/uoft-cs/cifar10",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=output_directory, default="zoo", metavar="DIR",
        help="where zoo.jsonl, zoo.json and zoo.md go; a sweep that was stopped goes on (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=_zoo)


def _zoo(args: argparse.Namespace) -> None:
    from . import zoo

    names = timm.list_models(args.filter or "")
    found = zoo.sweep(names, args.ghn, args.output / "zoo.jsonl", args.workers, args.images)
    summary = zoo.summarise(track(found, "examining", len(names), console=console))
    (args.output / "zoo.json").write_text(json.dumps(summary, indent=1) + "\n")
    (args.output / "zoo.md").write_text(zoo.markdown(summary))
    table = Table("family", *zoo.COLUMNS)
    for family, counts in summary["families"].items():
        table.add_row(family, *zoo.cells(counts))
    table.add_section()
    table.add_row("all", *zoo.cells(summary["all"]))
    print_table(table)
    for name, row in summary["exceptions"].items():
        console.print(f"{name}: {row['predicted_fraction']:.2%}; kept: {', '.join(row['kept'])}", highlight=False)
    for name, finding in summary["outputs"].items():
        console.print(f"{name}: output {finding}", highlight=False, markup=False)
    if summary["failed"]:
        name, error = next(iter(summary["failed"].items()))
        raise GHNError(f"{len(summary['failed'])} architectures failed, the first of them {name} ({error}).")


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from .training.command import add_train_arguments

    add_train_arguments(commands.add_parser("train", help="train a GHN on images, over random architectures"))


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from .training.command import add_evaluate_arguments

    add_evaluate_arguments(commands.add_parser("evaluate", help="accuracy of predicted weights over architectures"))


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("convert", help="make safetensors of an official GHN checkpoint, executing nothing")
    parser.add_argument("file", type=Path, help="a ghn*.pt of ppuda (GHN-1, GHN-2) or of ghn3")
    parser.add_argument("-o", "--output", type=output_directory, required=True, metavar="DIR", help="for the result")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    directory = convert_file(args.file, args.output)
    console.print(f"converted to {directory}: load it by this path", highlight=False, markup=False)


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("verify", help="compare what an official GHN predicts with what its authors published")
    parser.add_argument("ghn", help="tag, directory, .safetensors file or hf-hub:org/repo@revision")
    parser.add_argument("architectures", nargs="*", help="names in torchvision.models; five of them if none is given")
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> None:
    checks = []
    table = Table("architecture", "norm", "published", "", title=f"L2 norm over all parameters, by {args.ghn}")
    for check in verify(args.ghn, args.architectures or ARCHITECTURES):
        checks.append(check)
        sign = "[green]the same" if check.agrees else "[red]different"
        table.add_row(check.architecture, f"{check.predicted:.4f}", f"{check.published:.4f}", sign)
    print_table(table)
    different = [check.architecture for check in checks if not check.agrees]
    if different:
        raise GHNError(f"{args.ghn} does not predict what its authors published for {', '.join(different)}.")


def _add_publish(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("publish", help="put a GHN and its model card on the Hub")
    parser.add_argument("directory", type=Path, help="directory with model.safetensors and config.json")
    parser.add_argument("repository", help="organisation/name")
    parser.add_argument("--upload", action="store_true", help="really do it; without this, it is only shown")
    parser.set_defaults(run=_publish)


def _publish(args: argparse.Namespace) -> None:
    publication = publish(args.directory, args.repository, args.upload)
    for name, file in publication.files.items():
        size = file.stat().st_size if isinstance(file, Path) else len(file)
        console.print(f"{size:>13,} bytes  {name}", highlight=False, markup=False)
    console.print_json(data=publication.pin)
    if not args.upload:
        card = publication.files["README.md"]
        assert isinstance(card, bytes)
        console.print(card.decode(), highlight=False, markup=False)
        console.print("Nothing was sent; --upload sends it.")


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("run", help="run a Python script, such as timm's train.py, with the hook in timm")
    parser.add_argument("-m", dest="module", action="store_true", help="run a module instead, as python -m does")
    parser.add_argument("script", help="a script's file; with -m, a module's name")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="all that follows is for the script, options too")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    launch(args.script, args.arguments, args.module)
