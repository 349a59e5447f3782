"""Which of several GHNs predicts a network: the one that was trained on its kind."""

from __future__ import annotations

from collections.abc import Collection

KINDS = {"attention": "msa", "layer_norm": "ln"}
"""Kinds of networks that can have a GHN of their own, with the primitive that tells them; the first one counts."""


def kind_of(ops: Collection[str], experts: Collection[str]) -> str | None:
    """The kind of a network of these primitives among those that there are experts for; None if it is none of them."""
    return next((kind for kind, primitive in KINDS.items() if kind in experts and primitive in ops), None)
