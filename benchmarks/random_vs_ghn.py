"""What training gains when it starts from predicted weights: the same runs from timm's random init and from a GHN's.

For each architecture every start trains on the same images in the same order, with the same augmentation, optimiser and
schedule, each with the learning rate that serves it best: all rates of one grid are tried in short runs of a seed of
their own and judged on images that nothing else looks at. Then come the measured runs, over several seeds. Accuracies
are those of held-out images, batch norms calibrated on training images before every evaluation, whatever the start.

Starts: "random" is timm's init, "predicted" the GHN's weights as they are, "conditioned" and "orthogonal" prepared as
ghn_kwargs={"finetune": ...} does, "later-orthogonal" predicted but for the later 40 % of the layers, which get fresh
orthogonal weights (arXiv 2207.10049), and "pretrained" timm's weights, where they can be had.

Sections: "full" trains on all of --data, "long" five times as long, "few-shot" on 100 images of each class, "transfer"
and "transfer-small" on a data set the GHN never saw (--transfer), at its own size and at three quarters of it. Prints
tables, and writes JSON, curves as PNG and SVG, and one HTML page. A run that was stopped goes on where it was: finished
runs are kept in DIR/random_vs_ghn.jsonl, under the hash of the checkpoint, and random ones serve every checkpoint.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import comparison_report
import timm
import torch
import torch.nn.functional as F
from graph_layer import machine
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import nn
from tqdm import tqdm

import timm_ghn
from timm_ghn.checkpoints.catalog import CATALOG
from timm_ghn.checkpoints.load import load_ghn
from timm_ghn.command_line import (
    Parser,
    architecture_name,
    device_name,
    exit_status,
    integer,
    output_directory,
    positive,
)
from timm_ghn.evaluation.accuracy import accuracy, create_model
from timm_ghn.evaluation.calibration import calibrate
from timm_ghn.preparation import PREPARATIONS
from timm_ghn.training.data import ImageDataset, load_dataset
from timm_ghn.training.precision import fast_arithmetic
from timm_ghn.training.small_maps import simplify_small_maps
from timm_ghn.workers import process_pool

MODELS = (
    "resnet10t", "regnetx_002", "dla46_c", "mobilenetv3_small_050", "edgenext_xx_small", "convnext_atto",
    "mobilevit_xxs", "vit_tiny_patch16_224",
)  # fmt: skip
FEW_MODELS = ("regnetx_002", "vit_tiny_patch16_224")
"""For the sections of few images and of transfer."""
LONG_MODELS = ("mobilenetv3_small_050",)
STARTS = ("random", "predicted", "conditioned", "orthogonal", "later-orthogonal", "pretrained")
SHOTS = 100
MARKS = (0, 1, 10, 30, 100, 200, 300, 500, 700, 1000, 2000, 3000, 5000)
BATCH = 32
TEST_BATCH = 250
CALIBRATION = 2  # batches of TEST_BATCH images
TUNING_SEED = 1_000
TUNING_IMAGES = 1_000


@dataclass(frozen=True)
class Section:
    """One comparison: what is trained on, and what is trained."""

    name: str
    title: str
    data: str
    models: tuple[str, ...]
    steps: int
    image_size: int | None = None
    shots: int | None = None


@dataclass(frozen=True)
class Run:
    """One training run."""

    section: Section
    model: str
    start: str
    rate: float
    seed: int
    steps: int

    def key(self, setting: tuple[str, ...], checkpoint: str) -> str:
        """Identifies what the run computes; one from random weights does not depend on the checkpoint."""
        of = "" if self.start in ("random", "pretrained") else checkpoint
        section = (Path(self.section.data).name, self.section.image_size, self.section.shots)
        run = (self.model, self.start, self.rate, self.seed, self.steps)
        return json.dumps([*section, *run, *setting, of])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is not in the store yet, and returns what the report is made of."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="torch/cifar10", help="what the GHN was trained on (default: %(default)s)")
    parser.add_argument("--transfer", help="another data set: parquet file, image folder, torch/NAME or hfds/REPO")
    parser.add_argument("--ghn", default="ghn2", help="tag, directory or .safetensors file (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", help="only these")
    parser.add_argument("--models", nargs="+", type=architecture_name, help="timm architectures, for all sections")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="what to begin training from")
    parser.add_argument("--rates", nargs="+", type=positive, default=[0.01, 0.03, 0.1], help="learning rates to try")
    parser.add_argument("--optimizer", default="sgd", help="any of timm's (default: %(default)s, with momentum)")
    parser.add_argument("--seeds", type=integer(1), default=3, help="measured runs of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=integer(1), default=1000, help="of the first section (default: %(default)s)")
    parser.add_argument("--holdout", type=integer(1), default=5000, help="training images to hold out (%(default)s)")
    parser.add_argument("--images", type=integer(1), default=1000, help="held-out images to measure on (%(default)s)")
    parser.add_argument("--workers", type=integer(1), default=1, help="processes, of one thread each (%(default)s)")
    parser.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--download", action="store_true", help="let torch/… fetch what is missing")
    parser.add_argument("--out", type=output_directory, default=str(Path(__file__).parent / "results"), metavar="DIR")
    arguments = parser.parse_args(argv)
    if "random" not in arguments.starts:
        parser.error("--starts must have random in it: everything is compared with it.")
    if arguments.optimizer not in list_optimizers():
        parser.error(f"timm has no optimizer {arguments.optimizer!r}.")
    checkpoint = hash_of(arguments.ghn)
    sections = chosen_sections(parser, arguments)
    models = {model for section in sections for model in section.models}
    unavailable = without_pretrained(models) if "pretrained" in arguments.starts else {}
    setting = (arguments.optimizer, str(arguments.holdout), str(arguments.images), timm.__version__)
    store = Store(arguments.out / "random_vs_ghn.jsonl", setting, checkpoint)
    with process_pool(arguments.workers, prepare_worker, (arguments,)) as pool:
        compared = [compare(section, arguments, unavailable, pool, store) for section in sections]
    result = {
        "machine": machine(),
        "command": {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)},
        "checkpoint": {"ghn": arguments.ghn, "sha256": checkpoint},
        "batch": BATCH,
        "unavailable": unavailable,
        "sections": compared,
    }
    comparison_report.write(result, arguments.out)
    comparison_report.show(result)
    return result


def compare(
    section: Section,
    arguments: argparse.Namespace,
    unavailable: Container[str],
    pool: ProcessPoolExecutor,
    store: Store,
) -> dict[str, Any]:
    """Finds the best rate for every architecture and start, and then measures with it."""
    tuning = {
        (model, start): [
            Run(section, model, start, rate, TUNING_SEED, max(1, section.steps // 5)) for rate in arguments.rates
        ]
        for model in section.models
        for start in arguments.starts
        if start != "pretrained" or model not in unavailable
    }
    tuned = execute(pool, store, itertools.chain(*tuning.values()), f"{section.name}: tuning")
    best = [max(runs, key=lambda run: tuned[run]["curve"][str(run.steps)]) for runs in tuning.values()]
    measured = [replace(run, seed=seed, steps=section.steps) for run in best for seed in range(arguments.seeds)]
    done = execute(pool, store, measured, f"{section.name}: measuring")
    rows = {name: [row(*item) for item in results.items()] for name, results in (("tuning", tuned), ("runs", done))}
    return {**asdict(section), **rows}


def chosen_sections(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[Section]:
    data = arguments.data
    models, few, long = (tuple(arguments.models or default) for default in (MODELS, FEW_MODELS, LONG_MODELS))
    steps, fewer = arguments.steps, max(1, arguments.steps // 5)
    sections = [
        Section("full", "The data set the GHN was trained on", data, models, steps),
        Section("long", "Five times as long", data, long, 5 * steps),
        Section("few-shot", f"The same, {SHOTS} images a class", data, few, fewer, shots=SHOTS),
    ]
    if arguments.transfer:
        options = {"holdout": arguments.holdout, "download": arguments.download}
        size = load_dataset(arguments.transfer, "val", **options).image_size
        smaller = size * 3 // 4
        sections += [
            Section("transfer", f"Transfer, {size}×{size}", arguments.transfer, few, fewer, size),
            Section("transfer-small", f"Transfer, {smaller}×{smaller}", arguments.transfer, few, fewer, smaller),
        ]
    wanted = arguments.sections or [section.name for section in sections]
    unknown = set(wanted) - {section.name for section in sections}
    if unknown:
        parser.error(f"no section {unknown.pop()!r} here; there are {', '.join(s.name for s in sections)}.")
    return [section for section in sections if section.name in wanted]


def hash_of(ghn: str) -> str:
    """Of a published checkpoint, that of its file; of any other, its fingerprint."""
    pin = CATALOG.published.get(ghn)
    if pin is not None and pin.sha256 is not None:
        return pin.sha256
    return timm_ghn.load_ghn(ghn).fingerprint()


def without_pretrained(models: Iterable[str]) -> dict[str, str]:
    """The models whose pretrained weights cannot be had, with the reason."""
    reasons: dict[str, str] = {}
    for model in tqdm(sorted(models), "fetching pretrained weights"):
        try:
            timm.create_model(model, pretrained=True)
        except Exception as error:  # whatever the network, the Hub or timm raises
            reasons[model] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return reasons


class Store:
    """Finished runs, a JSON line each."""

    def __init__(self, file: Path, setting: tuple[str, ...], checkpoint: str):
        self.file, self.setting, self.checkpoint = file, setting, checkpoint
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text().splitlines() if file.exists() else []
        self._done = {entry["key"]: entry["result"] for entry in map(json.loads, lines)}

    def __contains__(self, run: Run) -> bool:
        return run.key(self.setting, self.checkpoint) in self._done

    def __getitem__(self, run: Run) -> dict[str, Any]:
        found: dict[str, Any] = self._done[run.key(self.setting, self.checkpoint)]
        return found

    def add(self, run: Run, result: dict[str, Any]) -> None:
        key = run.key(self.setting, self.checkpoint)
        self._done[key] = json.loads(json.dumps(result))  # as it is after a restart
        with self.file.open("a") as lines:
            lines.write(json.dumps({"key": key, "result": result}) + "\n")


def execute(pool: ProcessPoolExecutor, store: Store, runs: Iterable[Run], title: str) -> dict[Run, dict[str, Any]]:
    """The results of some runs, in their order; those that were finished earlier come from the store."""
    runs = list(runs)
    futures = {pool.submit(train, run): run for run in runs if run not in store}
    for future in tqdm(as_completed(futures), title, len(runs), initial=len(runs) - len(futures)):
        store.add(futures[future], future.result())
    return {run: store[run] for run in runs}


def row(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    fields = {name: getattr(run, name) for name in ("model", "start", "rate", "seed", "steps")}
    return {**fields, **result}


# --- in a worker ------------------------------------------------------------------------------------------------------

_arguments: argparse.Namespace


def prepare_worker(arguments: argparse.Namespace) -> None:
    global _arguments
    _arguments = arguments
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a CPU is slow on numbers next to nothing, such as old momenta
    if arguments.ghn not in timm_ghn.list_ghns():
        timm_ghn.register("compared", arguments.ghn)
        arguments.ghn = "compared"
    load_ghn(arguments.ghn)  # once, so that it is in no run's time


load = functools.lru_cache(maxsize=4)(load_dataset)


def train(run: Run) -> dict[str, Any]:
    """Trains one network, and measures it on the way."""
    device, section = torch.device(_arguments.device), run.section
    options = {"image_size": section.image_size, "holdout": _arguments.holdout, "download": _arguments.download}
    images, held_out = (load(section.data, split, **options).to(device) for split in ("train", "val"))
    if section.shots:
        images = few_shot(images, section.shots, run.seed)
    tuning, test = held_out_rows(len(held_out), _arguments.images)
    started = time.perf_counter()
    model = arranged(fresh(run, images), device)
    creation = time.perf_counter() - started

    generator = torch.Generator(device).manual_seed(run.seed)
    calibration = [images.sample(TEST_BATCH, torch.Generator(device).manual_seed(i)) for i in range(CALIBRATION)]

    def measure(rows: torch.Tensor, calibrated: bool = True) -> float:
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        if calibrated:
            calibrate(model, (x for x, _ in calibration))
        found = accuracy(model, (held_out.batch(part.to(device)) for part in rows.split(TEST_BATCH)))
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
        return found

    result: dict[str, Any] = {"creation_seconds": creation, "diverged": False, "curve": {}, "seconds": {}}
    marks = {mark for mark in MARKS if mark < run.steps} | {run.steps}
    if run.seed == TUNING_SEED:
        marks, test = {run.steps}, tuning
    else:
        result["uncalibrated_accuracy"] = measure(test, calibrated=False)
    optimizer = create_optimizer_v2(model, _arguments.optimizer, lr=run.rate, weight_decay=5e-4)
    schedule = CosineLRScheduler(optimizer, run.steps, warmup_t=run.steps // 20, t_in_epochs=False)
    spent = 0.0
    for step in range(run.steps + 1):
        if step in marks:
            result["seconds"][step] = spent
            result["curve"][step] = measure(test)
        if step < run.steps and not result["diverged"]:
            started = time.perf_counter()
            schedule.step_update(step + 1)  # the first rate would be 0
            loss = update(model.train(), optimizer, *images.sample(BATCH, generator))
            spent += time.perf_counter() - started
            result["diverged"] = not math.isfinite(loss)
    return result


def fresh(run: Run, images: ImageDataset) -> Any:
    """The network before training."""
    torch.manual_seed(run.seed)
    options: dict[str, Any] = {}
    if run.start == "pretrained":
        options = {"pretrained": True}
    elif run.start != "random":
        preparation = {"finetune": run.start} if run.start in PREPARATIONS else {}
        options = {"pretrained_cfg": _arguments.ghn, "ghn_kwargs": preparation}
    model = create_model(run.model, images.num_classes, images.image_size, **options)
    if run.start == "later-orthogonal":
        reinitialise_later_layers(model)
    return model


def reinitialise_later_layers(model: Any) -> None:
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    layers.remove(model.get_classifier())
    for layer in layers[len(layers) * 3 // 5 :]:
        nn.init.orthogonal_(layer.weight, nn.init.calculate_gain("relu"))


def arranged(model: nn.Module, device: torch.device) -> nn.Module:
    """A network on a device, as it trains fast there."""
    if device.type == "cpu":
        simplify_small_maps(model)
    return model.to(device).to(memory_format=torch.channels_last)


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, labels: torch.Tensor, bf16: bool = False
) -> float:
    """One step; returns the loss before it."""
    with fast_arithmetic(inputs.device, bf16):
        logits = model(inputs.contiguous(memory_format=torch.channels_last))
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return loss.item()


def few_shot(images: ImageDataset, shots: int | None, seed: int) -> ImageDataset:
    """So many images of each class, drawn by the seed, mixed; all of them for None, in its order."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.labels.device)
    if shots is None:
        return images.rows(order)
    labels = images.labels[order]
    return images.rows(torch.cat([order[labels == label][:shots] for label in range(images.num_classes)])).mixed()


def held_out_rows(count: int, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Disjoint rows of the held-out images to choose learning rates on, and to measure on."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    tuning = min(TUNING_IMAGES, count // 4)
    return order[:tuning], order[tuning : tuning + wanted]


if __name__ == "__main__":
    sys.exit(exit_status("random_vs_ghn.py", main))
