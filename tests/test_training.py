"""Training: what resumes, what processes share, what is skipped, what is refused, and that anything is learnt."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from timm_ghn.checkpoints.load import load_ghn
from timm_ghn.cli import main
from timm_ghn.hypernet import GHNConfig
from timm_ghn.training import optimizers
from timm_ghn.training.architectures import Architecture, architecture
from timm_ghn.training.checkpoint import TrainingError, load_checkpoint, save_checkpoint
from timm_ghn.training.config import PRESETS, TrainConfig
from timm_ghn.training.data import ImageDataset
from timm_ghn.training.folding import unfold
from timm_ghn.training.pool import Schedule, Share, TaskPool
from timm_ghn.training.records import Log
from timm_ghn.training.task import Task, prepare
from timm_ghn.training.trainer import Trainer, new_ghn

SIZE = 16
CONFIG = TrainConfig(
    ghn=GHNConfig(num_classes=3, max_shape=(16, 16, 3, 3), hid=8),
    architectures=(Share("timm", ("plain", "residual"), 400_000),),
    steps=6, batch_size=8, warmup=2, spacing=1, uses=2, eval_every=100, val_architectures=2, val_images=10,
    meta_batch=2, optimizer="adamw", lr=1e-3, betas=(0.9, 0.98), network_clip=None,
)  # fmt: skip


def images(count: int, seed: int = 0) -> ImageDataset:
    """Images whose class is the channel that is brightest."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 128, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 3
    pixels[torch.arange(count), labels] += 120
    return ImageDataset(pixels, labels, 3)


TRAIN, VAL = images(60), images(15, seed=1)


