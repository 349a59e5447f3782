"""GHN-3's attention bias per head and pair of nodes (arXiv 2303.04143), from the distances between the two.

In a DAG at most one of two nodes reaches the other, so a pair of distances is one of 2 * MAX_DISTANCE + 1. The bias is
computed for those alone and looked up: nothing of size N x N x d is ever made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ghn.graph.shortest_paths import MAX_DISTANCE

_FIRST_ROW = 2  # the embedding's row of distance 0


def edge_bias(
    distance: Tensor, embedding: Tensor, proj0_w: Tensor, proj0_b: Tensor, proj2_w: Tensor, proj2_b: Tensor
) -> Tensor:
    """Attention bias of a padded batch of graphs, through the table of distinct pairs of distances.

    Args:
        distance: int64 [B, N, N] of DAGs: [b, i, j] is the length of the edge i -> j, virtual or real, at most
            `MAX_DISTANCE`; 0 without an edge and for padding.
        embedding: [257, d] vectors of the distances.
        proj0_w: [d, 2d] first layer on the concatenated (forward, backward) vectors, as in `torch.nn.Linear`.
        proj0_b: [d]
        proj2_w: [heads, d] second layer.
        proj2_b: [heads]

    Returns:
        [B, heads, N, N], contiguous within each head; to be added to the attention's scores.

    Raises:
        ValueError: `distance` is not a batch of square integer matrices.
    """
    if distance.ndim != 3 or distance.shape[1] != distance.shape[2] or distance.dtype != torch.int64:
        raise ValueError(
            f"distance is {distance.dtype} of shape {tuple(distance.shape)}; give torch.int64 of shape [B, N, N]."
        )
    lengths = torch.arange(-MAX_DISTANCE, MAX_DISTANCE + 1, device=distance.device)
    pairs = torch.stack((lengths.clamp(min=0), (-lengths).clamp(min=0)), 1)
    table = _bias_of(pairs, embedding, proj0_w, proj0_b, proj2_w, proj2_b)
    row = distance - distance.mT + MAX_DISTANCE
    if distance.is_cuda:
        # Its backward sorts and adds up in a fixed order; that of the form below would add through atomics.
        return F.embedding(row, table).permute(0, 3, 1, 2).contiguous()
    by_head = table.t().index_select(1, row.flatten())
    return by_head.view(-1, *distance.shape).transpose(0, 1)


def edge_bias_reference(
    distance: Tensor, embedding: Tensor, proj0_w: Tensor, proj0_b: Tensor, proj2_w: Tensor, proj2_b: Tensor
) -> Tensor:
    """What `edge_bias` computes, pair of nodes by pair of nodes; same arguments and result."""
    pairs = torch.stack((distance, distance.mT), -1)
    return _bias_of(pairs, embedding, proj0_w, proj0_b, proj2_w, proj2_b).permute(0, 3, 1, 2)


def _bias_of(
    pairs: Tensor, embedding: Tensor, proj0_w: Tensor, proj0_b: Tensor, proj2_w: Tensor, proj2_b: Tensor
) -> Tensor:
    """[..., 2] pairs (distance forward, distance backward) to [..., heads] biases."""
    vectors = F.embedding(pairs + _FIRST_ROW, embedding).flatten(-2)
    return F.linear(F.relu(F.linear(vectors, proj0_w, proj0_b)), proj2_w, proj2_b)
