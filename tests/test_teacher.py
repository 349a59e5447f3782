"""A teacher's soft labels: made once, kept with the run, part of the loss, and refused for other images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from timm_ghn.hypernet import GHNConfig
from timm_ghn.training.checkpoint import TrainingError, load_checkpoint
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.data import ImageDataset
from timm_ghn.training.pool import Share
from timm_ghn.training.task import Task
from timm_ghn.training.teacher import FILE, distillation, soft_labels
from timm_ghn.training.trainer import Trainer

CONFIG = TrainConfig(
    ghn=GHNConfig(num_classes=3, max_shape=(16, 16, 3, 3), hid=8),
    architectures=(Share("timm", ("plain", "residual"), 400_000),),
    steps=4, batch_size=8, warmup=2, spacing=1, uses=2, eval_every=100, val_architectures=2, val_images=10,
    meta_batch=2, optimizer="adamw", lr=1e-3, betas=(0.9, 0.98), teacher=0.5,
)  # fmt: skip


def images(count: int, seed: int, size: int = 16) -> ImageDataset:
    """Images whose class is the channel that is brightest."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 128, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 3
    pixels[torch.arange(count), labels] += 120
    return ImageDataset(pixels, labels, 3)


TRAIN, VAL = images(200, 0), images(30, 1)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("taught")
    soft_labels(directory, TRAIN, VAL, epochs=20)
    return directory


def test_a_teacher_learns_and_is_trained_once(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = soft_labels(taught, TRAIN, VAL)
    assert labels.shape == (200, 3) and labels.dtype == torch.float32
    assert (labels.argmax(1) == TRAIN.labels).float().mean() > 0.9
    monkeypatch.setattr("timm_ghn.training.teacher._train", None)
    assert torch.equal(soft_labels(tmp_path / "other", TRAIN, VAL, source=taught), labels)
    assert torch.equal(soft_labels(tmp_path / "other", TRAIN, VAL), labels)
    assert [file.name for file in (tmp_path / "other").iterdir()] == [FILE]


def test_the_same_teacher_every_time(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first, second = (soft_labels(tmp_path / name, TRAIN, VAL, epochs=1) for name in "ab")
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_labels_for_other_images_and_damaged_ones_are_refused(taught: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"teacher\.safetensors has a teacher's labels for other images"):
        soft_labels(taught, images(200, 2), VAL)
    (tmp_path / FILE).write_bytes((taught / FILE).read_bytes()[:100])
    with pytest.raises(TrainingError, match=r"teacher\.safetensors cannot be read"):
        soft_labels(tmp_path, TRAIN, VAL)
    with pytest.raises(TrainingError, match=r"missing.teacher\.safetensors cannot be read"):
        soft_labels(tmp_path / "new", TRAIN, VAL, source=tmp_path / "missing")


def test_the_divergence_is_the_published_one() -> None:
    logits, labels = torch.randn(2, 7, 5, dtype=torch.float64)
    wanted, found = (labels / 3).softmax(1), (logits / 3).softmax(1)
    expected = 9 * (wanted * (wanted / found).log()).sum(1).mean()
    torch.testing.assert_close(distillation(logits, labels, 3.0), expected)
    assert distillation(labels, labels, 3.0).abs() < 1e-12


def test_a_run_follows_its_teacher_and_resumes_exactly(taught: Path, tmp_path: Path) -> None:
    labels = soft_labels(taught, TRAIN, VAL)

    def run(
        name: str, teacher: torch.Tensor | None, until: int | None = None, resume: bool = False
    ) -> dict[str, torch.Tensor]:
        config = dataclasses.replace(CONFIG, teacher=0.0 if teacher is None else 0.5)
        Trainer(config, TRAIN, VAL, tmp_path / name, workers=0, teacher=teacher, resume=resume).run(until=until)
        return load_checkpoint(tmp_path / name / "checkpoints")[0]["ghn"]

    whole = run("whole", labels)
    run("parts", labels, until=2)
    parts = run("parts", labels, resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    alone = run("alone", None)
    assert any(not torch.equal(whole[name], alone[name]) for name in whole)
    # With all of the loss from the teacher, the true labels do not matter.
    other = dataclasses.replace(TRAIN, labels=TRAIN.labels.flip(0))
    config = dataclasses.replace(CONFIG, teacher=1.0)
    losses = []
    for data, name in ((TRAIN, "true"), (other, "false")):
        trainer = Trainer(config, data, VAL, tmp_path / name, workers=0, teacher=labels)
        losses.append(trainer.run()["val_mean"])
    assert losses[0] == losses[1]


def test_a_share_without_labels_is_refused(taught: Path, tmp_path: Path) -> None:
    labels = soft_labels(taught, TRAIN, VAL)
    with pytest.raises(TrainingError, match=r"share of the loss is 0\.5, but no labels are given"):
        Trainer(CONFIG, TRAIN, VAL, tmp_path, workers=0)
    with pytest.raises(TrainingError, match=r"share of the loss is 0, but its labels are given"):
        Trainer(dataclasses.replace(CONFIG, teacher=0.0), TRAIN, VAL, tmp_path, workers=0, teacher=labels)


def test_images_come_in_the_sizes_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = Share("timm", ("plain", "vit"), 1_000_000)
    config = dataclasses.replace(CONFIG, teacher=0.0, steps=12, image_sizes=(16, 24), architectures=(share,), uses=1)
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    output = Task.output

    def spy(self: Task, parameters: dict[str, torch.Tensor], batch: torch.Tensor, bf16: bool = False) -> torch.Tensor:
        seen[self.architecture.fixed_size].add(batch.shape[-1])
        return output(self, parameters, batch, bf16)

    trainer = Trainer(config, TRAIN, VAL, tmp_path, workers=0)
    monkeypatch.setattr(Task, "output", spy)
    trainer.run()
    assert seen == {True: {16}, False: {16, 24}}
