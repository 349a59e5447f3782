"""Tracing: conventions of the graph, inputs of all kinds, and that the traced model is only read."""

from __future__ import annotations

import copy
import random
from typing import Any

import networkx as nx
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timm_ghn import ComputationGraph, TraceError, trace
from timm_ghn.graph.shortest_paths import with_virtual_edges


def build(name: str, **kwargs: Any) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def before(graph: ComputationGraph, node: int) -> list[int]:
    return [source for source, target, distance in graph.edges.tolist() if target == node and distance == 1]


def after(graph: ComputationGraph, node: int) -> list[int]:
    return [target for source, target, distance in graph.edges.tolist() if source == node and distance == 1]


# ---- shortest paths -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.floats(0, 0.5), st.integers(1, 6), st.integers(0, 2**31))
def test_virtual_edges_are_shortest_paths(nodes: int, density: float, cutoff: int, seed: int) -> None:
    draw = random.Random(seed)
    edges = [(u, v) for v in range(nodes) for u in range(v) if draw.random() < density]
    graph = nx.DiGraph(edges)
    graph.add_nodes_from(range(nodes))
    expected = {
        (u, v, distance)
        for u, lengths in nx.all_pairs_shortest_path_length(graph, cutoff=cutoff)
        for v, distance in lengths.items()
        if distance > 0
    }
    assert set(map(tuple, with_virtual_edges(nodes, edges, cutoff).tolist())) == expected


def test_a_long_chain_is_cut_at_fifty() -> None:
    edges = with_virtual_edges(3000, [(i, i + 1) for i in range(2999)])
    assert edges[:, 2].max() == 50
    assert len(edges) == sum(3000 - distance for distance in range(1, 51))


@pytest.mark.parametrize("edge", [(1, 0), (1, 1), (0, 2), (-1, 1)])
def test_an_edge_against_the_order_is_refused(edge: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not forward in the topological order"):
        with_virtual_edges(2, [edge])


# ---- conventions ----------------------------------------------------------------------------------------------------


def test_every_graph_starts_at_the_input_and_is_in_topological_order() -> None:
    graph = trace(build("resnet18"))
    assert graph.ops[0] == graph.names[0] == "input"
    assert (graph.edges[:, 0] < graph.edges[:, 1]).all()
    assert graph.head == ("fc.weight", "fc.bias")
    assert graph.names[-2:] == list(graph.head)


def test_attention_takes_query_key_and_value_and_alone_feeds_the_projection() -> None:
    graph = trace(build("vit_tiny_patch16_224"))
    for node in (i for i, op in enumerate(graph.ops) if op == "msa"):
        assert [graph.names[i].rpartition("attn.")[2] for i in before(graph, node)] == ["qkv.bias"]
        (projection,) = after(graph, node)
        assert before(graph, projection) == [node]
    assert graph.ops.count("msa") == 12


def test_separate_projections_all_flow_into_attention() -> None:
    graph = trace(build("cait_xxs24_224"))
    token_attention = [i for i, op in enumerate(graph.ops) if op == "msa"][-1]
    names = {graph.names[i].rpartition("attn.")[2] for i in before(graph, token_attention)}
    assert names == {"q.bias", "k.bias", "v.bias"}


def test_a_position_embedding_flows_into_its_sum() -> None:
    graph = trace(build("vit_tiny_patch16_224"))
    node = graph.names.index("pos_embed")
    assert graph.ops[node] == "pos_enc"
    assert before(graph, node) == []
    (target,) = after(graph, node)
    assert graph.ops[target] == "sum"


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "samvit_base_patch16"])
def test_a_position_embedding_may_be_a_grid_or_added_in_place(name: str) -> None:
    graph = trace(build(name))
    assert graph.ops.count("pos_enc") == 1
    assert not any("pos_embed" in key for key in graph.kept)


def test_a_relative_position_table_is_no_encoding() -> None:
    graph = trace(build("swin_tiny_patch4_window7_224"))
    assert "pos_enc" not in graph.ops
    assert set(graph.kept.values()) == {"relative position bias"}


def test_a_shift_of_logits_that_is_the_same_for_all_keys_is_no_position_bias() -> None:
    assert "relative position bias" not in trace(build("efficientvim_m1")).kept.values()


