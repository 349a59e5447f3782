"""The three ways a GHN lets nodes talk to each other: GatedGNN (GHN-1, GHN-2), Graphormer (GHN-3), or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import Topology, edge_bias, gated_gnn

if TYPE_CHECKING:
    from .config import GHNConfig

MAX_DEGREE = 100
MAX_INPUT_DISTANCE = 1000
NUM_DISTANCES = 257  # distances 0…254, shifted by 2 in the published checkpoints


class MLP(nn.Module):
    """Two linear layers with a ReLU between, and one after if `last_relu`."""

    def __init__(self, features: int, hidden: int, out: int, last_relu: bool = False):
        super().__init__()
        layers = [nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, out)]
        self.fc = nn.Sequential(*layers, *([nn.ReLU()] if last_relu else []))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.fc(x)
        return output

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weight and bias of the first layer, then of the second."""
        first, second = cast(nn.Linear, self.fc[0]), cast(nn.Linear, self.fc[2])
        return first.weight, first.bias, second.weight, second.bias


class MessagePassing(nn.Module):
    """A way for nodes to talk to each other.

    Attributes:
        node_embeddings: The embeddings of a node's place in the graph that it adds to the states, by the names that the
            published checkpoints have for them, with the largest index of each.
        centred: Whether it goes with kernels that are read from the centre of the largest one, as in GHN-3, instead of
            the top-left corner.
        sums_many: Whether its states are sums over many embeddings and layers, so that with torch's initial values the
            first predictions are too large for networks without norms.
        single_precision: Whether it computes in float32 only.
        own_fields: The fields of a config that only it reads.
    """

    node_embeddings: ClassVar[dict[str, int]] = {}
    centred: ClassVar[bool] = False
    sums_many: ClassVar[bool] = False
    single_precision: ClassVar[bool] = False
    own_fields: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def check(cls, config: GHNConfig) -> None:
        """Raises ValueError if it cannot be built by a config."""

    @classmethod
    def implied(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
        """What the shapes of a checkpoint's tensors say of its fields of the config; None if they are not its own."""
        raise NotImplementedError

    def forward(
        self, x: torch.Tensor, edges: torch.Tensor, sizes: list[int], embeddings: Sequence[nn.Embedding]
    ) -> torch.Tensor:
        """[N, d] states and int64 [E, 3] edges of the whole batch to updated [N, d] states.

        Args:
            x: The states.
            edges: (source, target, distance).
            sizes: Nodes of each graph.
            embeddings: Those of `node_embeddings`.
        """
        raise NotImplementedError


class GatedGNN(MessagePassing):
    """One round of gated message passing along the graph and back (arXiv 1810.05749 eq. 3; 2110.13100 eq. 4)."""

    single_precision = True

    @classmethod
    def implied(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
        """What the shapes of a checkpoint's tensors say of its fields of the config; None if they are not its own."""
        return {"ve": "gnn.mlp_ve.fc.0.weight" in shapes} if "gnn.gru.weight_ih" in shapes else None

    def __init__(self, config: GHNConfig):
        super().__init__()
        hid = config.hid
        hidden = hid // 2 if config.ve else hid
        self.mlp = MLP(hid, hidden, hid, last_relu=True)
        self.mlp_ve = MLP(hid, hidden, hid, last_relu=True) if config.ve else None
        self.gru = nn.GRUCell(hid, hid)

    def forward(
        self, x: torch.Tensor, edges: torch.Tensor, sizes: list[int], embeddings: Sequence[nn.Embedding]
    ) -> torch.Tensor:
        """[N, d] states and int64 [E, 3] edges of the whole batch to updated [N, d] states."""
        topology = Topology.from_edges(edges, sizes).to(x.device)
        gru = self.gru
        gates = (gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh)
        if self.mlp_ve is None:
            return gated_gnn(x, topology, *self.mlp.tensors(), None, None, None, None, *gates)
        return gated_gnn(x, topology, *self.mlp.tensors(), *self.mlp_ve.tensors(), *gates)


class NodeMLP(MessagePassing):
    """The MLP baseline: every node on its own (arXiv 2110.13100, §5)."""

    @classmethod
    def implied(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
        """What the shapes of a checkpoint's tensors say of its fields of the config; None if they are not its own."""
        return {} if "gnn.fc.0.weight" in shapes else None

    def __init__(self, config: GHNConfig):
        super().__init__()
        self.fc = MLP(config.hid, config.hid, config.hid, last_relu=True).fc

    def forward(
        self, x: torch.Tensor, edges: torch.Tensor, sizes: list[int], embeddings: Sequence[nn.Embedding]
    ) -> torch.Tensor:
        """[N, d] to [N, d]; the graphs are not looked at."""
        output: torch.Tensor = self.fc(x)
        return output


class Attention(nn.Module):
    """Self-attention over the nodes of a graph, with a bias per head and ordered pair of nodes."""

    def __init__(self, dim: int, heads: int, edges: bool):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        if edges:  # the first layer's bias serves all layers
            self.edge_embed = nn.ModuleDict({"embed": nn.Embedding(NUM_DISTANCES, dim)})
            self.proj_e = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, heads))

    def edge_bias(self, distances: torch.Tensor) -> torch.Tensor:
        """int64 [B, N, N] distances to a [B, heads, N, N] bias."""
        embed = cast(nn.Embedding, self.edge_embed["embed"])
        first, second = cast(nn.Linear, self.proj_e[0]), cast(nn.Linear, self.proj_e[2])
        return edge_bias(distances, embed.weight, first.weight, first.bias, second.weight, second.bias)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """[B, N, d] and [B, heads, N, N] to [B, N, d]."""
        batch, nodes, dim = x.shape
        q, k, v = self.to_qkv(x).view(batch, nodes, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        output: torch.Tensor = self.to_out(x.transpose(1, 2).reshape(batch, nodes, dim))
        return output


class GraphormerLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, dim: int, heads: int, edges: bool):
        super().__init__()
        self.ln1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, edges)
        self.ln2 = nn.LayerNorm(dim)
        # Published key names leave room for a dropout between the activation and the second layer.
        self.ff = nn.ModuleDict(
            {"net": nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Identity(), nn.Linear(4 * dim, dim))}
        )

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """[B, N, d] and [B, heads, N, N] to [B, N, d]."""
        x = x + self.attn(self.ln1(x), bias)
        output: torch.Tensor = x + self.ff["net"](self.ln2(x))
        return output


