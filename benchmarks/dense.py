"""Whether a predicted backbone is worth anything for a dense task: semantic segmentation, against random weights.

The GHN-2 paper asks this of photographs of pedestrians. Here scenes are made of any data set for classification: two to
four of its images are pasted, in ellipses of random places and sizes that fade at the rim, and each pixel has the class
of the image that it shows, or is background. Background is a texture with an image's colours and spectrum but random
phases, and so is one more ellipse: neither sharpness nor an ellipse tells what an object is. What such scenes are
not: an ellipse has what surrounds its object too, and counts it as the object; objects stand in no context, and do not
touch as things do; classes are those that the images were sorted by. By default they are the images that the GHN was
trained on: it has seen these classes and these training images, which random weights have not.

A timm backbone's last four stages are normalised, brought to a quarter of the scene's size and put side by side, a 1×1
convolution makes logits of them, and these are enlarged. (The convolution comes before the rest, which is the same and
cheaper.) "probe" trains the convolution alone, "whole" everything, with AdamW for so many steps. Norms have statistics
of training scenes for both starts, and again after training. The learning rate is the one with the best mIoU on
validation scenes in the first seed's runs; training, validation and test scenes share no image. A seed draws the
training scenes and random weights; heads begin with zeros.

mIoU is over all classes with background, "foreground" over the others, in percent. Rows are kept in DIR/dense.json as
they come, and not measured again; the table and the picture are of those asked for.
"""

from __future__ import annotations

import argparse
import base64
import copy
import itertools
import json
import statistics
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from graph_layer import machine
from matplotlib.figure import Figure
from random_vs_ghn import hash_of
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import timm_ghn
from timm_ghn.checkpoints.load import load_ghn
from timm_ghn.command_line import (
    Parser,
    add_data_arguments,
    add_device_argument,
    add_ghn_argument,
    architecture_name,
    exit_status,
    integer,
    load_data,
    output_directory,
    positive,
    print_table,
)
from timm_ghn.evaluation.accuracy import create_model
from timm_ghn.training.data import ImageDataset

MODELS = ("mobilenetv3_small_050", "regnetx_002", "convnext_atto", "resnet10t")
STARTS = ("predicted", "random")
TRAININGS = ("probe", "whole")
FIGURES = ("miou", "foreground", "accuracy")
TEST_BATCH = 50
SHOWN = 3  # scenes in the picture
FADE = 0.15  # part of an ellipse's radius

Scenes = tuple[Tensor, Tensor]  # images, and a class of each pixel; the last class is background


