"""Data sets: what is read, how it is split and augmented, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import FakeData

from timm_ghn.hypernet import Images
from timm_ghn.training.data import DatasetError, ImageDataset, load_dataset


def encode(value: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    """An image whose red channel is `value` everywhere, green and blue from a fixed noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[..., 0] = value
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, images: list[bytes | None], labels: list[Any], column: str = "img", names: int = 0) -> str:
    rows = [{"bytes": image, "path": f"{row}.png"} for row, image in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({column: pa.array(rows, kind), "label": pa.array(labels, pa.int64())})
    if names:
        features = {"label": {"_type": "ClassLabel", "names": [f"class {label}" for label in range(names)]}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return str(path)


@pytest.mark.parametrize("column", ["img", "image"])
def test_splits_of_a_parquet_file(tmp_path: Path, column: str) -> None:
    source = write(tmp_path / "data.parquet", [encode(row) for row in range(10)], [3, 0, 1, 2] * 2 + [0, 1], column)
    rows = {
        split: load_dataset(source, split, holdout=4).images[:, 0, 0, 0].tolist() for split in ("train", "val", "all")
    }
    assert rows == {"train": [0, 1, 2, 3, 4, 5], "val": [6, 7, 8, 9], "all": list(range(10))}
    validation = load_dataset(source, "val", holdout=4)
    assert validation.labels.tolist() == [1, 2, 0, 1]
    assert validation.num_classes == 4, "classes are counted over the whole file, not the split"
    assert validation.images.shape == (4, 3, 8, 8) and validation.images.dtype == torch.uint8


def test_holdout_covers_every_class_of_sorted_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "data.parquet", [encode(row) for row in range(12)], [0] * 4 + [1] * 4 + [2] * 4)
    validation, train = (load_dataset(source, split, holdout=3) for split in ("val", "train"))
    assert validation.labels.tolist() == [0, 1, 2]
    together = torch.cat([validation.images, train.images])[:, 0, 0, 0]
    assert sorted(together.tolist()) == list(range(12))


def test_the_first_images_are_of_every_class() -> None:
    labels = torch.arange(30) // 10
    grouped = ImageDataset(torch.zeros(30, 3, 8, 8, dtype=torch.uint8), labels, 3)
    assert grouped.first(6).labels.tolist() == [0, 0, 1, 1, 2, 2]
    mixed = ImageDataset(grouped.images, labels.roll(1), 3)
    assert mixed.first(6).labels.tolist() == [2, 0, 0, 0, 0, 0], "which are in no order: the first ones"
    assert mixed.first(None) is mixed and mixed.first(99) is mixed


def test_images_in_order_of_their_classes_are_mixed() -> None:
    labels = torch.arange(30) // 10
    grouped = ImageDataset(torch.arange(30).view(30, 1, 1, 1).expand(30, 3, 8, 8).to(torch.uint8), labels, 3)
    mixed = grouped.mixed()
    assert all(len(part.unique()) == 3 for part in mixed.labels.split(10))
    assert torch.equal(mixed.images[:, 0, 0, 0] // 10, mixed.labels) and len(mixed.images[:, 0, 0, 0].unique()) == 30
    assert torch.equal(grouped.mixed().labels, mixed.labels) and mixed.mixed() is mixed


def test_a_quarter_is_held_out_of_few_images(tmp_path: Path) -> None:
    source = write(tmp_path / "data.parquet", [encode(row) for row in range(10)], [3, 0, 1, 2] * 2 + [0, 1])
    assert [len(load_dataset(source, split)) for split in ("train", "val")] == [8, 2]


def test_named_classes(tmp_path: Path) -> None:
    source = write(tmp_path / "data.parquet", [encode(1)] * 3, [0, 1, 1], names=7)
    assert load_dataset(source, "all").num_classes == 7
    names = load_dataset(source, "all").described().label_names
    assert names is not None and len(names) == 7


def test_image_size_scales_and_crops(tmp_path: Path) -> None:
    source = write(tmp_path / "data.parquet", [encode(40, (8, 8)), encode(90, (24, 16))], [0, 1])
    data = load_dataset(source, "all", image_size=16)
    assert data.images.shape == (2, 3, 16, 16) and data.image_size == 16
    assert data.images[:, 0].flatten(1).unique(dim=1).tolist() == [[40], [90]]
    assert data.described() == Images(data.mean, data.std, (3, 16, 16), 1.0, "bicubic")


def test_image_folder(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(count):
                (tmp_path / part / label / f"{number}.png").write_bytes(encode(number))
    assert load_dataset(str(tmp_path), "train", holdout=2).labels.tolist() == [0, 0, 1, 1]
    assert load_dataset(str(tmp_path), "val", holdout=2).labels.tolist() == [0, 1]
    test = load_dataset(str(tmp_path), "test")
    assert test.labels.tolist() == [0, 0, 1, 1] and test.num_classes == 2
    assert test.described().label_names == ("cat", "dog")
    with pytest.raises(DatasetError, match="no folder test or val inside"):
        load_dataset(str(tmp_path / "train"), "test")
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"not an image")
    with pytest.raises(DatasetError, match=r"row 1 .* cannot be decoded"):
        load_dataset(str(tmp_path), "all")


@pytest.fixture
def dataset() -> ImageDataset:
    images = torch.randint(1, 256, (50, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageDataset(images, torch.arange(50) % 10, 10)


def test_normalisation_inverts(dataset: ImageDataset) -> None:
    images, labels = dataset.batch(torch.tensor([4, 7]))
    back = images * torch.tensor(dataset.std).view(3, 1, 1) + torch.tensor(dataset.mean).view(3, 1, 1)
    assert torch.equal((back * 255).round().to(torch.uint8), dataset.images[[4, 7]])
    assert labels.tolist() == [4, 7]


def test_augmentation_is_a_crop_of_the_padded_image_mirrored_or_not(dataset: ImageDataset) -> None:
    plain = ImageDataset(dataset.images, dataset.labels, 10, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
    images, _ = plain.batch(torch.arange(50), torch.Generator().manual_seed(1))
    mirrored = 0
    places = set()
    for image, original in zip(images, plain.images, strict=True):
        padded = torch.nn.functional.pad(original.float(), [4] * 4)
        found = [
            (top, left, flip)
            for flip in (False, True)
            for top in range(9)
            for left in range(9)
            if torch.equal(image.flip(-1) if flip else image, padded[:, top : top + 12, left : left + 12])
        ]
        assert len(found) == 1
        mirrored += found[0][2]
        places.add(found[0][:2])
    assert 15 <= mirrored <= 35 and len(places) > 25


def test_a_generator_alone_decides(dataset: ImageDataset) -> None:
    def draw(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        torch.rand(3)  # the global generator plays no part
        batches = [*dataset.batches(16, generator), dataset.sample(8, generator)]
        return [tensor for batch in batches for tensor in batch]

    first, again, other = draw(0), draw(0), draw(1)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


def test_one_pass_sees_every_row_once(dataset: ImageDataset) -> None:
    labels = [labels for _, labels in dataset.batches(16, torch.Generator().manual_seed(0))]
    assert [len(part) for part in labels] == [16, 16, 16, 2]
    assert torch.cat(labels).bincount().tolist() == [5] * 10
    assert torch.equal(torch.cat([part for _, part in dataset.batches(16)]), dataset.labels)


def test_refusals(tmp_path: Path) -> None:
    good = encode(1)
    cases: list[tuple[str, dict[str, Any], str]] = [
        (str(tmp_path / "absent.parquet"), {}, "There is no file"),
        (str(tmp_path / "absent"), {}, "no parquet file, no folder of images"),
        (write(tmp_path / "empty.parquet", [], []), {}, "holds no images"),
        (write(tmp_path / "negative.parquet", [good] * 2, [0, -1]), {}, "Row 1 .* has label -1"),
        (write(tmp_path / "outside.parquet", [good] * 2, [0, 7], names=5), {}, "label 7, .* 5 classes are 0 to 4"),
        (write(tmp_path / "blank.parquet", [good, None], [0, 1]), {}, "Row 1 .* no image bytes"),
        (write(tmp_path / "cut.parquet", [good, good[:90]], [0, 1]), {}, "row 1 .* cannot be decoded"),
        (write(tmp_path / "cut2.parquet", [encode(1, (64, 64), "JPEG")[:900]], [0]), {}, "row 0 .* cannot be decoded"),
        (
            write(tmp_path / "sizes.parquet", [good, encode(1, (9, 9))], [0, 1]),
            {},
            "9x9, the first one 8x8; give an image size",
        ),
        (write(tmp_path / "tall.parquet", [encode(1, (8, 9))], [0]), {}, "row 0 .* is 8x9, not square; give an image"),
        (write(tmp_path / "null.parquet", [good] * 2, [0, None]), {}, "must hold an integer in every row"),
        (write(tmp_path / "column.parquet", [good], [0], "picture"), {}, "has the columns picture, label"),
        (write(tmp_path / "test.parquet", [good], [0]), {"split": "test"}, "without a test split"),
        (
            write(tmp_path / "few.parquet", [good] * 2, [1, 0]),
            {"split": "val", "holdout": 2},
            "2 of the images in .*few",
        ),
        ("torch/cifar10", {"root": str(tmp_path)}, "timm cannot open torch/cifar10"),
        ("torch/cifar10", {"split": "training"}, "Unknown split 'training'"),
    ]
    damaged = Path(write(tmp_path / "damaged.parquet", [encode(row) for row in range(40)], [0] * 40))
    whole = damaged.read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("zeroed", whole[:200] + bytes(400) + whole[600:])):
        (tmp_path / f"{name}.damaged.parquet").write_bytes(content)
        cases.append((str(tmp_path / f"{name}.damaged.parquet"), {}, "not a readable parquet file|cannot be decoded"))
    for source, arguments, message in cases:
        with pytest.raises(DatasetError, match=message):
            load_dataset(source, **{"split": "all", **arguments})


@pytest.mark.parametrize(
    "name", ["cifar10", "CIFAR100", "mnist", "image_folder", "imagenet", "places365", "inaturalist"]
)
def test_torchvisions_data_sets_have_a_place_of_their_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    with pytest.raises(DatasetError, match=f"fetched to {tmp_path}/timm-ghn/datasets with download, or say in root"):
        load_dataset(f"torch/{name}")


@pytest.mark.parametrize("targets", [None, [[1, 2], [3, 4]]], ids=["none", "several for each image"])
def test_labels_that_are_not_one_for_each_image(targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """INaturalist has no list of them, QMNIST eight numbers for each image."""
    images: Any = FakeData(2)
    if targets:
        images.targets = targets
    monkeypatch.setattr("timm_ghn.training.data.create_dataset", lambda **options: images)
    with pytest.raises(DatasetError, match="torch/qmnist has no single label for each image"):
        load_dataset("torch/qmnist", "all")


def test_real_cifar10(shared: Path) -> None:
    validation = load_dataset(str(shared / "data" / "cifar10-train.parquet"), "val")
    assert validation.images.shape == (5000, 3, 32, 32) and validation.num_classes == 10
    assert validation.labels[:5].tolist() == [0, 4, 2, 3, 5]
    assert validation.images.float().mean() / 255 == pytest.approx(0.4715, abs=1e-3)
