"""``timm-ghn train`` and ``timm-ghn evaluate``: from command-line arguments to a run, and to a table."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import nn

from timm_ghn import evaluation
from timm_ghn.command_line import architecture_names, device_name, integer, output_directory, positive, print_table
from timm_ghn.errors import GHNError
from timm_ghn.hub import load_ghn
from timm_ghn.training.architectures import SPLITS, architecture, families
from timm_ghn.training.checkpoint import TrainingError, load_checkpoint
from timm_ghn.training.config import PRESETS, SCHEDULES, TrainConfig
from timm_ghn.training.data import ImageDataset, load_dataset
from timm_ghn.training.families import FAMILIES
from timm_ghn.training.optimizers import OPTIMIZERS
from timm_ghn.training.trainer import Trainer

logger = logging.getLogger("timm_ghn.training")

_GHN_ARGUMENTS = ("hypernet", "decoder", "hid", "layers", "heads", "rank", "max_shape", "split_attention")
_RUN_ARGUMENTS = ("steps", "seed", "meta_batch", "batch_size", "optimizer", "lr", "schedule", "network_clip",
                  "eval_every", "val_architectures", "val_images", "bf16")  # fmt: skip
_BATCH = 250
_CALIBRATION_BATCHES = 8


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="torch/cifar10", help="parquet file, image folder, torch/NAME or hfds/REPO")
    data.add_argument("--holdout", type=integer(1), default=5000, help="training images to hold out for validation")
    data.add_argument("--image-size", type=integer(1), help="bring all images to this size")
    data.add_argument("--root", help="where torch/… and hfds/… keep their files; by default beside the Hub's cache")
    data.add_argument("--download", action="store_true", help="let torch/… fetch what is missing")


def _load_data(args: argparse.Namespace, split: str) -> ImageDataset:
    options = {name: getattr(args, name) for name in ("holdout", "image_size", "root", "download")}
    return load_dataset(args.data, split, **options)


# --- train ------------------------------------------------------------------------------------------------------------


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``timm-ghn train``; those of the run's config have no default, so that a resumed run keeps its."""
    _add_data_arguments(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=output_directory, default="runs/ghn", help="the run's directory")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    run.add_argument(
        "--cooldown-from", type=Path, metavar="RUN",
        help="go on from this run's checkpoint, its learning rate falling to 0 over --steps more or --minutes",
    )  # fmt: skip
    run.add_argument("--init", help="start from these weights: a tag, directory, .safetensors file or hf-hub:org/repo")
    run.add_argument("--minutes", type=positive, help="wall-clock budget; without --steps it also sets the pace")
    run.add_argument("--steps", type=integer(1), help="length of the run, which resumes exactly then")
    run.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument(
        "--workers", type=integer(0), default=1, help="processes that prepare architectures, for each process"
    )

    config = parser.add_argument_group("config")
    config.add_argument("--preset", choices=PRESETS, help="recipe; ghn2 if not given")
    config.add_argument("--config", type=Path, metavar="JSON", help="fields of TrainConfig that differ from the preset")
    config.add_argument(
        "--architectures", action="append", type=_share, metavar="SOURCE[:FAMILIES[:MACS[:WEIGHT[:STEP]]]]",
        help="a part of the mixture: families up to a tier (0 to 3), or those named, with commas between, within so "
        "many multiply-accumulates, drawn as often as its weight says, from this step on; may be repeated",
    )  # fmt: skip
    config.add_argument("--seed", type=integer(0))
    config.add_argument("--meta-batch", type=integer(1), help="architectures a step, over all processes")
    config.add_argument("--batch-size", type=integer(1), help="images for each of them")
    config.add_argument("--optimizer", choices=OPTIMIZERS)
    config.add_argument("--lr", type=positive)
    config.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate; constant for an open end")
    config.add_argument("--network-clip", type=positive, help="limit for the norm of each network's gradient")
    config.add_argument("--eval-every", type=integer(1), help="steps between validations and checkpoints")
    config.add_argument("--val-architectures", type=integer(1))
    config.add_argument("--val-images", type=integer(1))
    config.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="by default where the device has it")
    config.add_argument("--hypernet", choices=("gatedgnn", "graphormer", "mlp"))
    config.add_argument("--decoder", choices=("conv", "mlp", "lowrank"))
    config.add_argument("--hid", type=integer(1))
    config.add_argument("--layers", type=integer(1))
    config.add_argument("--heads", type=integer(1))
    config.add_argument("--rank", type=integer(1), help="of a low-rank decoder's matrices")
    config.add_argument(
        "--split-attention",
        action=argparse.BooleanOptionalAction,
        help="predict queries, keys and values each by itself",
    )
    config.add_argument("--max-shape", type=_kernel, metavar="OUT,IN,H,W")
    parser.set_defaults(run=train)


