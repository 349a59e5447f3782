"""The published code's graphs and predictions, reproduced: `tests/data/golden` was made with it, on random weights."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision

from timm_ghn.checkpoints.load import load_ghn
from timm_ghn.graph import ComputationGraph, trace
from timm_ghn.hypernet.config import PUBLISHED_PRIMITIVES
from timm_ghn.prediction import Prediction
from timm_ghn.predictor import predict

GOLDEN = Path(__file__).parent / "data" / "golden"
ARCHITECTURES = sorted(path.name.removesuffix(".json.gz") for path in GOLDEN.glob("*.json.gz"))


@cache
def golden(architecture: str) -> dict[str, Any]:
    graph: dict[str, Any] = json.loads(gzip.decompress((GOLDEN / f"{architecture}.json.gz").read_bytes()))
    return graph


def build(architecture: str) -> Any:
    source, name = architecture.split("-", 1)
    with torch.device("meta"):
        return timm.create_model(name) if source == "timm" else getattr(torchvision.models, name)()


def labelled_edges(nodes: list[Any], edges: list[list[int]]) -> Counter[tuple[str, str, int]]:
    """Every edge as (source, target, distance), a node being what it is and all that comes before and after it."""
    labels = [repr((op, name, None if shape is None else tuple(shape))) for op, name, shape in nodes]
    around: list[list[str]] = []
    for direction in (0, 1):
        neighbours: list[list[int]] = [[] for _ in nodes]
        for edge in edges:
            if edge[2] == 1:
                neighbours[edge[1 - direction]].append(edge[direction])
        seen = list(labels)
        for node in range(len(nodes)) if direction == 0 else reversed(range(len(nodes))):
            text = labels[node] + "".join(sorted(seen[neighbour] for neighbour in neighbours[node]))
            seen[node] = hashlib.sha256(text.encode()).hexdigest()
        around.append(seen)
    keys = ["".join(pair) for pair in zip(*around, strict=True)]
    return Counter((keys[source], keys[target], distance) for source, target, distance in edges)


def assert_same_graph(graph: ComputationGraph, expected: dict[str, Any]) -> None:
    nodes = [list(node) for node in zip(graph.ops, graph.names, graph.shapes, strict=True)]
    assert len(nodes) == len(expected["nodes"])
    assert labelled_edges(nodes, graph.edges.tolist()) == labelled_edges(expected["nodes"], expected["edges"])


def assert_same_predictions(prediction: Prediction, expected: dict[str, Any]) -> None:
    assert {name for name, values in expected.items() if values is None} == set(prediction.report.kept)
    assert {name for name, values in expected.items() if values is not None} == set(prediction)
    for name, tensor in prediction.items():
        values = expected[name]
        assert list(tensor.shape) == values["shape"], name
        norm = torch.linalg.vector_norm(tensor, dtype=torch.float64)  # float32 is too coarse for 100 M squares
        assert float(norm) == pytest.approx(values["norm"], rel=1e-4), name
        flat = tensor.flatten()
        torch.testing.assert_close(flat[: len(values["head"])], torch.tensor(values["head"]), atol=1e-5, rtol=0)
        torch.testing.assert_close(flat[-len(values["tail"]) :], torch.tensor(values["tail"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_graph(architecture: str) -> None:
    graph = trace(build(architecture), (3, 224, 224)).within(PUBLISHED_PRIMITIVES)
    assert_same_graph(graph, golden(architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ghn2(architecture: str) -> None:
    prediction = predict(build(architecture), load_ghn(GOLDEN / "ghn2.safetensors"))
    assert_same_predictions(prediction, golden(architecture)["predictions"]["ghn2"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ghn3(architecture: str, shared: Path) -> None:
    prediction = predict(build(architecture), load_ghn(shared / "golden" / "ghn3.safetensors"))
    assert_same_predictions(prediction, golden(architecture)["predictions"]["ghn3"])
