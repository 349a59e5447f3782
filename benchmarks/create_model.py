"""How long it takes to create a model with predicted weights, against timm's random init.

Prints a table, and writes JSON and a picture. For each of 40 architectures the two alternate in one process, the
predicted model without a graph in the cache (cold) and with one (warm); each time is the best of its repeats, on one
thread. On a busy machine the processor's time, which is given too, says more than the clock. Memory is the highest that
the process had above what it had before, over the size of the model. The floor is the time it takes to write the
parameters at the bandwidth of the memory. What happens once in a process is not in the times: imports, and loading the
GHN.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import matplotlib
import timm
import torch
from graph_layer import machine
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

import timm_ghn
from timm_ghn.command_line import Parser, architecture_name, exit_status, integer, output_directory

ARCHITECTURES = (
    "test_vit", "test_resnet", "mobilenetv3_small_050", "mobilevit_xs", "mobilenetv3_small_100", "convnext_atto",
    "regnety_004", "ghostnet_100", "efficientnet_b0", "deit_tiny_patch16_224", "mobilenetv3_large_100", "densenet121",
    "levit_128", "resnet18", "fastvit_sa12", "hrnet_w18", "vit_small_patch16_224", "inception_v3", "pvt_v2_b2",
    "resnet50", "coatnet_0_rw_224", "seresnet50", "swin_tiny_patch4_window7_224", "convnext_tiny", "efficientnet_b5",
    "resnet101", "mixer_b16_224", "nfnet_f0", "vit_base_patch16_224", "swin_base_patch4_window7_224", "convnext_base",
    "beit_base_patch16_224", "vgg16", "swin_large_patch4_window7_224", "convnext_large", "vit_large_patch16_224",
    "vit_huge_patch14_224", "convnextv2_huge", "vit_giant_patch14_224", "vit_giant_patch14_dinov2",
)  # fmt: skip
WAYS = ("random", "cold", "warm")
LARGE = 100_000_000
TAG = "benchmark"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ghn", default="ghn2", help="tag, directory or .safetensors file (default: %(default)s)")
    parser.add_argument("--models", nargs="+", type=architecture_name, default=list(ARCHITECTURES), help="timm models")
    parser.add_argument("--repeats", type=integer(1), default=5, help="of each; fewer for large ones (%(default)s)")
    parser.add_argument(
        "--out",
        type=output_directory,
        default=str(Path(__file__).parent / "results"),
        help="where to write (default: %(default)s)",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tag = arguments.ghn
    if tag not in timm_ghn.list_ghns():
        timm_ghn.register(TAG, tag)
        tag = TAG
    with tempfile.TemporaryDirectory() as cache:
        huggingface_hub.constants.HF_HOME = cache
        measure("test_vit2", tag, 1)  # what happens once in a process
        rows = [measure(name, tag, arguments.repeats) for name in tqdm(arguments.models)]
    rows.sort(key=lambda row: row["parameters"])
    bandwidth = memory_bandwidth()
    for row in rows:
        row["floor"] = row["bytes"] / bandwidth
    result = {
        "machine": machine(),
        "load": os.getloadavg(),  # of a machine of which one processor was needed
        "threads": 1,
        "bandwidth": bandwidth,
        "summary": {
            clock: {
                way: {
                    "median": median_ratio(rows, way, clock),
                    "median_above_100M": median_ratio([r for r in rows if r["parameters"] > LARGE], way, clock),
                }
                for way in WAYS[1:]
            }
            for clock in ("seconds", "cpu_seconds")
        }
        | {"median_peak": statistics.median(peak(row) for row in rows), "models": len(rows)},
        "models": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "create_model.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, arguments.out / "create_model.png")
    show(result)


def measure(name: str, tag: str, repeats: int) -> dict[str, Any]:
    """Creates a model all three ways, by turns, and keeps the best of each."""
    with torch.device("meta"):
        model = timm.create_model(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    del model
    if parameters > LARGE:
        repeats = min(repeats, 1 if parameters > 5 * LARGE else 2)
    calls: dict[str, Callable[[], nn.Module]] = {
        "random": lambda: timm.create_model(name),
        "cold": lambda: timm.create_model(name, pretrained_cfg=tag),
        "warm": lambda: timm.create_model(name, pretrained_cfg=tag),
    }
    row: dict[str, Any] = {"name": name, "parameters": parameters, "bytes": size}
    runs: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    os.environ.pop("TIMM_GHN_CACHE", None)
    calls["warm"]()  # puts the graph into the cache
    for _ in range(repeats):
        for way, call in calls.items():
            os.environ["TIMM_GHN_CACHE"] = "0" if way == "cold" else "1"
            runs[way].append(measured(call))
    for position, (key, best) in enumerate((("seconds", min), ("cpu_seconds", min), ("peak_bytes", max))):
        row[key] = {way: best(run[position] for run in runs[way]) for way in WAYS}
    return row


def measured(call: Callable[[], nn.Module]) -> tuple[float, float, float]:
    """Seconds by the clock and of the processor, and the peak of memory, of one call."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # the allocator keeps memory that was freed, which would not be seen again
    before = memory("VmRSS")
    reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    model = call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = memory("VmHWM") - before
    del model
    return wall, cpu, peak


