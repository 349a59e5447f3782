"""The kernels against the portable implementation.

Collected by `test_kernels.py` in a process of its own: Triton's interpreter, which runs kernels without a GPU, has
to be asked for before Triton is imported. With a GPU at hand the kernels run on it.
"""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import batch, chain, dags, fan, golden_graph, layer_weights, several_sinks, states
from torch import Tensor

from timm_ghn.ops import kernels, portable
from timm_ghn.ops.portable import Weights
from timm_ghn.ops.topology import Topology

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
EDGELESS = (torch.empty(0, 3, dtype=torch.int64), 2)


def run(
    implementation: ModuleType, edges: Tensor, sizes: list[int], d: int, hidden: int, dtype: torch.dtype
) -> list[Tensor]:
    """States and gradients."""
    topology = Topology.from_edges(edges, sizes).to(DEVICE)
    weights = Weights(*(w.detach().to(DEVICE) for w in layer_weights(d, hidden, dtype)))
    out, saved = implementation.forward(states(sum(sizes), d, dtype).detach().to(DEVICE), topology, weights)
    grad = torch.linspace(-1, 1, out.numel(), dtype=dtype, device=DEVICE).view_as(out)
    return [out, *implementation.backward(grad, out, saved, topology, weights)]


def check(graphs: list[tuple[Tensor, int]], d: int, hidden: int, dtype: torch.dtype, tolerance: float) -> None:
    edges, sizes = batch(graphs)
    expected = run(portable, edges, sizes, d, hidden, dtype)
    for a, e in zip(run(kernels, edges, sizes, d, hidden, dtype), expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * max(1.0, e.abs().max().item())


SINGLE, DOUBLE = (torch.float32, 1e-5), (torch.float64, 1e-10)


@pytest.mark.parametrize(
    ("d", "hidden", "dtype", "tolerance"), [(8, 4, *SINGLE), (6, 6, *DOUBLE), (3, 5, *DOUBLE), (128, 64, *SINGLE)]
)
def test_widths(d: int, hidden: int, dtype: torch.dtype, tolerance: float) -> None:
    check([several_sinks(), EDGELESS, fan(2)], d, hidden, dtype, tolerance)


@settings(max_examples=3, deadline=None, database=None)
@given(st.lists(dags(), min_size=1, max_size=2))
def test_any_batch_of_dags(graphs: list[tuple[Tensor, int]]) -> None:
    check(graphs, 4, 2, torch.float64, 1e-10)


def test_list_longer_than_a_block() -> None:
    check([fan(20 if DEVICE == "cpu" else 3000)], 100, 50, torch.float32, 1e-5)


def test_distances_up_to_the_cutoff() -> None:
    check([chain(52 if DEVICE == "cpu" else 3000)], 4, 2, torch.float64, 1e-10)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes the interpreter long, and has nothing that the others have not")
def test_golden_graph() -> None:
    check([golden_graph("torchvision-vgg11_bn"), chain(3)], 32, 16, torch.float32, 1e-5)


def test_same_input_same_bits() -> None:
    edges, sizes = batch([several_sinks(), chain(9)])
    runs = [run(kernels, edges, sizes, 8, 4, torch.float32) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_what_is_not_finite_stays_so() -> None:
    edges, sizes = batch([chain(4), chain(4)])
    topology = Topology.from_edges(edges, sizes).to(DEVICE)
    h = states(8, 8, torch.float32).detach().to(DEVICE)
    h[1, 0] = torch.nan
    out, _ = kernels.forward(h, topology, Weights(*(w.detach().to(DEVICE) for w in layer_weights(8, 4, h.dtype))))
    assert out[:4].isnan().any(1).all() and out[4:].isfinite().all()


def test_empty_batch() -> None:
    out, by_h, *_ = run(kernels, EDGELESS[0], [], 4, 2, torch.float32)
    assert out.shape == by_h.shape == (0, 4)
