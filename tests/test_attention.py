"""The parts of fused projections: found in real models and random ones, and predicted each on its own."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from timm_ghn.graph import ComputationGraph, trace
from timm_ghn.graph.computation_graph import Operands, Part
from timm_ghn.graph.fused import regular
from timm_ghn.hypernet import GHN, GHNConfig
from timm_ghn.predictor import Predictor
from timm_ghn.tiling import tile

SMALL: dict[str, Any] = {"max_shape": (16, 16, 3, 3), "hid": 16}


def rows_of(operands: Operands) -> dict[str, set[int]]:
    """The rows of each operand."""
    rows: dict[str, set[int]] = {part.operand: set() for part in operands.parts}
    row = 0
    for _ in range(operands.blocks):
        for part in operands.parts:
            rows[part.operand] |= set(range(row, row + part.rows))
            row += part.rows
    return rows


class Listener(TorchFunctionMode):
    """Keeps the operands of every attention of a forward pass: what softmax stands between, or one call gets."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.last: tuple[Tensor, Tensor] | None = None
        self.logits: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append(args[:3])
        elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm):
            if self.logits is not None:
                self.calls.append((*self.logits, args[1]))
                self.logits = None
            self.last = args[:2]
        elif func in (torch.softmax, Tensor.softmax, F.softmax):
            self.logits = self.last
        return func(*args, **(kwargs or {}))


def heard(model: nn.Module, size: tuple[int, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
    listener = Listener()
    with listener:
        model.eval()(torch.randn(1, *size))
    assert listener.calls
    return listener.calls


def changed_rows(parameter: nn.Parameter, operand: Tensor) -> set[int]:
    """The rows that an operand depends on, by its derivative."""
    total = (operand * torch.randn_like(operand)).sum()
    (gradient,) = torch.autograd.grad(total, parameter, retain_graph=True, allow_unused=True)
    return set() if gradient is None else set(gradient.flatten(1).abs().sum(1).nonzero().flatten().tolist())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "smaller", "parameter"),
    [
        ("test_vit", {}, "blocks.0.attn.qkv.weight"),
        ("vit_tiny_patch16_224", {"depth": 1, "img_size": 64}, "blocks.0.attn.qkv.weight"),
        ("deit_tiny_distilled_patch16_224", {"depth": 1, "img_size": 64}, "blocks.0.attn.qkv.weight"),
        ("vit_base_patch16_xp_224", {"depth": 1, "embed_dim": 48, "num_heads": 3}, "blocks.0.in_proj.weight"),
        ("eva02_tiny_patch14_224", {"depth": 1, "img_size": 56}, "blocks.0.attn.qkv.weight"),
        ("beit_base_patch16_224", {"depth": 1, "embed_dim": 48, "num_heads": 3}, "blocks.0.attn.qkv.weight"),
        ("cait_xxs24_224", {"depth": 1, "img_size": 64}, "blocks.0.attn.qkv.weight"),
        ("xcit_nano_12_p16_224", {"depth": 1, "img_size": 64}, "blocks.0.attn.qkv.weight"),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, "layers.0.blocks.0.attn.qkv.weight"),
        ("twins_svt_small", {"depths": (2, 1, 1, 1)}, "blocks.0.1.attn.kv.weight"),
        ("mobilevit_xxs", {}, "stages.2.1.transformer.0.attn.qkv.weight"),
        ("coatnet_nano_rw_224", {}, "stages.2.blocks.0.attn.qkv.weight"),
        ("maxvit_rmlp_pico_rw_256", {}, "stages.0.blocks.0.attn_block.attn.qkv.weight"),
        ("pvt_v2_b0", {}, "stages.0.blocks.0.attn.kv.weight"),
        ("levit_128s", {}, "stages.0.blocks.0.attn.qkv.linear.weight"),
        ("levit_128s", {}, "stages.1.downsample.attn_downsample.kv.linear.weight"),
        ("tiny_vit_5m_224", {}, "stages.1.blocks.0.attn.qkv.weight"),
        ("test_vit3", {}, "attn_pool.kv.weight"),
    ],
)
def test_rows_are_those_that_the_operands_depend_on(name: str, smaller: dict[str, Any], parameter: str) -> None:
    model = timm.create_model(name, **smaller)
    image = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.pretrained_cfg["input_size"][1:]
    check_rows(model, parameter, (3, *image))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("swin_t", "features.1.0.attn.qkv.weight"),
    ],
)
def test_rows_of_torchvision_models(name: str, parameter: str) -> None:
    check_rows(torchvision.models.get_model(name), parameter, (3, 224, 224))


