"""``timm-ghn train``: from command-line arguments to a run."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from timm_ghn.hub import load_ghn
from timm_ghn.training.architectures import FAMILIES, SPLITS
from timm_ghn.training.checkpoint import TrainingError, load_checkpoint
from timm_ghn.training.config import PRESETS, TrainConfig
from timm_ghn.training.data import load_dataset
from timm_ghn.training.trainer import Trainer

logger = logging.getLogger("timm_ghn.training")

_GHN_ARGUMENTS = ("hypernet", "hid", "layers", "heads", "max_shape")
_RUN_ARGUMENTS = ("steps", "seed", "meta_batch", "batch_size", "lr", "eval_every", "val_architectures", "val_images",
                  "bf16")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``timm-ghn train``; those of the run's config have no default, so that a resumed run keeps its."""
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="torch/cifar10", help="parquet file, image folder, torch/NAME or hfds/REPO")
    data.add_argument("--holdout", type=int, default=5000, help="training images to hold out for validation")
    data.add_argument("--image-size", type=int, help="bring all images to this size")
    data.add_argument("--root", help="where torch/… and hfds/… keep their files")
    data.add_argument("--download", action="store_true", help="let torch/… fetch what is missing")

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("runs/ghn"), help="the run's directory")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    run.add_argument("--init", help="start from these weights: a tag, directory, .safetensors file or hf-hub:org/repo")
    run.add_argument("--minutes", type=float, help="wall-clock budget; without --steps it also sets the pace")
    run.add_argument("--steps", type=int, help="length of the run, which resumes exactly then")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--workers", type=int, default=1, help="processes that prepare architectures, for each process")

    config = parser.add_argument_group("config")
    config.add_argument("--preset", choices=PRESETS, help="recipe; ghn2 if not given")
    config.add_argument("--config", type=Path, metavar="JSON", help="fields of TrainConfig that differ from the preset")
    config.add_argument(
        "--architectures", action="append", type=_share, metavar="SOURCE[:TIER[:MACS[:WEIGHT[:STEP]]]]",
        help="a part of the mixture: families up to a tier (0 to 2), within so many multiply-accumulates, drawn as "
        "often as its weight says, from this step on; may be repeated",
    )  # fmt: skip
    config.add_argument("--seed", type=int)
    config.add_argument("--meta-batch", type=int, help="architectures a step, over all processes")
    config.add_argument("--batch-size", type=int, help="images for each of them")
    config.add_argument("--lr", type=float)
    config.add_argument("--eval-every", type=int, help="steps between validations and checkpoints")
    config.add_argument("--val-architectures", type=int)
    config.add_argument("--val-images", type=int)
    config.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="by default where the device has it")
    config.add_argument("--hypernet", choices=("gatedgnn", "graphormer", "mlp"))
    config.add_argument("--hid", type=int)
    config.add_argument("--layers", type=int)
    config.add_argument("--heads", type=int)
    config.add_argument("--max-shape", type=_integers, metavar="OUT,IN,H,W")
    parser.set_defaults(run=train)


def _share(text: str) -> dict[str, Any]:
    source, *numbers = text.split(":")
    if source not in FAMILIES:
        raise argparse.ArgumentTypeError(f"{source!r} is not among {', '.join(FAMILIES)}")
    names = ("families", "max_macs", "weight", "from_step")
    share: dict[str, Any] = {name: int(float(number)) for name, number in zip(names, numbers, strict=False)}
    if numbers:
        tier = share["families"]
        share["families"] = [name for name in SPLITS[source]["train"].families if FAMILIES[source][name].tier <= tier]
    return {"source": source, **share}


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def train(args: argparse.Namespace) -> None:
    """Runs ``timm-ghn train``."""
    logging.basicConfig(format="%(message)s")
    # A different network at every step has more shapes of convolution than the default remembers.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")
    with _processes(args.device) as device:
        first = not dist.is_initialized() or dist.get_rank() == 0
        logging.getLogger("timm_ghn").setLevel(logging.INFO if first else logging.ERROR)
        options = {name: getattr(args, name) for name in ("holdout", "image_size", "root", "download")}
        data = load_dataset(args.data, "train", **options)
        validation = load_dataset(args.data, "val", **options)
        init = load_ghn(args.init) if args.init else None
        config = _config(args, data.num_classes, None if init is None else init.config.to_dict(), device)
        trainer = Trainer(
            config, data, validation, args.out, device=device, workers=args.workers, init=init, resume=args.resume
        )
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
    else:
        fields = {**PRESETS[args.preset or "ghn2"], "bf16": _has_bf16(device)}
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


def _has_bf16(device: torch.device) -> bool:
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
