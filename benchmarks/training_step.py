"""Where the time of a training step goes, stage by stage, beside a plain implementation of the same step.

The plain one builds every network with its random weights, traces it and trains on it once; passes messages edge by
edge and node by node (`timm_ghn.ops.reference`); decodes the largest kernel for every node and cuts it; and computes
all copies of tiled parameters, in float32. Ours builds networks without memory, uses each as often as the training's
default, computes copies once (`timm_ghn.training.folding`, on the CPU), and in bfloat16 where the device is faster with
it. What the GHN predicts is the same, and so is the work: as many images for each.

With ``--against REVISION`` the script of that revision of this repository runs as well, in turns with this one, and the
ratio of the two is printed: the same architectures, but each revision with its own optimiser and size of meta-batch.

Times are those of one architecture in one step, the mean over all. On the CPU one thread computes, and its own time
counts, so that a busy machine does not matter. Building and tracing count, although worker processes do most of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")

import torch
import torch.nn.functional as F
from graph_layer import NOT_MEASURED, machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from timm_ghn.command_line import Parser, exit_status, integer, output_directory
from timm_ghn.devices import has_bf16
from timm_ghn.hypernet import GHN, GHNConfig
from timm_ghn.ops.reference import gated_gnn_reference
from timm_ghn.training.architectures import SPLITS, Architecture, architecture
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.folding import unfold
from timm_ghn.training.optimizers import new_optimizer
from timm_ghn.training.task import Prepared, Task, prepare
from timm_ghn.training.trainer import new_ghn

STAGES = ("build", "trace", "GHN forward", "network forward and backward", "GHN backward", "optimiser")
CLASSES, SIZE = 10, 32


class Clock:
    """Adds up the time of stages."""

    def __init__(self, device: str):
        self.device = device
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[name] += self.now() - started


def make_plain(ghn: GHN) -> GHN:
    """A copy with the same weights that works node by node and edge by edge."""
    ghn = copy.deepcopy(ghn)
    gnn: Any = ghn.gnn
    decoder: Any = ghn.decoder
    decode = decoder.forward

    def pass_messages(x: Tensor, edges: Tensor, sizes: list[int], embeddings: Sequence[nn.Embedding]) -> Tensor:
        layers = (gnn.mlp.fc[0], gnn.mlp.fc[2], gnn.mlp_ve.fc[0], gnn.mlp_ve.fc[2])
        weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        gru = gnn.gru
        weights += [gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh]
        return gated_gnn_reference(x, edges, *weights)

    def decode_all(states: list[Tensor], shapes: list[tuple[int, int, int, int]]) -> list[Tensor]:
        kernels = [torch.cat([decode([state[None]], [decoder.max_shape])[0] for state in x]) for x in states]
        return [
            kernel[:, : shape[0], : shape[1], : shape[2], : shape[3]]
            for kernel, shape in zip(kernels, shapes, strict=True)
        ]

    gnn.forward, decoder.forward = pass_messages, decode_all
    return ghn


def prepare_timed(found: Architecture, plain: bool, clock: Clock) -> Task:
    """A task, its time charged to building and tracing."""
    if plain:
        with clock.stage("build"):
            network = found.build(CLASSES, image_size=SIZE)
        del network
    started = clock.now()
    prepared: Prepared = prepare(found, CLASSES, SIZE)
    tracing = clock.now() - started
    with clock.stage("build"):
        task = Task(prepared, CLASSES, SIZE, clock.device)
    clock.seconds["trace"] += tracing
    return task


def train(
    ghn: GHN, tasks: list[Task], batches: list[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer, bf16: bool,
    plain: bool, clock: Clock,
) -> None:  # fmt: skip
    """One step, as in `Trainer.train_step`, with a clock."""
    optimizer.zero_grad(set_to_none=False)
    with clock.stage("GHN forward"):
        predicted = ghn([task.graph for task in tasks])
    outputs: list[Any] = []
    gradients: list[Any] = []
    for task, tiles, (images, labels) in zip(tasks, predicted, batches, strict=True):
        with clock.stage("network forward and backward"):
            leaves = {name: tile.detach().requires_grad_() for name, tile in tiles.items() if name in task.shapes}
            parameters = task.parameters(leaves)
            if plain:
                parameters = {name: unfold(parameter) for name, parameter in parameters.items()}
            loss = F.cross_entropy(task.output(parameters, images, bf16), labels)
            (loss / len(tasks)).backward()
        used = [name for name, leaf in leaves.items() if leaf.grad is not None and tiles[name].requires_grad]
        outputs += [tiles[name] for name in used]
        own: list[Any] = [leaves[name].grad for name in used]
        if not plain:
            norm = float(torch.stack(torch._foreach_norm(own)).norm())
            own = [*torch._foreach_mul(own, min(1.0, 3.0 / norm))]
        gradients += own
    with clock.stage("GHN backward"):
        torch.autograd.backward(outputs, gradients)
    with clock.stage("optimiser"):
        torch.nn.utils.clip_grad_norm_(ghn.parameters(), 5.0)
        optimizer.step()


def measure(found: list[Architecture], plain: bool, device: str, meta_batch: int, batch_size: int) -> dict[str, float]:
    """Seconds of each stage for one architecture."""
    ghn = new_ghn(GHNConfig(CLASSES), seed=0).to(device)
    if plain:
        ghn = make_plain(ghn)
    for parameter in ghn.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = (
        torch.optim.AdamW(ghn.parameters(), lr=1e-4, foreach=False)
        if plain
        else new_optimizer("soap", ghn.parameters(), lr=1e-4, betas=(0.95, 0.95), weight_decay=1e-2)
    )
    bf16 = has_bf16(torch.device(device)) and not plain
    generator = torch.Generator(device).manual_seed(0)
    batches = [
        (
            torch.randn(batch_size, 3, SIZE, SIZE, device=device, generator=generator),
            torch.randint(CLASSES, (batch_size,), device=device, generator=generator),
        )
        for _ in range(meta_batch)
    ]
    preparing, steps = Clock(device), Clock(device)
    prepare_timed(found[0], plain, Clock(device))  # what is done once in a process is not a step's
    tasks = [prepare_timed(one, plain, preparing) for one in found]
    for clock in (Clock(device), steps):  # the first time, convolutions are compiled
        for start in range(0, len(tasks), meta_batch):
            group = tasks[start : start + meta_batch]
            train(ghn, group, batches[: len(group)], optimizer, bf16, plain, clock)
    uses = 1 if plain else TrainConfig(ghn.config).uses
    return {stage: (preparing.seconds[stage] / uses + steps.seconds[stage]) / len(tasks) for stage in STAGES}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", choices=list(SPLITS), default=list(SPLITS), help="of architectures")
    parser.add_argument("--architectures", type=integer(1), default=16, help="of each source (default: %(default)s)")
    parser.add_argument("--plain-architectures", type=integer(1), default=4, help="for the plain one (%(default)s)")
    parser.add_argument("--meta-batch", type=integer(1), default=4, help="architectures a step (default: %(default)s)")
    parser.add_argument("--batch-size", type=integer(1), default=64, help="images for each (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=output_directory,
        default=str(Path(__file__).parent / "results"),
        help="where to write (default: %(default)s)",
    )
    parser.add_argument("--against", metavar="REVISION", help="also run the script of this revision, and compare")
    parser.add_argument("--rounds", type=integer(1), default=3, help="of this comparison (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.against:
        compare(arguments)
        return
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

    rows: list[dict[str, Any]] = []
    for source, device in tqdm([(s, d) for s in arguments.sources for d in devices], desc="measuring"):
        found = [architecture(source, "train", index) for index in range(arguments.architectures)]
        fewer = found[: arguments.plain_architectures]
        sizes = arguments.meta_batch, arguments.batch_size
        row = {"source": source, "device": device, "ours": measure(found, False, device, *sizes)}
        # The ratio is that of the same work: the architectures that both did.
        row["plain"] = measure(fewer, True, device, *sizes)
        row["ours on the same"] = measure(fewer, False, device, *sizes)
        rows.append(row)

    arguments.out.mkdir(parents=True, exist_ok=True)
    told = {name: value for name, value in vars(arguments).items() if name != "out"}
    report: dict[str, Any] = {"machine": machine(), "arguments": told, "seconds": rows}
    (arguments.out / "training_step.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(rows, report["machine"], arguments.out / "training_step.png")
    console = Console(width=150)
    console.print(f"{report['machine']}\n{arguments.batch_size} images an architecture, milliseconds")
    for source in arguments.sources:
        console.print(table(source, [row for row in rows if row["source"] == source]))


def compare(arguments: argparse.Namespace) -> None:
    """Runs a revision's script and this one in turns; prints the median times and their ratio."""
    here = Path(__file__).resolve().parent.parent
    times: dict[str, dict[str, list[float]]] = {source: {"before": [], "now": []} for source in arguments.sources}
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        git = ["git", "-C", str(here)]
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(before), arguments.against], check=True)
        try:
            for _ in tqdm(range(arguments.rounds), desc="rounds"):
                for kind, root in (("before", before), ("now", here)):
                    command = [sys.executable, str(root / "benchmarks" / "training_step.py"), "--out", folder]
                    command += ["--architectures", str(arguments.architectures), "--plain-architectures", "1"]
                    command += ["--sources", *arguments.sources]
                    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
                    subprocess.run(command, check=True, env=environment, capture_output=True)
                    for row in json.loads((Path(folder) / "training_step.json").read_text())["seconds"]:
                        times[row["source"]][kind].append(total(row["ours"], "all"))
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(before)], check=True)
    result = Table("architectures", f"{arguments.against}, ms", "now, ms", "ratio", title=machine())
    for source, kinds in times.items():
        earlier, now = (1e3 * statistics.median(kinds[kind]) for kind in ("before", "now"))
        result.add_row(f"{source}'s kind", f"{earlier:.1f}", f"{now:.1f}", f"{earlier / now:.2f}×")
    Console(width=110).print(result)
    report = {"machine": machine(), "against": arguments.against, "seconds": times}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "training_step_against.json").write_text(json.dumps(report, indent=1) + "\n")


