"""From an `nn.Module` to the computation graph a GHN reads."""

from .computation_graph import PRIMITIVES, ComputationGraph
from .trace import trace

__all__ = ["PRIMITIVES", "ComputationGraph", "trace"]
