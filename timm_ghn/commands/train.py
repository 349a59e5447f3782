"""Train a GHN on images, over random architectures.

Examples:
    timm-ghn train --data torch/cifar10 --download --minutes 60 -o runs/mine
    timm-ghn train --resume -o runs/mine
    timm-ghn train --data cifar10-train.parquet --steps 1000 --architectures timm:vit,swin:12e6
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..command_line import (
    add_data_arguments,
    add_device_argument,
    add_json_argument,
    family_names,
    integer,
    load_data,
    output_directory,
    positive,
    print_json,
)

if TYPE_CHECKING:
    import torch

    from ..training.config import TrainConfig
    from ..training.trainer import Trainer

logger = logging.getLogger("timm_ghn.training")

_GHN_ARGUMENTS = (
    "hypernet",
    "decoder",
    "hid",
    "layers",
    "heads",
    "rank",
    "max_shape",
    "split_attention",
    "conditioned",
)
_RUN_ARGUMENTS = ("steps", "seed", "meta_batch", "batch_size", "optimizer", "lr", "schedule", "network_clip",
                  "eval_every", "val_architectures", "val_images", "bf16", "head", "data_weights")  # fmt: skip
_TEACHERS_SHARE = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Data, run and config; those of the run's config have no default, so that a resumed run keeps its."""
    add_data_arguments(parser, several=True)
    run = parser.add_argument_group("run")
    run.add_argument(
        "-o", "--output", type=output_directory, default="runs/ghn", metavar="DIR",
        help="the run's directory (default: %(default)s)",
    )  # fmt: skip
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    run.add_argument(
        "--cooldown-from", type=Path, metavar="RUN",
        help="go on from this run's checkpoint, its learning rate falling to 0 over --steps more or --minutes",
    )  # fmt: skip
    run.add_argument("--init", help="start from these weights: a tag, directory, .safetensors file or hf-hub:org/repo")
    run.add_argument(
        "--expert", metavar="KIND",
        help="from those that --init has for this kind of networks (attention, layer_norm, depthwise, or general)",
    )  # fmt: skip
    run.add_argument(
        "--teacher", nargs="?", const="", metavar="RUN",
        help="learn from the soft labels of a small network as well, which is trained first, or was for that run",
    )  # fmt: skip
    run.add_argument("--minutes", type=positive, help="wall-clock budget; without --steps it also sets the pace")
    run.add_argument("--steps", type=integer(1), help="length of the run, which resumes exactly then")
    add_device_argument(run)
    run.add_argument(
        "--workers", type=integer(0), default=1,
        help="processes that prepare architectures, for each process (default: %(default)s)",
    )  # fmt: skip
    add_json_argument(parser)

    config = parser.add_argument_group(
        "config", "fields of timm_ghn.training.config.TrainConfig; those that are not given are the preset's"
    )
    config.add_argument("--preset", choices=("ghn2", "ghn3", "published"), help="recipe; ghn2 if not given")
    config.add_argument("--config", type=Path, metavar="JSON", help="fields of TrainConfig that differ from the preset")
    config.add_argument(
        "--architectures", action="append", type=_share, metavar="SOURCE[:FAMILIES[:MACS[:WEIGHT[:STEP]]]]",
        help="a part of the mixture: families (`timm-ghn list --families`) up to a tier (0 to 3), or those named, with "
        "commas between, within so many multiply-accumulates, drawn as often as its weight says, from this step on; "
        "may be repeated",
    )  # fmt: skip
    config.add_argument(
        "--head", choices=("predicted", "ridge"),
        help="predicted, for the classes of one data set, or ridge: fitted in closed form to tasks from all of them",
    )  # fmt: skip
    config.add_argument(
        "--data-weights", type=positive, nargs="+", metavar="WEIGHT", help="how often a task is from each data set"
    )
    config.add_argument(
        "--conditioned", action=argparse.BooleanOptionalAction, help="tell the GHN of the task that it predicts for"
    )
    config.add_argument("--seed", type=integer(0), help="decides first weights, architectures and images")
    config.add_argument("--meta-batch", type=integer(1), help="architectures a step, over all processes")
    config.add_argument("--batch-size", type=integer(1), help="images for each of them")
    config.add_argument("--optimizer", choices=("soap", "adamw", "adam"), help="soap takes the fewest steps")
    config.add_argument("--lr", type=positive, help="peak learning rate")
    config.add_argument(
        "--schedule", choices=("cosine", "steps", "constant", "linear"),
        help="of the learning rate; constant for an open end",
    )  # fmt: skip
    config.add_argument("--network-clip", type=positive, help="limit for the norm of each network's gradient")
    config.add_argument("--eval-every", type=integer(1), help="steps between validations and checkpoints")
    config.add_argument("--val-architectures", type=integer(1), help="unseen networks to validate on")
    config.add_argument("--val-images", type=integer(1), help="held-out images to validate on")
    config.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="by default where the device has it")
    config.add_argument(
        "--hypernet",
        choices=("gatedgnn", "graphormer", "mlp"),
        help="what reads the graph: that of GHN-2, GHN-3 or none",
    )
    config.add_argument(
        "--decoder",
        choices=("conv", "lowrank", "mlp"),
        help="what makes weights of states: that of GHN-2, of LoGAH, or an MLP",
    )
    config.add_argument("--hid", type=integer(1), help="width of a node's state")
    config.add_argument("--layers", type=integer(1), help="of the hypernet")
    config.add_argument("--heads", type=integer(1), help="of a graphormer's attention")
    config.add_argument("--rank", type=integer(1), help="of a low-rank decoder's matrices")
    config.add_argument(
        "--split-attention",
        action=argparse.BooleanOptionalAction,
        help="predict queries, keys and values each by itself",
    )
    config.add_argument(
        "--max-shape", type=_kernel, metavar="OUT,IN,H,W", help="of a kernel as it is decoded; larger ones are tiled"
    )


