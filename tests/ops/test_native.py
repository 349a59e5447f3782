"""The graph layer in C: against the reference, when it is used, and what happens where it cannot be compiled."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import batch, chain, dags, fan, golden_graph, layer_weights, several_sinks, states
from torch import Tensor

from timm_ghn.graph import trace
from timm_ghn.ops import Topology, gated_gnn, native
from timm_ghn.ops.portable import Weights
from timm_ghn.ops.reference import gated_gnn_reference

Graph = tuple[Tensor, int]
EDGELESS: Graph = (torch.empty(0, 3, dtype=torch.int64), 1)


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of libraries, with nothing in it or in the process."""
    monkeypatch.delenv("TIMM_GHN_CACHE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    native._library.cache_clear()
    yield tmp_path / "timm-ghn" / "kernels"
    native._library.cache_clear()


def inputs(sizes: list[int], d: int, hidden: int) -> tuple[Tensor, list[Tensor]]:
    """States and weights in float32, rounded the same for all."""
    h, *weights = (x.detach().float().requires_grad_() for x in (states(sum(sizes), d), *layer_weights(d, hidden)))
    return h, weights


def need_compiler(d: int = 8, hidden: int = 4) -> None:
    h, weights = inputs([1], d, hidden)
    if not native.can_compute(h, Weights(*weights)):
        pytest.skip("no C compiler")


def check(graphs: list[Graph], d: int, hidden: int, without_virtual: bool = False) -> None:
    """States and all gradients are those of the reference in float64, to single precision."""
    need_compiler(d, hidden)
    edges, sizes = batch(graphs)
    h, weights = inputs(sizes, d, hidden)
    direction = torch.linspace(-1, 1, h.numel()).view_as(h)
    results = []
    layers: list[tuple[torch.dtype, Any, Any]] = [
        (torch.float32, gated_gnn, Topology.from_edges(edges, sizes)),
        (torch.float64, gated_gnn_reference, edges),
    ]
    for dtype, layer, where in layers:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (h, *weights)]
        arguments: list[Any] = list(leaves)
        if without_virtual:
            arguments[5:9] = [None] * 4
        out = layer(arguments[0], where, *arguments[1:])
        grads = torch.autograd.grad(out, leaves, direction.to(dtype), allow_unused=True, materialize_grads=True)
        results.append((out, *grads))
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= 2e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize(("d", "hidden"), [(8, 4), (32, 16), (64, 32), (128, 64), (6, 3), (1, 1)])
def test_widths(d: int, hidden: int) -> None:
    check([several_sinks(), EDGELESS, fan(3), chain(4)], d, hidden)


@settings(max_examples=40, deadline=None)
@given(st.lists(dags(), min_size=1, max_size=3))
def test_any_batch_of_dags(graphs: list[Graph]) -> None:
    check(graphs, 8, 4)


@pytest.mark.parametrize(
    "graphs",
    [[EDGELESS], [(EDGELESS[0], 5)], [fan(300)], [chain(60), several_sinks()], [several_sinks()] * 4],
    ids=["one node", "no edges", "fan", "beyond the longest distance", "several graphs"],
)
def test_odd_graphs(graphs: list[Graph]) -> None:
    check(graphs, 32, 16)


def test_without_virtual_edges() -> None:
    check([several_sinks(), chain(6)], 16, 16, without_virtual=True)


@pytest.mark.parametrize("model", ["test_vit", "test_resnet", "test_efficientnet"])
def test_timm_models(model: str) -> None:
    graph = trace(timm.create_model(model))
    check([(graph.edges, len(graph))], 32, 16)


def test_golden_graph() -> None:
    check([golden_graph("torchvision-resnet18"), chain(3)], 32, 16)


def test_empty_batch() -> None:
    h, weights = inputs([], 8, 4)
    out = gated_gnn(h, Topology.from_edges(EDGELESS[0], []), *weights)
    out.sum().backward()
    assert out.shape == (0, 8)
    assert all(w.grad is not None and not w.grad.any() for w in weights)


