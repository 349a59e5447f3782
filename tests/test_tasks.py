"""Training through a head in closed form, and GHNs that are told of a task."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import timm_ghn
from timm_ghn.checkpoints.load import load_ghn
from timm_ghn.cli import main
from timm_ghn.hypernet import GHN, GHNConfig
from timm_ghn.hypernet.tasks import SKETCH
from timm_ghn.predictor import Predictor
from timm_ghn.tiling import tile
from timm_ghn.training.checkpoint import TrainingError, load_checkpoint
from timm_ghn.training.closed_form import ridge_logits
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.data import DatasetError, ImageDataset, load_dataset
from timm_ghn.training.pool import Share
from timm_ghn.training.trainer import Trainer, new_ghn

SIZE = 16
CONFIG = TrainConfig(
    ghn=GHNConfig(num_classes=3, max_shape=(16, 16, 3, 3), hid=8, predicts_head=False, conditioned=True),
    architectures=(Share("timm", ("plain", "residual"), 400_000),),
    head="ridge", ways=(2, 3), grey=0.3, data_weights=(2.0, 1.0), steps=6, batch_size=12, warmup=2, spacing=1, uses=2,
    eval_every=100, val_architectures=2, val_images=40, meta_batch=2, optimizer="adamw", lr=1e-3, betas=(0.9, 0.98),
)  # fmt: skip


def images(count: int, classes: int, seed: int, size: int = SIZE) -> ImageDataset:
    """Stripes under noise, whose direction is the class."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 196, (count, 3, size, size), generator=generator)
    labels, place = torch.arange(count) % classes, torch.arange(size)
    directions = ((0, 1), (1, 0), (1, 1), (1, 3), (2, 1), (1, 2), (2, 2))
    stripes = torch.stack([(place[:, None] * down + place * right) % 4 < 2 for down, right in directions])
    pixels = (pixels + 60 * stripes[labels][:, None]).clamp(max=255)
    return ImageDataset(pixels.to(torch.uint8), labels, classes)


TRAIN = [images(60, 3, 0), images(100, 5, 1)]
VAL = [images(30, 3, 2), images(50, 5, 3)]


# --- the closed form --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 6), st.integers(2, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_it_is_the_least_squares_solution_and_so_are_its_derivatives(ways: int, shots: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(ways).repeat_interleave(shots)
    known = torch.randn(ways * shots, d, generator=generator, dtype=torch.float64).requires_grad_()
    asked = torch.randn(7, d, generator=generator, dtype=torch.float64).requires_grad_()
    found = ridge_logits(known, labels, asked)

    def least_squares(ridge: float) -> torch.Tensor:
        mean, wanted = known.mean(0), F.one_hot(labels).double()
        centred = known - mean
        scale = centred.square().sum() / len(known)
        products = centred.T @ centred + ridge * scale * torch.eye(d, dtype=torch.float64)
        weight: torch.Tensor = torch.linalg.solve(products, centred.T @ (wanted - wanted.mean(0)))
        return (asked - mean) @ weight + wanted.mean(0)

    # What it does not say, the ridge and the sharpness, are two of few; the solution is that of one pair.
    for ridge in torch.logspace(-2, 2, 13).tolist():
        expected = least_squares(ridge)
        sharpness = ((found * expected).sum() / expected.square().sum()).item()
        if torch.allclose(found, sharpness * expected, rtol=1e-4, atol=1e-6):
            break
    else:
        pytest.fail("no ridge gives these logits")
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((found * weights).sum(), (known, asked))
    references = torch.autograd.grad((sharpness * expected * weights).sum(), (known, asked))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-5)


def test_the_ridge_is_that_of_leaving_one_out() -> None:
    """Noisy features call for a large one, clean ones for a small one, and surer answers."""
    labels = torch.arange(5).repeat_interleave(5)
    clean = torch.eye(5)[labels].repeat(1, 8)
    noise = torch.randn(25, 40, generator=torch.Generator().manual_seed(0))
    sure, unsure = (ridge_logits(x, labels, clean).softmax(1).amax(1).mean() for x in (clean + 0.1 * noise, noise))
    assert sure > 0.9 and unsure < 0.5


def test_features_that_say_nothing_have_finite_gradients() -> None:
    known, asked = torch.ones(6, 4, requires_grad=True), torch.ones(6, 4, requires_grad=True)
    logits = ridge_logits(known, torch.arange(3).repeat_interleave(2), asked)
    logits.sum().backward()
    assert logits.isfinite().all() and known.grad is not None and known.grad.isfinite().all()


# --- sketches ---------------------------------------------------------------------------------------------------------


