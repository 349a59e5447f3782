"""The graph layer against its reference, and what torch asks of a custom op."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import GOLDEN_ARCHITECTURES, batch, chain, dags, fan, golden_graph, layer_weights, several_sinks, states
from torch import Tensor

from timm_ghn.graph.shortest_paths import with_virtual_edges
from timm_ghn.ops.gated_gnn import gated_gnn
from timm_ghn.ops.reference import gated_gnn_reference
from timm_ghn.ops.topology import Topology

EDGELESS = (torch.empty(0, 3, dtype=torch.int64), 1)


def op_arguments(h: Tensor, topology: Topology, weights: list[Tensor]) -> tuple[Tensor, ...]:
    return (True, h, *vars(topology).values(), *weights)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest expected value."""
    assert actual.shape == expected.shape
    if expected.numel():
        assert (actual - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def check_gradients(edges: Tensor, sizes: list[int], weights: Sequence[Tensor | None], d: int = 8) -> None:
    """States and gradients of all inputs agree with the reference in float64."""
    h = states(sum(sizes), d)
    inputs = [h, *(w for w in weights if w is not None)]
    arguments: list[Any] = list(weights)
    expected = gated_gnn_reference(h, edges, *arguments)
    actual = gated_gnn(h, Topology.from_edges(edges, sizes), *arguments)
    assert_close(actual, expected, 1e-10)
    direction = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad(actual, inputs, direction, allow_unused=True),
        torch.autograd.grad(expected, inputs, direction, allow_unused=True),
        strict=True,
    ):
        assert_close(a, torch.zeros_like(a) if e is None else e, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", GOLDEN_ARCHITECTURES)
def test_golden_graphs(architecture: str) -> None:
    edges, nodes = golden_graph(architecture)
    topology = Topology.from_edges(edges, [nodes])
    with torch.no_grad():
        weights, h = layer_weights(32), states(nodes, 32)
        expected = gated_gnn_reference(h, edges, *weights)
        assert_close(gated_gnn(h, topology, *weights), expected, 1e-10)
        assert_close(gated_gnn(h.float(), topology, *(w.float() for w in weights)).double(), expected, 1e-5)


@pytest.mark.parametrize("architecture", ["torchvision-vgg11_bn", "torchvision-resnet18"])
def test_golden_graphs_gradients(architecture: str) -> None:
    edges, nodes = golden_graph(architecture)
    check_gradients(edges, [nodes], layer_weights(8))


@settings(max_examples=40, deadline=None)
@given(st.lists(dags(), min_size=1, max_size=3), st.sampled_from([2, 4, 6]))
def test_any_batch_of_dags(graphs: list[tuple[Tensor, int]], d: int) -> None:
    check_gradients(*batch(graphs), layer_weights(d), d)


@pytest.mark.slow
@pytest.mark.parametrize(
    "graphs",
    [[EDGELESS], [(EDGELESS[0], 5)], [several_sinks()], [chain(5), EDGELESS, fan(4), several_sinks()], [fan(300)]],
    ids=["one node", "no edges", "several sinks", "unequal sizes", "fan"],
)
def test_odd_graphs(graphs: list[tuple[Tensor, int]]) -> None:
    check_gradients(*batch(graphs), layer_weights(4), d=4)


@pytest.mark.slow
def test_long_chain() -> None:
    edges, nodes = chain(1200)  # more than Python's functions may nest
    real = edges[edges[:, 2] == 1]
    with torch.no_grad():
        weights, h = layer_weights(4), states(nodes, 4)
        expected = gated_gnn_reference(h, edges, *weights)
        assert_close(gated_gnn(h, Topology.from_edges(edges, [nodes]), *weights), expected, 1e-10)
    check_gradients(real, [nodes], layer_weights(4), d=4)


def test_empty_batch() -> None:
    weights = layer_weights(4)
    h = states(0, 4)
    out = gated_gnn(h, Topology.from_edges(EDGELESS[0], []), *weights)
    out.sum().backward()
    assert out.shape == (0, 4)
    assert all(w.grad is not None and not w.grad.any() for w in weights)


def test_without_virtual_edges() -> None:
    weights = layer_weights(8)
    edges, sizes = batch([chain(6), several_sinks()])
    check_gradients(edges, sizes, [*weights[:4], None, None, None, None, *weights[8:]])


def test_edges_beyond_the_cutoff_carry_nothing() -> None:
    edges, nodes = with_virtual_edges(60, [(v, v + 1) for v in range(59)], 58), 60
    assert edges[:, 2].max() == 58
    check_gradients(edges, [nodes], layer_weights(4), d=4)


def test_noncontiguous_inputs() -> None:
    edges, sizes = batch([several_sinks(), chain(4)])
    topology = Topology.from_edges(edges, sizes)
    weights = layer_weights(6)
    h = states(sum(sizes), 6)
    expected = gated_gnn(h, topology, *weights)
    strided = [torch.stack((w, w), -1)[..., 0] for w in weights]
    wide = torch.cat((h, h), 1)[:, :6]
    actual = gated_gnn(wide.t().contiguous().t(), topology, *strided)
    assert_close(actual, expected, 1e-12)
    grad = torch.randn(6, sum(sizes), dtype=torch.float64).t()
    for a, e in zip(
        torch.autograd.grad(actual, [h, *weights], grad),
        torch.autograd.grad(expected, [h, *weights], grad.contiguous()),
        strict=True,
    ):
        assert_close(a, e, 1e-12)


def test_same_input_same_bits() -> None:
    edges, sizes = batch([golden_graph("torchvision-resnet18"), fan(50)])
    topology, weights, h = Topology.from_edges(edges, sizes), layer_weights(8, dtype=torch.float32), None
    runs = []
    for _ in range(2):
        h = states(sum(sizes), 8, torch.float32)
        out = gated_gnn(h, topology, *weights)
        runs.append((out, *torch.autograd.grad(out.square().sum(), [h, *weights])))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradcheck() -> None:
    edges, sizes = batch([several_sinks(), chain(4)])
    topology = Topology.from_edges(edges, sizes)
    # Weights away from zero, so that no ReLU switches within the finite difference.
    weights = [w.detach().requires_grad_() for w in layer_weights(4)]
    assert torch.autograd.gradcheck(
        lambda h, *ws: gated_gnn(h, topology, *ws), (states(sum(sizes), 4), *weights), eps=1e-6, atol=1e-6
    )


def test_opcheck() -> None:
    edges, sizes = batch([several_sinks(), chain(4)])
    topology = Topology.from_edges(edges, sizes)
    weights = layer_weights(4, dtype=torch.float32)
    h = states(sum(sizes), 4, torch.float32)
    torch.library.opcheck(torch.ops.timm_ghn.gated_gnn.default, op_arguments(h, topology, weights))
    out, saved = torch.ops.timm_ghn.gated_gnn(*op_arguments(h, topology, weights))
    torch.library.opcheck(
        torch.ops.timm_ghn.gated_gnn_backward.default,
        (True, torch.ones_like(out), *(x.detach() for x in (out, saved, *vars(topology).values(), *weights))),
    )


def test_compile_fullgraph() -> None:
    edges, sizes = batch([several_sinks(), chain(4)])
    topology = Topology.from_edges(edges, sizes)
    weights = layer_weights(4, dtype=torch.float32)
    h = states(sum(sizes), 4, torch.float32)

    def loss(h: Tensor, topology: Topology, *weights: Tensor) -> Tensor:
        return gated_gnn(2 * h, topology, *weights).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(h, topology, *weights), [h, *weights])
    for a, e in zip(torch.autograd.grad(compiled(h, topology, *weights), [h, *weights]), expected, strict=True):
        assert_close(a, e, 1e-5)


