"""Candidates in order: what is measured, on what, and how far to trust it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

from timm_ghn import load_ghn, rank, register
from timm_ghn.checkpoints.catalog import CATALOG
from timm_ghn.evaluation.ranking import Ranked, pareto_front, trust

Batches = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def stripes() -> Batches:
    """Images of four classes that a linear head tells apart: how fast their stripes change."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.stack([torch.sin(torch.arange(32) * frequency) for frequency in (0.2, 0.6, 1.2, 2.4)])
    labels = torch.arange(24) % 4
    noise = [0.3 * torch.randn(24, 3, 32, 32, generator=generator) for _ in range(4)]
    return [(waves[labels][:, None, None, :] + each, labels) for each in noise]


def test_other_classes_are_measured_on_images_that_no_head_was_fitted_to(stripes: Batches, ghn_file: Path) -> None:
    rows = rank("test_resnet", stripes, ghn_file, num_classes=4)
    assert rows[0].top1 == rows[0].accuracy["adapted"] > 0.6, "a quarter would be chance"
    generator = torch.Generator().manual_seed(0)
    meaningless = [(images, labels[torch.randperm(24, generator=generator)]) for images, labels in stripes]
    assert rank(["test_resnet"], meaningless, str(ghn_file), num_classes=4)[0].accuracy["adapted"] < 0.5
    held_out = rank(["test_resnet"], stripes[:2], str(ghn_file), held_out=stripes[2:], head="ridge", num_classes=4)
    assert held_out[0].accuracy["adapted"] > 0.6
    with pytest.raises(ValueError, match="Label 2 is none of the 2 classes"):
        rank(["test_resnet"], stripes, str(ghn_file), num_classes=2)
    with pytest.raises(ValueError, match="A batch is a tuple of images and labels, not float32 of shape"):
        rank("test_resnet", [stripes[0][0]], ghn_file)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="Each batch is a single image"):
        rank(["test_resnet"], [(stripes[0][0][:1], stripes[0][1][:1])], str(ghn_file), head="ridge")
    with pytest.raises(ValueError, match="head is 'keep'; it must be one of auto, predict, ridge, prototype"):
        rank(["test_resnet"], stripes, str(ghn_file), head="keep")


def test_images_that_are_not_square(stripes: Batches, ghn_file: Path) -> None:
    tall = [(images[..., :16], labels) for images, labels in stripes[:1]]
    (row,) = rank("vit_tiny_patch16_224", tall, str(ghn_file), num_classes=10)
    assert row.error is None and row.top1 is not None


def test_limits_leave_out(stripes: Batches, ghn_file: Path) -> None:
    names = ["test_resnet", "test_vit", timm.create_model("resnet18", num_classes=10)]
    rows = rank(names, stripes[:1], str(ghn_file), max_params=10_000_000)
    assert {row.name for row in rows} == {"test_resnet", "test_vit"} and all(row.error is None for row in rows)
    assert {row.name for row in rank(names, stripes[:1], str(ghn_file), max_macs=2_000_000)} == {"test_vit"}
    assert rank(names, stripes[:1], str(ghn_file), max_macs=1) == []


def test_what_a_model_costs_whose_modules_are_called_with_parameters(stripes: Batches, ghn_file: Path) -> None:
    model = timm.create_model("cait_xxs24_224", num_classes=10, img_size=32)
    (row,) = rank([model], stripes[:1], str(ghn_file))
    assert row.error is None and row.macs == 44_697_216
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())


def test_the_same_candidates_are_measured_alike(stripes: Batches, ghn_file: Path) -> None:
    """What is not predicted is as random each time as the time before, whoever drew numbers in between."""
    state = torch.random.get_rng_state()
    shares = []
    for _ in range(2):
        (row,) = rank(["test_vit"], stripes, str(ghn_file))
        shares.append(row.accuracy)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.rand(1)
        state = torch.random.get_rng_state()
    assert shares[0] == shares[1]


def test_how_far_to_trust_an_order(
    stripes: Batches, ghn_file: Path, tags: None, monkeypatch: pytest.MonkeyPatch, save_ghn: Callable[..., Path]
) -> None:
    measured = {"tau": 0.3125, "error": 0.051, "networks": 60, "source": "results.json"}
    pins = {tag: dataclasses.replace(pin, ranking=measured) for tag, pin in CATALOG.published.items()}
    monkeypatch.setitem(CATALOG.__dict__, "published", pins)
    found = trust("ghn2")
    assert (found.tau, found.networks) == (0.3125, 60)
    assert "Kendall's tau 0.31 ± 0.05 for ghn2, over 60 networks (results.json)" in str(found)
    assert "0.26 on its own test split" in str(found), "with what it is to be compared with"
    register("ghn2", ghn_file)
    assert trust("ghn2").tau is None, "another one by this name"
    rows = rank(["test_resnet"], stripes[:1], "ghn2")
    assert "has not been measured for ghn2." in str(rows.trust)
    assert "has not been measured for this GHN." in str(rank([], stripes[:1], load_ghn(str(ghn_file))).trust)


def test_every_published_tau_says_where_it_is_from() -> None:
    for tag, pin in CATALOG.published.items():
        if pin.ranking is not None:
            assert -1 <= pin.ranking["tau"] <= 1 and pin.ranking["networks"] > 1 and pin.ranking["source"], tag
        str(trust(tag))


def test_the_front_is_what_none_is_cheaper_and_better_than() -> None:
    shares = {"a": 0.5, "b": 0.4, "c": 0.4, "d": 0.5, "f": 0.6}
    costs = {"a": 10, "b": 5, "c": 7, "d": 12, "f": 99}
    rows = [Ranked(name, {"predicted": share}, macs=costs[name]) for name, share in shares.items()]
    assert [row.name for row in pareto_front([*rows, Ranked("failed", macs=1)])] == ["b", "a", "f"]
