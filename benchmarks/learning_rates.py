"""Which learning rates predicted weights survive: short trainings on a thousand images, over rates and warm-ups.

Large rates, which random weights need, take apart what was predicted before they build anything. Every run trains an
architecture by SGD with momentum 0.9, a cosine schedule and no limit on gradients, as timm's `train.py` does by
default, on the same 100 images of each class, and is measured on the same held-out images: before training, after each
epoch and at the end, batch norms calibrated on training images for the measurement. Finished runs are kept in the JSON
and not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from graph_layer import machine
from random_vs_ghn import few_shot, hash_of
from rich.console import Console
from rich.table import Table
from timm.scheduler import CosineLRScheduler
from tqdm import tqdm

import timm_ghn  # noqa: F401, installs the hook
from timm_ghn.command_line import Parser, architecture_name, exit_status, integer, output_directory, positive
from timm_ghn.evaluation.accuracy import accuracy, create_model
from timm_ghn.evaluation.calibration import calibrate
from timm_ghn.preparation import PREPARATIONS
from timm_ghn.training.data import ImageDataset, load_dataset

BATCH, TEST_BATCH = 32, 250


def run(
    name: str, start: str, rate: float, warmup: float, epochs: int, train: ImageDataset, test: ImageDataset
) -> list[float]:
    """Top-1 in percent before training and after each epoch; ends where a loss is not finite."""
    torch.manual_seed(0)
    options: dict[str, Any] = {} if start == "random" else {"pretrained_cfg": "ghn2"}
    if start in PREPARATIONS:
        options["ghn_kwargs"] = {"finetune": start}
    model = create_model(name, train.num_classes, train.image_size, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    steps = len(train) // BATCH
    schedule = CosineLRScheduler(optimizer, epochs * steps, warmup_t=round(warmup * epochs * steps), t_in_epochs=False)
    generator = torch.Generator().manual_seed(0)
    calibration = [train.sample(TEST_BATCH, torch.Generator().manual_seed(i))[0] for i in range(2)]

    def measure() -> float:
        twin = calibrate(copy.deepcopy(model), calibration)
        return 100 * accuracy(twin, test.batches(TEST_BATCH))

    found = [measure()]
    for epoch in range(epochs):
        for step in range(steps):
            schedule.step_update(epoch * steps + step + 1)  # the first rate would be 0
            images, labels = train.sample(BATCH, generator)
            loss = F.cross_entropy(model.train()(images), labels)
            if not math.isfinite(loss.item()):
                return found
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(measure())
    return found


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="torch/cifar10", help="as for timm-ghn train (default: %(default)s)")
    parser.add_argument(
        "--models", nargs="+", type=architecture_name, default=["mobilenetv3_small_050", "vit_tiny_patch16_224"]
    )
    parser.add_argument("--starts", nargs="+", choices=("random", "predicted", *PREPARATIONS),
                        default=["random", "predicted"])  # fmt: skip
    parser.add_argument("--rates", nargs="+", type=positive, default=[0.0015, 0.005, 0.015, 0.05])
    parser.add_argument("--warmups", nargs="+", type=float, default=[0.0, 0.25], help="shares of the run")
    parser.add_argument("--epochs", type=integer(1), default=6, help="of 1,000 images (default: %(default)s)")
    parser.add_argument("--images", type=integer(1), default=500, help="held-out images (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=output_directory,
        default=str(Path(__file__).parent / "results"),
        help="where the results are kept (default: %(default)s)",
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "learning_rates.json"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a CPU is slow on numbers next to nothing
    train = few_shot(load_dataset(arguments.data, "train"), 100, seed=0)
    test = load_dataset(arguments.data, "val").first(arguments.images)

    rows: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else []
    hashes = {start: None if start == "random" else hash_of("ghn2") for start in arguments.starts}
    wanted = [
        {"model": model, "start": start, "ghn": hashes[start], "rate": rate, "warmup": warmup,
         "epochs": arguments.epochs, "images": arguments.images}
        for model in arguments.models for rate in arguments.rates for warmup in arguments.warmups
        for start in arguments.starts
    ]  # fmt: skip
    done = {json.dumps({key: row[key] for key in wanted[0]}) for row in rows}
    for setting in tqdm([setting for setting in wanted if json.dumps(setting) not in done], desc="training"):
        chosen = {key: setting[key] for key in ("start", "rate", "warmup", "epochs")}
        curve = run(setting["model"], **chosen, train=train, test=test)
        rows.append({**setting, "machine": machine(), "top1": curve})
        file.write_text(json.dumps({"runs": rows}, indent=1) + "\n")

    table = Table("architecture", "start", "warm-up", "before", *(f"{rate:g}" for rate in arguments.rates))
    for model in arguments.models:
        for start in arguments.starts:
            for warmup in arguments.warmups:
                cells, before = [], math.nan
                for rate in arguments.rates:
                    wanted_row = {"model": model, "start": start, "ghn": hashes[start], "rate": rate, "warmup": warmup}
                    curve = next(r["top1"] for r in rows if wanted_row.items() <= r.items())
                    before = curve[0]
                    cells.append(f"{min(curve[1:], default=math.nan):.1f} → {curve[-1]:.1f}")
                table.add_row(model, start, f"{warmup:.0%}", f"{before:.1f}", *cells)
    console = Console(width=130)
    console.print(f"{machine()}; top-1 in %: lowest after an epoch → at the end, by learning rate", table)


if __name__ == "__main__":
    sys.exit(exit_status("learning_rates.py", main))