def _share(text: str) -> dict[str, Any]:
    source, *parts = text.split(":")
    if source not in FAMILIES:
        raise argparse.ArgumentTypeError(f"{source!r} is not among {', '.join(FAMILIES)}")
    kinds: dict[str, Callable[[str], Any]]
    kinds = {
        "families": partial(_families, source), "max_macs": lambda text: int(positive(text)), "weight": positive,
        "from_step": integer(0),
    }  # fmt: skip
    if len(parts) > len(kinds):
        raise argparse.ArgumentTypeError(f"{text!r} has more parts than SOURCE:FAMILIES:MACS:WEIGHT:STEP")
    return {"source": source, **{name: kind(part) for (name, kind), part in zip(kinds.items(), parts, strict=False)}}


def _families(source: str, text: str) -> list[str]:
    """A source's families up to a tier, or those that are named."""
    if text[:1].isalpha():
        names = [name for part in text.split(",") if (name := part.strip())]
        if unknown := [name for name in names if name not in FAMILIES[source]]:
            known = ", ".join(FAMILIES[source])
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not among the families of {source}: {known}")
        return names
    tier = integer(0, 3)(text)
    if not (names := list(families(source, tier))):
        raise argparse.ArgumentTypeError(f"{source} has no families up to tier {tier}")
    return names


def _kernel(text: str) -> list[int]:
    sizes = [integer(1)(number) for number in text.split(",")]
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} has {len(sizes)} numbers, not four")
    return sizes


def train(args: argparse.Namespace) -> None:
    """Runs ``timm-ghn train``."""
    logging.basicConfig(format="%(message)s")
    # A different network at every step has more shapes of convolution than the default remembers.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")
    with _processes(args.device) as device:
        first = not dist.is_initialized() or dist.get_rank() == 0
        logging.getLogger("timm_ghn").setLevel(logging.INFO if first else logging.ERROR)
        data, validation = _load_data(args, "train"), _load_data(args, "val")
        init = load_ghn(args.init) if args.init else None
        ghn = None if init is None else replace(init.config, images=None).to_dict()  # it may have seen others
        config = _config(args, data.num_classes, ghn, device)
        trainer = Trainer(
            config, data, validation, args.out, device=device, workers=args.workers, init=init, resume=args.resume,
            cooldown_from=None if args.resume else args.cooldown_from,
        )  # fmt: skip
        result = trainer.run(args.minutes)
        logger.info(
            "%d steps: validation %.2f %%; the best so far is in %s", trainer.step, result["val_mean"], args.out
        )


def _config(
    args: argparse.Namespace, num_classes: int, ghn: dict[str, Any] | None, device: torch.device
) -> TrainConfig:
    """The config of the run: what is resumed, or a preset and a file, and over it what the command line says."""
    fields: dict[str, Any]
    if args.resume:
        fields = load_checkpoint(args.out / "checkpoints")[1]["config"]
    elif args.cooldown_from:
        state = load_checkpoint(args.cooldown_from / "checkpoints")[1]
        fields = {**state["config"], "schedule": "linear", "warmup": 0, "steps": None}
        if args.steps is not None:
            args.steps += state["step"]
    else:
        fields = {**PRESETS[args.preset or "ghn2"], "bf16": has_bf16(device)}
    if args.config is not None:
        try:
            fields = {**fields, **json.loads(args.config.read_text(encoding="utf-8"))}
        except (OSError, ValueError, TypeError) as error:
            raise TrainingError(f"{args.config} is not a JSON object that can be read ({error}).") from error
    fields.update({name: getattr(args, name) for name in _RUN_ARGUMENTS if getattr(args, name) is not None})
    if args.architectures:
        fields["architectures"] = args.architectures
    fields["ghn"] = {"num_classes": num_classes, **(ghn or fields.get("ghn", {}))}
    fields["ghn"].update({name: getattr(args, name) for name in _GHN_ARGUMENTS if getattr(args, name) is not None})
    return TrainConfig.from_dict(fields)


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is faster than float32 there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


@contextmanager
def _processes(device: str) -> Iterator[torch.device]:
    """Joins torchrun's process group, if there is one, and gives this process its device.

    Small networks keep a GPU busy only if several processes share it, which NCCL does not allow and gloo does.
    """
    if "RANK" not in os.environ:
        yield torch.device(device)
        return
    own, backend = torch.device(device), "gloo"
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(own)
        backend = "nccl" if int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count() else "gloo"
    dist.init_process_group(backend)
    try:
        yield own
    finally:
        dist.destroy_process_group()


