"""Every command line and every piece of Python in README.md and docs/, run as they stand there, at a small size.

The notebook's cells run one after the other without a kernel, which would be one more thing to install.

Data lie where the documents say they do, 200 images of the demo in place of whole data sets; options are appended that
make a command shorter; timm's own scripts, which are in no package, are short ones of the same options.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from hub_server import HubServer
from torchvision.datasets import CIFAR10

import timm_ghn
from timm_ghn import cli, commands, demo
from timm_ghn.commands import evaluate
from timm_ghn.training.data import default_root, load_dataset

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "docs" / "tutorial.ipynb"]

NOT_RUN = {
    "pip install": "fetches from an index of packages",
    "make demo": "makes an environment first; what it runs then has its tests in commands/test_cli.py",
    "make test": "is this suite",
    "ruff check": "is run beside this suite",
    "timm-ghn demo": "is run by commands/test_cli.py",
    "timm-ghn verify ghn3_tm8": "needs the released file from the Hub",
    "timm-ghn train --data cifar10-train.parquet --init": "goes on with weights that a short test is too small for",
    "timm-ghn convert": "needs a published file; checkpoints/test_convert.py writes such",
    "python benchmarks/learning_rates.py": "holds out more images than there are here",
    "python benchmarks/random_vs_ghn.py": "is run by test_random_vs_ghn.py",
    "python benchmarks/your_data.py": "is run by test_your_data.py",
    "python benchmarks/paper.py": "is run by test_paper.py",
    "python benchmarks/dense.py": "is run by test_dense.py",
    "python benchmarks/create_model.py": "measures time, for minutes",
    "python benchmarks/graph_layer.py": "likewise",
    "python benchmarks/training_step.py": "is run by test_training_step.py",
    "python benchmarks/training_trials.py": "trains for minutes",
    "python -m timm_ghn": "is a name, not a command line",
}
_TRAIN = (
    "--steps 2 --holdout 100 --hid 8 --max-shape 16,16,3,3 --architectures timm:0:1e7 --batch-size 20 "
    "--val-architectures 1 --val-images 9 --workers 0 --device cpu"
)
SHORTER = {
    "timm-ghn train": _TRAIN,
    "torchrun --nproc-per-node 1 -m timm_ghn.training": _TRAIN,
    "timm-ghn evaluate .*--source zoo": "--names test_resnet",
    "timm-ghn evaluate": "--images 20 --holdout 100 --architectures 1 --device cpu",
    "timm-ghn zoo": "test_resnet",
    "timm-ghn inspect": "--holdout 100 --image-size 64 --images 4",
    "timm-ghn adapt": "--candidates test_resnet --support 50 --holdout 20 --device cpu",
    "timm-ghn calibrate": "--support 50 --holdout 20 --device cpu",
    "timm-ghn rank": "--support 50 --holdout 20 --device cpu",
}
# What stands for a user's own, or is too much for a test.
PLACEHOLDERS = {
    "NAME": "test_resnet", "DIR": "predicted", "SCRIPT": "script.py", "MODULE": "script", "…": "",
    "'resnet*'": "test_resnet", "--nproc-per-node 8": "--nproc-per-node 1",
}  # fmt: skip
# Makes torchvision take the data set below for the real one, in the processes that a command starts.
SITE = """
import json, pathlib, torchvision.datasets
for name, value in json.loads(pathlib.Path(__file__).with_name("cifar10.json").read_text()).items():
    setattr(torchvision.datasets.CIFAR10, name, value)
