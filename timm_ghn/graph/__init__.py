"""From an `nn.Module` to the computation graph a GHN reads."""

from .computation_graph import ComputationGraph
from .kept import Kept
from .primitives import PRIMITIVES
from .trace import trace

__all__ = ["PRIMITIVES", "ComputationGraph", "Kept", "trace"]
