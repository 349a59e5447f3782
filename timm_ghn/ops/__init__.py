"""The accelerated graph layer: GHN-2's message passing and GHN-3's edge bias, each beside its plain reference."""

from __future__ import annotations

from timm_ghn.ops.edge_bias import edge_bias as edge_bias
from timm_ghn.ops.gated_gnn import gated_gnn as gated_gnn
from timm_ghn.ops.topology import Topology as Topology
