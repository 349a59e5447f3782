"""The command line, ``timm-ghn``: one function for each sub-command."""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_model
from torch import nn

from .assign import HEADS, initialize
from .convert import convert_file
from .creation import create_predicted
from .errors import GHNError
from .evaluation import accuracy, calibrate
from .hub import hub_configs, list_ghns, load_ghn, resolve
from .launch import launch
from .publish import publish
from .verify import ARCHITECTURES, verify

_DEMO_ARCHITECTURES = (
    "resnet50",
    "regnety_016",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_small_patch16_224",
    "swin_s3_tiny_224",
)
_DEMO_CLASSIFIERS = ("resnet18", "resnet50", "regnety_016")

console = Console()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. What a user did wrong is told in one sentence, without a traceback."""
    parser = argparse.ArgumentParser(prog="timm-ghn", description="Predicted weights for timm models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add in (
        _add_list, _add_create, _add_predict, _add_demo, _add_zoo, _add_train, _add_evaluate, _add_convert, _add_verify,
        _add_publish, _add_run,
    ):  # fmt: skip
        add(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except GHNError as error:
        print(f"timm-ghn: {error}", file=sys.stderr)
        return 1
    return 0


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
    console.print(table)


def _add_create(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("create", help="predict a model's weights, say what was predicted, save them if asked")
    parser.add_argument("name", help="architecture, as in timm.create_model")
    parser.add_argument("--ghn", default="ghn2", help="tag, directory, .safetensors file or hf-hub:org/repo@revision")
    parser.add_argument("--num-classes", type=int, help="classes of the model; timm's default for it if not given")
    parser.add_argument("--output", type=Path, metavar="FILE", help="save the weights to this .safetensors file")
    parser.set_defaults(run=_create)


def _create(args: argparse.Namespace) -> None:
    ghn = load_ghn(args.ghn)
    model = _timm_model(args.name, args.num_classes)
    report = initialize(model, ghn)
    console.print(f"{args.name} by {args.ghn}", style="bold")
    console.print(str(report), highlight=False, markup=False)
    if args.output:
        save_model(model, str(args.output))
        console.print(f"saved to {args.output}", highlight=False, markup=False)


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.0)[0]
        raise GHNError(f"timm has no architecture {name!r}: did you mean {nearest!r}?")


def _timm_model(name: str, num_classes: int | None = None) -> nn.Module:
    _check_name(name)
    model: nn.Module = timm.create_model(name, num_classes=num_classes)
    return model


def _add_predict(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("predict", help="write a model's predicted weights to files, however large it is")
    parser.add_argument("name", help="architecture, as in timm.create_model")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument("--ghn", default="ghn2", help="tag, directory, .safetensors file or hf-hub:org/repo@revision")
    parser.add_argument("--num-classes", type=int, help="classes of the model; timm's default for it if not given")
    parser.add_argument("--head", default="auto", choices=HEADS, help="the classification layer (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="begin another file beyond, e.g. 5GB; timm itself loads only one file"
    )
    parser.set_defaults(run=_predict)


def _predict(args: argparse.Namespace) -> None:
    from .export import export, parse_size

    _check_name(args.name)
    limit = parse_size(args.max_shard_size) if args.max_shard_size else None
    ghn = load_ghn(args.ghn)
    tag = args.ghn if args.ghn in list_ghns() else "ghn"
    dtype = getattr(torch, args.dtype)
    report, files = export(args.name, args.output, ghn, tag, args.num_classes, args.head, dtype, limit)
    console.print(f"{args.name} by {args.ghn}", style="bold")
    console.print(str(report), highlight=False, markup=False)
    for file in files:
        console.print(f"{file.stat().st_size:>15,} bytes  {file}", highlight=False, markup=False)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("demo", help="predict several architectures, and classify images with some of them")
    parser.add_argument("--ghn", default="ghn2", help="tag, directory, .safetensors file or hf-hub:org/repo@revision")
    parser.add_argument("--cifar10", metavar="FILE", help="parquet file in the schema of the Hub's uoft-cs/cifar10")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    ghn = load_ghn(args.ghn)
    classes = ghn.config.num_classes
    table = Table("architecture", "parameters", "predicted", "random init", "by prediction", title=f"by {args.ghn}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in _DEMO_ARCHITECTURES:
        started = time.perf_counter()
        _timm_model(name, classes)
        created = time.perf_counter()
        model, report = create_predicted(functools.partial(_timm_model, name, classes), ghn)
        predicted = time.perf_counter()
        size = sum(parameter.numel() for parameter in model.parameters())
        times = (f"{seconds:.2f} s" for seconds in (created - started, predicted - created))
        table.add_row(name, f"{size / 1e6:.1f} M", f"{report.predicted_fraction:.2%}", *times)
    console.print(table)
    console.print(f"\n{name}, in detail\n{report}", highlight=False, markup=False)
    if args.cifar10:
        from .training.data import load_dataset

        images = load_dataset(args.cifar10, "val")
        console.print(f"\nTop-1 of predicted weights, no gradient step, on {len(images)} held-out images:")
        for name in _DEMO_CLASSIFIERS:
            model, _ = create_predicted(functools.partial(_timm_model, name, images.num_classes), ghn, head="predict")
            calibrate(model, itertools.islice(images.batches(250), 4))  # batch norms have seen no data yet
            console.print(f"  {name:<12} {accuracy(model, images.batches(250)):6.2%}", highlight=False)


def _add_zoo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("zoo", help="trace, predict and run every architecture of timm, and sum up the result")
    parser.add_argument("filter", nargs="*", help="names or wildcards; all architectures if none is given")
    parser.add_argument("--ghn", default="ghn2", help="tag, directory, .safetensors file or hf-hub:org/repo@revision")
    parser.add_argument("--workers", type=int, default=1, help="processes to use (default: %(default)s)")
    parser.add_argument(
        "--images", metavar="DATA",
        help="also run each model on two images of a parquet file, a folder, torch/cifar10 or hfds/uoft-cs/cifar10",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("zoo"), metavar="DIR",
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
    console.print(table)
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
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where the result goes")
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
    console.print(table)
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