def scenes(data: ImageDataset, count: int, side: int, seed: int) -> Scenes:
    """Scenes of a data set's images, on its device; the seed alone decides which."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def texture() -> Tensor:
        images = F.interpolate(data.batch(data.draw(count, generator))[0], size=side, mode="bilinear")
        means = images.mean((2, 3), keepdim=True)
        phases = torch.fft.rfft2(torch.randn(count, 1, side, side, generator=generator)).angle().to(images.device)
        strengths = torch.fft.rfft2(images - means).abs()
        scrambled: Tensor = torch.fft.irfft2(torch.polar(strengths, phases.expand_as(strengths)), s=(side, side))
        return means + scrambled

    canvas = texture()
    truth = torch.full((count, side, side), data.num_classes, device=canvas.device)
    objects = torch.randint(2, 5, (count,), generator=generator)
    for order in (0, 1, None, 2, 3):  # None is an ellipse of texture
        if order is None:
            images, labels = texture(), torch.full((count,), data.num_classes)
        else:
            images, labels = data.batch(data.draw(count, generator))
        widths, heights = uniform(0.35, 0.75), uniform(0.35, 0.75)  # of the canvas
        # Where a pixel of the canvas, from -1 to 1 each way, lies in the image.
        place = torch.zeros(count, 2, 3)
        for row, part in enumerate((widths, heights)):
            place[:, row, row] = 1 / part
            place[:, row, 2] = uniform(-1, 1) * (1 - part) / part
        grid = F.affine_grid(place.to(canvas.device), [count, 3, side, side], align_corners=False)
        alpha = ((1 - grid.square().sum(3).sqrt()) / FADE).clamp(0, 1)
        if order is not None:
            alpha[order >= objects] = 0
        canvas = torch.lerp(canvas, F.grid_sample(images, grid, align_corners=False), alpha[:, None])
        truth = torch.where(alpha > 0.5, labels.to(truth.device)[:, None, None], truth)
    return canvas, truth


class Head(nn.Module):
    """Logits of each pixel from a backbone's stages."""

    def __init__(self, channels: Sequence[int], classes: int, side: int):
        super().__init__()
        self.side = side
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, affine=False) for width in channels)
        self.classifiers = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in channels)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        logits = [
            F.interpolate(classifier(norm(stage)), size=self.side // 4, mode="bilinear")
            for norm, classifier, stage in zip(self.norms, self.classifiers, stages, strict=True)
        ]
        return F.interpolate(torch.stack(logits).sum(0), size=self.side, mode="bilinear")


def build(arguments: argparse.Namespace, name: str, start: str, classes: int, seed: int) -> nn.Sequential:
    """A backbone and a head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone: Any = create_model(name, classes, arguments.canvas, features_only=True, out_indices=(-4, -3, -2, -1))
        head = Head(backbone.feature_info.channels(), classes, arguments.canvas)
    if start == "predicted":
        timm_ghn.initialize(backbone, load_ghn(arguments.ghn))
    network: nn.Sequential = nn.Sequential(backbone, head).to(arguments.device)
    return network.to(memory_format=torch.channels_last)


def fit(
    model: nn.Module, inputs: Callable[[Tensor], Any], truth: Tensor, rate: float, arguments: argparse.Namespace
) -> None:
    """Trains in the mode that the model is in, on the inputs of the rows that it draws, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    steps = arguments.steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1, cycle_momentum=False)
    for _ in range(steps):
        rows = torch.randint(len(truth), (arguments.batch,), generator=generator).to(truth.device)
        loss = F.cross_entropy(model(inputs(rows)), truth[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def answers(network: nn.Module, images: Tensor) -> Tensor:
    network.eval()
    return torch.cat([network(part).argmax(1) for part in images.split(TEST_BATCH)])


def figures(found: Tensor, truth: Tensor) -> dict[str, float]:
    """In percent; a class that is neither there nor answered counts nowhere."""
    classes = int(truth.max()) + 1  # the last one, background, is always there
    pairs = (truth * classes + found).flatten().bincount(minlength=classes**2).double().view(classes, classes)
    overlap = 100 * pairs.diag() / (pairs.sum(0) + pairs.sum(1) - pairs.diag())
    values = (overlap.nanmean(), overlap[:-1].nanmean(), 100 * pairs.trace() / pairs.sum())
    return dict(zip(FIGURES, map(float, values), strict=True))


def compare(
    arguments: argparse.Namespace, network: nn.Sequential, rates: Mapping[str, Sequence[float]], *of: Scenes
) -> dict[str, Any]:
    """Both trainings of a network, at the better of the rates, on scenes to train, choose and test with."""
    (images, truth), validation, test = of
    calibration = images[: 5 * TEST_BATCH].split(TEST_BATCH)
    timm_ghn.calibrate(network, calibration).eval()
    with torch.no_grad():
        stages = [torch.cat(parts) for parts in zip(*map(network[0], images.split(TEST_BATCH)), strict=True)]

    def trained(training: str, rate: float) -> nn.Module:
        copied = copy.deepcopy(network)
        if training == "probe":
            fit(copied[1], lambda rows: [stage[rows] for stage in stages], truth, rate, arguments)
            return copied
        fit(copied.train(), lambda rows: images[rows], truth, rate, arguments)
        return timm_ghn.calibrate(copied, calibration)

    row: dict[str, Any] = {}
    for training in TRAININGS:
        networks = {rate: trained(training, rate) for rate in rates[training]}
        judged = {rate: figures(answers(networks[rate], validation[0]), validation[1]) for rate in networks}
        rate = max(networks, key=lambda rate: judged[rate]["miou"])
        found = answers(networks[rate], test[0])
        validated = {str(rate): judged[rate]["miou"] for rate in judged}
        row[training] = {**figures(found, test[1]), "rate": rate, "validation": validated}
        row["shown"] = base64.b64encode(zlib.compress(found[:SHOWN].to("cpu", torch.uint8).numpy().tobytes())).decode()
    return row


def measure(
    arguments: argparse.Namespace, images: ImageDataset, validation: Scenes, test: Scenes
) -> list[dict[str, Any]]:
    """A row for each model, start and seed, from the file where it is there."""
    file = arguments.out / "dense.json"
    known: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    names = ("image_size", "holdout", "canvas", "scenes", "test_scenes", "steps", "batch")
    rates = dict(zip(TRAININGS, (arguments.probe_rates, arguments.whole_rates), strict=True))
    setting = [Path(arguments.data).name, *(getattr(arguments, name) for name in names), rates]
    rows: list[dict[str, Any]] = []
    checkpoint = f"{arguments.ghn} {hash_of(arguments.ghn)}"  # a tag can come to mean other weights
    cases = itertools.product(arguments.models, STARTS, range(arguments.seeds))
    for name, start, seed in tqdm(list(cases), desc="measuring", unit="network"):
        of = [name, start, checkpoint if start == "predicted" else "", seed, *setting]
        row = next((row for row in known if row["of"] == of), None)
        if row is None:
            tried = {training: [rows[-seed][training]["rate"]] for training in TRAININGS} if seed else rates
            training = scenes(images, arguments.scenes, arguments.canvas, seed)
            network = build(arguments, name, start, images.num_classes + 1, seed)
            row = {"of": of, "machine": machine(), **compare(arguments, network, tried, training, validation, test)}
            known.append(row)
            file.write_text(json.dumps({"rows": known}, indent=1) + "\n")
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> list[list[str]]:
    """Measures what is not measured yet, and returns the table of means, its first row the header."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    add_ghn_argument(parser)
    parser.add_argument("--models", nargs="+", type=architecture_name, default=MODELS, help="timm architectures")
    parser.add_argument("--canvas", type=integer(32), default=64, help="side of a scene (default: %(default)s)")
    parser.add_argument("--scenes", type=integer(1), default=300, help="to train on (default: %(default)s)")
    parser.add_argument("--test-scenes", type=integer(SHOWN), default=150, help="and to validate on (%(default)s)")
    parser.add_argument("--steps", type=integer(2), default=200, help="of each training (default: %(default)s)")
    parser.add_argument("--batch", type=integer(2), default=8, help="scenes in a step (default: %(default)s)")
    for option, rates in (("--probe-rates", [0.003, 0.01]), ("--whole-rates", [0.001, 0.004])):
        parser.add_argument(option, nargs="+", type=positive, default=rates, help="to try (default: %(default)s)")
    parser.add_argument("--seeds", type=integer(1), default=2, help="networks of each kind (default: %(default)s)")
    add_device_argument(parser)
    parser.add_argument("--out", type=output_directory, default=str(Path(__file__).parent / "results"), metavar="DIR")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a CPU is slow on numbers next to nothing
    images, held_out = (load_data(arguments, split).to(arguments.device) for split in ("train", "val"))
    # Every other held-out image is for validation; no training scene is drawn by a negative seed.
    halves = [held_out.rows(slice(i, None, 2)) for i in (0, 1)]
    validation, test = (scenes(halves[i], arguments.test_scenes, arguments.canvas, ~i) for i in (0, 1))
    return report(measure(arguments, images, validation, test), held_out, test, arguments.out)


def report(rows: list[dict[str, Any]], data: ImageDataset, test: Scenes, directory: Path) -> list[list[str]]:
    """Means over the seeds, printed as a table, which is returned, and drawn as a picture."""
    nothing = figures(torch.full_like(test[1], data.num_classes), test[1])
    models = list(dict.fromkeys(row["of"][0] for row in rows))

    def mean(name: str, start: str, training: str, figure: str) -> float:
        return statistics.fmean(row[training][figure] for row in rows if row["of"][:2] == [name, start])

    cells = [["model", "training", *(f"{figure}, {start}" for figure in FIGURES for start in STARTS)]]
    for training, name in itertools.product(TRAININGS, models):
        values = (mean(name, start, training, figure) for figure in FIGURES for start in STARTS)
        cells.append([name, training, *(f"{value:.1f}" for value in values)])
    cells.append(["background", "none", *(f"{nothing[figure]:.1f}" for figure in FIGURES for _ in STARTS)])
    table = Table(*cells[0], title=f"{machine()}; %, mean over seeds")
    for line in cells[1:]:
        table.add_row(*line)
    print_table(table)

    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = cast(Any, figure.subfigures(1, 2, width_ratios=(5, 4)))
    texts = [next(row["shown"] for row in rows if row["of"][:2] == [models[-1], start]) for start in STARTS]
    found = [torch.tensor(list(zlib.decompress(base64.b64decode(text)))).view_as(test[1][:SHOWN]) for text in texts]
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (data.std, data.mean))
    pictures = (test[0][:SHOWN].cpu() * scale + shift).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    for row, axes in enumerate(left.subplots(SHOWN, 2 + len(STARTS))):
        axes[0].imshow(pictures[row])
        for place, labels in zip(axes[1:], (test[1].cpu(), *found), strict=True):
            shown = labels[row].double().masked_fill(labels[row] == data.num_classes, torch.nan)
            place.imshow(shown.numpy(), cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
        for place, title in zip(axes, ("scene", "truth", *STARTS), strict=True):
            place.set(xticks=[], yticks=[], title=title if row == 0 else "", facecolor="black")
    left.suptitle(f"{models[-1]}, whole network trained")
    for training, axes in zip(TRAININGS, right.subplots(2, 1, sharex=True), strict=True):
        for number, start in enumerate(STARTS):
            places = [place + 0.4 * number - 0.2 for place in range(len(models))]
            axes.bar(places, [mean(name, start, training, "foreground") for name in models], 0.38, label=start)
        axes.set(title=f"{training}: mIoU of the foreground, %")
        axes.set_xticks(range(len(models)), models)
    axes.legend()
    figure.savefig(directory / "dense.png")
    return cells


if __name__ == "__main__":
    sys.exit(exit_status("dense.py", main))
