"""Why a parameter has no node."""

from __future__ import annotations

import enum


class Kept(str, enum.Enum):
    """A reason, which is also the words that a report gives it in."""

    FROZEN = "frozen (requires_grad=False)"
    EMPTY = "empty"
    UNUSED = "not used by the forward pass"
    DETACHED = "not part of the output, or detached from it"
    WITHOUT_GRADIENT = "used without gradients (no_grad)"
    BRANCH_SCALE = "scale of a residual branch"  # a GHN may have been trained with a value for it
    POSITION_BIAS = "relative position bias"  # likewise
    POSITION_TABLE = "relative position table"
    TOKEN = "learned token"
    UNUSUAL_POSITIONS = "position table of an unusual layout"
    AFFINE = "scale or shift without a norm"
    NO_PRIMITIVE = "no primitive for it"

    __str__ = str.__str__
    __hash__ = str.__hash__  # as for its words, to which it is equal