class Graphormer(nn.ModuleList, MessagePassing):
    """GHN-3's message passing (arXiv 2303.04143, §3.1)."""

    node_embeddings: ClassVar[dict[str, int]] = {
        "centrality_embed_in": MAX_DEGREE,
        "centrality_embed_out": MAX_DEGREE,
        "input_dist_embed": MAX_INPUT_DISTANCE,
    }
    centred = True
    sums_many = True
    own_fields = ("heads", "layers")

    @classmethod
    def check(cls, config: GHNConfig) -> None:
        """Raises ValueError if it cannot be built by a config."""
        if config.hid % config.heads:
            raise ValueError(f"GHN config: hid={config.hid} must be a multiple of heads={config.heads}.")

    @classmethod
    def implied(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
        """What the shapes of a checkpoint's tensors say of its fields of the config; None if they are not its own."""
        if "gnn.0.attn.to_qkv.weight" not in shapes:
            return None
        layers = sum(bool(re.fullmatch(r"gnn\.\d+\.ln1\.weight", name)) for name in shapes)
        return {"layers": layers, "heads": shapes["gnn.0.attn.proj_e.2.weight"][0]}

    def __init__(self, config: GHNConfig):
        super().__init__(GraphormerLayer(config.hid, config.heads, edges=i == 0) for i in range(config.layers))

    def forward(
        self, x: torch.Tensor, edges: torch.Tensor, sizes: list[int], embeddings: Sequence[nn.Embedding]
    ) -> torch.Tensor:
        """[N, d] states and int64 [E, 3] edges of the whole batch to updated [N, d] states."""
        batch, width = len(sizes), max(sizes)
        starts = torch.tensor([0, *sizes[:-1]], device=x.device).cumsum(0)
        counts = torch.tensor(sizes, device=x.device)
        graph = torch.repeat_interleave(torch.arange(batch, device=x.device), counts)
        local = torch.arange(len(x), device=x.device) - starts[graph]

        distances = torch.zeros(batch, width, width, dtype=torch.int64, device=x.device)
        source, target, distance = edges.to(x.device).unbind(1)
        distances[graph[source], local[source], local[target]] = distance
        neighbours = distances == 1
        indices = (neighbours.sum(1), neighbours.sum(2), distances[:, 0])

        padded = x.new_zeros(batch, width, x.shape[1])
        padded[graph, local] = x
        for embed, index in zip(embeddings, indices, strict=True):
            padded = padded + embed(index.clamp(max=embed.num_embeddings - 1))

        bias = cast(GraphormerLayer, self[0]).attn.edge_bias(distances)
        padding = torch.arange(width, device=x.device) >= counts[:, None]
        bias = bias.masked_fill(padding[:, None, None, :], -torch.inf)
        for layer in self:
            padded = layer(padded, bias)
        return padded[graph, local]


HYPERNETS: dict[str, type[MessagePassing]] = {"gatedgnn": GatedGNN, "graphormer": Graphormer, "mlp": NodeMLP}