"""


def snippets(document: Path) -> Iterator[tuple[str, str]]:
    """What kind each piece of code is, "python" or "shell", and its text; blocks of output are passed over."""
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        yield from (("python", "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code")
        return
    for match in re.finditer(r"```(\w*)\n(.*?)```|`((?:timm-ghn|python|torchrun)\s[^`]+)`", text, re.DOTALL):
        language, block, inline = match.groups()
        if language == "python":
            yield "python", block
        elif block and re.match(r"(timm-ghn|python|torchrun|pip|make|ruff)\b", block):
            yield from (("shell", line) for line in block.replace("\\\n", " ").splitlines() if line.strip())
        elif inline and len(inline.split()) > 2:  # a command with arguments, not only its name
            yield "shell", " ".join(inline.split())


ALL = [(document, *snippet) for document in DOCUMENTS for snippet in snippets(document)]


def test_what_is_not_run_is_there() -> None:
    lines = [text for _, kind, text in ALL if kind == "shell"]
    assert [start for start in NOT_RUN if not any(f"{line} ".startswith(f"{start} ") for line in lines)] == []
    assert sum(kind == "python" for _, kind, _ in ALL) >= 4 and len(lines) >= 20


def write_cifar10(folder: Path) -> dict[str, Any]:
    """The demo's images as torchvision's CIFAR-10, 100 in each file; returns what the class then has to expect."""
    images = load_dataset(str(demo.IMAGES), "all", holdout=1)
    folder = folder / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict[str, Any]) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(number: int) -> dict[str, Any]:
        rows = slice(number % 2, None, 2)
        return {"data": images.images[rows].flatten(1).numpy(), "labels": images.labels[rows].tolist()}

    return {
        "train_list": [[f"data_batch_{n}", write(f"data_batch_{n}", batch(n))] for n in range(1, 6)],
        "test_list": [["test_batch", write("test_batch", batch(0))]],
        "meta": {**CIFAR10.meta, "md5": write("batches.meta", {"label_names": list(demo.CLASSES)})},
    }


def write_parquet(file: Path, folders: int) -> None:
    """The demo's images in the schema of the Hub's data sets, in an order without meaning."""
    files = sorted(demo.IMAGES.rglob("*.jpg"), key=lambda path: path.name)
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    labels = [demo.CLASSES.index(path.parent.name) % folders for path in files]
    pq.write_table(pa.table({"img": rows, "label": np.array(labels)}), file)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: HubServer) -> Path:
    """A working directory with all that the documents take for granted."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(evaluate, "_CALIBRATION_BATCHES", 1)
    monkeypatch.chdir(tmp_path)
    expected = write_cifar10(default_root())
    write_cifar10(tmp_path / "data")
    for name, value in expected.items():
        monkeypatch.setattr(CIFAR10, name, value)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "cifar10.json").write_text(json.dumps(expected))
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)

    write_parquet(tmp_path / "cifar10-train.parquet", 10)
    write_parquet(tmp_path / "tiny-imagenet-20k.parquet", 5)
    (tmp_path / "photographs").symlink_to(demo.IMAGES)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    for name in ("train", "validate"):
        (tmp_path / f"{name}.py").symlink_to(ROOT / "tests" / "data" / f"{name}_like_timm.py")
    (tmp_path / "script.py").write_text("import timm; timm.create_model('test_resnet.ghn2', pretrained=True)\n")
    mine = tmp_path / "path" / "to" / "directory"
    timm_ghn.load_ghn().save_pretrained(mine)
    server.commit("org/repo", {path.name: path.read_bytes() for path in mine.iterdir()})
    server.repos["org/repo"]["revision"] = server.repos["org/repo"]["main"]
    return tmp_path


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command line, in this process where that is the same."""
    for name, value in PLACEHOLDERS.items():
        line = re.sub(rf"(?<![\w/]){re.escape(name)}(?!\w)", value, line)
    options = (options for start, options in SHORTER.items() if re.match(start, line))
    program, *arguments = [*shlex.split(line, comments=True), *shlex.split(" ".join(options))]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [program, *arguments])
        patch.setattr(sys, "path", [*sys.path])
        if program == "timm-ghn":
            assert cli.main(arguments) == 0, line
        elif program == "python" and not arguments[0].startswith(("-", "benchmarks")):
            patch.setattr(sys, "argv", arguments)
            timm_ghn.uninstall()
            try:
                runpy.run_path(arguments[0], run_name="__main__")
            finally:
                timm_ghn.install()
        else:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            start = [sys.executable]
            if program == "torchrun":
                start += ["-m", "torch.distributed.run"]
                environment["PYTHONPATH"] += f"{os.pathsep}{Path.cwd() / 'site'}"
            done = subprocess.run([*start, *arguments], capture_output=True, text=True, env=environment, check=False)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.usefixtures("tags")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_all_of_a_document_runs(document: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_dataset(str(demo.IMAGES), "val", holdout=100)
    known: dict[str, Any] = {"timm": timm, "timm_ghn": timm_ghn, "torch": torch, "batches": list(images.batches(50))}
    for of, kind, text in ALL:
        if of != document or any(f"{text} ".startswith(f"{start} ") for start in NOT_RUN):
            continue
        if kind == "python":
            exec(compile(text, f"{document.name}: {text}", "exec"), known)
        else:
            run(text, monkeypatch)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason='the manual is built by mkdocs: pip install -e ".[docs]"')
    pytest.importorskip("mkdocstrings", reason='its reference is made by mkdocstrings: pip install -e ".[docs]"')
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    pages = {page.stem: page.read_text(encoding="utf-8") for page in (tmp_path / "site").glob("*.html")}
    described = {address.rpartition(".")[2] for address in re.findall(r'id="(timm_ghn\.[\w.]+)"', pages["python"])}
    assert {*timm_ghn.__all__} <= described
    names = [name for _, name, _ in pkgutil.iter_modules(commands.__path__)]
    assert [name for name in names if f'<h2 id="{name}"' not in pages["command_line"]] == []
    # Nothing is fetched when it is read: what is loaded, unlike what is linked, is beside the pages.
    loads = r"<(?:script|img|link|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)"
    assert {stem: found for stem, text in pages.items() if (found := re.findall(loads, text))} == {}
