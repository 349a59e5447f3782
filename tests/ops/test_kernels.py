"""The Triton kernels: through the interpreter, through the compiler, and what happens without them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_cases import batch, layer_weights, several_sinks, states

from timm_ghn.ops import portable
from timm_ghn.ops.portable import Weights
from timm_ghn.ops.topology import Topology

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_interpreted_or_on_the_gpu() -> None:
    pytest.importorskip("triton")
    interpret = "0" if torch.cuda.is_available() else "1"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS / "ops_kernels_cases.py"],
        cwd=TESTS.parents[1],
        env={**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("direction", ["_forward", "_backward"])
def test_compiles_for_a_gpu(direction: str, resident: bool) -> None:
    """The interpreter accepts code that the compiler does not, and the compiler needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from timm_ghn.ops import kernels

    kernel = getattr(kernels, direction)
    constants = {"D": 32, "H": 32, "E": 64, "RESIDENT": resident}
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(kernels._TOPOLOGY, "*i64")
    types |= {"d": "i32", "hidden_width": "i32"} | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 80, 32))
    assert ".target sm_80" in compiled.asm["ptx"]


def test_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    op = sys.modules["timm_ghn.ops.gated_gnn"]
    monkeypatch.setattr(op, "_fused_works", True)
    monkeypatch.setitem(sys.modules, "timm_ghn.ops.kernels", None)
    monkeypatch.delattr("timm_ghn.ops.kernels", raising=False)
    edges, sizes = batch([several_sinks()])
    arguments = (
        states(sum(sizes), 4).detach(),
        Topology.from_edges(edges, sizes),
        Weights(*(w.detach() for w in layer_weights(4))),
    )
    expected, _ = portable.forward(*arguments)
    with caplog.at_level(logging.WARNING, "timm_ghn.ops"):
        for _ in range(2):
            actual, _ = op._fused_or_portable("forward", *arguments)
            assert torch.equal(actual, expected)
    assert len(caplog.records) == 1
    assert "portable implementation" in caplog.text
