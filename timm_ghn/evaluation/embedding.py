"""Networks as vectors: what a GHN knows of their graphs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial

import timm
import torch
from torch import Tensor, nn

from ..checkpoints.load import load_ghn
from ..errors import TraceError
from ..graph import ComputationGraph, trace
from ..graph.meta_copy import meta_copy
from ..hypernet import GHN
from ..lazy_init import on_meta
from ..plan import make_plan

_BATCH = 16


Network = str | nn.Module | ComputationGraph


def embed(models: Network | Iterable[Network], ghn: str | os.PathLike[str] | GHN = "ghn2") -> Tensor:
    """Embeds networks by a GHN: the mean of their nodes' states after message passing (arXiv 2110.13100, §4.3).

    Args:
        models: One or several: timm's names, of which no weights are made, modules, or what `trace` made of them.
        ghn: A loaded GHN, or whatever `load_ghn` takes.

    Returns:
        float32 [networks, d] on the CPU, d the GHN's `config.hid`.

    Raises:
        CheckpointError: If the GHN cannot be loaded.
        TraceError: If a model cannot be traced.
    """
    hypernet = ghn if isinstance(ghn, GHN) else load_ghn(ghn)
    if isinstance(models, Network):
        models = [models]
    graphs = [model if isinstance(model, ComputationGraph) else architecture_graph(model) for model in models]
    decoded = hypernet.decoder.decoded_shape
    # Networks of a size together: a batch takes as many steps of message passing as its largest one.
    order = sorted(range(len(graphs)), key=lambda index: len(graphs[index]))
    embeddings = torch.empty(len(graphs), hypernet.config.hid)
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        plans = [make_plan(graphs[row], hypernet.config, decoded) for row in rows]
        with torch.no_grad():
            states = hypernet.node_states(plans)
        parts = states.split([len(plan.graph) for plan in plans])
        embeddings[rows] = torch.stack([part.mean(0) for part in parts]).float().cpu()
    return embeddings


def architecture_graph(model: str | nn.Module) -> ComputationGraph:
    """The graph of a module, or of an architecture of timm's, of which no weights are made.

    Raises:
        TraceError: If it cannot be made or traced.
    """
    if isinstance(model, nn.Module):
        return trace(meta_copy(model))  # of which nothing is frozen: that has no node otherwise
    try:
        skeleton = on_meta(partial(timm.create_model, model))
    except Exception as error:  # whatever a model's code raises
        raise TraceError(f"timm cannot make {model!r}: {error}") from error
    return trace(skeleton)


def principal_plane(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates [n, 2] on the plane in which [n, d] vary most, and the share of the variance along each axis."""
    centred = (embeddings - embeddings.mean(0)).double()
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    coordinates = torch.zeros(len(embeddings), 2, dtype=torch.float64)
    shares = torch.zeros(2, dtype=torch.float64)
    found = min(2, len(values))
    coordinates[:, :found] = left[:, :found] * values[:found]
    shares[:found] = values[:found].square() / values.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return coordinates, shares
