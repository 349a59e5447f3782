"""The graph hypernetwork: computation graphs in, parameters out."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from huggingface_hub import ModelHubMixin
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ..graph import ComputationGraph
from ..graph.computation_graph import Operands
from ..plan import Layout, Plan, Role, Shape4d, Target, make_plan, shape_to_4d
from ..tiling import tile
from .config import GHNConfig
from .decoders import DECODERS
from .encoder import ShapeEncoder
from .experts import kind_of
from .message_passing import HYPERNETS, MLP
from .tasks import TaskModulation

_OPERANDS = "qkv"


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

    loader: ClassVar[Callable[[str], GHN]]
    """What `from_pretrained` reads with: `timm_ghn.load_ghn`, set where that is defined, on top of this class."""

    def __init__(self, config: GHNConfig):
        super().__init__()
        self.config = config
        hid = config.hid
        self.embed = nn.Embedding(len(config.primitives), hid)
        self.shape_enc = ShapeEncoder(config)
        if config.split_attention:
            # The nodes of queries, keys and values have the same shape, the same sources and the same targets: without
            # a feature of their own they would have the same state and decode to the same weights.
            self.operand_embed = nn.Embedding(len(_OPERANDS), hid)
        self.gnn = HYPERNETS[config.hypernet](config)
        for name, largest in self.gnn.node_embeddings.items():
            self.add_module(name, nn.Embedding(largest + 1, hid))
        if config.layernorm:
            self.ln = nn.LayerNorm(hid)
        self.decoder = DECODERS[config.decoder](config)
        self.decoder_1d = MLP(hid, 2 * hid, 2 * config.max_channels)
        if config.predicts_head:
            self.bias_class = nn.Sequential(nn.ReLU(), nn.Linear(config.max_channels, config.num_classes))
        if config.conditioned:
            self.modulation = TaskModulation(hid)
        if config.experts:
            self.experts = nn.ModuleDict({kind: GHN(config.without_experts) for kind in config.experts})

    @classmethod
    def of(cls, config: GHNConfig, tensors: Mapping[str, torch.Tensor]) -> GHN:
        """A GHN in eval mode with these tensors, which are those of `parameter_shapes`, as its parameters."""
        # On meta nothing is initialised only to be overwritten, and the caller's random state is left alone.
        with torch.device("meta"):
            ghn = cls(config)
        # Not by load_state_dict, which registers parameters: where those are made without memory for their values
        # (accelerate's init_empty_weights), it is that function which is replaced.
        for name, tensor in tensors.items():
            prefix, _, attribute = name.rpartition(".")
            ghn.get_submodule(prefix)._parameters[attribute] = nn.Parameter(tensor)
        return ghn.eval()

    def alone(self, kind: str | None = None) -> GHN:
        """The GHN that predicts a kind of networks, see `GHNConfig.experts`, or without a kind all others.

        Raises:
            ValueError: If this one has no expert for the kind.
        """
        if kind not in (None, *self.config.experts):
            raise ValueError(f"This GHN has no expert for {kind!r}; it has {', '.join(self.config.experts) or 'none'}.")
        whole = self.experts[kind] if kind else self
        tensors = {name: x.clone() for name, x in whole.state_dict().items() if not name.startswith("experts.")}
        return GHN.of(self.config.without_experts, tensors)

    def with_experts(self, experts: Mapping[str, GHN]) -> GHN:
        """A GHN that leaves kinds of networks to others.

        Args:
            experts: By kind, see `GHNConfig.experts`; they take the place of those that this GHN has.

        Raises:
            ValueError: If there is no such kind, or an expert's config is not this one's.
        """
        general = self.alone()
        experts = {**{kind: self.alone(kind) for kind in self.config.experts}, **experts}
        for kind, expert in experts.items():
            if expert.config != general.config:
                theirs = expert.config.to_dict()
                differing = [name for name, value in general.config.to_dict().items() if theirs.get(name) != value]
                raise ValueError(
                    f"The expert for {kind} differs from this GHN in {', '.join(differing) or 'experts'}; both must "
                    "have one config."
                )
        tensors = general.state_dict()
        for kind, expert in experts.items():
            tensors |= {f"experts.{kind}.{name}": tensor for name, tensor in expert.state_dict().items()}
        whole = dataclasses.replace(general.config, experts=tuple(sorted(experts)))
        return GHN.of(whole, {name: tensor.clone() for name, tensor in tensors.items()})

    @classmethod
    def parameter_shapes(cls, config: GHNConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor a checkpoint of this config holds."""
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}

    def fingerprint(self) -> str:
        """A hash of all that predictions depend on, wherever the GHN was loaded from; sha256 in hexadecimal digits."""
        config = dataclasses.replace(self.config, images=None)
        digest = hashlib.sha256(json.dumps(config.to_dict()).encode())
        for tensor in self.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def _save_pretrained(self, save_directory: Path) -> None:
        # Half the bytes of each of several GHNs; what is predicted is off by less than 0.1 % of its norm.
        dtype = torch.float16 if self.config.experts else torch.float32
        tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        config = self.config.to_dict()
        # The config travels inside the file as well, so that the file alone is a checkpoint.
        save_file(tensors, save_directory / "model.safetensors", metadata={"config": json.dumps(config)})
        (save_directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None, **options: Any) -> GHN:
        if asked := [name for name, value in options.items() if value and name != "config"]:
            raise TypeError(
                f"GHN.from_pretrained takes no {', '.join(asked)}: downloads go by huggingface_hub's settings, such as "
                "HF_TOKEN, HF_HUB_CACHE and HF_HUB_OFFLINE, and a GHN is moved by its `to`."
            )
        source = model_id if Path(model_id).exists() else f"hf-hub:{model_id}" + (f"@{revision}" if revision else "")
        return copy.deepcopy(cls.loader(source))  # the loader shares what it loaded

    def forward(
        self,
        graphs: Sequence[ComputationGraph],
        predict_head: bool = True,
        tasks: Sequence[torch.Tensor | None] | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Predicts the parameters of several networks at once.

        Args:
            graphs: The networks' computation graphs.
            predict_head: Whether to predict the classification layers; they come out with the checkpoint's classes.
                A GHN without such weights never does.
            tasks: For a conditioned GHN, the `sketch` of each network's task, or None where none is known.

        Returns:
            For each graph, parameter name to *tile*: a normalised tensor with the parameter's number of dimensions, as
            large as the parameter or, where the parameter exceeds `max_shape`, the part of which it is made of copies
            (`timm_ghn.tiling.tile`). That of a fused projection that was predicted in parts has all rows. A norm's bias
            comes with its weight, whether or not the norm has one.
        """
        if not graphs:
            return []
        kinds = [kind_of(graph, self.config.experts) for graph in graphs]
        if any(kinds):
            return self._by_experts(kinds, graphs, predict_head, tasks or [None] * len(graphs))
        predict_head = predict_head and self.config.predicts_head
        plans = [make_plan(graph, self.config, self.decoder.decoded_shape, predict_head) for graph in graphs]
        states = self.node_states(plans)
        if self.config.conditioned and tasks is not None:
            states = self.modulation(states, [len(plan.graph) for plan in plans], tasks)
        jobs = _Jobs(plans)
        tiles: list[dict[str, torch.Tensor]] = [{} for _ in plans]
        for predicted in (
            self._constants(jobs),
            self._vectors(jobs, states),
            self._class_biases(jobs, states),
            self._kernels(jobs, states),
            self._class_weights(jobs, states),
        ):
            for job, tile_of_it in predicted:
                tiles[job.network][job.target.name] = tile_of_it
        return [_with_joined_parts(found, plan.whole) for found, plan in zip(tiles, plans, strict=True)]

    def _by_experts(
        self,
        kinds: Sequence[str | None],
        graphs: Sequence[ComputationGraph],
        predict_head: bool,
        tasks: Sequence[torch.Tensor | None],
    ) -> list[dict[str, torch.Tensor]]:
        """`forward`, where some of the networks have experts."""
        tiles: list[dict[str, torch.Tensor]] = [{} for _ in graphs]
        for kind in dict.fromkeys(kinds):
            ghn = cast(GHN, self.experts[kind]) if kind else self
            places = [place for place, of in enumerate(kinds) if of == kind]
            found = ghn([graphs[place] for place in places], predict_head, [tasks[place] for place in places])
            for place, predicted in zip(places, found, strict=True):
                tiles[place] = predicted
        return tiles

    def node_states(self, plans: Sequence[Plan]) -> torch.Tensor:
        """States [N, d] of all nodes of the graphs, one graph after the other, ready for the decoders.

        They are this GHN's own also where it has experts, so that those of all networks can be compared.
        """
        device = self.embed.weight.device
        row = {name: index for index, name in enumerate(self.config.primitives)}
        primitives = torch.tensor([row[op] for plan in plans for op in plan.graph.ops])
        shapes = torch.tensor([self.shape_enc.rows(shape) for plan in plans for shape in plan.shapes])
        x: torch.Tensor = self.embed(primitives.to(device)) + self.shape_enc(shapes.to(device))
        if self.config.split_attention:
            uses = torch.tensor([use for plan in plans for use in _uses(plan.graph)], dtype=x.dtype)
            x = x + uses.to(device) @ self.operand_embed.weight

        sizes = [len(plan.graph) for plan in plans]
        edges, offset = [], 0
        for plan, size in zip(plans, sizes, strict=True):
            edges.append(plan.graph.edges + plan.graph.edges.new_tensor([offset, offset, 0]))
            offset += size
        embeddings = [cast(nn.Embedding, self.get_submodule(name)) for name in self.gnn.node_embeddings]
        x = self.gnn(x, torch.cat(edges), sizes, embeddings)
        return self.ln(x) if self.config.layernorm else x

    def _constants(self, jobs: _Jobs) -> Predictions:
        for job in jobs.of(Role.CONSTANT):
            yield job, self.embed.weight.new_tensor(job.target.gain)

    def _vectors(self, jobs: _Jobs, states: torch.Tensor) -> Predictions:
        """Norms, whose weight and bias come from one node, and biases."""
        wanted = jobs.of(Role.BIAS, Role.NORM_WEIGHT, Role.NORM_BIAS)
        if not wanted:
            return
        place = {row: index for index, row in enumerate(dict.fromkeys(job.row for job in wanted))}
        weights, biases = self._decoded_vectors(states[torch.tensor(list(place), device=states.device)]).unbind(1)
        if self.config.weight_norm:
            weights = 2 * torch.sigmoid(0.5 * weights)
        rows = {True: weights.unbind(), False: self._squashed(biases).unbind()}
        for job in wanted:
            vector = rows[job.target.role is Role.NORM_WEIGHT][place[job.row]]
            yield job, vector[: job.target.decoded[0]]

    def _class_biases(self, jobs: _Jobs, states: torch.Tensor) -> Predictions:
        if wanted := jobs.of(Role.CLASS_BIAS):
            biases = self.bias_class(self._decoded_vectors(_states(states, wanted))[:, 1])
            yield from zip(wanted, self._squashed(biases).unbind(), strict=True)

    def _kernels(self, jobs: _Jobs, states: torch.Tensor) -> Predictions:
        groups = _grouped(jobs.of(Role.WEIGHT, Role.POSITIONS))
        if not groups:
            return
        decoded = self.decoder([_states(states, group) for group in groups.values()], list(groups))
        for group, kernels in zip(groups.values(), decoded, strict=True):
            for job, kernel in zip(group, kernels.unbind(), strict=True):
                yield job, _scaled(_as_parameter(kernel, job.target), job.target)

    def _class_weights(self, jobs: _Jobs, states: torch.Tensor) -> Predictions:
        for (_, in_features, *_), group in _grouped(jobs.of(Role.CLASS_WEIGHT)).items():
            weights = self.decoder.class_weight(_states(states, group), in_features)
            for job, weight in zip(group, weights.unbind(), strict=True):
                yield job, _scaled(weight, job.target)

    def _decoded_vectors(self, states: torch.Tensor) -> torch.Tensor:
        """States [n, d] to [n, 2, max_channels]: a weight and a bias."""
        vectors: torch.Tensor = self.decoder_1d(states)
        return vectors.view(-1, 2, self.config.max_channels)

    def _squashed(self, biases: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.2 * biases) if self.config.weight_norm else biases


class _Job(NamedTuple):
    """A target of one of several networks, with the row of the states that it is decoded from."""

    network: int
    row: int
    target: Target


Predictions = Iterator[tuple[_Job, torch.Tensor]]


class _Jobs:
    """The targets of several networks, network by network."""

    def __init__(self, plans: Sequence[Plan]):
        self._all: list[_Job] = []
        start = 0
        for network, plan in enumerate(plans):
            self._all += [_Job(network, start + (target.node or 0), target) for target in plan.targets]
            start += len(plan.graph)

    def of(self, *roles: Role) -> list[_Job]:
        return [job for job in self._all if job.target.role in roles]


def _grouped(jobs: Iterable[_Job]) -> dict[Shape4d, list[_Job]]:
    """By what is decoded."""
    groups: dict[Shape4d, list[_Job]] = defaultdict(list)
    for job in jobs:
        groups[job.target.decoded].append(job)
    return groups


def _states(states: torch.Tensor, jobs: list[_Job]) -> torch.Tensor:
    return states[torch.tensor([job.row for job in jobs], device=states.device)]


def _scaled(kernel: torch.Tensor, target: Target) -> torch.Tensor:
    return kernel if target.gain == 1 else kernel * target.gain


def _uses(graph: ComputationGraph) -> list[list[bool]]:
    """For each node, which of an attention's operands its parameter makes."""
    used = {name: use.parts[0].operand for name, use in graph.operands.items() if len(use.parts) == 1}
    return [[operand in used.get(name, "") for operand in _OPERANDS] for name in graph.names]


def _with_joined_parts(tiles: dict[str, torch.Tensor], whole: Mapping[str, Operands]) -> dict[str, torch.Tensor]:
    """Tiles of parameters, where some are those of their parts."""
    for name, operands in whole.items():
        tiles[name] = _joined([tiles.pop(part) for part in operands.names(name)], operands)
    return tiles


def _joined(parts: list[torch.Tensor], operands: Operands) -> torch.Tensor:
    """The tiles of a parameter's parts as one tile, with all rows; the other dimensions are still the tiles'."""
    blocks = [
        tile(rows, (operands.blocks * part.rows, *rows.shape[1:])).unflatten(0, (operands.blocks, part.rows))
        for rows, part in zip(parts, operands.parts, strict=True)
    ]
    return torch.cat(blocks, dim=1).flatten(0, 1)


def _as_parameter(kernel: torch.Tensor, target: Target) -> torch.Tensor:
    """A decoded kernel [out, in, h, w] in the parameter's own dimensions.

    Spatial sizes are always the parameter's: a kernel larger than the decoder's largest is resized bilinearly, as
    GHN-3 does with position embeddings.
    """
    size = shape_to_4d(target.shape)[2:]
    if kernel.shape[2:] != size:
        kernel = F.interpolate(kernel, size, mode="bilinear")
    if target.layout is Layout.KERNEL:
        return kernel
    if target.layout is Layout.MATRIX:
        return kernel[..., 0, 0]
    if target.layout is Layout.VECTOR:
        return kernel[:, 0, 0, 0]
    if target.layout is Layout.SEQUENCE:
        return kernel[..., 0]
    if target.layout is Layout.GRID:
        return kernel.permute(0, 2, 3, 1)
    if target.layout is Layout.TOKENS:
        table = kernel.flatten(2).transpose(1, 2)
        return F.pad(table, (0, 0, target.shape[1] - table.shape[1], 0))  # class tokens come first, without a position
    middle = (1,) * (len(target.shape) - 4)
    return kernel.view(*kernel.shape[:2], *middle, *kernel.shape[2:])
