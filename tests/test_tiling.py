"""Both ways to repeat a tile: as one tensor, and into memory that is there."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_ghn.tiling import tile, tile_into


def sizes(dims: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, 9), min_size=dims, max_size=dims)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 4).flatmap(lambda dims: st.tuples(sizes(dims), sizes(dims))))
def test_both_ways_to_tile_agree(shapes: tuple[list[int], list[int]]) -> None:
    have, wanted = shapes
    source = torch.randn(have)
    expected = source
    for dim, size in enumerate(wanted):
        expected = expected.index_select(dim, torch.arange(size) % source.shape[dim])
    assert torch.equal(tile(source, tuple(wanted)), expected)
    target = torch.full(wanted, torch.nan)
    tile_into(target, source)
    assert torch.equal(target, expected)


def test_a_tile_may_lack_trailing_dimensions() -> None:
    target = torch.empty(4, 6, 1, 1)
    matrix = torch.randn(2, 3)
    tile_into(target, matrix)
    assert torch.equal(target, tile(matrix, target.shape))
    assert torch.equal(tile(torch.tensor(2.0), (3, 1)), torch.full((3, 1), 2.0))


def test_tiling_is_differentiable() -> None:
    source = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda tensor: tile(tensor, (5, 7)), source)
