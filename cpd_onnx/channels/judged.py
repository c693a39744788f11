"""Costs at realistic sizes: where a file leaves the sizes of images open, combing uses small ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.channels.combing import sweep
from cpd_onnx.channels.groups import Combed, Swept
from cpd_onnx.shapes.realistic import realistic

_known: WeakKeyDictionary[Combed, Swept | None] = WeakKeyDictionary()
"""Sweeps at the judged sizes; None if those are the model's own."""


def judged(combed: Combed) -> Swept:
    """Return the sweep over the model at the sizes under which it is judged; the model itself if it has those."""
    if combed not in _known:
        folded = realistic(combed.folded)
        _known[combed] = None if folded is combed.folded else sweep(folded, combed.recorder.by_group)
    return _known[combed] or combed


def terms_of_work(combed: Combed) -> list[tuple[float, tuple[Axis, ...]]]:
    """Return the multiply-accumulates at the judged sizes as factors and the axes that multiply them."""
    here, there = combed.recorder.costs, judged(combed).recorder.costs
    alike = [(cost.scope.path, cost.node, len(cost.axes)) for cost in here] == [
        (cost.scope.path, cost.node, len(cost.axes)) for cost in there
    ]
    if here is there or not alike:
        return [(cost.factor, cost.axes) for cost in here]
    return [term_at(combed, other.factor, cost.axes, other.axes) for cost, other in zip(here, there, strict=True)]


def term_at(
    combed: Combed, factor: float, axes: Sequence[Axis], other: Sequence[Axis] | None
) -> tuple[float, tuple[Axis, ...]]:
    """Return a term with its frozen axes multiplied into the factor, by their sizes elsewhere if these are given."""
    if other is None or len(other) != len(axes):
        other = axes
    is_frozen = [combed.atoms.all_frozen(axis) for axis in axes]
    fixed = math.prod(len(there) for there, frozen in zip(other, is_frozen, strict=True) if frozen)
    return factor * fixed, tuple(axis for axis, frozen in zip(axes, is_frozen, strict=True) if not frozen)