def table(source: str, rows: list[dict[str, Any]]) -> Table:
    result = Table(title=f"{source}'s kind of architectures")
    result.add_column("stage")
    for column in ("plain, CPU", "ours, CPU", "ratio", "plain, CUDA", "ours, CUDA", "ratio"):
        result.add_column(column, justify="right")
    by_device = {row["device"]: row for row in rows}
    for stage in (*STAGES, "all"):
        cells = []
        for device in ("cpu", "cuda"):
            if device not in by_device:
                cells += [NOT_MEASURED] * 3
                continue
            plain, ours = (total(by_device[device][kind], stage) for kind in ("plain", "ours on the same"))
            cells += [f"{1e3 * plain:,.1f}", f"{1e3 * ours:,.1f}", f"{plain / ours:,.1f}×" if ours else ""]
        result.add_row(stage, *cells, end_section=stage == STAGES[-1])
    for device, row in by_device.items():
        speed = 1 / total(row["ours"], "all")
        result.caption = f"{result.caption or ''}{device}, all architectures: {speed:.1f} architecture-steps a second. "
    return result


def total(seconds: dict[str, float], stage: str) -> float:
    return sum(seconds.values()) if stage == "all" else seconds[stage]


def draw(rows: list[dict[str, Any]], caption: str, path: Path) -> None:
    """Stacked bars, plain and ours, for each source and device."""
    from matplotlib.figure import Figure

    bars = [
        (f"{row['source']}, {row['device']}\n{kind}", row[kind])
        for row in rows
        for kind in ("plain", "ours on the same")
    ]
    figure = Figure(figsize=(10, 0.7 * len(bars) + 1.8), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for stage in STAGES:
        widths = [1e3 * seconds[stage] for _, seconds in bars]
        axes.barh([label for label, _ in bars], widths, left=left, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, end in enumerate(left):
        axes.text(end, y, f" {end:,.0f}", va="center")
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds for one architecture in one step", xlim=(0, 1.1 * max(left)))
    axes.legend(fontsize=8)
    figure.supxlabel(caption, fontsize=7)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(exit_status("training_step.py", main))
