"""Feeds damaged and random files to every checkpoint reader: each must load a GHN or raise a CheckpointError.

    python benchmarks/fuzz_readers.py --inputs 100000

Prints a table of outcomes per format and writes it as JSON. An input that does anything else (another exception, more
than a gigabyte, more than five seconds, a crash of the process) is kept in the output directory, with its seed.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from attacks import attacks
from attacks.samples import EDITS, attempt, damaged, samples

from timm_ghn.command_line import Parser, exit_status, integer, output_directory

MEMORY = 1 << 30
SECONDS = 5.0
CHUNK = 10_000  # inputs per process
OPCODES = b"(.0129BCIJKLMNQRSTUVXabcdeghijlopqrstu\x80\x81\x85\x86\x87\x88\x89\x8a\x8c\x8e\x93\x94\x95"


def generated(corpus: dict[str, bytes], seed: int) -> tuple[str, bytes]:
    """The input of a seed: noise, two files spliced, or one with a few edits, mostly where its structure is."""
    rng = random.Random(seed)
    format = rng.choice(list(corpus))
    data = corpus[format]
    kind = rng.random()
    if kind < 0.02:
        return format, data[: rng.randrange(20)] + rng.randbytes(rng.randrange(2000))
    if kind < 0.1:
        other = corpus[rng.choice(list(corpus))]
        data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]
    edits = []
    for _ in range(rng.randint(1, 6)):
        near_an_end = rng.random() < 0.7
        where = rng.choice((1, -1)) * rng.randrange(min(len(data) + 1, 1200)) if near_an_end else rng.randrange(1 << 20)
        what = rng.choice(
            (rng.randbytes(rng.randint(1, 8)), b"\xff" * 4, b"\0" * 8, b"\x7f", bytes([rng.choice(OPCODES)]))
        )
        edits.append((rng.choice(EDITS), where, what))
    return format, damaged(data, edits)


def work(seeds: range, out: Path, results: multiprocessing.Queue[dict[str, dict[str, int]]]) -> None:
    """Tries a range of seeds; `out`/current is the one at work, should the process die."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    corpus = samples()
    corpus |= {f"graphormer {format}": data for format, data in samples(hypernet="graphormer", layers=2).items()}
    hostile = attacks("/tmp/timm-ghn-canary")
    corpus["attack"] = b""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    outcomes: dict[str, dict[str, int]] = collections.defaultdict(collections.Counter)
    small = [data for data in hostile.values() if 0 < len(data) < 100_000]
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            corpus["attack"] = small[seed % len(small)]
            format, data = generated(corpus, seed)
            (out / "current").write_bytes(data)
            started = time.perf_counter()
            try:
                tried = attempt(data, Path(folder))
                loaded = any(not isinstance(outcome, Exception) for outcome in tried)
                memory = any(isinstance(getattr(outcome, "__cause__", None), MemoryError) for outcome in tried)
                outcome = "memory" if memory else "loaded" if loaded else "refused"
            except Exception:
                outcome = "other exception"
                (out / f"{seed}.txt").write_text(traceback.format_exc())
            if time.perf_counter() - started > SECONDS:
                outcome = "slow"
            if outcome not in ("loaded", "refused"):
                (out / f"{seed}.bin").write_bytes(data)
            outcomes[format][outcome] += 1
    results.put({format: dict(counts) for format, counts in outcomes.items()})


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=integer(1), default=100_000)
    parser.add_argument("--first-seed", type=integer(0), default=0)
    parser.add_argument("--output", type=output_directory, default="runs/fuzz")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    started = time.perf_counter()
    end = args.first_seed + args.inputs
    for first in range(args.first_seed, end, CHUNK):
        results = context.Queue()
        seeds = range(first, min(first + CHUNK, end))
        process = context.Process(target=work, args=(seeds, args.output, results))
        process.start()
        try:
            for format, counts in results.get(timeout=len(seeds) * SECONDS / 10 + 60).items():
                totals[format].update(counts)
            process.join()
        except Exception:
            process.kill()
            (args.output / "current").rename(args.output / f"crash-{first}.bin")
            totals["?"]["crash or hang"] += 1
        (args.output / "fuzz.json").write_text(json.dumps(totals, indent=2) + "\n")
        print(f"{seeds.stop - args.first_seed:,} inputs, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    kinds = sorted({kind for counts in totals.values() for kind in counts})
    table = Table("format", *kinds, title=f"{args.inputs:,} inputs in {time.perf_counter() - started:.0f} s")
    for format, counts in sorted(totals.items()):
        table.add_row(format, *(f"{counts[kind]:,}" for kind in kinds))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(exit_status("fuzz_readers.py", main))