def test_autocast_computes_in_float32() -> None:
    edges, sizes = batch([golden_graph("torchvision-vgg11_bn")])
    topology = Topology.from_edges(edges, sizes)
    weights = layer_weights(8, dtype=torch.float32)
    h = states(sum(sizes), 8, torch.float32)
    expected = gated_gnn(h, topology, *weights)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gated_gnn(h, topology, *weights)
        half = gated_gnn(h.bfloat16(), topology, *weights)
    assert actual.dtype == half.dtype == torch.float32
    assert torch.equal(actual, expected)
    half.sum().backward()
    assert h.grad is not None and h.grad.dtype == torch.float32


@pytest.mark.parametrize("of_states", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("of_weights", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_of_types_that_differ(of_states: torch.dtype, of_weights: torch.dtype) -> None:
    edges, sizes = batch([several_sinks()])
    topology = Topology.from_edges(edges, sizes)
    h = states(sum(sizes), 8).detach().to(of_states).requires_grad_()
    weights = [w.detach().to(of_weights).requires_grad_() for w in layer_weights(8)]
    with torch.autocast("cpu", torch.bfloat16):
        out = gated_gnn(h, topology, *weights)
    dtype = torch.float64 if of_states == torch.float64 else torch.float32
    expected = gated_gnn(h.to(dtype), topology, *(w.to(dtype) for w in weights))
    assert out.dtype == dtype and torch.equal(out, expected)
    gradients = torch.autograd.grad(out.square().sum(), [h, *weights])
    for found, plain in zip(gradients, torch.autograd.grad(expected.square().sum(), [h, *weights]), strict=True):
        assert torch.equal(found, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_cpu() -> None:
    edges, sizes = batch([golden_graph("torchvision-resnet50"), golden_graph("torchvision-densenet121"), chain(5)])
    results = []
    for device in ("cpu", "cuda"):
        h, *weights = (x.detach().to(device).requires_grad_() for x in (states(sum(sizes), 32), *layer_weights(32)))
        out = gated_gnn(h, Topology.from_edges(edges, sizes).to(device), *weights)
        results.append((out, *torch.autograd.grad(out.square().sum(), [h, *weights])))
    for a, e in zip(*results[::-1], strict=True):
        assert_close(a.cpu(), e, 1e-10)


def test_data_parallel(tmp_path: Path) -> None:
    edges, sizes = batch([several_sinks()])
    topology = Topology.from_edges(edges, sizes)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(layer_weights(4))

        def forward(self, h: Tensor) -> Tensor:
            return gated_gnn(h, topology, *self.weights)

    h, layer = states(sum(sizes), 4), Layer()
    expected = torch.autograd.grad(layer(h).sum(), list(layer.parameters()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(layer)(h).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, e in zip(layer.parameters(), expected, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, e)


def test_torch_func() -> None:
    edges, sizes = batch([several_sinks()])
    topology = Topology.from_edges(edges, sizes)
    h, *weights = (x.detach() for x in (states(sum(sizes), 4), *layer_weights(4)))

    def loss(h: Tensor, weights: list[Tensor]) -> Tensor:
        return gated_gnn(h, topology, *weights).square().sum()

    by_h, by_weights = torch.func.grad(loss, argnums=(0, 1))(h, weights)
    inputs = [x.requires_grad_() for x in (h, *weights)]
    for a, e in zip((by_h, *by_weights), torch.autograd.grad(loss(h, weights), inputs), strict=True):
        assert_close(a, e, 1e-12)


@pytest.mark.parametrize(
    ("edges", "sizes", "message"),
    [
        ([[0, 1]], [2], r"shape \(1, 2\); give \[E, 3\]"),
        ([[0.0, 1.0, 1.0]], [2], "torch.float32; give them as torch.int64"),
        ([[0, 2, 1]], [2], r"edge 0 -> 2 \(distance 1\) names a node outside 0\.\.\.1"),
        ([[-1, 1, 1]], [2], "names a node outside"),
        ([[1, 0, 1]], [2], "closes a cycle or is out of order"),
        ([[1, 1, 1]], [2], "closes a cycle or is out of order"),
        ([[0, 1, 0]], [2], "distance below 1"),
        ([[0, 2, 1]], [2, 1], "joins graphs 0 and 1"),
        ([[0, 1, 2]], [2], "no path of edges of distance 1"),
        ([[0, 1, 1], [0, 1, 1]], [2], "more than once"),
        ([[0, 1, 1]], [-1, 3], "fewer than 0 nodes"),
    ],
)
def test_wrong_edges(edges: list[list[float]], sizes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Topology.from_edges(torch.tensor(edges), sizes)


def test_wrong_tensors() -> None:
    topology = Topology.from_edges(*batch([chain(3)]))
    weights: list[Any] = [*layer_weights(4)]
    h = states(3, 4)
    for wrong_h, message in (
        (h[:2], r"give \[3, d\]"),
        (h[0], r"give \[3, d\]"),
        (h.bfloat16(), "torch.float32 or torch.float64, or use autocast"),
        (h.long(), "torch.float32 or torch.float64"),
        (h.to("meta"), r"use topology\.to\(h\.device\)"),
        (h[:, :3], "for states of width 3 give"),
        (h.float(), "mlp0_w is torch.float64 on cpu, but h is torch.float32 on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_gnn(wrong_h, topology, *weights)
    for index, name in ((0, "mlp0_w"), (3, "mlp2_b"), (6, "ve2_w"), (9, "gru_w_hh"), (11, "gru_b_hh")):
        with pytest.raises(ValueError, match=f"{name} has shape|mlp"):
            gated_gnn(h, topology, *[w[..., :-1] if i == index else w for i, w in enumerate(weights)])
    weights[4] = None
    with pytest.raises(ValueError, match="give all four, or none"):
        gated_gnn(h, topology, *weights)
