"""The graph hypernetwork: computation graphs in, parameters out."""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ..assign import tile
from ..graph import PRIMITIVES, ComputationGraph, Kept
from ..graph.computation_graph import Operands
from ..graph.primitives import NORMS, Carries
from .config import GHNConfig
from .decoder import DECODERS
from .encoder import Shape4d, ShapeEncoder, is_grid_of_channels, shape_to_4d
from .message_passing import MAX_DEGREE, MAX_INPUT_DISTANCE, MLP, GatedGNN, Graphormer, NodeMLP

_OPERANDS = "qkv"
_PRIMITIVE_INDEX = {name: index for index, name in enumerate(PRIMITIVES)}


class GHN(
    nn.Module,
    ModelHubMixin,
    library_name="timm-ghn",
    tags=["graph-hypernetwork", "timm"],
    repo_url="https://github.com/timm-ghn/timm-ghn",
    license="apache-2.0",
):
    """GHN-1, GHN-2, GHN-3 and the MLP baseline, by config; module names are the published checkpoints' keys.

    `from_pretrained`, `save_pretrained` and `push_to_hub` are huggingface_hub's, with safetensors as the only format.
    """

    def __init__(self, config: GHNConfig):
        super().__init__()
        self.config = config
        hid = config.hid
        self.embed = nn.Embedding(len(PRIMITIVES), hid)
        self.shape_enc = ShapeEncoder(config)
        if config.split_attention:
            # The nodes of queries, keys and values have the same shape, the same sources and the same targets: without
            # a feature of their own they would have the same state and decode to the same weights.
            self.operand_embed = nn.Embedding(len(_OPERANDS), hid)
        self.gnn: GatedGNN | Graphormer | NodeMLP
        if config.hypernet == "graphormer":
            self.gnn = Graphormer(config)
            self.centrality_embed_in = nn.Embedding(MAX_DEGREE + 1, hid)
            self.centrality_embed_out = nn.Embedding(MAX_DEGREE + 1, hid)
            self.input_dist_embed = nn.Embedding(MAX_INPUT_DISTANCE + 1, hid)
        else:
            self.gnn = GatedGNN(config) if config.hypernet == "gatedgnn" else NodeMLP(config)
        if config.layernorm:
            self.ln = nn.LayerNorm(hid)
        self.decoder = DECODERS[config.decoder](config)
        self.decoder_1d = MLP(hid, 2 * hid, 2 * config.max_channels)
        self.bias_class = nn.Sequential(nn.ReLU(), nn.Linear(config.max_channels, config.num_classes))

    @classmethod
    def parameter_shapes(cls, config: GHNConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor a checkpoint of this config holds."""
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        config = self.config.to_dict()
        # The config travels inside the file as well, so that the file alone is a checkpoint.
        save_file(tensors, save_directory / "model.safetensors", metadata={"config": json.dumps(config)})
        (save_directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None, **_: Any) -> GHN:
        from ..hub import load_ghn  # the loader builds GHNs, so it cannot be imported above

        source = model_id if Path(model_id).exists() else f"hf-hub:{model_id}" + (f"@{revision}" if revision else "")
        return copy.deepcopy(load_ghn(source))  # the loader shares what it loaded

    def node_states(self, graphs: Sequence[ComputationGraph], predict_head: bool = True) -> torch.Tensor:
        """States [N, d] of all nodes of the graphs, one graph after the other, ready for the decoders."""
        device = self.embed.weight.device
        primitives = torch.tensor([_PRIMITIVE_INDEX[op] for graph in graphs for op in graph.ops])
        rows = torch.tensor([row for graph in graphs for row in self._shape_rows(graph, predict_head)])
        x = self.embed(primitives.to(device)) + self.shape_enc(rows.to(device))
        if self.config.split_attention:
            uses = torch.tensor([use for graph in graphs for use in _uses(graph)], dtype=x.dtype)
            x = x + uses.to(device) @ self.operand_embed.weight

        sizes = [len(graph) for graph in graphs]
        edges, offset = [], 0
        for graph, size in zip(graphs, sizes, strict=True):
            edges.append(graph.edges + graph.edges.new_tensor([offset, offset, 0]))
            offset += size
        if isinstance(self.gnn, Graphormer):
            centrality = (self.centrality_embed_in, self.centrality_embed_out, self.input_dist_embed)
            x = self.gnn(x, torch.cat(edges), sizes, centrality)
        else:
            x = self.gnn(x, torch.cat(edges), sizes)
        return self.ln(x) if self.config.layernorm else x

    def _shape_rows(self, graph: ComputationGraph, predict_head: bool) -> list[Shape4d]:
        head = set() if predict_head else set(graph.head)
        return [
            # A head that is left alone looks like one for the classes the GHN was trained on.
            self.shape_enc.rows((self.config.num_classes, *shape[1:]) if name in head and shape else shape)
            for name, shape in zip(graph.names, graph.shapes, strict=True)
        ]

    def forward(self, graphs: Sequence[ComputationGraph], predict_head: bool = True) -> list[dict[str, torch.Tensor]]:
        """Predicts the parameters of several networks at once.

        Args:
            graphs: The networks' computation graphs.
            predict_head: Whether to predict the classification layers; they come out with the checkpoint's classes.

        Returns:
            For each graph, parameter name to *tile*: a normalised tensor with the parameter's number of dimensions, as
            large as the parameter or, where the parameter exceeds `max_shape`, the part of which it is made of copies
            (`timm_ghn.assign.tile`). That of a fused projection that was predicted in parts has all rows. A norm's bias
            comes with its weight, whether or not the norm has one.
        """
        if not graphs:
            return []
        whole = graphs
        if self.config.split_attention:
            graphs = [graph.untied for graph in graphs]
        x = self.node_states(graphs, predict_head)
        vectors: list[tuple[int, int]] = []  # (graph, node) of norms and biases
        class_biases: list[tuple[int, int]] = []
        kernels: dict[Shape4d, list[tuple[int, int]]] = defaultdict(list)
        class_weights: dict[int, list[tuple[int, int]]] = defaultdict(list)
        starts = [0]
        for g, graph in enumerate(graphs):
            starts.append(starts[-1] + len(graph))
            for node, (op, name, shape) in enumerate(zip(graph.ops, graph.names, graph.shapes, strict=True)):
                carries = PRIMITIVES[op].carries
                if carries is Carries.NOTHING or shape is None or (name in graph.head and not predict_head):
                    continue
                if op in NORMS or op == "bias":
                    (class_biases if name in graph.head else vectors).append((g, node))
                elif name in graph.head:
                    class_weights[min(shape_to_4d(shape)[1], self.config.max_shape[1])].append((g, node))
                else:
                    kernels[self.decoder.decoded_shape(shape_to_4d(shape))].append((g, node))

        def states(nodes: list[tuple[int, int]]) -> torch.Tensor:
            return x[torch.tensor([starts[g] + node for g, node in nodes], device=x.device)]

        predicted = [self._constants(graph) for graph in graphs]
        if vectors:
            weights, biases = self._vectors(states(vectors))
            for (g, node), weight, bias in zip(vectors, weights.unbind(), biases.unbind(), strict=True):
                graph, name = graphs[g], graphs[g].names[node]
                size = math.prod(graph.shapes[node] or ())
                if graph.ops[node] == "bias":
                    predicted[g][name] = bias[:size]
                else:
                    predicted[g][name] = weight[:size]
                    predicted[g][f"{name.removesuffix('weight')}bias"] = bias[:size]
        if class_biases:
            biases = self.decoder_1d(states(class_biases)).view(-1, 2, self.config.max_channels)[:, 1]
            biases = self.bias_class(biases)
            for (g, node), bias in zip(class_biases, self._normalised_bias(biases).unbind(), strict=True):
                predicted[g][graphs[g].names[node]] = bias
        decoded = self.decoder([states(nodes) for nodes in kernels.values()], list(kernels)) if kernels else []
        for nodes, group in zip(kernels.values(), decoded, strict=True):
            for (g, node), kernel in zip(nodes, group.unbind(), strict=True):
                shape = graphs[g].shapes[node]
                assert shape is not None
                predicted[g][graphs[g].names[node]] = self._normalised_kernel(_as_parameter(kernel, shape), shape)
        for in_features, nodes in class_weights.items():
            weights = self.decoder.class_weight(states(nodes), in_features)
            for (g, node), weight in zip(nodes, weights.unbind(), strict=True):
                shape = graphs[g].shapes[node]
                assert shape is not None
                predicted[g][graphs[g].names[node]] = self._normalised_kernel(weight, shape)
        if self.config.split_attention:
            for graph, tiles in zip(whole, predicted, strict=True):
                for name, operands in graph.operands.items():
                    if len(operands.parts) > 1:
                        tiles[name] = _joined([tiles.pop(part) for part in operands.names(name)], operands)
        return predicted

    def _constants(self, graph: ComputationGraph) -> dict[str, torch.Tensor]:
        """Parameters without a node that all had one value while the GHN was trained."""
        trained = {Kept.BRANCH_SCALE: self.config.branch_scale, Kept.POSITION_BIAS: self.config.position_bias}
        values = {role: self.embed.weight.new_tensor(value) for role, value in trained.items() if value is not None}
        return {name: values[reason] for name, reason in graph.kept.items() if reason in values}

    def _vectors(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, biases = self.decoder_1d(x).view(-1, 2, self.config.max_channels).unbind(1)
        if self.config.weight_norm:
            weights = 2 * torch.sigmoid(0.5 * weights)
        return weights, self._normalised_bias(biases)

    def _normalised_bias(self, biases: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.2 * biases) if self.config.weight_norm else biases

    def _normalised_kernel(self, kernel: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Scales to the fan-in of the parameter, so that activations keep their variance (arXiv 2110.13100, §3.2.3)."""
        if not self.config.weight_norm or (len(shape) > 2 and shape[0] == 1 and shape[2] >= 11):
            return kernel  # position embeddings are not products with anything
        linear = len(shape) > 2 and (shape[1] == 1 or (len(shape) > 3 and shape[2] < shape[3]))
        return kernel * math.sqrt((1 if linear else 2) / math.prod(shape[1:]))


def _uses(graph: ComputationGraph) -> list[list[bool]]:
    """For each node, which of an attention's operands its parameter makes."""
    used = {name: use.parts[0].operand for name, use in graph.operands.items() if len(use.parts) == 1}
    return [[operand in used.get(name, "") for operand in _OPERANDS] for name in graph.names]


def _joined(parts: list[torch.Tensor], operands: Operands) -> torch.Tensor:
    """The tiles of a parameter's parts as one tile, with all rows; the other dimensions are still the tiles'."""
    blocks = [
        tile(rows, (operands.blocks * part.rows, *rows.shape[1:])).unflatten(0, (operands.blocks, part.rows))
        for rows, part in zip(parts, operands.parts, strict=True)
    ]
    return torch.cat(blocks, dim=1).flatten(0, 1)


def _as_parameter(kernel: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A decoded kernel [out, in, h, w] in the parameter's own number of dimensions.

    Spatial sizes are always the parameter's: a kernel larger than the decoder's largest is resized bilinearly, as
    GHN-3 does with position embeddings.
    """
    target = shape_to_4d(shape)
    if kernel.shape[2:] != target[2:]:
        kernel = F.interpolate(kernel, target[2:], mode="bilinear")
    if len(shape) == 4:
        return kernel.permute(0, 2, 3, 1) if is_grid_of_channels(shape) else kernel
    if len(shape) < 3:
        return kernel[..., 0, 0] if len(shape) == 2 else kernel[:, 0, 0, 0]
    if len(shape) == 3:
        if shape[0] == 1 and min(shape[1:]) > 1:  # a position embedding: channels last
            table = kernel.flatten(2).transpose(1, 2)
            return F.pad(table, (0, 0, shape[1] - table.shape[1], 0))  # class tokens come first and have no position
        return kernel[..., 0]
    middle = (1,) * (len(shape) - 4)
    return kernel.view(*kernel.shape[:2], *middle, *kernel.shape[2:])