def test_a_model_may_switch_autocast_off_for_its_device() -> None:
    class Precise(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(x.device.type, enabled=False), torch.amp.autocast(device_type=x.device.type):
                return super().forward(x)

    autocast = torch.autocast
    assert trace(Precise(3, 4), (3,)).names == ["input", "weight", "bias"]
    assert torch.autocast is torch.amp.autocast is autocast


def test_separate_biases_of_one_projection_each_get_a_node() -> None:
    graph = trace(build("beit_base_patch16_224"))
    nodes = [graph.names.index(f"blocks.0.attn.{name}") for name in ("qkv.weight", "q_bias", "v_bias")]
    assert [before(graph, node) for node in nodes[1:]] == [[node] for node in nodes[:-1]]


def test_inside_squeeze_excite_the_mean_is_contracted() -> None:
    graph = trace(build("seresnet50"))
    assert graph.ops.count("glob_avg") == 1
    squeeze = graph.names.index("layer1.0.se.fc1.weight")
    assert [graph.names[i] for i in before(graph, squeeze)] == ["layer1.0.bn3.weight"]


def test_a_standardised_convolution_is_one_node_and_its_gain_is_kept() -> None:
    graph = trace(build("nf_resnet50"))
    assert graph.ops[graph.names.index("stem.conv.weight")] == "conv"
    assert "stem.conv.gain" in graph.kept


def test_an_lstm_is_read_as_one_step() -> None:
    graph = trace(build("sequencer2d_s"))
    names = ["weight_ih_l0", "bias_ih_l0", "weight_hh_l0", "bias_hh_l0"]
    nodes = [next(i for i, name in enumerate(graph.names) if name.endswith(suffix)) for suffix in names]
    assert [before(graph, node) for node in nodes[1:]] == [[node] for node in nodes[:-1]]


def test_groups_and_dilation_name_the_convolution() -> None:
    class Convolutions(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2, dilation=2),
                nn.Conv2d(8, 8, 3, dilation=2), nn.AvgPool2d(2), nn.MaxPool2d(3),
            )  # fmt: skip

    graph = trace(Convolutions(), (4, 32, 32))
    ops = [op for op in graph.ops if op not in ("bias", "input")]
    assert ops == ["conv", "sep_conv", "dil_conv", "conv", "avg_pool", "max_pool"]
    assert graph.shapes[-2:] == [(1, 1, 2, 2), (1, 1, 3, 3)]


def test_a_sum_of_one_node_is_contracted() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer(x)
            return x + x.relu()

    assert trace(Doubled(), (3,)).ops == ["input", "conv", "bias"]


def test_a_shared_layer_keeps_one_node_and_the_graph_acyclic() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return self.layer(self.layer(x).relu())

    assert trace(Shared(), (3,)).names == ["input", "layer.weight", "layer.bias"]


def test_an_unused_parameter_has_its_reason() -> None:
    model = nn.Linear(3, 3)
    model.extra = nn.Parameter(torch.zeros(3))
    assert trace(model, (3,)).kept == {"extra": "not used by the forward pass"}


# ---- inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"features_only": True}),
        ("vit_tiny_patch16_224", {"features_only": True, "out_indices": (2, 5)}),
        ("convnext_atto", {"features_only": True}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4}),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4, "num_classes": 10}),
        ("resnet18", {"in_chans": 1, "num_classes": 0}),
        ("vit_tiny_patch16_224", {"in_chans": 5, "global_pool": ""}),
        ("naflexvit_base_patch16_gap", {}),
        ("inception_v3", {}),
    ],
)
def test_inputs_are_found(name: str, kwargs: dict[str, Any]) -> None:
    model = build(name, **kwargs)
    graph = trace(model)
    accounted = {*graph.names, *graph.kept}
    norm_biases = {name for name, _ in model.named_parameters()} - accounted
    assert all(name.endswith("bias") and f"{name.removesuffix('bias')}weight" in graph.names for name in norm_biases)
    if kwargs.get("features_only") or kwargs.get("num_classes") == 0:
        assert graph.head == ()


def test_a_model_may_return_a_dictionary() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"a": self.a(x), "rest": [self.b(x), None, "text"]}

    assert {"a.weight", "b.weight"} < set(trace(Named(), (3,)).names)


def test_a_failing_forward_names_the_size_and_the_remedy() -> None:
    with pytest.raises(TraceError, match=r"fails on an input of size \(3, 100, 100\).*pass the size it expects"):
        trace(build("vit_tiny_patch16_224"), (3, 100, 100))


def test_a_scripted_model_is_refused() -> None:
    with pytest.raises(TraceError, match="The model is scripted"):
        trace(torch.jit.script(nn.Linear(3, 3)), (3,))


def test_the_model_is_only_read() -> None:
    model = timm.create_model("resnet18").train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    state = {name: (id(tensor), copy.deepcopy(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    graph = trace(model)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == state[name][0]
        assert torch.equal(tensor, state[name][1])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert graph.kept == {"conv1.weight": "frozen (requires_grad=False)"}


def test_a_graph_survives_json() -> None:
    graph = trace(build("convnext_atto"))
    restored = ComputationGraph.from_dict(graph.to_dict())
    assert torch.equal(restored.edges, graph.edges)
    assert restored.to_dict() == graph.to_dict()