def check_rows(model: nn.Module, parameter: str, size: tuple[int, ...]) -> None:
    operands = trace(model).operands[parameter]
    weight = dict(model.named_parameters())[parameter]
    for call in heard(model, size):
        truth = {operand: rows for operand, t in zip("qkv", call, strict=True) if (rows := changed_rows(weight, t))}
        if truth:  # the first attention that depends on a layer is its own
            break
    found = rows_of(operands)
    found.pop("", None)
    assert found == truth


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        # Linear attention, the channels of each head and scale one after the other.
        ("efficientvit_b0", {"main.qkv.conv.weight": "qkv*", "main.aggreg.0.1.weight": "qkv*"}),
        ("coat_lite_tiny", {"factoratt_crpe.qkv.weight": "qkv", "factoratt_crpe.qkv.bias": "qkv"}),
        ("xcit_nano_12_p16_224", {"attn.qkv.weight": "qkv"}),
        ("volo_d1_224", {"network.2.0.attn.qkv.weight": "qkv", "post_network.0.attn.kv.weight": "kv"}),
        # Biases: of queries and values only, each a parameter; and one of all.
        ("beit_base_patch16_224", {"attn.qkv.weight": "qkv", "attn.q_bias": "q", "attn.v_bias": "v"}),
        ("shvit_s1", {"mixer.m.qkv.c.weight": "qkv"}),
        ("botnet26t_256", {"self_attn.qkv.weight": "qkv"}),
        ("lambda_resnet26t", {"self_attn.qkv.weight": "qkv"}),
        ("halonet26t", {"self_attn.q.weight": "q", "self_attn.kv.weight": "kv*"}),
        ("torchvision/vit_b_16", {"in_proj_weight": "qkv", "in_proj_bias": "qkv"}),
        ("convit_tiny", {"attn.qk.weight": "qk", "attn.v.weight": "v"}),
        ("vit_base_patch16_siglip_224", {"attn_pool.q.weight": "q", "attn_pool.kv.weight": "kv"}),
        ("mobilenetv4_hybrid_medium", {"attn.query.proj.weight": "q", "attn.key.proj.weight": "k"}),
    ],
)
def test_operands_of_other_kinds(name: str, kinds: dict[str, str]) -> None:
    library, _, short = name.rpartition("/")
    with torch.device("meta"):
        graph = trace(torchvision.models.get_model(short) if library else timm.create_model(short))
    for end, operands in kinds.items():
        found = [graph.operands[key] for key in graph.names if key.endswith(end)]
        assert found
        for one in found:
            assert "".join(part.operand for part in one.parts) + "*" * (one.blocks > 1) == operands


def test_a_model_without_attention_has_no_operands() -> None:
    graph = trace(timm.create_model("test_resnet"))
    assert not graph.operands and not graph.readers
    assert graph.untied is graph


