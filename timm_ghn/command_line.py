"""What all commands share: types of arguments, which refuse a mistake before any work is done, and the exit status."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from safetensors import SafetensorError

from .errors import GHNError

if TYPE_CHECKING:
    from rich.table import Table

    from .prediction import Report
    from .training.data import ImageDataset

EXIT_STATUS = "Exit status: 0 done; 1 failed, for the reason given; 2 wrong arguments; 130 interrupted by Ctrl-C."
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (all options: {self.prog} --help)\n")


class Help(argparse.HelpFormatter):
    """Help whose paragraphs are as wide as the terminal; indented lines, which are examples, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = super()._fill_text
        parts = text.rstrip().split("\n\n")
        return "\n\n".join(part if part.startswith("  ") else filled(part, width, indent) for part in parts)


def exit_status(program: str, command: Callable[[], object]) -> int:
    """Runs a command and returns the exit status; what a user can do something about is told in one line."""
    try:
        command()
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{program}: interrupted\n")
        return 130
    except (GHNError, OSError, SafetensorError, RuntimeError) as error:
        # Of what torch raises as a RuntimeError, a lack of memory is no mistake of this program.
        short_of_memory = any(text in str(error) for text in ("allocate memory", "out of memory"))
        if isinstance(error, RuntimeError) and not short_of_memory:
            raise
        sys.stderr.write(f"{program}: {' '.join(str(error).split())}\n")
        return 1
    return 0


def print_table(table: Table) -> None:
    """Prints a table in which no word is cut, however narrow the terminal, or the 80 columns that a file counts as."""
    from rich.console import Console

    for column in table.columns:
        words = " ".join(map(str, (column.header, *column.cells))).split()
        column.min_width = max(map(len, words), default=0)
    Console().print(table, crop=False)


