"""Which way of training makes most of a CPU's time: short runs from scratch, the same seconds for each.

Every trial trains a GHN of its own on the same mixture of architectures and the same images, until its process has
used its CPU seconds on one thread (validation and the preparation of architectures by a worker do not count), then
validates it on the same unseen architectures and held-out images. The learning rate falls along a cosine over the
seconds. Finished trials are kept in the JSON and not run again, so that a list can be continued.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")

import torch
from graph_layer import machine
from random_vs_ghn import hash_of
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from timm_ghn.checkpoints.load import load_ghn
from timm_ghn.command_line import Parser, exit_status, integer, output_directory, positive
from timm_ghn.hypernet.ghn import GHN
from timm_ghn.training.architectures import families
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.data import load_dataset
from timm_ghn.training.teacher import soft_labels
from timm_ghn.training.trainer import Trainer

BEFORE: dict[str, Any] = {
    "optimizer": "adamw", "lr": 1e-3, "betas": [0.9, 0.98], "meta_batch": 2, "network_clip": None
}  # fmt: skip
TRIALS: dict[str, dict[str, Any]] = {
    "AdamW, one clip of 5 on the sum, meta-batch 2": BEFORE,
    "AdamW, each network clipped to 3, meta-batch 2": {**BEFORE, "lr": 2e-3, "network_clip": 3.0},
    "AdamW, each network clipped to 3": {**BEFORE, "lr": 2e-3, "network_clip": 3.0, "meta_batch": 4},
    "SOAP, each network clipped to 3": {},
    "SOAP, meta-batch 8, 32 images": {"meta_batch": 8, "batch_size": 32, "lr": 3e-3},
    "SOAP, half of the loss from a teacher": {"teacher": 0.5},
    "SOAP, all of the loss from a teacher": {"teacher": 1.0},
    "SOAP, no label smoothing": {"label_smoothing": 0.0},
    "SOAP, images of 32, 48 and 64 pixels": {"image_sizes": [32, 32, 48, 64]},
    "SOAP, split attention": {"ghn": {"split_attention": True}},
    "SOAP, states of 64": {"ghn": {"hid": 64}},
    "SOAP, tiles of 128": {"ghn": {"max_shape": [128, 128, 11, 11]}},
    "SOAP, GHN-3": {"ghn": {"hypernet": "graphormer", "layers": 3}},
    "SOAP, LoGAH": {"ghn": {"decoder": "lowrank", "max_shape": [1024, 1024, 11, 11], "rank": 32}},
}  # fmt: skip


def run(
    config: TrainConfig, init: GHN | None, train: Any, val: Any, teacher: Any, seconds: float, label: str
) -> dict[str, Any]:
    """One trial: what it did in so many CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, train, val, Path(folder), workers=1, init=init, teacher=teacher)
        used, accuracy = 0.0, 0.0
        with closing(trainer.pool()) as pool, tqdm(total=round(seconds), desc=label, unit="s") as bar:
            while used < seconds:
                tasks = pool.tasks(trainer.step)
                started = time.process_time()
                result = trainer.train_step(tasks)
                used += time.process_time() - started
                trainer.progress = min(1.0, used / seconds)
                accuracy += 0.02 * (result["accuracy"] - accuracy)
                bar.n = round(min(used, seconds))
                bar.set_postfix(steps=trainer.step * config.meta_batch, accuracy=f"{accuracy:.1f}")
        top1 = trainer.validate()
    return {
        "architecture_steps": trainer.step * config.meta_batch,
        "top1": top1.mean().item(),
        "error": top1.std().item() / len(top1) ** 0.5,
        "training_accuracy": accuracy,
        "left_out": len(trainer.skipped),
    }


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="torch/cifar10", help="as for timm-ghn train (default: %(default)s)")
    parser.add_argument("--seconds", type=positive, default=480, help="of CPU for each trial (default: %(default)s)")
    parser.add_argument("--max-macs", type=positive, default=12e6, help="of an architecture (default: %(default)s)")
    parser.add_argument(
        "--tier", type=integer(0, 3), default=2, help="families up to this difficulty (default: %(default)s)"
    )
    parser.add_argument("--init", help="start from these weights, and their config, instead of from scratch")
    parser.add_argument("--trials", nargs="*", choices=TRIALS, default=list(TRIALS)[:5], help="which to run")
    parser.add_argument(
        "--out",
        type=output_directory,
        default=str(Path(__file__).parent / "results"),
        help="where the results are kept (default: %(default)s)",
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "training_trials.json"
    torch.set_num_threads(1)
    logging.basicConfig(format="%(message)s")

    train, val = load_dataset(arguments.data, "train"), load_dataset(arguments.data, "val")
    share = {"source": "timm", "families": families("timm", arguments.tier), "max_macs": int(arguments.max_macs)}
    common = {"architectures": [share], "val_architectures": 48, "val_images": 500, "uses": 6}
    told = {name: getattr(arguments, name) for name in ("seconds", "max_macs", "tier", "init")}
    told["sha256"] = hash_of(arguments.init) if arguments.init else None
    init = load_ghn(arguments.init) if arguments.init else None
    start = init.config.to_dict() if init else {"num_classes": train.num_classes, "branch_scale": 1.0}
    rows: list[dict[str, Any]] = json.loads(file.read_text())["trials"] if file.exists() else []
    for name in arguments.trials:
        if any(row["name"] == name and row["setting"] == told for row in rows):
            continue
        fields = {**common, **TRIALS[name]}
        fields["ghn"] = {**start, **fields.get("ghn", {})}
        config = TrainConfig.from_dict(fields)
        teacher = soft_labels(arguments.out, train, val) if config.teacher else None
        result = run(config, init, train, val, teacher, arguments.seconds, name)
        rows.append({"name": name, "setting": told, "machine": machine(), **result})
        file.write_text(json.dumps({"trials": rows}, indent=1) + "\n")

    table = Table("trial", "architecture-steps", "top-1 of unseen networks, %", "while training, %")
    for row in rows:
        if row["setting"] == told:
            top1 = f"{row['top1']:.1f} ± {row['error']:.1f}"
            table.add_row(row["name"], f"{row['architecture_steps']:,}", top1, f"{row['training_accuracy']:.1f}")
    Console(width=120).print(f"{machine()}; {arguments.seconds:g} CPU seconds each", table)


if __name__ == "__main__":
    sys.exit(exit_status("training_trials.py", main))