class Attention(nn.Module):
    """Any order and width of the parts, as one projection of tokens or of a map, in blocks or not."""

    def __init__(
        self, order: str, sizes: dict[str, int], blocks: int, conv: bool, extra: int, softmax: bool, normed: str
    ):
        super().__init__()
        self.parts = [*((operand, sizes[operand]) for operand in order), *([("", extra)] if extra else [])]
        self.blocks, self.softmax = blocks, softmax
        self.dim = sum(size for _, size in self.parts)
        self.embed = nn.Conv2d(3, 6, 4, 4)
        self.qkv: nn.Module = nn.Conv2d(6, blocks * self.dim, 1) if conv else nn.Linear(6, blocks * self.dim)
        self.norms = nn.ModuleDict({operand: nn.LayerNorm(sizes[operand]) for operand in normed})
        self.proj = nn.Linear(blocks * (sizes["v"] + extra), 5)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        x = self.qkv(x).flatten(2).mT if isinstance(self.qkv, nn.Conv2d) else self.qkv(x.flatten(2).mT)
        x = x.unflatten(-1, (self.blocks, self.dim)).transpose(1, 2)
        names, sizes = zip(*self.parts, strict=True)
        part = dict(zip(names, x.split(sizes, -1), strict=True))
        for operand, norm in self.norms.items():
            part[operand] = norm(part[operand])
        if self.softmax:
            y = (part["q"] @ part["k"].mT).softmax(-1) @ part["v"]
        else:
            y = part["q"].relu() @ (part["k"].relu().mT @ part["v"])
        if "" in part:
            y = torch.cat((y, part[""]), -1)
        return self.proj(y.transpose(1, 2).flatten(2)).mean(1)


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations("qkv"),
    width=st.integers(2, 5),
    values=st.integers(2, 7),
    blocks=st.integers(1, 3),
    conv=st.booleans(),
    extra=st.integers(0, 3),
    softmax=st.booleans(),
    normed=st.sampled_from(["", "q", "k", "qk", "v", "qkv"]),
)
def test_random_attention(
    order: list[str], width: int, values: int, blocks: int, conv: bool, extra: int, softmax: bool, normed: str
) -> None:
    sizes = {"q": width, "k": width, "v": values}
    model = Attention("".join(order), sizes, blocks, conv, extra, softmax, normed)
    graph = trace(model, 16)
    expected = Operands(tuple(Part(*part) for part in model.parts), blocks)
    assert graph.operands["qkv.weight"] == graph.operands["qkv.bias"] == expected
    check(graph)
    # What is applied to one part only hangs on this part.
    untied = graph.untied
    real = untied.edges[untied.edges[:, 2] == 1, :2].tolist()
    for operand in normed:
        node = untied.names.index(f"norms.{operand}.weight")
        assert [untied.names[source] for source, target in real if target == node] == [f"qkv.bias[{operand}]"]


