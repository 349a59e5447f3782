"""Soft labels from a teacher: a small network, trained first, says of each training image how alike the classes are.

What a GHN predicts is far from fitting its training images, so the labels' noise is in every gradient. A teacher's
probabilities have less of it (arXiv 1503.02531; for hypernetworks, Task-Aware Learning, ICML 2025).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import Tensor, nn

from timm_ghn.files import whole_files
from timm_ghn.training.checkpoint import TrainingError
from timm_ghn.training.data import ImageDataset

logger = logging.getLogger("timm_ghn.training")

FILE = "teacher.safetensors"

_EPOCHS = 8
_BATCH = 128
_LR = 0.2
_VIEWS = 4  # of each image, that the soft labels are the mean of


def soft_labels(
    directory: Path,
    train: ImageDataset,
    val: ImageDataset,
    device: torch.device | str = "cpu",
    source: Path | None = None,
    epochs: int = _EPOCHS,
) -> Tensor:
    """A teacher's logits for the training images; a teacher is trained only if no file has them yet.

    Args:
        directory: A run's, where ``teacher.safetensors`` is kept.
        train: Images to train the teacher on, and to label.
        val: Images to measure it on.
        device: Where to train it.
        source: Another run's directory, to take them from if `directory` has none.
        epochs: How long to train.

    Returns:
        float32 [images, classes] on the CPU.

    Raises:
        TrainingError: If the file is damaged, belongs to other images, or cannot be written.
    """
    file = directory / FILE
    if file.exists():
        return _read(file, train)
    if source is not None:
        logits, accuracy = _read(source / FILE, train), None
    else:
        logits, accuracy = _train(train, val, device, epochs)
        logger.info("the teacher has %.1f %% on validation images", accuracy)
    facts = {"data": json.dumps(fingerprint(train)), "validation": "" if accuracy is None else f"{accuracy:.2f}"}
    try:
        with whole_files(directory) as unfinished:
            save_file({"logits": logits}, unfinished / FILE, facts)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"Cannot write the teacher's labels to {file} ({error}); make room and resume.") from error
    return logits


def distillation(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(labels / T) ‖ softmax(logits / T)), of a network from its teacher, both float32 [n, classes]."""
    wanted = (labels / temperature).softmax(1)
    return F.kl_div((logits / temperature).log_softmax(1), wanted, reduction="batchmean") * temperature**2


def fingerprint(data: ImageDataset) -> dict[str, int]:
    """Numbers that tell one data set from another."""
    return {"images": len(data), "image_size": data.image_size, "pixels": int(data.images.sum(dtype=torch.int64))}


def _network(num_classes: int) -> nn.Module:
    """A residual network for small images: 10 million multiply-accumulates at 32×32."""
    stages = [
        ByoBlockCfg("basic", d=1, c=width, s=stride, gs=0, br=1.0) for width, stride in ((24, 1), (64, 2), (128, 2))
    ]
    return ByobNet(ByoModelCfg(tuple(stages), stem_chs=32, stem_type="3x3", stem_pool=None), num_classes)


def _train(train: ImageDataset, val: ImageDataset, device: torch.device | str, epochs: int) -> tuple[Tensor, float]:
    """The teacher's logits for the training images, and its top-1 on the validation images, in percent."""
    train, val = train.to(device), val.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _network(train.num_classes).to(device)
    network.to(memory_format=torch.channels_last)
    generator = torch.Generator(train.images.device).manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), lr=_LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * -(-len(train) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=steps)
    batches = (batch for _ in range(epochs) for batch in train.batches(_BATCH, generator))
    for images, labels in track(batches, "training a teacher", total=steps, console=Console(stderr=True)):
        loss = F.cross_entropy(network(images.contiguous(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        correct = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in val.batches(_BATCH))
        logits = torch.zeros(len(train), train.num_classes, device=train.images.device)
        for _ in range(_VIEWS):
            for rows in torch.arange(len(train), device=train.images.device).split(_BATCH):
                logits[rows] += network(train.batch(rows, generator)[0]) / _VIEWS
    return logits.cpu(), 100 * correct / len(val)


def _read(file: Path, train: ImageDataset) -> Tensor:
    try:
        with safe_open(file, "pt") as reader:
            data, logits = json.loads((reader.metadata() or {})["data"]), reader.get_tensor("logits")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(f"{file} cannot be read ({error}); remove it, and a teacher is trained again.") from error
    if data != fingerprint(train) or logits.shape != (len(train), train.num_classes):
        raise TrainingError(f"{file} has a teacher's labels for other images; remove it, or give it the same data.")
    return logits
