"""What networks with predicted weights are trained and judged by, for one kind of classifier each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ghn.hypernet import Images
from timm_ghn.hypernet.tasks import sketch
from timm_ghn.training.checkpoint import TrainingError
from timm_ghn.training.closed_form import ridge_logits
from timm_ghn.training.data import ImageDataset
from timm_ghn.training.teacher import distillation, fingerprint

if TYPE_CHECKING:
    from timm_ghn.training.config import TrainConfig

VAL_BATCH = 250
"""Images that share the statistics of batch norms in validation."""

_VAL_SHOTS = 50  # images of a class, at most, that a classifier is fitted to in validation


@dataclass(frozen=True)
class Batch:
    """What one network is trained on in a step.

    Attributes:
        images: float32 [n, 3, height, width].
        labels: int64 [n].
        rows: Where they are from, int64 [n].
        sketch: Of their task, if the GHN is told.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    sketch: Tensor | None = None


class Objective(Protocol):
    """A way of training and judging.

    Attributes:
        image_size: Side of the images.
        predict_head: Whether the classification layer is predicted; if not, networks have none and give features.
    """

    predict_head: ClassVar[bool]
    image_size: int

    def draw(self, generator: torch.Generator, image_size: int) -> Batch:
        """The images of one network and step, brought to a size; the generator alone decides which."""

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of a network's output [n, ·] for a batch, and the share of images that it gets right."""

    def accuracy(self, predict: Callable[[Tensor | None], Callable[[Tensor], Tensor]]) -> float:
        """Top-1 on validation images, in percent.

        Args:
            predict: For a task's sketch, the network with the weights that are predicted for it.
        """

    def facts(self) -> list[dict[str, int]]:
        """What tells these images from others."""

    def described(self) -> Images:
        """What a GHN's config says of them."""


class PredictedHead:
    """The classifier is predicted, for the classes of one data set; cross-entropy of its logits."""

    predict_head: ClassVar[bool] = True

    def __init__(
        self,
        config: TrainConfig,
        train: Sequence[ImageDataset],
        val: Sequence[ImageDataset],
        device: torch.device,
        teacher: Tensor | None,
    ):
        if len(train) != 1:
            raise TrainingError(
                f"{len(train)} data sets are given, but the classes of a predicted head are those of one; give one, or "
                "train with a ridge head."
            )
        for name, (data,) in (("training", train), ("validation", val)):
            if data.num_classes != config.ghn.num_classes:
                raise TrainingError(
                    f"The {name} images have {data.num_classes} classes, the GHN {config.ghn.num_classes}; make them "
                    "equal."
                )
        if not config.ghn.predicts_head:
            raise TrainingError("The GHN predicts no classification layer; train it with a ridge head.")
        if (teacher is None) != (config.teacher == 0):
            raise TrainingError(
                f"A teacher's share of the loss is {config.teacher:g}, but {'no' if teacher is None else 'its'} "
                "labels are given; give both or neither."
            )
        self.config = config
        self.train, self.val = train[0].to(device), val[0].to(device)
        self.teacher = None if teacher is None else teacher.to(device)
        self.image_size = self.train.image_size
        order = torch.randperm(len(self.val), generator=torch.Generator().manual_seed(0))
        self.val_rows = order[: config.val_images].to(device)

    def draw(self, generator: torch.Generator, image_size: int) -> Batch:
        rows = self.train.draw(self.config.batch_size, generator)
        images, labels = self.train.batch(rows, generator)
        return Batch(_resized(images, image_size), labels, rows)

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(output, batch.labels, label_smoothing=self.config.label_smoothing)
        if self.teacher is not None:
            divergence = distillation(output, self.teacher[batch.rows], self.config.temperature)
            loss = torch.lerp(loss, divergence, self.config.teacher)
        return loss, (output.argmax(1) == batch.labels).float().mean()

    def accuracy(self, predict: Callable[[Tensor | None], Callable[[Tensor], Tensor]]) -> float:
        network, right = predict(None), 0
        for rows in self.val_rows.split(VAL_BATCH):
            images, labels = self.val.batch(rows)
            right += int((network(images).argmax(1) == labels).sum())
        return 100 * right / len(self.val_rows)

    def facts(self) -> list[dict[str, int]]:
        return [fingerprint(self.train)]

    def described(self) -> Images:
        return self.train.described()