def memory(field: str) -> int:
    """Bytes of physical memory of this process, now (VmRSS) or at its highest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Makes the highest the current one (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_bandwidth() -> float:
    """Bytes a second that one thread writes to memory."""
    target = torch.empty(1 << 27)
    times = []
    for _ in range(8):
        started = time.perf_counter()
        target.fill_(1.0)
        times.append(time.perf_counter() - started)
    return target.nbytes / min(times)


def median_ratio(rows: list[dict[str, Any]], way: str, clock: str) -> float | None:
    return statistics.median(row[clock][way] / row[clock]["random"] for row in rows) if rows else None


def peak(row: dict[str, Any]) -> float:
    """Highest memory of a prediction, in model sizes."""
    return float(max(row["peak_bytes"][way] for way in WAYS[1:]) / row["bytes"])


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"Seconds to create a model; {result['machine']}")
    table.add_column("model")
    for column in ("parameters", "random init", "cold", "warm", "floor", "cold / random", "warm / random", "memory"):
        table.add_column(column, justify="right")
    for row in result["models"]:
        seconds = row["seconds"]
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.1f} M",
            *(f"{seconds[way]:.3f}" for way in WAYS),
            f"{row['floor']:.3f}",
            *(f"{seconds[way] / seconds['random']:.2f}" for way in WAYS[1:]),
            f"{peak(row):.2f}×",
        )
    console = Console()
    console.print(table)
    console.print(f"memory: median {result['summary']['median_peak']:.2f}× the model", highlight=False)
    for clock in ("seconds", "cpu_seconds"):
        ways = result["summary"][clock]
        for way, medians in ways.items():
            shown = ", ".join(f"{key} {value:.2f}" for key, value in medians.items() if value is not None)
            console.print(f"{way} / random init by {clock}: {shown}", highlight=False)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    millions = [row["parameters"] / 1e6 for row in rows]
    styles = {"random": ("o", "tab:gray"), "cold": ("s", "tab:blue"), "warm": ("^", "tab:green")}
    labels = {"random": "timm's random init", "cold": "predicted, cold", "warm": "predicted, graph in the cache"}
    for way, (marker, color) in styles.items():
        seconds = [row["seconds"][way] for row in rows]
        axes.plot(millions, seconds, marker, color=color, label=labels[way], markersize=5)
    axes.plot(millions, [row["floor"] for row in rows], "-", color="black", linewidth=1, label="floor: writing them")
    axes.set(xscale="log", yscale="log", xlabel="million parameters", ylabel="seconds to create the model")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(exit_status("create_model.py", main))