def trainer(directory: Path, config: TrainConfig = CONFIG, **options: Any) -> Trainer:
    return Trainer(config, TRAIN, VAL, directory, **{"workers": 0, **options})


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's checkpoint."""
    tensors, _ = load_checkpoint(directory / "checkpoints")
    return {f"{part}/{name}": value for part, values in tensors.items() for name, value in values.items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    trainer(directory).run()
    return directory


# --- the run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_equals_an_uninterrupted_one(uninterrupted: Path, tmp_path: Path, workers: int) -> None:
    state = torch.get_rng_state()
    trainer(tmp_path, workers=workers).run(until=3)
    assert torch.equal(state, torch.get_rng_state()), "training leaves the caller's random state alone"
    trainer(tmp_path, workers=workers, resume=True).run()
    expected, found = weights(uninterrupted), weights(tmp_path)
    assert expected.keys() == found.keys() and len(expected) > 100
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    with (tmp_path / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3", "6"]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_resumed_run_with_soap_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    """Over several changes of its bases."""
    monkeypatch.setattr(optimizers, "_STEPS_A_BASIS", 2)
    config = dataclasses.replace(CONFIG, optimizer="soap", network_clip=3.0, steps=9, schedule=schedule)
    trainer(tmp_path / "whole", config).run()
    trainer(tmp_path / "parts", config).run(until=4)
    trainer(tmp_path / "parts", config, resume=True).run()
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    moved = load_checkpoint(tmp_path / "whole" / "checkpoints")[0]["ghn"]
    start = new_ghn(config.ghn, config.seed).state_dict()
    assert not torch.equal(moved["decoder.conv.2.weight"], start["decoder.conv.2.weight"]), "kernels are optimised too"


def test_a_cooldown_goes_on_from_a_run_of_open_length(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, optimizer="soap", schedule="constant", steps=None, warmup=0)
    run = trainer(tmp_path / "run", config)
    run.run(minutes=5, until=3)
    assert run.learning_rate() == config.lr
    before = weights(tmp_path / "run")
    cold = dataclasses.replace(config, schedule="linear", steps=7)
    cooldown = trainer(tmp_path / "cooldown", cold, cooldown_from=tmp_path / "run")
    assert cooldown.step == 3 and cooldown.learning_rate() == config.lr
    rates = []
    for step in range(4, 7):
        cooldown.run(until=step)
        rates.append(cooldown.learning_rate() / config.lr)
        cooldown = trainer(tmp_path / "cooldown", cold, resume=True)
    assert rates == pytest.approx([0.75, 0.5, 0.25])
    cooldown.run()
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "run").items())
    other = dataclasses.replace(cold, meta_batch=4)
    with pytest.raises(TrainingError, match="has meta_batch = 2, not 4"):
        trainer(tmp_path / "other", other, cooldown_from=tmp_path / "run")


def test_each_network_is_clipped_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network with a thousand times larger gradients weighs no more in the step than it does without."""
    cross_entropy = F.cross_entropy

    def gradient(config: TrainConfig, factors: tuple[float, float]) -> torch.Tensor:
        of_networks = iter(factors)
        run = trainer(tmp_path, config)
        pool = TaskPool(Schedule(config.architectures, 0, 2, 2, 1), range(2), 0, 3, SIZE, torch.device("cpu"), 0)
        monkeypatch.setattr(run.optimizer, "step", lambda: None)
        with monkeypatch.context() as patch:
            patch.setattr(F, "cross_entropy", lambda *a, **k: next(of_networks) * cross_entropy(*a, **k))
            run.train_step(pool.tasks(0))
        return run.gradient.clone()[:-5]

    clipped = dataclasses.replace(CONFIG, network_clip=1e-3, clip=1e9)
    even, uneven = gradient(clipped, (1.0, 1.0)), gradient(clipped, (1.0, 1000.0))
    torch.testing.assert_close(even, uneven, rtol=1e-3, atol=1e-8)
    free = dataclasses.replace(CONFIG, network_clip=None, clip=1e9)
    assert gradient(free, (1.0, 1000.0)).norm() > 50 * gradient(free, (1.0, 1.0)).norm()


def test_what_a_run_leaves(uninterrupted: Path) -> None:
    assert {path.name for path in uninterrupted.iterdir()} == {
        "checkpoints", "log.csv", "families.csv", "curves.png", "model.safetensors", "config.json", "README.md",
    }  # fmt: skip
    assert [path.name for path in (uninterrupted / "checkpoints").iterdir()] == ["step-000000006"]
    ghn = load_ghn(uninterrupted)
    assert ghn.config == CONFIG.ghn
    assert ghn.config.images == TRAIN.described() and ghn.config.images.input_size == (3, SIZE, SIZE)
    averaged = load_checkpoint(uninterrupted / "checkpoints")[0]["ema"]
    assert all(torch.equal(value, averaged[name]) for name, value in ghn.state_dict().items())
    card = (uninterrupted / "README.md").read_text()
    assert "Architecture-steps | 12 " in card and '"meta_batch": 2' in card


def test_it_learns(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=60, lr=1e-2, warmup=5, ema=0.9, uses=6, val_images=15)
    config = dataclasses.replace(config, architectures=(Share("timm", ("plain",), 200_000),))
    run = trainer(tmp_path, config)
    assert run.validate().mean() < 50
    assert run.run()["val_mean"] > 65


@pytest.mark.parametrize(
    "ghn",
    [
        {"hypernet": "graphormer", "layers": 2, "heads": 2},
        {"hypernet": "mlp", "decoder": "mlp"},
        {"hypernet": "graphormer", "decoder": "lowrank", "rank": 4, "heads": 2, "max_shape": (64, 64, 16, 16)},
    ],
)
def test_every_kind_of_ghn_trains(ghn: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, ghn=dataclasses.replace(CONFIG.ghn, **ghn), steps=2, penalty=3e-5)
    run = trainer(tmp_path, config)
    start = {name: value.clone() for name, value in run.ghn.named_parameters()}
    run.run()
    assert run.skipped == [] and math.isfinite(run.best["val_mean"])
    assert sum(not torch.equal(value, start[name]) for name, value in run.ghn.named_parameters()) > 0.9 * len(start)


def test_starting_from_weights(uninterrupted: Path, tmp_path: Path) -> None:
    init = load_ghn(uninterrupted)
    run = trainer(tmp_path, init=init)
    for name, value in run.ghn.state_dict().items():
        assert torch.equal(value, init.state_dict()[name])
    meaning = dataclasses.replace(CONFIG, ghn=dataclasses.replace(CONFIG.ghn, branch_scale=0.5))
    assert trainer(tmp_path, meaning, init=init).ghn.config.branch_scale == 0.5, "the same tensors may mean more"
    split = dataclasses.replace(CONFIG, ghn=dataclasses.replace(CONFIG.ghn, split_attention=True))
    graph = prepare(network("vit"), 3, 32).graph
    with torch.no_grad():
        (tied,), (untied,) = init([graph]), trainer(tmp_path, split, init=init).ghn([graph])
    qkv = "blocks.0.attn.qkv.weight"
    assert tied[qkv].shape[0] < len(untied[qkv]) == len(network("vit").build(3, image_size=32).get_parameter(qkv))
    queries, keys, values = untied[qkv].chunk(3)
    assert torch.equal(queries, keys) and torch.equal(keys, values), "they start out as equals"
    other = dataclasses.replace(CONFIG, ghn=dataclasses.replace(CONFIG.ghn, hid=16))
    with pytest.raises(TrainingError, match="differs in hid"):
        trainer(tmp_path, other, init=init)


def test_a_budget_of_time_ends_a_run_and_its_decay(tmp_path: Path) -> None:
    run = trainer(tmp_path, dataclasses.replace(CONFIG, steps=None))
    run.run(minutes=0.02)
    assert run.progress == 1 and run.seconds >= 1.2
    assert run.learning_rate() == pytest.approx(0.01 * CONFIG.lr)
    with pytest.raises(TrainingError, match="Neither a number of steps nor of minutes"):
        run.run()
    with pytest.raises(TrainingError, match="minutes is -1"):
        run.run(minutes=-1)


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    """Through torchrun, as users do it; gloo, since there are more processes than GPUs."""
    source = write_parquet(tmp_path / "data.parquet", TRAIN)
    arguments = ["train", "--data", source, "--holdout", "15", "--steps", "1", "--meta-batch", "4", "--batch-size", "8"]
    arguments += ["--optimizer", "adamw", "--lr", "0.2", "--device", "cpu", "--workers", "0", "--no-bf16"]
    arguments += ["--hid", "8", "--max-shape", "16,16,3,3"]
    arguments += ["--architectures", "timm:0:400000", "--val-architectures", "2", "--val-images", "10"]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    launch += ["timm_ghn.training", *arguments[1:], "--out", str(tmp_path / "two")]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = new_ghn(GHNConfig(3, (16, 16, 3, 3), 8), seed=0).state_dict()

    def joined(tensors: dict[str, torch.Tensor], pattern: str) -> torch.Tensor:
        return torch.cat([tensors[pattern.format(name)].flatten() for name in start])

    # Sums in another order differ in their last bits, and Adam makes a whole step of it where a gradient is almost 0,
    # so that parameters are compared after the first step, before the difference can grow.
    mean = joined(one, "optimizer/{}/exp_avg")
    assert (joined(two, "optimizer/{}/exp_avg") - mean).norm() < 1e-4 * mean.norm()
    moved = joined(one, "ghn/{}") - joined(start, "{}")
    assert (joined(two, "ghn/{}") - joined(one, "ghn/{}")).norm() < 0.05 * moved.norm()


@pytest.mark.parametrize("head", ["predicted", "ridge"])
def test_networks_without_a_finite_gradient_are_left_out_counted_and_in_the_end_fatal(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Task.output
    bad_steps = {1, 2}
    ghn = dataclasses.replace(CONFIG.ghn, predicts_head=head == "predicted")
    run = trainer(tmp_path, dataclasses.replace(CONFIG, steps=10, max_skipped=4, head=head, ways=(2,), ghn=ghn))
    monkeypatch.setattr(Task, "output", lambda *args: output(*args) * (torch.nan if run.step in bad_steps else 1.0))
    run.run(until=4)
    assert run.skipped == [1, 1, 2, 2] and run.step == 4
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert run.optimizer.state_dict()["state"][0]["step"] == 2
    with (tmp_path / "families.csv").open() as file:
        norms = [float(row[name]) for row in csv.DictReader(file) for name in ("norm_median", "norm_max") if row[name]]
    assert math.inf in norms and not any(math.isnan(norm) for norm in norms)
    bad_steps.add(5)
    with pytest.raises(TrainingError, match=r"In the last 6 steps, 6 networks had no finite gradient"):
        run.run()


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_directory_with_a_run_is_not_overwritten(uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds a run already"):
        trainer(uninterrupted)
    with pytest.raises(TrainingError, match="no checkpoint to resume from"):
        trainer(tmp_path, resume=True)
    with pytest.raises(TrainingError, match=r"All 6 steps of the run .* are done"):
        trainer(uninterrupted, resume=True).run()


def test_resuming_under_another_config_or_on_other_images(uninterrupted: Path) -> None:
    with pytest.raises(TrainingError, match=r"has lr = 0.001, not 0.002; resume it under its own config"):
        trainer(uninterrupted, dataclasses.replace(CONFIG, lr=2e-3), resume=True)
    with pytest.raises(TrainingError, match="trained on other images"):
        Trainer(CONFIG, images(60, seed=5), VAL, uninterrupted, workers=0, resume=True)


def test_a_run_that_states_its_images_alone_resumes(uninterrupted: Path, tmp_path: Path) -> None:
    """As those did that could only have one data set, and whose GHNs had fewer fields."""
    tensors, state = load_checkpoint(uninterrupted / "checkpoints")
    (state["data"],) = state["data"]
    del state["config"]["ghn"]["bounded"]
    save_checkpoint(tmp_path / "checkpoints", state["step"], tensors, state)
    assert trainer(tmp_path, resume=True).step == CONFIG.steps
    state["data"]["images"] += 1
    save_checkpoint(tmp_path / "other" / "checkpoints", state["step"], tensors, state)
    with pytest.raises(TrainingError, match="trained on other images"):
        trainer(tmp_path / "other", resume=True)


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    trainer(tmp_path).run(until=1)
    (directory,) = (tmp_path / "checkpoints").iterdir()
    whole = (directory / "optimizer.safetensors").read_bytes()
    for name, content in (("optimizer.safetensors", whole[:-9]), ("optimizer.safetensors", None), ("state.json", b"{")):
        before = (directory / name).read_bytes()
        if content is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(content)
        with pytest.raises(TrainingError, match="damaged"):
            trainer(tmp_path, resume=True)
        (directory / name).write_bytes(before)
    trainer(tmp_path, resume=True)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    small, large = {"ghn": {"x": torch.ones(4)}}, {"ghn": {"x": torch.ones(1 << 20)}}
    save_checkpoint(tmp_path, 1, small, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # files cannot grow, as if the disk were full
    try:
        with pytest.raises(TrainingError, match="the checkpoint of step 1 is intact: make room and resume"):
            save_checkpoint(tmp_path, 2, large, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(tmp_path)[1] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"], "nothing half-written is left"


def test_what_is_resumed_does_not_change_with_its_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"optimizer": {"x": torch.ones(4096)}}, {})
    tensors, _ = load_checkpoint(tmp_path)
    with (tmp_path / "step-000000001" / "optimizer.safetensors").open("r+b") as stream:
        stream.seek(1024)
        stream.write(bytes(1024))
    assert torch.equal(tensors["optimizer"]["x"], torch.ones(4096))


def test_a_run_that_is_killed_as_it_resumes_keeps_its_log(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.csv", 0)
    log.write(step=100, loss=2.5)
    log.close()
    resumed = Log(tmp_path / "log.csv", 100)
    with (tmp_path / "log.csv").open() as file:
        assert [(row["step"], row["loss"]) for row in csv.DictReader(file)] == [("100", "2.5")]
    resumed.write(step=200, loss=2.0)
    with (tmp_path / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["100", "200"]
    resumed.close()


def test_an_interrupted_save_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, {"ghn": {"x": torch.ones(4)}}, {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # the process is gone at once
        patch.setattr(os, "rename", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, {"ghn": {"x": torch.zeros(4)}}, {"step": 2})
    assert len(list(tmp_path.iterdir())) == 2
    tensors, state = load_checkpoint(tmp_path)
    assert state == {"step": 1} and tensors["ghn"]["x"].sum() == 4
    save_checkpoint(tmp_path, 3, {"ghn": {"x": torch.ones(4)}}, {"step": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"], "left-overs are cleared away"


def test_data_that_does_not_fit(tmp_path: Path) -> None:
    for broken, problem in (
        (dataclasses.replace(TRAIN, images=TRAIN.images[:0], labels=TRAIN.labels[:0]), "no training images"),
        (dataclasses.replace(TRAIN, num_classes=4), "have 4 classes, the GHN 3"),
        (dataclasses.replace(TRAIN, labels=TRAIN.labels + 1), "labels are 1 to 3, those of 3 classes 0 to 2"),
    ):
        with pytest.raises(TrainingError, match=problem):
            Trainer(CONFIG, broken, VAL, tmp_path)


def test_configs() -> None:
    assert TrainConfig.from_dict(CONFIG.to_dict()) == CONFIG
    for preset in PRESETS.values():
        config = {**preset, "ghn": {"num_classes": 10, **preset.get("ghn", {})}}
        assert TrainConfig.from_dict(TrainConfig.from_dict(config).to_dict()) == TrainConfig.from_dict(config)
    plain = {"ghn": {"num_classes": 3}}
    for wrong, problem in (
        ({"uses": 0}, "uses is 0"),
        ({"schedule": "sine"}, "schedule is 'sine'"),
        ({"learning_rate": 1}, "not a training config"),
        ({"architectures": [{"weight": 0}]}, "no share"),
        ({"ghn": {"hid": 8}}, "num_classes"),
    ):
        with pytest.raises(TrainingError, match=problem):
            TrainConfig.from_dict({**plain, **wrong})


def test_a_mixture_that_cannot_be_drawn_from(tmp_path: Path) -> None:
    for share, problem in ((Share("timm", ("resnot",)), "resnot"), (Share("timm", ("vgg",), 10), "raise the limits")):
        with pytest.raises(TrainingError, match=problem):
            trainer(tmp_path, dataclasses.replace(CONFIG, architectures=(share,)))


# --- tasks and their schedule ---------------------------------------------------------------------------------------


def network(family: str) -> Architecture:
    return architecture("timm", "train", 3, families=[family], image_size=32)


@pytest.mark.parametrize("family", [
    "bottleneck", "mobilenetv2", "convnext", "vit", "swin", "repvgg", "eva", "cait", "xcit", "swinv2", "levit",
    "maxvit", "resnetv2_group", "residual_group", "nfnet",
])  # fmt: skip
def test_a_task_computes_what_its_network_does(family: str) -> None:
    """With the network's own parameters, a task is that network; whatever no GHN predicts is among its fixed values."""
    prepared = prepare(network(family), 5, 32)
    task = Task(prepared, 5, 32)
    assert all(parameter.is_meta for parameter in task.module.parameters())
    real = network(family).build(5).train()
    real.load_state_dict({name: unfold(value) for name, value in task.fixed.items()}, strict=False)
    own = {name: parameter for name, parameter in real.named_parameters() if name in task.shapes}
    assert own.keys() | task.graph.kept.keys() == dict(real.named_parameters()).keys()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(task.output(own, x), real(x), atol=1e-4, rtol=1e-4)
    rough = task.output(own, x, bf16=True)
    assert rough.dtype == torch.float32
    assert (rough - real(x)).norm() < 0.2 * real(x).norm()
    again = prepare(network(family), 5, 32)
    assert all(torch.equal(value, again.fixed[name]) for name, value in prepared.fixed.items())


def test_training_tells_queries_from_keys_that_start_out_equal(tmp_path: Path) -> None:
    ghn = dataclasses.replace(CONFIG.ghn, split_attention=True)
    shares = (Share("timm", ("vit",), 4_000_000),)
    config = dataclasses.replace(CONFIG, ghn=ghn, architectures=shares, steps=2, warmup=0)
    run = trainer(tmp_path, config, init=new_ghn(CONFIG.ghn, seed=0))
    run.run()
    queries, keys, values = run.ghn.operand_embed.weight.detach()
    assert min((a - b).abs().max() for a, b in ((queries, keys), (keys, values), (queries, values))) > 1e-5


def test_a_schedule_uses_each_architecture_equally_often() -> None:
    schedule = Schedule((Share(),), seed=0, lanes=2, uses=3, spacing=4)
    for lane in range(2):
        numbers = [schedule.number(lane, step) for step in range(600)]
        assert all(number <= step // 3 for step, number in enumerate(numbers)), "one new architecture every 3 steps"
        assert all(step <= schedule.last_step(lane, number) for step, number in enumerate(numbers))
        settled = [number for number in numbers if 20 <= number < 150]
        assert {settled.count(number) for number in settled} == {3}
        where = [step for step, number in enumerate(numbers) if number == 50]
        assert min(np.diff(where)) > 3 * 4


def test_pools_agree_wherever_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(CONFIG.architectures, seed=1, lanes=2, uses=3, spacing=1)

    def keys(lanes: range, first: int, last: int) -> list[list[str]]:
        pool = TaskPool(schedule, lanes, first, 3, SIZE, torch.device("cpu"), workers=0)
        found = [[task.architecture.key for task in pool.tasks(step)] for step in range(first, last)]
        assert len(pool._tasks) < 12
        return found

    whole = keys(range(2), 0, 24)
    assert keys(range(2), 9, 24) == whole[9:]
    assert [[key] for _, key in whole[9:]] == keys(range(1, 2), 9, 24)


def test_shares_join_at_their_step() -> None:
    shares = (Share("timm", ("plain",)), Share("timm", ("vit",), weight=3, from_step=100))
    schedule = Schedule(shares, seed=0, lanes=1, uses=2, spacing=1)
    early = {schedule.architecture(0, number, 32).family for number in range(50)}
    late = [schedule.architecture(0, number, 32).family for number in range(50, 150)]
    assert early == {"plain"} and 60 <= late.count("vit") <= 90


# --- the command ----------------------------------------------------------------------------------------------------


def write_parquet(path: Path, data: ImageDataset) -> str:
    rows = []
    for image in data.images:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": ""})
    pq.write_table(pa.table({"img": rows, "label": data.labels.numpy()}), path)
    return str(path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_parquet(tmp_path / "data.parquet", TRAIN)
    arguments = ["train", "--data", source, "--holdout", "15", "--out", str(tmp_path / "run"), "--device", "cpu"]
    smaller = ["--hid", "8", "--max-shape", "16,16,3,3", "--architectures", "timm:0:400000", "--batch-size", "8"]
    smaller += ["--val-architectures", "1", "--val-images", "9", "--workers", "0"]
    assert main([*arguments, *smaller, "--steps", "4", "--minutes", "1e-6"]) == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoints")[1]["step"] == 1
    assert main([*arguments, "--resume", "--lr", "0.5"]) == 1
    assert "has lr = 0.002, not 0.5" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--workers", "0"]) == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoints")[1]["step"] == 4
    exported = load_file(tmp_path / "run" / "model.safetensors")
    assert exported["embed.weight"].shape == (15, 8)
    assert load_ghn(tmp_path / "run").config.bounded
    taught, cold = str(tmp_path / "taught"), str(tmp_path / "cold")
    assert main([*arguments, *smaller, "--steps", "1", "--out", taught, "--teacher"]) == 0
    assert load_checkpoint(tmp_path / "taught" / "checkpoints")[1]["config"]["teacher"] == 0.5
    assert main([*arguments, "--workers", "0", "--steps", "1", "--out", cold, "--cooldown-from", taught]) == 0
    labels = [load_file(tmp_path / name / "teacher.safetensors")["logits"] for name in ("taught", "cold")]
    assert torch.equal(*labels)
    with pytest.raises(SystemExit):
        main([*arguments, "--architectures", "torchvision"])
    assert main(["train", "--data", str(tmp_path / "none.parquet"), "--steps", "1"]) == 1