def print_json(result: Any) -> None:
    """Prints a command's result as one JSON document; numbers that JSON does not have are null."""
    sys.stdout.write(json.dumps(_for_json(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _for_json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def print_report(args: argparse.Namespace, report: Report, files: list[Path]) -> None:
    """What was predicted of ``args.name`` by ``args.ghn``, and the files it is in; as JSON if that is asked for."""
    if args.json:
        found = {"architecture": args.name, "ghn": args.ghn, "predicted_fraction": report.predicted_fraction}
        lists = {"predicted": report.predicted, "kept": report.kept, "seconds": report.seconds}
        print_json({**found, **lists, "files": {str(file): file.stat().st_size for file in files}})
        return
    from rich.console import Console

    console = Console()
    console.print(f"{args.name} by {args.ghn}", style="bold")
    console.print(str(report), highlight=False, markup=False)
    for file in files:
        console.print(f"{file.stat().st_size:>15,} bytes  {file}", highlight=False, markup=False)


# --- arguments of several commands ------------------------------------------------------------------------------------


def add_ghn_argument(parser: argparse.ArgumentParser) -> None:
    """What predicts."""
    parser.add_argument(
        "--ghn", default="ghn2",
        help="tag, directory, .safetensors file or hf-hub:org/repo@revision (default: %(default)s)",
    )  # fmt: skip


def add_device_argument(parser: argparse._ActionsContainer) -> None:
    """Where it is computed."""
    parser.add_argument(
        "--device", type=device_name, default="auto", help="cpu, cuda, …; auto is cuda if there is one (default)"
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """How the result is printed."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_data_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Which images, as `load_data` takes them, or as a list of such."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", nargs="+" if several else None, default=["torch/cifar10"] if several else "torch/cifar10",
        metavar="DATA",
        help="parquet file, image folder, torch/NAME or hfds/REPO; with #20-29 behind it, only these classes",
    )  # fmt: skip
    data.add_argument(
        "--holdout", type=integer(1),
        help="training images to hold out for validation (default: 5,000, but at most a quarter)",
    )  # fmt: skip
    data.add_argument("--image-size", type=integer(1), help="bring all images to this size, a square")
    data.add_argument(
        "--root", help="where torch/… and hfds/… keep their files; by default in $HF_HOME/timm-ghn/datasets"
    )
    data.add_argument("--download", action="store_true", help="let torch/… fetch what is missing")


def add_measuring_arguments(parser: argparse.ArgumentParser, support: int | None, images: int | None) -> None:
    """What predicts, which and how many images it is measured with, and where; `load_images` takes them."""
    add_data_arguments(parser)
    add_ghn_argument(parser)
    parser.add_argument(
        "--support", type=integer(2), default=support,
        help=f"take norms' statistics, and a fitted head, from so many training images (default: {support or 'all'})",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=integer(1), default=images,
        help=f"measure on so many held-out images (default: {images or 'all'})",
    )  # fmt: skip
    add_device_argument(parser)


def load_images(args: argparse.Namespace) -> tuple[ImageDataset, ImageDataset]:
    """The images that statistics and heads come from, and those that are measured on."""
    support, test = (load_data(args, split) for split in ("train", "val"))
    support = support.first(args.support).mixed()  # batches of one class would give norms statistics of their own
    return support.to(args.device), test.first(args.images).to(args.device)


def load_data(args: argparse.Namespace, split: str, source: str | None = None) -> ImageDataset:
    """The images that the arguments name, or those of one of several sources."""
    from .training.data import load_dataset

    options = {name: getattr(args, name) for name in ("holdout", "image_size", "root", "download")}
    return load_dataset(source or args.data, split, **options)


# --- types of arguments -----------------------------------------------------------------------------------------------


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of a whole number within bounds."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= (number := int(text)) <= most:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least:,} to {most:,}")

    return parse


def positive(text: str) -> float:
    """A finite number above zero."""
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


def count(text: str) -> int:
    """``"25M"``, ``"4.5G"``, ``"12e6"`` or a plain number, of whatever is counted."""
    with contextlib.suppress(ValueError, OverflowError):
        unit = text[-1:].upper() if text[-1:].isalpha() else ""
        if (number := float(text.removesuffix(text[-1:]) if unit else text) * _UNITS.get(unit, 0)) >= 1:
            return int(number)
    raise argparse.ArgumentTypeError(f"{text!r} is no count: give a number, or one with K, M, G or T, such as 25M")


def file_size(text: str) -> int:
    """``"5GB"``, ``"500 MB"`` or a number of bytes, as bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) ?([KMGT]?)B?", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: give a number of bytes, or one with KB, MB, GB or TB, such as 5GB"
        )
    return size


def device_name(text: str) -> str:
    """A device that this machine has."""
    import torch  # not above: most commands show their options without it, and it takes seconds

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    with contextlib.suppress(RuntimeError):  # what is not even the name of one
        wanted = torch.device(text)
        if wanted.type == "cpu" or (accelerator and wanted.type == accelerator.type and (wanted.index or 0) < count):
            return text
    present = ["cpu", *(f"{accelerator.type}:{index}" for index in range(count) if accelerator)]
    raise argparse.ArgumentTypeError(f"there is no device {text!r} here, only {', '.join(present)}")


def architecture_name(text: str) -> str:
    """The name of an architecture that timm has."""
    import timm

    if not text:
        raise argparse.ArgumentTypeError("'' names no architecture")
    if not timm.is_model(text):
        nearest = difflib.get_close_matches(text, timm.list_models(), n=1, cutoff=0.0)[0]
        raise argparse.ArgumentTypeError(f"timm has no architecture {text!r}: did you mean {nearest!r}?")
    try:
        timm.get_pretrained_cfg(text)
    except RuntimeError as error:
        architecture, _, tag = text.partition(".")
        raise argparse.ArgumentTypeError(f"timm has no weights {tag!r} of {architecture}: leave the tag out") from error
    return text


def architecture_names(text: str) -> list[str]:
    """Names of architectures, with commas between."""
    if names := [architecture_name(name) for part in text.split(",") if (name := part.strip())]:
        return names
    raise argparse.ArgumentTypeError(f"{text!r} names no architecture")


def architecture_patterns(text: str) -> list[str]:
    """Names of architectures that match names or wildcards, with commas between."""
    import timm

    names: list[str] = []
    for pattern in filter(None, map(str.strip, text.split(","))):
        if not (found := timm.list_models(pattern) if set(pattern) & set("*?[") else [architecture_name(pattern)]):
            raise argparse.ArgumentTypeError(f"timm has no architecture like {pattern!r}")
        names += found
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no architecture")
    return list(dict.fromkeys(names))


def family_names(source: str, text: str) -> list[str]:
    """A source's families up to a tier, or those that are named."""
    from .training.architectures import families
    from .training.families import FAMILIES

    if text[:1].isalpha():
        names = [name for part in text.split(",") if (name := part.strip())]
        if unknown := [name for name in names if name not in FAMILIES[source]]:
            known = ", ".join(FAMILIES[source])
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not among the families of {source}: {known}")
        return names
    tier = integer(0, 3)(text)
    if not (names := list(families(source, tier))):
        raise argparse.ArgumentTypeError(f"{source} has no families up to tier {tier}")
    return names


@contextlib.contextmanager
def _writing_to(text: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise argparse.ArgumentTypeError(f"nothing can be written to {text!r} ({error.strerror})") from error


def output_directory(text: str) -> Path:
    """A directory that files can be written to; it need not exist yet, and is not made here."""
    with _writing_to(text):
        existing = directory = Path(text)
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise argparse.ArgumentTypeError(f"{str(existing)!r} is a file; give a directory")
        tempfile.TemporaryFile(dir=existing).close()
    return directory


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """The type of a file that can be written, whose name says which of some kinds it is."""

    def parse(text: str) -> Path:
        with _writing_to(text):
            file = Path(text)
            if file.is_dir():
                raise argparse.ArgumentTypeError(f"{text!r} is a directory; give the name of a file")
            if file.suffix not in suffixes:
                kinds = " or ".join(suffixes)
                raise argparse.ArgumentTypeError(f"a {kinds} file is written; give it such a name, not {text!r}")
            output_directory(str(file.parent))
            if file.exists():
                file.open("ab").close()
        return file

    return parse


def picture_file(text: str) -> Path:
    """A .svg or .png file that can be written, and drawn at all."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError('pictures are drawn by matplotlib: pip install "timm-ghn[plot]"')
    return output_file(".svg", ".png")(text)