def test_a_sketch_is_of_the_images_in_whatever_order_and_batches() -> None:
    data = images(40, 4, 0)
    x, y = data.batch(torch.arange(40))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    whole = timm_ghn.sketch([(x, y)])
    torch.testing.assert_close(timm_ghn.sketch([(x[o], y[o] + 7) for o in order.split(9)]), whole, atol=1e-5, rtol=1e-4)
    assert whole.abs().max() < 10
    for other in (x.mean(1, keepdim=True), x.roll(1, 1), F.avg_pool2d(x, 2), 2 * x):
        assert (timm_ghn.sketch([(other, y)]) - whole).abs().max() > 0.1
    assert (timm_ghn.sketch([(x, y[order])]) - whole).abs().max() > 0.1, "which images are of a class matters"
    assert timm_ghn.sketch([(x[:1], y[:1])]).isfinite().all()


@pytest.mark.parametrize("batches", [[], [(torch.full((2, 3, 8, 8), torch.nan), torch.tensor([0, 1]))]])
def test_no_sketch_without_proper_images(batches: Any) -> None:
    with pytest.raises(ValueError, match=r"image"):
        timm_ghn.sketch(batches)


def test_a_task_changes_what_is_predicted_once_that_was_learnt() -> None:
    config = dataclasses.replace(CONFIG.ghn, num_classes=10)
    plain = new_ghn(dataclasses.replace(config, conditioned=False), 0).eval()
    told = GHN(config).eval()
    told.load_state_dict(plain.state_dict() | {n: x for n, x in told.state_dict().items() if "modulation" in n})
    model = timm.create_model("test_resnet", num_classes=10)
    tasks = [timm_ghn.sketch([data.batch(torch.arange(20))]) for data in TRAIN]

    def kernel(ghn: GHN, task: torch.Tensor | None = None) -> torch.Tensor:
        return Predictor(ghn, task=task).predict(model)["layer1.0.conv1.weight"]

    assert torch.equal(kernel(told, tasks[0]), kernel(plain)), "it begins as a GHN that is told nothing"
    with torch.no_grad():
        for parameter in told.modulation.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    assert torch.equal(kernel(told), kernel(plain)), "without a task nothing changes"
    assert not torch.equal(kernel(told, tasks[0]), kernel(told, tasks[1]))
    graph = timm_ghn.trace(model)
    together = told([graph, graph, graph], tasks=[tasks[0], None, tasks[1]])
    for tiles, task in zip(together, (tasks[0], None, tasks[1]), strict=True):
        torch.testing.assert_close(tile(tiles["layer1.0.conv1.weight"], (32, 32, 3, 3)), kernel(told, task))


def test_a_size_that_training_never_showed_changes_nothing(tmp_path: Path) -> None:
    """All its images have one size."""
    trainer(tmp_path, dataclasses.replace(CONFIG, steps=3)).run()
    ghn, model = load_ghn(str(tmp_path)), timm.create_model("test_resnet", num_classes=3)
    x, y = TRAIN[0].batch(torch.arange(20))
    small = timm_ghn.sketch([(x, y)])
    larger = small.clone()
    larger[-2] += 1  # octave
    assert timm_ghn.sketch([(F.interpolate(x, size=2 * SIZE), y)])[-2] == larger[-2]
    kernels = [Predictor(ghn, task=task).predict(model)["layer1.0.conv1.weight"] for task in (small, larger)]
    torch.testing.assert_close(*kernels)