def test_same_bits_in_threads() -> None:
    need_compiler()
    edges, sizes = batch([golden_graph("torchvision-resnet18"), fan(50)])
    topology = Topology.from_edges(edges, sizes)

    def run(_: int) -> tuple[Tensor, ...]:
        h, weights = inputs(sizes, 8, 4)
        out = gated_gnn(h, topology, *weights)
        return out, *torch.autograd.grad(out.square().sum(), [h, *weights])

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(run, range(6))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_noncontiguous_inputs() -> None:
    need_compiler()
    edges, sizes = batch([several_sinks(), chain(4)])
    topology = Topology.from_edges(edges, sizes)
    h, weights = inputs(sizes, 8, 4)
    expected = gated_gnn(h, topology, *weights)
    strided = [torch.stack((w, w), -1)[..., 0] for w in weights]
    actual = gated_gnn(h.t().contiguous().t(), topology, *strided)
    assert torch.equal(actual, expected)
    grad = torch.randn(8, sum(sizes)).t()
    for a, e in zip(
        torch.autograd.grad(actual, [h, *weights], grad),
        torch.autograd.grad(expected, [h, *weights], grad.contiguous()),
        strict=True,
    ):
        assert torch.equal(a, e)


def test_what_is_not_finite_stays_so() -> None:
    need_compiler()
    edges, sizes = batch([chain(4), chain(4)])
    h, weights = inputs(sizes, 8, 4)
    with torch.no_grad():
        h[1, 0] = torch.nan
    out = gated_gnn(h, Topology.from_edges(edges, sizes), *weights)
    assert out[:4].isnan().any(1).all()
    assert out[4:].isfinite().all()
    by_h, *_ = torch.autograd.grad(out[:4].sum(), [h, *weights])
    assert by_h[:4].isnan().any()


@pytest.mark.parametrize(
    ("switch", "in_training", "in_inference"), [(None, True, False), ("0", False, False), ("1", True, True)]
)
def test_when_it_computes(
    monkeypatch: pytest.MonkeyPatch, switch: str | None, in_training: bool, in_inference: bool
) -> None:
    """It is a matter of the call and the switch, never of what happens to be compiled already."""
    if switch is None:
        monkeypatch.delenv("TIMM_GHN_COMPILE", raising=False)
    else:
        monkeypatch.setenv("TIMM_GHN_COMPILE", switch)
    asked = []
    monkeypatch.setattr(native, "can_compute", lambda *_: asked.append(True))
    edges, sizes = batch([several_sinks()])
    topology = Topology.from_edges(edges, sizes)
    h, weights = inputs(sizes, 8, 4)
    gated_gnn(h, topology, *weights)
    assert bool(asked) == in_training
    asked.clear()
    with torch.no_grad():
        gated_gnn(h, topology, *weights)
    gated_gnn(h.detach(), topology, *(w.detach() for w in weights))
    assert bool(asked) == in_inference


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, empty_cache: Path, level: int
) -> None:
    """Portable, and only those who asked for more are told."""
    edges, sizes = batch([several_sinks()])
    topology = Topology.from_edges(edges, sizes)
    h, weights = inputs(sizes, 8, 4)
    monkeypatch.setenv("TIMM_GHN_COMPILE", "0")
    expected = gated_gnn(h, topology, *weights)
    monkeypatch.setenv("CC", "no-such-compiler --really")
    monkeypatch.setenv("TIMM_GHN_COMPILE", "1" if level == logging.WARNING else "")
    with caplog.at_level(logging.INFO, "timm_ghn.ops"):
        for _ in range(2):
            assert torch.equal(gated_gnn(h, topology, *weights), expected)
    assert [record.levelno for record in caplog.records] == [level]
    assert "no-such-compiler" in caplog.text


def test_compiles_once(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    need_compiler()
    native._library.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    check([several_sinks()], 8, 4)


def test_compiles_what_is_damaged_again(empty_cache: Path) -> None:
    need_compiler()
    (library,) = empty_cache.iterdir()
    library.unlink()  # this process goes on executing what was in it
    library.write_bytes(b"not a library")
    native._library.cache_clear()
    check([several_sinks()], 8, 4)
    assert library.read_bytes() != b"not a library"


def test_threads_compile_at_once(empty_cache: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda _: native._library(1, 1), range(2)))
    if None in compiled:
        pytest.skip("no C compiler")
    assert len(list(empty_cache.iterdir())) == 1


def test_a_folder_that_others_can_write_to(empty_cache: Path) -> None:
    empty_cache.mkdir(parents=True)
    empty_cache.chmod(0o777)
    need_compiler()
    check([several_sinks()], 8, 4)
    assert not list(empty_cache.iterdir())
