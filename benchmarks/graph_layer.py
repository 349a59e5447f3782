"""How fast the graph layer is: GHN-2's message passing and GHN-3's attention, against their plain references.

Message passing is compared with two others. The reference goes from edge to edge; nobody would use it. The node loop is
what one would write without this layer: a message is computed once for each node, and a node's messages add up in one
product. The layer itself is measured without a compiler (`TIMM_GHN_COMPILE=0`) and with one, and as it is of no use
without the topology, which the node loop makes for itself, speed-ups over the node loop count that too.

Prints tables, and writes JSON and a picture. Every time is the median of several runs; the reference, which takes
seconds, runs once, and backward not at all on graphs with more edges than `--reference-edges`. On the CPU one thread
computes, and its own time counts, so that a busy machine does not. A graph's floor is what the machine could do at
best: the arithmetic, and reading edges and states from memory once a sweep, at measured rates; on a GPU also a wait for
each level of the graph.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from timm_ghn.command_line import Parser, architecture_name, exit_status, integer, output_directory
from timm_ghn.graph import trace
from timm_ghn.ops import Topology, edge_bias, gated_gnn
from timm_ghn.ops.edge_bias import edge_bias_reference
from timm_ghn.ops.reference import gated_gnn_reference
from timm_ghn.training.architectures import architecture

MODELS = (
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "cait_xxs36_224",
)
NOT_MEASURED = "not measured"
GPU_LEVEL_SECONDS = 1e-6
"""Floor of a level inside one kernel: about four reads from a GPU's cache that wait for one another."""


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="*", type=model_spec, default=list(MODELS), help="as NAME or NAME:depth=BLOCKS"
    )
    parser.add_argument("--batches", nargs="*", type=integer(1), default=[4, 16], help="of so many training graphs")
    parser.add_argument("--dim", type=integer(1), default=32, help="width of GHN-2's states (default: %(default)s)")
    parser.add_argument(
        "--attention-dim",
        type=integer(1),
        default=64,
        help="width of GHN-3's states, and the heads of its attention below: by "
        "default those of the smallest released GHN-3 (%(default)s)",
    )
    parser.add_argument("--heads", type=integer(1), default=8, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=integer(1), default=10, help="runs to take the median of (%(default)s)")
    parser.add_argument(
        "--reference-edges",
        type=integer(0),
        default=50_000,
        help="most edges for which the reference, which keeps gigabytes, runs backward (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=output_directory,
        default=str(Path(__file__).parent / "results"),
        help="where to write (default: %(default)s)",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

    graphs = {model: [model_graph(model)] for model in tqdm(arguments.models, desc="tracing models")}
    for count in arguments.batches:
        indices = tqdm(range(count), desc=f"tracing {count} training graphs")
        graphs[f"{count} training graphs"] = [training_graph(index) for index in indices]
    rates = {device: machine_rates(device) for device in devices}
    rows = []
    for name, batch in (progress := tqdm(graphs.items(), desc="measuring")):
        progress.set_postfix_str(name)
        rows.append(measure_graph(name, batch, devices, rates, arguments))

    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine(),
        "dim": arguments.dim,
        "attention_dim": arguments.attention_dim,
        "rates": rates,
        "rows": rows,
    }
    (arguments.out / "graph_layer.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(rows, report["machine"], arguments.out / "graph_layer.png")
    console = Console(width=170)
    console.print(f"{report['machine']}\nmilliseconds, float32, GHN-2's states of width {arguments.dim}")
    for title, key in (("forward", "forward"), ("forward and backward", "both")):
        console.print(layer_table(f"GHN-2's message passing, {title}", key, rows))
    console.print(attention_table(arguments, rows))


def model_spec(text: str) -> str:
    """The type of an argument such as ``vit_tiny_patch16_224:depth=153``."""
    name, _, depth = text.partition(":depth=")
    architecture_name(name)
    if depth:
        integer(1)(depth)
    return text


def model_graph(spec: str) -> tuple[Tensor, int]:
    """Edges and number of nodes of a timm model."""
    name, _, depth = spec.partition(":depth=")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, **({"depth": int(depth)} if depth else {}))
    graph = trace(model)
    return graph.edges, len(graph)


