"""``timm-ghn run``: scripts that know nothing of this package, in processes of their own."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import load_checkpoint
from timm.utils import random_seed

from timm_ghn.cli import main

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "tests" / "data" / "train_like_timm.py")
RUN = ("-m", "timm_ghn", "run")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def train(*arguments: str, cwd: Path, launcher: tuple[str, ...] = RUN) -> dict[str, Any]:
    """Trains with a learning rate of zero, which leaves a checkpoint of the weights that the script began with."""
    fixed = ("--num-classes", "10", "--lr", "0", "--output", str(cwd))
    done = python(*launcher, TRAIN, *fixed, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert all(map(math.isfinite, result["losses"]))
    return result


def assert_began_with(expected: torch.nn.Module, directory: Path) -> None:
    saved = timm.create_model("test_resnet", num_classes=10)
    load_checkpoint(saved, str(directory / "last.pth.tar"))
    torch.testing.assert_close(dict(saved.named_parameters()), dict(expected.named_parameters()))


GHN_KWARGS = {"finetune": "orthogonal", "head": "keep"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "name", "kwargs"),
    [
        (["--pretrained"], "test_resnet.ghn2", {"pretrained": True}),
        ([], "test_resnet", {}),
        (
            ["--pretrained", "--model-kwargs", f"ghn_kwargs={GHN_KWARGS}"],
            "test_resnet.ghn2",
            {"pretrained": True, "ghn_kwargs": GHN_KWARGS},
        ),
    ],
    ids=["pretrained", "random", "ghn_kwargs"],
)
def test_a_training_script_begins_with_what_create_model_gives(
    arguments: list[str], name: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    train("--model", "test_resnet.ghn2", *arguments, cwd=tmp_path)
    random_seed(42)
    assert_began_with(timm.create_model(name, num_classes=10, **kwargs), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)
def test_processes_of_torchrun(tmp_path: Path) -> None:
    launcher = (*TORCHRUN, *RUN)
    result = train("--model", "test_resnet.ghn2", "--pretrained", cwd=tmp_path, launcher=launcher)
    assert result["processes"] == 2
    assert_began_with(timm.create_model("test_resnet.ghn2", pretrained=True, num_classes=10), tmp_path)


SCRIPT = """
from __future__ import annotations
import multiprocessing, sys

def work(queue):
    queue.put(__name__)

if __name__ == "__main__":
    print(sys.argv[1:], sys.path[0], __name__, __file__, __spec__ and __spec__.name)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    print(queue.get(timeout=100))
    process.join()
    sys.exit(3)
"""
ERROR = """
import runpy
def fail():
    try:
        runpy.run_module("no_such_module")
    except ImportError as error:
        raise ValueError("a script's own") from error
fail()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "file", "arguments", "status"),
    [
        (SCRIPT, "folder/script.py", ["folder/script.py", "--help", "-m", "--", "x y"], 3),
        (SCRIPT, "package/module.py", ["-m", "package.module", "--help"], 3),
        (ERROR, "error.py", ["error.py"], 1),
        ("x = = 1", "syntax.py", ["syntax.py"], 1),
    ],
    ids=["script", "module", "error", "syntax"],
)
def test_it_runs_as_by_python(source: str, file: str, arguments: list[str], status: int, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    expected, found = python(*arguments, cwd=tmp_path), python(*RUN, *arguments, cwd=tmp_path)
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr.endswith(expected.stderr)  # the whole traceback, and no frame more
    assert found.returncode == status


CLONED = """
import timm, sys
print(timm.__file__, timm.__version__, timm.create_model("test_resnet.ghn2", pretrained=True).pretrained_cfg["tag"])
import timm_ghn
print(timm_ghn.initialize(timm.create_model("test_resnet"), head="keep").predicted_fraction > 0.5)
"""


@pytest.mark.slow
def test_a_script_beside_a_timm_of_its_own_uses_that(tmp_path: Path) -> None:
    """As in a clone of timm's repository, under ``python train.py``."""
    package = tmp_path / "clone" / "timm"
    shutil.copytree(Path(timm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "version.py").write_text("__version__ = '9.9'\n")
    (tmp_path / "clone" / "train.py").write_text(CLONED)
    for launcher in (RUN, ("-c", "import timm_ghn.cli, sys; sys.exit(timm_ghn.cli.main())", "run")):
        done = python(*launcher, "clone/train.py", cwd=tmp_path)
        assert done.stdout == f"{package / '__init__.py'} 9.9 ghn2\nTrue\n", done.stderr
    registry = package / "models" / "_builder.py"
    registry.write_text(registry.read_text() + "\nfrom . import _registry\ndel _registry._expand_filter\n")
    done = python(*RUN, "clone/train.py", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("timm-ghn: timm 9.9 lacks timm.models._registry._expand_fi")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_file.py", "--model", "x"], "There is no script 'no_such_file.py' in "),
        (["-m", "no_such_module"], "Cannot run 'no_such_module': No module named no_such_module."),
        (["-m", "timm"], "Cannot run 'timm': No module named timm.__main__; 'timm' is a package and cannot be"),
    ],
)
def test_nothing_to_run(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["run", *arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"timm-ghn: {message}") and printed.count("\n") == 1
