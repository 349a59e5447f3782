"""The command line, by its exit status, what it prints, and what it refuses before any work."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from timm_ghn import cli, demo, register
from timm_ghn.command_line import (
    architecture_names,
    device_name,
    exit_status,
    file_size,
    integer,
    output_directory,
    output_file,
)
from timm_ghn.predictor import predict

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.usefixtures("tags")
@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_list_prints_every_name_whole(
    columns: str, ghn_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    register("mine", ghn_file)
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in ("ghn2", "timm-ghn/ghn2", "SamsungSAILMontreal/ghn3", "mine", str(ghn_file)):
        assert f" {name} " in printed


def test_create_saves_what_timm_loads(ghn_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "new" / "saved.safetensors"
    command = ["create", "test_resnet", "--ghn", str(ghn_file), "--num-classes", "10", "--output", str(saved)]
    assert cli.main(command) == 0
    assert "predicted" in capsys.readouterr().out
    model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=saved)
    state = load_file(saved)
    for name, tensor in predict(model, str(ghn_file)).items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(model.get_parameter(name), tensor)


@pytest.mark.parametrize("classes", ["0", "1"])
def test_any_number_of_classes(classes: str, ghn_file: Path, tmp_path: Path) -> None:
    options = ["--ghn", str(ghn_file), "--num-classes", classes]
    assert cli.main(["create", "test_resnet", *options]) == 0
    assert cli.main(["predict", "test_resnet", *options, "-o", str(tmp_path)]) == 0


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "test_resnet", "--ghn", "ghn7"], "Unknown GHN 'ghn7': did you mean"),
        (["demo", "--ghn", "missing.safetensors"], "There is no GHN checkpoint at"),
        (["demo", "--data", "missing.parquet"], "There is no file missing.parquet"),
        (["zoo", "no_such_model*"], "No architecture was examined"),
        (["evaluate", "--split", "best"], "timm has no split 'best'; choose from"),
        (["evaluate", "--names", "test_resnet"], "--names are names in timm"),
        (["evaluate", "--data", "missing"], "missing is no parquet file"),
        (["train", "--data", "missing"], "missing is no parquet file"),
        (["convert", "missing.pt", "-o", "out"], "Cannot convert missing.pt: [Errno 2] No such file"),
        (["convert", ".", "-o", "out"], "Cannot convert ."),
        (["publish", "missing", "org/name"], "missing is not a directory"),
        (["run", "missing.py"], "There is no script 'missing.py'"),
        (["create", "test_resnet", "--ghn", ""], "The GHN's name is empty; give a tag"),
        (["evaluate", "--data", ""], "The data has no name"),
        (["predict", "test_resnet", "-o", "new", "--ghn", "ghn2_tasks", "--head", "predict"], 'head is "predict", but'),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_failure_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert cli.main(arguments) == 1
    printed = capfd.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("timm-ghn: ")]
    assert len(lines) == 1 and lines[0].startswith(f"timm-ghn: {message}")
    assert "Traceback" not in printed.err and "│" not in printed.out


def test_a_lack_of_memory_is_one_line_and_a_bug_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(message: str) -> NoReturn:
        raise RuntimeError(message)

    assert exit_status("timm-ghn", lambda: fail("DefaultCPUAllocator: can't allocate memory:\nyou tried")) == 1
    assert capsys.readouterr().err == "timm-ghn: DefaultCPUAllocator: can't allocate memory: you tried\n"
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        exit_status("timm-ghn", lambda: fail("mat1 and mat2 shapes cannot be multiplied"))


NO_CUDA = [] if torch.cuda.is_available() else [("evaluate --device cuda", "there is no device 'cuda' here, only cpu")]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("create tset_resnet", "timm has no architecture 'tset_resnet': did you mean 'test_resnet'?"),
        ("create test_resnet.a1_in1k", "timm has no weights 'a1_in1k' of test_resnet: leave the tag out"),
        ("predict tset_resnet -o new", "timm has no architecture 'tset_resnet': did you mean 'test_resnet'?"),
        ("create test_resnet --num-classes -1", "'-1' is no whole number from 0"),
        ("create test_resnet --output x.pth", "a .safetensors file is written; give it such a name, not 'x.pth'"),
        ("create test_resnet --output folder", "'folder' is a directory; give the name of a file"),
        ("create test_resnet --output file/x.safetensors", "'file' is a file; give a directory"),
        ("create test_resnet --output LOCKED/x.safetensors", "nothing can be written to 'LOCKED'"),
        ("create test_resnet --output LONG.safetensors", "File name too long"),
        ("predict test_resnet -o file", "'file' is a file; give a directory"),
        ("predict test_resnet -o file/new", "'file' is a file; give a directory"),
        ("predict test_resnet -o LOCKED/new", "nothing can be written to 'LOCKED/new'"),
        ("predict test_resnet -o LONG", "File name too long"),
        ("predict test_resnet -o new --max-shard-size 0", "'0' is no size"),
        ("demo -o picture.jpg", "a .png file is written"),
        ("demo -o LOCKED/demo.png", "nothing can be written to 'LOCKED'"),
        ("zoo --workers 0", "'0' is no whole number from 1"),
        ("zoo -o file", "'file' is a file"),
        ("convert ghn.pt -o file", "'file' is a file"),
        ("evaluate --images -5", "'-5' is no whole number from 1"),
        ("evaluate --image-size 0", "'0' is no whole number from 1"),
        ("evaluate --holdout 0", "'0' is no whole number from 1"),
        ("evaluate --architectures 0", "'0' is no whole number from 1"),
        ("evaluate --sgd-steps -1", "'-1' is no whole number from 0"),
        ("evaluate --names resnet18,resnt34", "timm has no architecture 'resnt34': did you mean 'resnet34'?"),
        ("evaluate --names ,", "',' names no architecture"),
        ("evaluate --output file", "'file' is a file"),
        ("evaluate --device cpuu", "there is no device 'cpuu' here, only cpu"),
        ("evaluate --device meta", "there is no device 'meta' here"),
        *NO_CUDA,
        ("train -o file", "'file' is a file"),
        ("train --output LOCKED", "nothing can be written to 'LOCKED'"),
        ("train --device meta", "there is no device 'meta' here"),
        ("train --minutes nan", "'nan' is no number above 0"),
        ("train --minutes 0", "'0' is no number above 0"),
        ("train --steps 0", "'0' is no whole number from 1"),
        ("train --workers -1", "'-1' is no whole number from 0"),
        ("train --seed 99999999999999999999", "is no whole number from 0 to 2,147,483,647"),
        ("train --lr inf", "'inf' is no number above 0"),
        ("train --image-size 2.5", "'2.5' is no whole number from 1"),
        ("train --max-shape 16,16", "'16,16' has 2 numbers, not four"),
        ("train --max-shape a,b,c,d", "'a' is no whole number from 1"),
        ("train --architectures torchvision", "'torchvision' is not among timm, deepnets"),
        ("train --architectures timm:5", "'5' is no whole number from 0 to 3"),
        ("train --architectures timm:vit,resnot", "'resnot' is not among the families of timm: plain, "),
        ("train --architectures deepnets:0", "deepnets has no families up to tier 0"),
        ("train --architectures timm:2:inf", "'inf' is no number above 0"),
        ("train --architectures timm:2:1e9:1:0:7", "has more parts than"),
        ("train --preset mine", "invalid choice: 'mine'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    # Where nobody may write, not even root.
    locked = "/sys" if sys.platform == "linux" else "/dev/null"
    with pytest.raises(SystemExit) as stopped:
        cli.main(command.replace("LOCKED", locked).replace("LONG", "x" * 300).split())
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    assert message.replace("LOCKED", locked) in printed.err
    assert printed.err.startswith("timm-ghn ") and printed.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", ["--out {}", "--models tset_resnet", "--repeats 0", "--batches -1", "--architectures 0", "--inputs 0"]
)
def test_benchmarks_refuse_likewise(
    options: str, tmp_path: Path, run_benchmark: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = options.format(tmp_path / "file").split()
    scripts = [script for script in sorted(BENCHMARKS.glob("*.py")) if f'"{arguments[0]}",' in script.read_text()]
    assert scripts
    for script in scripts:
        with pytest.raises(SystemExit) as stopped:
            run_benchmark(script.stem, *arguments)
        printed = capsys.readouterr()
        assert (stopped.value.code, printed.out) == (2, "")
        assert printed.err.startswith(f"{script.name}: argument {arguments[0]}") and printed.err.count("\n") == 1


def test_types_of_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[tuple[Callable[[str], Any], str, Any]] = [
        (integer(1), "1", 1), (integer(0), "0", 0), (integer(0, 2), "2", 2),
        (file_size, "5GB", 5 * 10**9), (file_size, "500 mb", 5 * 10**8), (file_size, "1.5k", 1500), (file_size, "7", 7),
        (architecture_names, " resnet18, ,vit_tiny_patch16_224", ["resnet18", "vit_tiny_patch16_224"]),
        (device_name, "cpu", "cpu"), (device_name, "cpu:0", "cpu:0"),
        (output_directory, str(tmp_path / "a" / "b"), tmp_path / "a" / "b"), (output_directory, ".", Path(".")),
        (output_file(".png"), str(tmp_path / "a" / "b.png"), tmp_path / "a" / "b.png"),
    ]  # fmt: skip
    for parse, text, value in parsed:
        assert parse(text) == value
    assert list(tmp_path.iterdir()) == [], "what is checked is not made"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [device_name(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda", "cuda:1", "cpu"]
    for name in ("cuda:2", "xpu", "meta", "", "2"):
        with pytest.raises(argparse.ArgumentTypeError, match="only cpu, cuda:0, cuda:1"):
            device_name(name)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "\ntimm-ghn: interrupted\n"),
        (OSError(28, "No space left on device", "x"), 1, "timm-ghn: [Errno 28] No space left on device: 'x'\n"),
    ],
)
def test_what_interrupts_any_command(
    error: BaseException, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("timm_ghn.checkpoints.load.load_ghn", fail)
    assert cli.main(["create", "test_resnet"]) == status
    assert capsys.readouterr().err == message


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "seconds"), [("1", 0), ("2", 0), ("2", 100)])
def test_ctrl_c_during_a_sweep(workers: str, seconds: int, tmp_path: Path, ghn_file: Path) -> None:
    """A terminal sends it to all processes; those that are only starting must be as silent as those at work.

    It comes so many seconds after the sweep has opened its file, which is when workers start, or with the first row.
    """
    command = ["zoo", "resnet*", "vit*", "--ghn", str(ghn_file), "-o", str(tmp_path), "--workers", workers]
    process = subprocess.Popen(
        [sys.executable, "-m", "timm_ghn", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    rows = tmp_path / "zoo.jsonl"
    while process.poll() is None and not rows.exists():
        time.sleep(0.01)
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline and not rows.stat().st_size:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=600)  # a hang, not a busy disk
    finally:
        with contextlib.suppress(ProcessLookupError):  # as it should be
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "timm-ghn: interrupted" and "Traceback" not in errors


def test_ctrl_c_in_a_script_of_the_users(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise KeyboardInterrupt\n")
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", str(script)])
    assert stopped.value.code == 130
    assert capfd.readouterr().err.count("File ") == 1, "the script's own line, as under python"


# --- the demo ---------------------------------------------------------------------------------------------------------


def test_the_demos_images_are_held_out_ones(shared: Path, tmp_path: Path, run_benchmark: Callable[..., None]) -> None:
    """They are what the script makes of the last 5,000 rows, byte by byte."""
    run_benchmark("demo_images", str(shared / "data" / "cifar10-train.parquet"), "--out", str(tmp_path))
    made, shipped = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jpg")}
        for folder in (tmp_path, demo.IMAGES)
    )
    assert made == shipped and len(made) == 200
    assert sum(map(len, made.values())) < 250_000
    assert min(int(path.stem) for path in made) >= 45_000


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_ARCHITECTURES", ("test_resnet", "test_vit"))
    monkeypatch.setattr(demo, "_CLASSIFIERS", ("resnet18", "test_vit"))


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_the_demo_classifies_its_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "demo.png"
    assert cli.main(["demo", "-o", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "random init" in printed and "can take longer" in " ".join(printed.split()) and str(picture) in printed
    row = next(line.split("│") for line in printed.splitlines() if "resnet18" in line)
    assert int(row[2]) >= 40 and int(row[3]) == 100, "ghn2's resnet18 has 63 % on more images"
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.getcolors(1 << 20)}
        assert image.width > 1000
    assert {(0x1A, 0x7F, 0x37), (0xFB, 0xEA, 0xE9)} <= colours, "right and wrong ones"


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_the_demo_with_more_images(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(shared / "data" / "cifar10-train.parquet")
    assert cli.main(["demo", "--data", data, "-o", str(tmp_path / "demo.png")]) == 0
    assert "500 other images" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("few")
def test_the_demo_of_a_ghn_for_other_classes(
    tmp_path: Path, save_ghn: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ghn = save_ghn(tmp_path / "ghn.safetensors", num_classes=7)
    assert cli.main(["demo", "--ghn", str(ghn), "-o", str(tmp_path / "demo.png")]) == 0
    assert "predicts 7 classes" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["demo", "--ghn", "ghn2_tasks", "-o", str(tmp_path / "demo.png")]) == 0
    assert "predicts no classification layer" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "demo.png").exists()