def _share(text: str) -> dict[str, Any]:
    from ..training.families import FAMILIES

    source, *parts = text.split(":")
    if source not in FAMILIES:
        raise argparse.ArgumentTypeError(f"{source!r} is not among {', '.join(FAMILIES)}")
    kinds: dict[str, Callable[[str], Any]]
    kinds = {
        "families": partial(family_names, source), "max_macs": lambda text: int(positive(text)), "weight": positive,
        "from_step": integer(0),
    }  # fmt: skip
    if len(parts) > len(kinds):
        raise argparse.ArgumentTypeError(f"{text!r} has more parts than SOURCE:FAMILIES:MACS:WEIGHT:STEP")
    return {"source": source, **{name: kind(part) for (name, kind), part in zip(kinds.items(), parts, strict=False)}}


def _kernel(text: str) -> list[int]:
    sizes = [integer(1)(number) for number in text.split(",")]
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} has {len(sizes)} numbers, not four")
    return sizes


def run(args: argparse.Namespace) -> None:
    """Trains, from the beginning or from where a run was stopped."""
    import torch.distributed as dist

    from ..checkpoints.load import load_ghn
    from ..training.checkpoint import TrainingError
    from ..training.teacher import soft_labels
    from ..training.trainer import Trainer

    if args.expert is not None and not args.init:
        raise TrainingError(f"--expert {args.expert} is given without --init; name the GHN that has it.")
    logging.basicConfig(format="%(message)s")
    # A different network at every step has more shapes of convolution than the default remembers.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")
    with _processes(args.device) as device:
        first = not dist.is_initialized() or dist.get_rank() == 0
        logging.getLogger("timm_ghn").setLevel(logging.INFO if first else logging.ERROR)
        data, validation = ([load_data(args, split, source) for source in args.data] for split in ("train", "val"))
        init = load_ghn(args.init) if args.init else None
        experts = init.config.experts if init is not None else ()
        if init is not None and args.expert is not None:
            try:
                init = init.alone(None if args.expert == "general" else args.expert)
            except ValueError as error:
                raise TrainingError(str(error)) from error
        ghn = None if init is None else replace(init.config, images=None).to_dict()  # it may have seen others
        config = _config(args, data[0].num_classes, ghn, device)
        teacher = None
        if config.teacher:
            if not first:
                dist.barrier()  # until the first process has written them
            source = Path(args.teacher) if args.teacher else args.cooldown_from
            teacher = soft_labels(args.output, data[0], validation[0], device, source)
            if first and dist.is_initialized():
                dist.barrier()
        trainer = Trainer(
            config, data, validation, args.output, device=device, workers=args.workers, init=init, resume=args.resume,
            cooldown_from=None if args.resume else args.cooldown_from, teacher=teacher,
        )  # fmt: skip
        if args.expert is not None:
            _warn_of_other_kinds(trainer, args.expert, experts)
        result = trainer.run(args.minutes)
        logger.info(
            "%d steps: validation %.2f %%; the best so far is in %s", trainer.step, result["val_mean"], args.output
        )
        if args.json and first:
            print_json({"output": args.output, "steps": trainer.step, **result})


def _warn_of_other_kinds(trainer: Trainer, expert: str, experts: Sequence[str]) -> None:
    """An expert that learns from networks that others will predict learns for nothing."""
    from ..hypernet.experts import kind_of

    kinds = [(family, kind_of(graph, experts) or "general") for family, graph in trainer.validation_graphs]
    others = Counter(f"{family} ({kind})" for family, kind in kinds if kind != expert)
    if others:
        logger.warning(
            "%d of the %d networks to validate on are not for the expert %s: %s; leave such out of --architectures",
            others.total(), len(kinds), expert, ", ".join(f"{count} {name}" for name, count in others.most_common()),
        )  # fmt: skip


def _config(
    args: argparse.Namespace, num_classes: int, ghn: dict[str, Any] | None, device: torch.device
) -> TrainConfig:
    """The config of the run: what is resumed, or a preset and a file, and over it what the command line says."""
    from ..devices import has_bf16
    from ..training.checkpoint import TrainingError, load_checkpoint
    from ..training.config import PRESETS, TrainConfig

    fields: dict[str, Any]
    if args.resume:
        fields = load_checkpoint(args.output / "checkpoints")[1]["config"]
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
    if args.teacher is not None:
        fields["teacher"] = fields.get("teacher") or _TEACHERS_SHARE
    fields["ghn"] = {"num_classes": num_classes, **(ghn or fields.get("ghn", {}))}
    fields["ghn"].update({name: getattr(args, name) for name in _GHN_ARGUMENTS if getattr(args, name) is not None})
    if fields.get("head") == "ridge":
        fields["ghn"]["predicts_head"] = False
    return TrainConfig.from_dict(fields)


@contextmanager
def _processes(device: str) -> Iterator[torch.device]:
    """Joins torchrun's process group, if there is one, and gives this process its device.

    Small networks keep a GPU busy only if several processes share it, which NCCL does not allow and gloo does.
    """
    import torch
    import torch.distributed as dist

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
