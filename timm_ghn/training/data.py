"""Image data sets for training and evaluation, decoded once and kept as bytes in memory.

At 32×32 pixels a whole data set is smaller than one step's activations, so every image stays on the device as 8-bit
integers; cropping, flipping and normalising a batch are a few tensor operations there.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset
from torch import Tensor

from timm_ghn.errors import GHNError
from timm_ghn.hypernet import GHNConfig, Images

_CROP_PADDING = 4
_HOLDOUT = 5_000

# Labels, what gives the encoded (or, from torchvision, decoded) image of a row, and the classes' names if known.
_Rows = tuple[np.ndarray[Any, Any], Callable[[int], Any], "tuple[str, ...] | None"]


class DatasetError(GHNError):
    """A data set is missing, empty, damaged, or not what was asked for."""


@dataclass(frozen=True)
class ImageDataset:
    """Images and labels, on one device.

    Attributes:
        images: uint8, [N, 3, H, W].
        labels: int64, [N], each from 0 to num_classes - 1.
        num_classes: How many classes the whole source has, which may be more than this split shows.
        mean: Per channel, of pixels scaled to 0…1; by default the numbers that timm's own loaders use.
        std: Likewise.
        names: Of the classes, if the source has them.
        interpolation: Of the resizing, if images were resized.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    names: tuple[str, ...] | None = None
    interpolation: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        return self.images.shape[-1]

    def described(self) -> Images:
        """What a GHN's config says of the images that it was trained with."""
        size = tuple(self.images.shape[1:])
        return Images(self.mean, self.std, size, interpolation=self.interpolation, label_names=self.names)

    def has_classes_of(self, config: GHNConfig) -> bool:
        """Whether a GHN predicts heads, and for these classes: they are as many and, where both are known, so named."""
        known = config.images.label_names if config.images else None
        return (
            config.predicts_head
            and self.num_classes == config.num_classes
            and (not known or not self.names or known == self.names)
        )

    def to(self, device: torch.device | str) -> ImageDataset:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batch(self, rows: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Normalised images and labels of some rows.

        Args:
            rows: int64, on the data set's device.
            generator: Draws a crop and a flip for each image when given.
        """
        images = self.images[rows]
        if generator is not None:
            images = _crop_and_flip(images, generator)
        scale = torch.tensor(self.std, device=images.device).view(3, 1, 1) * 255
        shift = torch.tensor(self.mean, device=images.device).view(3, 1, 1) * 255
        return (images.float() - shift) / scale, self.labels[rows]

    def rows(self, rows: Tensor | slice) -> ImageDataset:
        """Some of the images, in this order; a tensor of rows is on the data set's device."""
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def of_classes(self, first: int, last: int) -> ImageDataset:
        """The images of classes `first` to `last`, which are counted from 0 then."""
        found = self.rows(((self.labels >= first) & (self.labels <= last)).nonzero().flatten())
        return replace(
            found,
            labels=found.labels - first,
            num_classes=last - first + 1,
            names=self.names and self.names[first : last + 1],
        )

    def first(self, count: int | None) -> ImageDataset:
        """So many images, the first ones or, where rows are grouped by class, evenly spaced ones; all if None."""
        if count is None or count >= len(self):
            return self
        rows = torch.arange(count, device=self.labels.device)
        if bool((self.labels[1:] >= self.labels[:-1]).all()):
            rows = rows * len(self) // count
        return self.rows(rows)

    def mixed(self) -> ImageDataset:
        """In an order that has all classes in each part, the same each time; as it is where rows are in no order."""
        if not bool((self.labels[1:] >= self.labels[:-1]).all()):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        return self.rows(order.to(self.labels.device))

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Rows drawn with replacement, on the data set's device; `generator` alone decides which."""
        rows = torch.randint(len(self), (batch_size,), generator=generator, device=generator.device)
        return rows.to(self.images.device)

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """An augmented batch of rows drawn with replacement."""
        return self.batch(self.draw(batch_size, generator), generator)

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over all rows: shuffled and augmented with a generator, in order and as they are without."""
        if generator is None:
            order = torch.arange(len(self), device=self.images.device)
        else:
            order = torch.randperm(len(self), generator=generator, device=generator.device).to(self.images.device)
        for rows in order.split(batch_size):
            yield self.batch(rows, generator)


@dataclass(frozen=True)
class Batches:
    """All rows of a data set in order, a batch at a time, as often as they are asked for."""

    data: ImageDataset
    size: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.batches(self.size)


def _crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image padded with black, cropped to its size at a random place, and mirrored half of the time."""
    count, _, height, width = images.shape

    def draw(end: int) -> Tensor:
        return torch.randint(end, (count, 1), generator=generator, device=generator.device).to(images.device)

    down, right = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    rows = draw(2 * _CROP_PADDING + 1) + down
    columns = draw(2 * _CROP_PADDING + 1) + torch.where(draw(2) == 1, right.flip(0), right)
    padded = F.pad(images, [_CROP_PADDING] * 4)
    which = torch.arange(count, device=images.device)[:, None, None]
    # Indices around the sliced channel dimension put it last.
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def default_root() -> Path:
    """Where torchvision's data sets are kept, which know no such folder by themselves."""
    return Path(huggingface_hub.constants.HF_HOME) / "timm-ghn" / "datasets"


def load_dataset(
    source: str,
    split: str = "train",
    *,
    holdout: int | None = None,
    image_size: int | None = None,
    root: str | None = None,
    download: bool = False,
) -> ImageDataset:
    """Decode a split of a data set into memory.

    Args:
        source: A parquet file in the schema of the Hub's CIFAR-10 (an image column `img` or `image`, and `label`), a
            folder of images that timm reads, "torch/cifar10" and the like, or "hfds/<repository>". With "#20-29" behind
            it, only these classes, which are counted from 0 then.
        split: "train" (the source's training images without the held-out ones), "val" (the held-out ones), "all"
            (both), or "test" (the source's own test images; a parquet file has none).
        holdout: How many training images to hold out: the last rows, or evenly spaced ones where rows are grouped by
            class. If None, 5,000, but at most a quarter.
        image_size: Scale the shorter side to this and cut out the centre. Needed if images differ in size.
        root: Where "torch/…" and "hfds/…" keep their files; if None, `default_root` or the Hub's own cache.
        download: Let "torch/…" fetch what is missing.

    Raises:
        DatasetError: The source is missing, empty, damaged, has labels outside its classes, or no such split.
    """
    if not source:
        raise DatasetError("The data has no name: give a parquet file, a folder of images, or one like torch/cifar10.")
    if split not in ("train", "val", "all", "test"):
        raise DatasetError(f"Unknown split {split!r}; choose from train, val, all, test.")
    if found := re.fullmatch(r"(.+)#(\d+)-(\d+)", source):
        whole = load_dataset(found[1], split, holdout=holdout, image_size=image_size, root=root, download=download)
        first, last = int(found[2]), int(found[3])
        if not first <= last < whole.num_classes:
            raise DatasetError(
                f"{source} asks for classes {first} to {last}, but there are 0 to {whole.num_classes - 1}; correct the "
                "numbers behind #."
            )
        return whole.of_classes(first, last)
    if source.endswith(".parquet"):
        if split == "test":
            raise DatasetError(f"{source} is a single parquet file without a test split; choose train, val or all.")
        labels, encoded, names = _read_parquet(Path(source))
    else:
        part = "test" if split == "test" else "train"
        labels, encoded, names = _read_with_timm(source, part, root, download)
    if len(labels) == 0:
        raise DatasetError(f"{source} holds no images; give a data set with at least one.")
    classes = len(names) if names else int(labels.max()) + 1
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise DatasetError(
            f"Row {outside[0]} of {source} has label {labels[outside[0]]}, but the labels of {classes} classes are "
            f"0 to {classes - 1}; correct the labels."
        )
    rows = _rows_of(split, labels, holdout, source)
    return ImageDataset(
        _decode(encoded, rows, image_size, source),
        torch.from_numpy(labels[rows]),
        classes,
        names=names,
        interpolation=None if image_size is None else "bicubic",
    )


def _rows_of(split: str, labels: np.ndarray[Any, Any], holdout: int | None, source: str) -> np.ndarray[Any, Any]:
    rows = np.arange(len(labels))
    if split in ("all", "test"):
        return rows
    if holdout is None:
        holdout = min(_HOLDOUT, max(1, len(labels) // 4))
    if not 0 < holdout < len(labels):
        raise DatasetError(
            f"{holdout} of the images in {source} cannot be held out: there are {len(labels)}; choose fewer, or a "
            "larger data set."
        )
    by_class = bool(np.all(labels[1:] >= labels[:-1]))
    held = np.arange(holdout) * len(labels) // holdout if by_class else rows[-holdout:]
    return held if split == "val" else np.setdiff1d(rows, held)


def _read_parquet(path: Path) -> _Rows:
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DatasetError('Reading parquet files needs pyarrow: pip install "timm-ghn[train]".') from error
    if not path.is_file():
        raise DatasetError(f"There is no file {path}; check the path.")
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            column = next((name for name in ("img", "image") if name in schema.names), None)
            if column is None or "label" not in schema.names:
                raise DatasetError(
                    f"{path} has the columns {', '.join(schema.names)}; needed are 'img' or 'image', and 'label'."
                )
            table = file.read([column, "label"])
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is not a readable parquet file ({error}); fetch it again.") from error
    kind = schema.field(column).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise DatasetError(f"Column {column!r} of {path} is {kind}; needed is a struct with the images' 'bytes'.")
    if not pa.types.is_integer(schema.field("label").type) or table["label"].null_count:
        raise DatasetError(f"Column 'label' of {path} must hold an integer in every row.")
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = described.get("info", {}).get("features", {}).get("label", {}).get("names")
    encoded = pc.struct_field(table[column], "bytes")
    return table["label"].to_numpy().astype(np.int64), lambda row: encoded[row].as_py(), tuple(names) if names else None


def _read_with_timm(source: str, split: str, root: str | None, download: bool) -> _Rows:
    """Likewise for everything that timm's data set factory knows."""
    if source.startswith("hfds/"):
        attempts: list[dict[str, Any]] = [
            {"name": source, "root": root, "split": split, "input_key": key} for key in ("image", "img")
        ]
    elif source.startswith("torch/"):
        half = "train" if split == "train" else "validation"
        root = root or str(default_root())
        attempts = [{"name": source, "root": root, "split": half, "download": download}]
    elif Path(source).is_dir():
        if split == "test":
            # timm would fall back to the folder itself and so to the training images.
            halves = [half for half in ("test", "val", "valid", "validation", "eval") if (Path(source) / half).is_dir()]
            if not halves:
                raise DatasetError(f"{source} has no folder test or val inside; add one, or choose train, val or all.")
            split = halves[0]
        attempts = [{"name": "", "root": source, "split": split}]
    else:
        raise DatasetError(
            f"{source} is no parquet file, no folder of images, and no name like torch/cifar10 or hfds/uoft-cs/cifar10."
        )
    failures = []
    for attempt in attempts:
        try:
            dataset: Any = create_dataset(**attempt)
            key = attempt.get("input_key")
            if key and len(dataset) and dataset.reader.dataset[0][key] is None:
                raise KeyError(f"no column {key!r}")  # a column that is not there reads as one without values
            break
        except (RuntimeError, ImportError, OSError, ValueError, KeyError, AssertionError) as error:
            failures.append(error)
    else:
        remedy = ""
        if source.startswith("torch/"):
            remedy = f"; let it be fetched to {root} with download, or say in root where it is"
        raise DatasetError(f"timm cannot open {source}, split {split}: {failures[0]}{remedy}") from failures[0]
    if not hasattr(dataset, "reader"):
        labels = np.array(getattr(dataset, "targets", ()), np.int64)
        if labels.shape != (len(dataset),):
            raise DatasetError(f"{source} has no single label for each image; give a folder of its images instead.")
        return labels, lambda row: dataset[row][0], tuple(dataset.classes)
    # Past the data set to its reader: for a damaged image, the data set answers with the next good one.
    reader = dataset.reader

    def encoded(row: int) -> bytes:
        with reader[row][0] as file:
            return bytes(file.read())

    targets = [label for _, label in reader.samples] if hasattr(reader, "samples") else list(reader.iter_targets())
    names = tuple(map(str, sorted(reader.class_to_idx, key=reader.class_to_idx.get)))
    return np.array(targets, np.int64), encoded, names or None


def _decode(encoded: Callable[[int], Any], rows: np.ndarray[Any, Any], image_size: int | None, source: str) -> Tensor:
    images = torch.empty(0)
    for place, row in enumerate(rows.tolist()):
        value = encoded(row)
        if value is None:
            raise DatasetError(f"Row {row} of {source} has no image bytes; embed the images in the file.")
        try:
            image = value if isinstance(value, Image.Image) else Image.open(io.BytesIO(value))
            image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DatasetError(
                f"The image in row {row} of {source} cannot be decoded ({error}); fetch it again."
            ) from error
        if image_size is not None and image.size != (image_size, image_size):
            image = _resize(image, image_size)
        if place == 0:
            images = torch.empty(len(rows), 3, image.height, image.width, dtype=torch.uint8)
        if image.width != image.height or image.width != images.shape[-1]:
            why = "not square" if image.width != image.height else f"the first one {images.shape[3]}x{images.shape[2]}"
            raise DatasetError(
                f"The image in row {row} of {source} is {image.width}x{image.height}, {why}; give an image size, to "
                "which all are brought."
            )
        images[place] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return images


def _resize(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
