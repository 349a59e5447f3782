"""GHN-3's attention bias: the table against the pair-by-pair form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import chain, dags, golden_graph
from torch import Tensor

from timm_ghn.ops.edge_bias import edge_bias, edge_bias_reference

D, HEADS = 8, 4


def padded(graphs: list[tuple[Tensor, int]]) -> Tensor:
    largest = max(nodes for _, nodes in graphs)
    distance = torch.zeros(len(graphs), largest, largest, dtype=torch.int64)
    for b, (edges, _) in enumerate(graphs):
        distance[b, edges[:, 0], edges[:, 1]] = edges[:, 2]
    return distance


def projection(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((257, D), (D, 2 * D), (D,), (HEADS, D), (HEADS,))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def check(graphs: list[tuple[Tensor, int]]) -> None:
    distance, weights = padded(graphs), projection()
    expected, actual = edge_bias_reference(distance, *weights), edge_bias(distance, *weights)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad(actual, weights, direction), torch.autograd.grad(expected, weights, direction), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.lists(dags(), min_size=1, max_size=3))
def test_any_batch_of_dags(graphs: list[tuple[Tensor, int]]) -> None:
    check(graphs)


def test_longest_distance() -> None:
    check([chain(60), chain(3)])


def test_golden_graph() -> None:
    check([golden_graph("torchvision-resnet18")])


def test_padded_batch_and_single_graph_agree() -> None:
    graphs, weights = [chain(9), golden_graph("torchvision-vgg11_bn")], projection()
    together = edge_bias(padded(graphs), *weights)
    for b, (edges, nodes) in enumerate(graphs):
        alone = edge_bias(padded([(edges, nodes)]), *weights)[0]
        assert torch.equal(together[b, :, :nodes, :nodes], alone)


@pytest.mark.parametrize("distance", [torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, 2, 2)])
def test_wrong_distances(distance: Tensor) -> None:
    with pytest.raises(ValueError, match=r"give torch\.int64 of shape \[B, N, N\]"):
        edge_bias(distance, *projection())