class RidgeHead:
    """The classifier is fitted in closed form to some images of a few classes, and judged by others of these classes.

    What is predicted then has to be good for any classes, as in arXiv 1805.08136. Each network and step has a task of
    its own: so many classes of one of the data sets.
    """

    predict_head: ClassVar[bool] = False

    def __init__(
        self,
        config: TrainConfig,
        train: Sequence[ImageDataset],
        val: Sequence[ImageDataset],
        device: torch.device,
        teacher: Tensor | None,
    ):
        if config.ghn.predicts_head:
            raise TrainingError(
                "A ridge head leaves nothing to learn for the GHN's own; set its predicts_head to false."
            )
        if teacher is not None or config.teacher:
            raise TrainingError("A teacher knows the classes of one data set; train with a predicted head, or without.")
        weights = config.data_weights or (1.0,) * len(train)
        if len(weights) != len(train):
            raise TrainingError(f"There are {len(weights)} weights for {len(train)} data sets; give one for each.")
        sizes = {data.image_size for data in (*train, *val)}
        if len(sizes) > 1:
            raise TrainingError(f"The data sets have images of {sorted(sizes)} pixels; bring all to one size.")
        self.config, (self.image_size,) = config, sizes
        self.shares = torch.tensor(weights, dtype=torch.float64).cumsum(0) / sum(weights)
        self.train = [_ByClass(data.to(device)) for data in train]
        least = 2 * max(config.ways)
        if config.batch_size < least:
            raise TrainingError(
                f"{config.batch_size} images are too few for {max(config.ways)} classes; a batch must have {least}."
            )
        generator = torch.Generator().manual_seed(0)
        self.val_batches = [batch for data in val for batch in self._episodes(data, len(val), generator, device)]

    def _episodes(
        self, data: ImageDataset, share: int, generator: torch.Generator, device: torch.device
    ) -> list[Batch]:
        """Tasks to validate on: few and large ones, where there are images enough."""
        by_class = _ByClass(data.to(device))
        ways = min(10, len(by_class.rows))
        shots = max(1, min(_VAL_SHOTS, by_class.fewest // 2, self.config.val_images // share // (2 * ways)))
        count = max(1, self.config.val_images // share // (2 * ways * shots))
        return [self._batch(by_class, ways, shots, generator, augment=False) for _ in range(count)]

    def draw(self, generator: torch.Generator, image_size: int) -> Batch:
        point, told, grey = torch.rand(3, generator=generator, device=generator.device).tolist()
        data = self.train[int((self.shares <= point).sum())]
        which = torch.randint(len(self.config.ways), (), generator=generator, device=generator.device)
        ways = min(self.config.ways[int(which)], len(data.rows))
        batch = self._batch(data, ways, self.config.batch_size // (2 * ways), generator, augment=True)
        images = _resized(batch.images, image_size)
        if grey < self.config.grey:
            images = images.mean(1, keepdim=True).expand_as(images)
        batch = dataclasses.replace(batch, images=images)
        told_of = self.config.ghn.conditioned and told >= self.config.blind
        return dataclasses.replace(batch, sketch=_sketch(batch)) if told_of else batch

    def _batch(self, data: _ByClass, ways: int, shots: int, generator: torch.Generator, augment: bool) -> Batch:
        """A task; the first half of its images is what the classifier is fitted to."""
        rows = data.draw(ways, 2 * shots, generator)
        rows = torch.cat((rows[:, :shots].flatten(), rows[:, shots:].flatten()))
        images, _ = data.data.batch(rows, generator if augment else None)
        labels = torch.arange(ways, device=rows.device).repeat_interleave(shots).repeat(2)
        return Batch(images, labels, rows)

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        half = len(batch.labels) // 2
        known, asked = batch.labels.split(half)
        logits = ridge_logits(output[:half], known, output[half:])
        return F.cross_entropy(logits, asked), (logits.argmax(1) == asked).float().mean()

    def accuracy(self, predict: Callable[[Tensor | None], Callable[[Tensor], Tensor]]) -> float:
        shares = []
        for batch in self.val_batches:
            network = predict(_sketch(batch) if self.config.ghn.conditioned else None)
            # Mixed, so that each batch has images of all classes, and so the statistics that training has.
            order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(0))
            order = order.to(batch.labels.device)
            output = torch.cat([network(batch.images[rows]) for rows in order.split(VAL_BATCH)])[order.argsort()]
            shares.append(self.loss(output, batch)[1])
        return 100 * float(torch.stack(shares).mean())

    def facts(self) -> list[dict[str, int]]:
        return [fingerprint(each.data) for each in self.train]

    def described(self) -> Images:
        return dataclasses.replace(self.train[0].data.described(), label_names=None)


def _sketch(batch: Batch) -> Tensor:
    """Of the task, by the images that a classifier is fitted to."""
    half = len(batch.labels) // 2
    return sketch([(batch.images[:half], batch.labels[:half])])


def _resized(images: Tensor, size: int) -> Tensor:
    if size == images.shape[-1]:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)


class _ByClass:
    """A data set's rows by class, without classes that have only one."""

    def __init__(self, data: ImageDataset):
        self.data = data
        counts = data.labels.bincount(minlength=data.num_classes)
        found = data.labels.argsort(stable=True).split(counts.tolist())
        self.rows = [rows for rows in found if len(rows) > 1]
        if len(self.rows) < 2:
            raise TrainingError(
                "Tasks need at least two classes of at least two images; give a data set that has them."
            )
        self.fewest = min(map(len, self.rows))

    def draw(self, ways: int, count: int, generator: torch.Generator) -> Tensor:
        """Rows [ways, count] of as many classes; with repetitions where a class has fewer."""

        def some(rows: Tensor) -> Tensor:
            order = torch.randperm(len(rows), generator=generator, device=generator.device).to(rows.device)
            return rows[order.repeat(-(-count // len(order)))[:count]]

        chosen = torch.randperm(len(self.rows), generator=generator, device=generator.device)[:ways].tolist()
        return torch.stack([some(self.rows[label]) for label in chosen])


OBJECTIVES: dict[str, Callable[..., Objective]] = {"predicted": PredictedHead, "ridge": RidgeHead}
"""By what a training config calls them."""