def training_graph(index: int) -> tuple[Tensor, int]:
    """Edges and number of nodes of a network that GHNs are trained on."""
    graph = trace(architecture("timm", "train", index).skeleton(num_classes=10), (3, 32, 32))
    return graph.edges, len(graph)


def measure_graph(
    name: str,
    batch: list[tuple[Tensor, int]],
    devices: list[str],
    rates: dict[str, dict[str, float]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Everything about one graph, or one batch of graphs."""
    d, sizes = arguments.dim, [nodes for _, nodes in batch]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    edges = torch.cat([e + torch.tensor([start, start, 0]) for (e, _), start in zip(batch, starts, strict=True)])
    topology = Topology.from_edges(edges, sizes)
    row: dict[str, Any] = {
        "name": name,
        "graphs": len(batch),
        "nodes": sum(sizes),
        "edges": len(edges),
        "levels": len(topology.level_ptr) - 1,
        "topology_seconds": median_time(lambda: Topology.from_edges(edges, sizes), "cpu", arguments.repeats),
        "gated_gnn": {device: {} for device in devices},
        "attention": {device: {} for device in devices},
    }
    generator = torch.Generator().manual_seed(0)
    weights = layer_weights(d, generator)
    states = torch.randn(sum(sizes), d, generator=generator)
    for device in devices:
        there = topology.to(device)
        times = row["gated_gnn"][device]
        for key, switch in (("layer", "1"), ("portable", "0")) if device == "cpu" else (("layer", "1"),):
            os.environ["TIMM_GHN_COMPILE"] = switch
            times[key] = both_times(
                lambda h, *w, there=there: gated_gnn(h, there, *w), [states, *weights], device, arguments.repeats
            )
        if device == "cpu":
            times["node loop"] = both_times(
                lambda h, *w: torch.cat(
                    [node_loop(states, e, *w) for states, (e, _) in zip(h.split(sizes), batch, strict=True)]
                ),
                [states, *weights],
                device,
                max(1, arguments.repeats // 3),
            )
        times["reference"] = both_times(
            lambda h, *w: gated_gnn_reference(h, edges, *w),
            [states, *weights],
            device,
            repeats=1,
            backward=len(edges) <= arguments.reference_edges,
        )
        times["floor"] = floor(row, len(topology.in_index), d, device, rates[device])
    if len(batch) == 1:
        measure_attention(row, edges, sizes[0], devices, arguments, generator)
    return row


def node_loop(h: Tensor, edges: Tensor, *weights: Tensor) -> Tensor:
    """A graph's message passing, node by node: [N, d] states to updated ones."""
    w0, b0, w2, b2, ve_w0, ve_b0, ve_w2, ve_b2, *gru = weights
    source, target, distance = edges.unbind(1)
    virtual = h.new_zeros(len(h), len(h))
    virtual[target, source] = 1 / distance.to(h.dtype)
    real = (virtual == 1).to(h.dtype)
    states, nodes = list(h.unbind()), range(len(h))
    back = real.T.contiguous(), virtual.T.contiguous()
    for sweep, by_real, by_virtual in ((nodes, real, virtual), (reversed(nodes), *back)):
        sent, sent_far = torch.zeros_like(h), torch.zeros_like(h)
        for v in sweep:
            message = by_real[v] @ sent + by_virtual[v] @ sent_far
            states[v] = torch.gru_cell(message[None], states[v][None], *gru)[0]
            sent[v] = F.linear(F.linear(states[v], w0, b0).relu(), w2, b2).relu()
            sent_far[v] = F.linear(F.linear(states[v], ve_w0, ve_b0).relu(), ve_w2, ve_b2).relu()
    return torch.stack(states)


def measure_attention(
    row: dict[str, Any],
    edges: Tensor,
    nodes: int,
    devices: list[str],
    arguments: argparse.Namespace,
    generator: torch.Generator,
) -> None:
    """GHN-3's attention with its bias, through the table and through the N x N x 2d tensor."""
    d, heads = arguments.attention_dim, arguments.heads
    distance = torch.zeros(1, nodes, nodes, dtype=torch.int64)
    distance[0, edges[:, 0], edges[:, 1]] = edges[:, 2]
    shapes = ((257, d), (d, 2 * d), (d,), (heads, d), (heads,))
    weights = [torch.randn(s, generator=generator) * d**-0.5 for s in shapes]
    qkv = [torch.randn(1, heads, nodes, d // heads, generator=generator) for _ in range(3)]

    def table(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=edge_bias(distance.to(q.device), *weights))

    def plain(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Any:
        bias = edge_bias_reference(distance.to(q.device), *weights)
        return (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v

    for device in devices:
        for key, function, repeats in (("layer", table, arguments.repeats), ("reference", plain, 1)):
            times = both_times(function, [*qkv, *weights], device, repeats)
            with LargestTensor() as largest:  # type: ignore[no-untyped-call]  # torch says nothing of its own
                function(*(x.to(device) for x in (*qkv, *weights)))
            row["attention"][device][key] = {**times, "largest_bytes": largest.bytes}


class LargestTensor(TorchDispatchMode):
    """Sees every tensor that an operation makes, and keeps the size of the largest."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def layer_weights(d: int, generator: torch.Generator) -> list[Tensor]:
    """In the order of the layer's arguments."""
    shapes = [(d // 2, d), (d // 2,), (d, d // 2), (d,)] * 2 + [(3 * d, d), (3 * d, d), (3 * d,), (3 * d,)]
    return [torch.randn(shape, generator=generator) * d**-0.5 for shape in shapes]


def both_times(
    function: Callable[..., Tensor], inputs: list[Tensor], device: str, repeats: int, backward: bool = True
) -> dict[str, float | None]:
    """Seconds of a forward pass without gradients, and of a forward and backward pass, or None."""
    there = [x.to(device) for x in inputs]

    def forward() -> None:
        with torch.no_grad():
            function(*there)

    leaves = [x.to(device).requires_grad_() for x in inputs]

    def both() -> None:
        torch.autograd.grad(function(*leaves).sum(), leaves, allow_unused=True)

    return {
        "forward": median_time(forward, device, repeats),
        "both": median_time(both, device, repeats) if backward else None,
    }


def median_time(function: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of a run; a run to warm up comes first, unless there is only one."""

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    times = []
    for _ in range(repeats + (repeats > 1)):
        started = now()
        function()
        times.append(now() - started)
    return statistics.median(times[repeats > 1 :])


def machine_rates(device: str) -> dict[str, float]:
    """Flops and bytes per second."""
    big, out = torch.randn(1024, 1024, device=device), torch.empty(1024, 1024, device=device)
    flops = 2 * 1024**3 / median_time(lambda: torch.mm(big, big, out=out), device, 10)
    source = torch.randn(1 << 24, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / median_time(lambda: target.copy_(source), device, 10)
    return {"flops": flops, "bandwidth": bandwidth}


def floor(row: dict[str, Any], entries: int, d: int, device: str, rates: dict[str, float]) -> dict[str, float]:
    """What the machine could do at best: see the module's description. A backward pass costs two forward passes."""
    weights = sum(w.numel() for w in layer_weights(d, torch.Generator()))
    flops = 2 * (2 * weights * row["nodes"] + 2 * d * entries)
    traffic = 2 * (4 * d * 5 * row["nodes"] + 16 * entries)
    work = flops / rates["flops"] + traffic / rates["bandwidth"]
    latency = 2 * row["levels"] * GPU_LEVEL_SECONDS if device == "cuda" else 0.0
    return {"forward": work + latency, "both": 3 * work + 2 * latency}


def machine() -> str:
    """The hardware and versions that the figures belong to."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    if torch.cuda.is_available():
        import triton

        versions += f", CUDA {torch.version.cuda}, triton {triton.__version__}"
    return f"{cpu} (one thread), {gpu}; {versions}; {datetime.date.today().isoformat()}"


def milliseconds(seconds: float | None) -> str:
    return NOT_MEASURED if seconds is None else f"{1e3 * seconds:,.4g}"


def ratio(slow: float | None, fast: float | None) -> str:
    return NOT_MEASURED if slow is None or fast is None else f"{slow / fast:,.{0 if slow > 10 * fast else 1}f}×"


def with_topology(seconds: float | None, row: dict[str, Any]) -> float | None:
    return None if seconds is None else seconds + row["topology_seconds"]


def layer_table(title: str, key: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    table.add_column("graph")
    columns = "nodes|edges|levels|reference|node loop|topology|portable|speed-up|compiled|speed-up|floor"
    if "cuda" in rows[0]["gated_gnn"]:
        columns += "|reference on GPU|CUDA|speed-up|CUDA floor"
    for column in columns.split("|"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row[x]:,}" for x in ("nodes", "edges", "levels")]
        times = {kind: seconds[key] for kind, seconds in row["gated_gnn"]["cpu"].items()}
        cells += [milliseconds(x) for x in (times["reference"], times["node loop"], row["topology_seconds"])]
        for kind in ("portable", "layer"):
            cells += [milliseconds(times[kind]), ratio(times["node loop"], with_topology(times[kind], row))]
        cells.append(milliseconds(times["floor"]))
        if "cuda" in row["gated_gnn"]:
            reference, layer, least = (row["gated_gnn"]["cuda"][x][key] for x in ("reference", "layer", "floor"))
            cells += [milliseconds(reference), milliseconds(layer), ratio(reference, layer), milliseconds(least)]
        table.add_row(row["name"], *cells)
    return table


def attention_table(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> Table:
    sizes = f"width {arguments.attention_dim}, {arguments.heads} heads"
    table = Table(title=f"GHN-3's attention and bias, {sizes} (forward / forward and backward)")
    table.add_column("graph")
    for column in ("nodes", "reference", "CPU", "speed-up", "largest tensor, MiB", "CUDA", "speed-up"):
        table.add_column(column, justify="right")
    for row in rows:
        cpu, cuda = row["attention"]["cpu"], row["attention"].get("cuda")
        if not cpu:
            continue
        cells = [f"{row['nodes']:,}"]
        cells += [" / ".join(milliseconds(cpu[x][k]) for k in ("forward", "both")) for x in ("reference", "layer")]
        cells.append(" / ".join(ratio(cpu["reference"][k], cpu["layer"][k]) for k in ("forward", "both")))
        cells.append(" → ".join(f"{cpu[x]['largest_bytes'] / 2**20:,.1f}" for x in ("reference", "layer")))
        if cuda:
            cells.append(" / ".join(milliseconds(cuda["layer"][k]) for k in ("forward", "both")))
            cells.append(" / ".join(ratio(cuda["reference"][k], cuda["layer"][k]) for k in ("forward", "both")))
        else:
            cells += [NOT_MEASURED, NOT_MEASURED]
        table.add_row(row["name"], *cells)
    return table


def draw(rows: list[dict[str, Any]], caption: str, path: Path) -> None:
    """Bars on a logarithmic scale, a panel per pass."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = [
        ("reference", "cpu", "reference"),
        ("node loop", "cpu", "node loop"),
        ("portable", "cpu", "portable"),
        ("compiled", "cpu", "layer"),
        ("CPU floor", "cpu", "floor"),
    ]
    if "cuda" in rows[0]["gated_gnn"]:
        series += [
            ("reference on GPU", "cuda", "reference"),
            ("CUDA", "cuda", "layer"),
            ("CUDA floor", "cuda", "floor"),
        ]
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 0.75 * len(rows) + 1.5), sharey=True, layout="constrained")
    height = 0.8 / len(series)
    for panel, key, title in zip(panels, ("forward", "both"), ("forward", "forward and backward"), strict=True):
        for i, (label, device, kind) in enumerate(series):
            values = [1e3 * (row["gated_gnn"][device][kind][key] or 0) for row in rows]
            panel.barh(numpy.arange(len(rows)) + (i - len(series) / 2 + 0.5) * height, values, height, label=label)
        panel.set(xscale="log", xlabel="milliseconds", title=f"GHN-2's message passing, {title}")
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [f"{row['name']}\n{row['nodes']:,} nodes" for row in rows])
    panels[0].invert_yaxis()
    panels[1].legend()
    figure.supxlabel(caption, fontsize=7)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(exit_status("graph_layer.py", main))