# --- evaluate ---------------------------------------------------------------------------------------------------------


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``timm-ghn evaluate``."""
    _add_data_arguments(parser)
    parser.add_argument("--ghn", default="ghn2", help="tag, directory, .safetensors file or hf-hub:org/repo@revision")
    parser.add_argument(
        "--source", choices=(*SPLITS, "zoo"), default="timm", help="random networks, or real ones of timm"
    )
    parser.add_argument(
        "--split", default="test", help="of random networks: val, test; deepnets: also wide, deep, dense, bnfree"
    )
    parser.add_argument(
        "--families", help="draw random networks of these only, with commas between; or of all up to a tier (0 to 3)"
    )
    parser.add_argument("--architectures", type=integer(1), default=100, help="measure the first so many")
    parser.add_argument(
        "--names", type=architecture_names,
        help="of real networks, with commas between; some of ten families if not given",
    )  # fmt: skip
    parser.add_argument("--data-split", choices=("val", "test"), default="val", help="images to measure on")
    parser.add_argument("--images", type=integer(1), default=5000, help="measure on the first so many")
    parser.add_argument(
        "--sgd-steps", type=integer(0), default=0, help="also measure so many steps of SGD from random weights"
    )
    parser.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=output_directory, default="evaluation", help="directory for results.json, histogram.png"
    )
    parser.set_defaults(run=evaluate)


def evaluate(args: argparse.Namespace) -> None:
    """Runs ``timm-ghn evaluate``."""
    logging.basicConfig(format="%(message)s")
    if args.source != "zoo" and args.names:
        raise GHNError(f"--names are names in timm, but the networks of --source {args.source} are random: choose zoo.")
    if args.source != "zoo" and args.split not in SPLITS[args.source]:
        raise GHNError(f"{args.source} has no split {args.split!r}; choose from {', '.join(SPLITS[args.source])}.")
    if args.source == "zoo" and args.families:
        raise GHNError("--families are of random networks, not of real ones: choose --source timm or deepnets.")
    try:
        drawn_from = _families(args.source, args.families) if args.families else None
    except argparse.ArgumentTypeError as error:
        raise GHNError(f"--families: {error}.") from None
    ghn = load_ghn(args.ghn, args.device)
    train, data = (_load_data(args, split).to(args.device) for split in ("train", args.data_split))
    if data.num_classes != ghn.config.num_classes:
        raise GHNError(
            f"{args.data} has {data.num_classes} classes, {args.ghn} predicts {ghn.config.num_classes}; choose a GHN "
            "trained for as many."
        )
    rows = torch.arange(min(args.images, len(data)), device=args.device)
    test = [data.batch(part) for part in rows.split(_BATCH)]
    generator = torch.Generator(args.device).manual_seed(0)
    calibration = [train.sample(_BATCH, generator) for _ in range(_CALIBRATION_BATCHES)]

    results = []
    builders = _builders(args, drawn_from, data.num_classes, data.image_size)
    for seed, (name, build) in enumerate(track(builders.items(), "measuring", console=Console(stderr=True))):
        sample = partial(train.sample, 64, generator) if args.sgd_steps else None
        build = evaluation.seeded(build, seed, args.device)
        results.append(
            evaluation.measure(
                name, build, ghn, calibration, test, random=True, sample=sample, sgd_steps=args.sgd_steps
            )
        )
    _report(args, results)


def _builders(
    args: argparse.Namespace, drawn_from: list[str] | None, num_classes: int, image_size: int
) -> dict[str, Callable[[], nn.Module]]:
    """What makes each network, by name."""
    if args.source == "zoo":
        names = args.names or evaluation.ZOO[: args.architectures]
        return {name: partial(evaluation.create_model, name, num_classes, image_size) for name in names}
    builders: dict[str, Callable[[], nn.Module]] = {}
    for index in range(min(args.architectures, SPLITS[args.source][args.split].size)):
        found = architecture(args.source, args.split, index, families=drawn_from, image_size=image_size)
        builders[f"{index} {found.family}"] = partial(found.build, num_classes, image_size=image_size)
    return builders


def _report(args: argparse.Namespace, results: list[evaluation.Measured]) -> None:
    """Tables on the terminal, a JSON file and a picture in the directory."""
    console = Console()
    if len(results) <= 40:
        table = Table("architecture", "parameters", "predicted", "top-1")
        for result in results:
            top1 = f"{result.accuracy['predicted']:.2%}" if result.error is None else escape(result.error)
            table.add_row(result.name, f"{result.parameters / 1e6:.1f} M", f"{result.predicted_fraction:.1%}", top1)
        print_table(table)
    summaries = {}
    table = Table("weights", "mean top-1", "standard error", "range", "architectures")
    for kind, label in (("predicted", args.ghn), ("random", "random"), ("sgd", f"{args.sgd_steps} steps of SGD")):
        summary = evaluation.summarize(results, kind)
        if summary.count:
            single = summary.count == 1  # which has no standard error
            summaries[kind] = {**asdict(summary), "error": None if single else summary.error}
            bounds = f"{summary.smallest:.2%} to {summary.largest:.2%}"
            error = "" if single else f"{summary.error:.2%}"
            table.add_row(label, f"{summary.mean:.2%}", error, bounds, str(summary.count))
    print_table(table)
    told = {name: value for name, value in vars(args).items() if isinstance(value, (str, int, list, type(None)))}
    everything = {"arguments": told, "summary": summaries, "architectures": [asdict(result) for result in results]}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    if summaries:
        evaluation.plot_histogram(results, args.out / "histogram.png")
    console.print(f"written to {args.out}", highlight=False, markup=False)
    if "predicted" not in summaries:
        first = results[0]
        raise GHNError(f"None of {len(results)} networks could be measured; the first, {first.name}: {first.error}")