class Grouped(nn.Module):
    """Grouped-query attention: fewer heads of keys and values, each for several of the queries'."""

    def __init__(self, one_call: bool):
        super().__init__()
        self.one_call = one_call
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.qkv = nn.Linear(8, 8 + 2 + 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(x).flatten(2).mT).split([8, 2, 2], -1)
        q, k, v = (t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(4, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v) if self.one_call else (q @ k.mT).softmax(-1) @ v
        return y.transpose(1, 2).flatten(2).mean(1)


@pytest.mark.parametrize("one_call", [True, False])
def test_grouped_queries(one_call: bool) -> None:
    assert trace(Grouped(one_call), 16).operands["qkv.weight"].parts == (("q", 8), ("k", 2), ("v", 2))


def test_multihead_attention_with_keys_from_elsewhere() -> None:
    class Cross(nn.Module):
        """Queries from one map, keys and values from another: three slices of one parameter are applied apart."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(3, 8, 4, 4)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x).flatten(2).mT, self.b(x).flatten(2).mT
            y: Tensor = self.attention(a, b, b, need_weights=False)[0]
            return y.mean(1)

    graph = trace(Cross(), 16)
    for name in ("attention.in_proj_weight", "attention.in_proj_bias"):
        assert graph.operands[name].parts == (("q", 8), ("k", 8), ("v", 8))
    check(graph)


def test_regular() -> None:
    q, k, v, qkv = Part("q", 2), Part("k", 1), Part("v", 1), Part("qkv", 9)
    assert regular([q, k, v]) == Operands((q, k, v))
    assert regular([q, k] * 3) == Operands((q, k), 3)
    assert regular([q]) == Operands((q,))
    assert regular([q, k, Part("q", 3)]) is None
    assert regular([q, k, Part("q", 3), k]) is None
    assert regular([qkv]) is None
    assert regular([]) is None


def check(graph: ComputationGraph) -> None:
    """One graph from node 0, each parameter once, and merging the parts again gives the graph they were made from."""
    untied = graph.untied
    assert len(untied.names) == len(untied.ops) == len(untied.shapes)
    real = untied.edges[untied.edges[:, 2] == 1, :2].tolist()
    fed, feeding = {target for _, target in real}, {source for source, _ in real}
    for node, (op, name) in enumerate(zip(untied.ops, untied.names, strict=True)):
        assert node == 0 or op == "pos_enc" or node in fed
        assert "[" not in name or node in feeding
    before = dict(zip(graph.names, graph.shapes, strict=True))
    for name, operands in graph.operands.items():
        shapes = [untied.shapes[untied.names.index(part)] or () for part in operands.names(name)]
        whole = before[name]
        assert whole is not None
        assert sum(shape[0] for shape in shapes) == whole[0] and {shape[1:] for shape in shapes} == {whole[1:]}
    # Parts put together again, the edges are those of before; only rows without a bias go past those of others.
    origin = [name.partition("[")[0] for name in untied.names]
    old = Counter((graph.names[s], graph.names[t]) for s, t in graph.edges[graph.edges[:, 2] == 1, :2].tolist())
    new = Counter((origin[s], origin[t]) for s, t in real)
    partial_biases = {
        name
        for name, op in zip(graph.names, graph.ops, strict=True)
        if op == "bias" and name in graph.operands and len(graph.operands[name].parts) == 1
    }
    assert all(edge in new or partial_biases.intersection(edge) for edge in old)
    assert all(edge in old or edge[0] in graph.operands for edge in new)


@pytest.mark.parametrize(
    "name", ["test_vit", "beit_base_patch16_224", "mvitv2_tiny", "coat_lite_tiny", "efficientvit_b0", "botnet26t_256"]
)
def test_untied_graphs_of_real_models(name: str) -> None:
    with torch.device("meta"):
        graph = trace(timm.create_model(name))
    check(graph)
    again = ComputationGraph.from_dict(graph.to_dict())
    assert again.operands == graph.operands and again.readers == graph.readers
    assert torch.equal(again.untied.edges, graph.untied.edges) and again.untied.names == graph.untied.names


def test_biases_follow_the_rows_that_they_are_added_to() -> None:
    with torch.device("meta"):
        graph = trace(timm.create_model("beit_base_patch16_224")).untied
    names = graph.names
    real = graph.edges[graph.edges[:, 2] == 1, :2].tolist()
    behind = {
        operand: [names[t] for s, t in real if names[s] == f"blocks.0.attn.qkv.weight[{operand}]"] for operand in "qkv"
    }
    assert behind["q"] == ["blocks.0.attn.q_bias"] and behind["v"] == ["blocks.0.attn.v_bias"]
    (key_reader,) = behind["k"]
    assert graph.ops[names.index(key_reader, names.index("blocks.0.attn.qkv.weight[k]"))] == "msa"


# ---- prediction -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ghn() -> GHN:
    torch.manual_seed(0)
    return GHN(GHNConfig(10, split_attention=True, **SMALL)).eval()


@pytest.mark.parametrize("hypernet", ["gatedgnn", "graphormer", "mlp"])
def test_queries_keys_and_values_differ(hypernet: str) -> None:
    torch.manual_seed(0)
    config = GHNConfig(10, hypernet=hypernet, heads=4, **SMALL)
    model = timm.create_model("test_vit", num_classes=10)
    graph = trace(model)
    (tied,) = GHN(config)([graph])
    assert tied["blocks.0.attn.qkv.weight"].shape == (16, 16)
    (untied,) = GHN(dataclasses.replace(config, split_attention=True))([graph])
    width = model.embed_dim
    for kind in ("weight", "bias"):
        q, k, v = untied[f"blocks.0.attn.qkv.{kind}"].split(width)
        for a, b in ((q, k), (q, v), (k, v)):
            assert (a - b).abs().max() > 1e-4
        assert torch.equal(q[:16], q[16:32])  # a part is made of copies of its own tile


def test_so_do_separate_projections(ghn: GHN) -> None:
    with torch.device("meta"):
        graph = trace(timm.create_model("cait_xxs24_224", depth=1, num_classes=10))
    (tiles,) = ghn([graph])
    q, k, v = (tiles[f"blocks_token_only.0.attn.{operand}.weight"] for operand in "qkv")
    assert q.shape == (16, 16)
    assert min((a - b).abs().max() for a, b in ((q, k), (q, v), (k, v))) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "levit_128s", "beit_base_patch16_224", "efficientvit_b0"])
def test_every_parameter_is_predicted_once_and_scaled_as_before(ghn: GHN, name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    parameters, graph = dict(model.named_parameters()), trace(model)
    prediction = Predictor(ghn).from_graph(model, graph)
    tied = Predictor(GHN(dataclasses.replace(ghn.config, split_attention=False))).from_graph(model, graph)
    assert prediction.keys() == tied.keys()
    assert not any("[" in key for key in prediction)
    for key, tensor in prediction.tiles.items():
        assert tile(tensor, parameters[key].shape).shape == parameters[key].shape
        if key in graph.operands and len(graph.operands[key].parts) > 1:
            assert tensor.shape == (len(parameters[key]), *tied.tiles[key].shape[1:])  # still a tile along the inputs


def test_rows_in_blocks_come_together_in_the_parameters_order(ghn: GHN) -> None:
    with torch.device("meta"):
        graph = trace(timm.create_model("levit_128s", num_classes=10))
    name = "stages.0.blocks.0.attn.qkv.linear.weight"
    (tiles,) = ghn([graph])
    (parts,) = ghn([graph.untied])
    weight = tiles[name].unflatten(0, (graph.operands[name].blocks, -1))
    row = 0
    for part, key in zip(graph.operands[name].parts, graph.operands[name].names(name), strict=True):
        expected = tile(parts[key], (graph.operands[name].blocks * part.rows, parts[key].shape[1]))
        torch.testing.assert_close(weight[:, row : row + part.rows].flatten(0, 1), expected)
        row += part.rows


def test_in_a_batch_with_other_networks(ghn: GHN) -> None:
    graphs = [trace(timm.create_model(name, num_classes=10)) for name in ("test_resnet", "test_vit", "test_convnext")]
    together = ghn(graphs)
    for graph, tiles in zip(graphs, together, strict=True):
        (alone,) = ghn([graph])
        assert alone.keys() == tiles.keys()
        for name in alone:
            torch.testing.assert_close(alone[name], tiles[name])


def test_every_part_is_learned_from(ghn: GHN) -> None:
    graph = trace(timm.create_model("test_vit", num_classes=10))
    (tiles,) = ghn([graph])
    q, k, v = tiles["blocks.0.attn.qkv.weight"].chunk(3)
    gradients = [
        torch.autograd.grad(t.square().sum(), ghn.operand_embed.weight, retain_graph=True)[0] for t in (q, k, v)
    ]
    for operand, gradient in enumerate(gradients):
        assert gradient[operand].abs().sum() > 0


def test_published_configs_have_neither_the_field_nor_the_tensor() -> None:
    config = GHNConfig.from_dict({"num_classes": 10, "hypernet": "gatedgnn"})
    assert not config.split_attention
    assert not any("operand" in name for name in GHN.parameter_shapes(config))
    with pytest.raises(ValueError, match="split_attention"):
        GHNConfig(10, split_attention="yes")  # type: ignore[arg-type]
