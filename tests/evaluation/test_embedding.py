"""Networks as vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from timm_ghn import TraceError, embed, load_ghn, trace
from timm_ghn.evaluation.embedding import principal_plane
from timm_ghn.plan import make_plan

NAMES = ["test_resnet", "test_vit", "resnet18"]


@pytest.mark.parametrize("config", [{}, {"hypernet": "graphormer", "heads": 2}, {"split_attention": True}])
def test_an_embedding_is_the_mean_of_the_nodes_states(
    config: dict[str, Any], tmp_path: Path, save_ghn: Callable[..., Path]
) -> None:
    ghn = load_ghn(save_ghn(tmp_path / "ghn.safetensors", **config))
    found = embed(NAMES, ghn)
    assert found.shape == (3, 16) and found.dtype == torch.float32 and not found.requires_grad
    for name, vector in zip(NAMES, found, strict=True):
        plan = make_plan(trace(timm.create_model(name)), ghn.config, ghn.decoder.decoded_shape)
        torch.testing.assert_close(vector, ghn.node_states([plan]).mean(0).detach(), rtol=1e-4, atol=1e-5)


def test_names_modules_and_graphs_are_the_same(ghn_file: Path) -> None:
    models = [timm.create_model(name) for name in NAMES]
    found = embed(NAMES, str(ghn_file))
    torch.testing.assert_close(embed(models, str(ghn_file)), found)
    torch.testing.assert_close(embed(map(trace, models), str(ghn_file)), found)
    assert embed([], ghn_file).shape == (0, 16)
    assert torch.equal(embed(models[0], ghn_file), embed(models[:1], ghn_file))
    apart = torch.cdist(found, found) + 1e9 * torch.eye(3)
    assert apart.min() > 1e-4, "other networks have other vectors"
    with pytest.raises(TraceError, match="timm cannot make 'no_such_model'"):
        embed(["no_such_model"], str(ghn_file))


def test_a_frozen_network_is_the_same_architecture(ghn_file: Path) -> None:
    model = timm.create_model("test_resnet").requires_grad_(False)
    assert torch.equal(embed(model, ghn_file), embed("test_resnet", ghn_file))


def test_older_regnets_that_are_not_made_on_meta(ghn_file: Path) -> None:
    assert embed(["regnetx_002"], str(ghn_file)).isfinite().all()


def test_the_plane_is_where_they_vary_most() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.1, 5.0, 0.1, 2.0])
    coordinates, shares = principal_plane(torch.randn(200, 4, generator=generator) * weights + 7)
    torch.testing.assert_close(coordinates.mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)
    assert coordinates.std(0)[0] > 4 and 1.5 < coordinates.std(0)[1] < 2.5 and shares.sum() > 0.99
    assert principal_plane(torch.ones(1, 4))[0].tolist() == [[0, 0]]