def test_a_head_or_task_that_a_ghn_has_no_use_for_is_refused() -> None:
    headless = new_ghn(dataclasses.replace(CONFIG.ghn, conditioned=False), 0)
    with pytest.raises(ValueError, match=r"predicts no classification layer; fit one with `adapt`"):
        Predictor(headless, head="predict")
    with pytest.raises(ValueError, match=r"same for all tasks"):
        Predictor(headless, task=torch.zeros(1))
    told = new_ghn(dataclasses.replace(CONFIG.ghn, conditioned=True), 0)
    for task, message in (
        (torch.zeros(3), r"numbers, not a tensor of shape \(3,\)"),
        ("x", "numbers, not a str"),
        (torch.full((SKETCH,), torch.nan), "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            Predictor(told, task=task)  # type: ignore[arg-type]
    report = Predictor(headless).predict(timm.create_model("test_resnet", num_classes=3)).report
    assert report.kept["fc.weight"] == "head: the checkpoint predicts none"


# --- the run ----------------------------------------------------------------------------------------------------------


def trainer(directory: Path, config: TrainConfig = CONFIG, **options: Any) -> Trainer:
    return Trainer(config, options.pop("train", TRAIN), options.pop("val", VAL), directory, workers=0, **options)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    trainer(tmp_path / "whole").run()
    trainer(tmp_path / "parts").run(until=3)
    trainer(tmp_path / "parts", resume=True).run()
    expected, found = (load_checkpoint(tmp_path / name / "checkpoints")[0] for name in ("whole", "parts"))
    for name, tensor in expected["ghn"].items():
        assert torch.equal(tensor, found["ghn"][name]), name
    assert expected["ghn"]["modulation.mlp.fc.2.weight"].any(), "what tasks change is learnt"
    assert not any("class" in name for name in expected["ghn"])


def test_it_learns_and_its_networks_take_anybodys_classes(tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG, steps=90, lr=3e-3, network_clip=3.0, meta_batch=4, batch_size=60, optimizer="soap", ema=0.95, grey=0.0,
        val_images=300, val_architectures=8,
    )  # fmt: skip
    train, val = [images(300, 3, 0), images(300, 5, 1)], [images(150, 3, 2), images(150, 5, 3)]
    run = trainer(tmp_path, config, train=train, val=val)
    before = float(run.validate().mean())
    after = run.run()["val_mean"]
    assert after > before + 8, "18 to 34 with other seeds, in float32 and in bfloat16"

    ghn = load_ghn(str(tmp_path))
    data = images(70, 7, 5)
    timm_ghn.register("tasks-test", str(tmp_path))
    batches = [data.batch(rows) for rows in torch.arange(70).split(35)]
    model = timm.create_model("test_resnet", pretrained_cfg="tasks-test", num_classes=7, ghn_kwargs={"data": batches})
    expected = timm_ghn.predict(model, ghn, head="keep")["layer1.0.conv1.weight"]
    torch.testing.assert_close(model.get_parameter("layer1.0.conv1.weight").detach(), expected)
    assert "ghn_kwargs" in (tmp_path / "README.md").read_text()


def test_weights_to_start_from_may_have_a_head_and_know_no_tasks(tmp_path: Path) -> None:
    init = new_ghn(GHNConfig(num_classes=3, max_shape=(16, 16, 3, 3), hid=8), 7)
    run = trainer(tmp_path, init=init)
    assert torch.equal(run.ghn.embed.weight, init.embed.weight)


@pytest.mark.parametrize(
    ("changes", "options", "problem"),
    [
        ({"data_weights": (1.0,)}, {}, "1 weights for 2 data sets"),
        ({}, {"train": [TRAIN[0], images(40, 4, 0, size=20)]}, r"\[16, 20\] pixels"),
        ({"batch_size": 5}, {}, "5 images are too few for 3 classes"),
        ({}, {"train": [TRAIN[0], images(5, 5, 0)]}, "at least two classes of at least two images"),
        ({}, {"teacher": torch.zeros(60, 3)}, "teacher knows the classes of one"),
        ({"ghn": dataclasses.replace(CONFIG.ghn, predicts_head=True)}, {}, "predicts_head to false"),
        ({"head": "predicted"}, {}, "2 data sets are given"),
        ({"head": "predicted"}, {"train": TRAIN[0], "val": VAL[0]}, "predicts no classification layer"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(TrainingError, match=problem):
        trainer(tmp_path, dataclasses.replace(CONFIG, **changes), **options)


def test_some_classes_of_a_source(cifar_like: Path) -> None:
    whole, some = load_dataset(str(cifar_like), holdout=10), load_dataset(f"{cifar_like}#1-2", holdout=10)
    assert some.num_classes == 2 and set(some.labels.tolist()) == {0, 1}
    assert torch.equal(some.images, whole.images[(whole.labels == 1) | (whole.labels == 2)])
    with pytest.raises(DatasetError, match=r"classes 2 to 9, but there are 0 to 2"):
        load_dataset(f"{cifar_like}#2-9", holdout=10)


@pytest.fixture
def cifar_like(tmp_path: Path) -> Path:
    """A folder of images."""
    from PIL import Image

    data = images(60, 3, 0)
    for row, (pixels, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        folder = tmp_path / "images" / "abc"[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{row}.png")
    return tmp_path / "images"


def test_the_command(cifar_like: Path, tmp_path: Path) -> None:
    arguments = [
        "--data", str(cifar_like), f"{cifar_like}#0-1", "--holdout", "20", "--head", "ridge", "--conditioned",
        "--architectures", "timm:plain:400000", "--max-shape", "16,16,3,3", "--hid", "8", "--batch-size", "20",
        "--meta-batch", "1", "--val-architectures", "1", "--workers", "0",
    ]  # fmt: skip
    assert main(["train", *arguments, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert not load_ghn(str(tmp_path / "run")).config.predicts_head
    assert main(["evaluate", "--ghn", str(tmp_path / "run"), "--data", str(cifar_like), "--holdout", "20"]) == 1
