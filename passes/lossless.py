"""Lossless: choose the channels whose removal changes no output, apart from the rounding of sums in another order.

In a quantised model that is computed in floating point, that rounding can change single quantisation steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget import host
from cpd_onnx.budget.allocation import Allocation
from cpd_onnx.channels.costs import CostModel
from cpd_onnx.channels.free import free_channels, keep_without, removable
from cpd_onnx.channels.groups import Combed
from cpd_onnx.pipeline.state import State

KIND = "lossless"
"""Kind of the budget in a plan."""


def lossless(combed: Combed) -> Allocation:
    """Return the allocation that removes the dead channels alone, and branches that have no others."""
    return _allocation(combed, removable(combed, free_channels(combed)))


def in_blocks(combed: Combed, chosen: Allocation, block: int) -> Allocation:
    """Return an allocation that keeps as many of the removed channels as fill the last block of each width."""
    removed, multiples = [], host.multiples(combed, block)
    for group, gone in zip(combed.groups, chosen.removed, strict=True):
        multiple = multiples[group.id]
        width = min(len(group), -(-(len(group) - len(gone)) // multiple) * multiple)
        removed.append(gone[: len(group) - width])
    return replace(_allocation(combed, removed), round_to=block)


def _allocation(combed: Combed, removed: list[list[int]]) -> Allocation:
    costs = CostModel(combed)
    return Allocation(removed, costs.total(KeepMask(combed.atoms)), costs.total(keep_without(combed, removed)))


@dataclass(frozen=True)
class Lossless:
    """Choose the channels whose removal changes no output, by the weights alone; often there are none."""

    name: ClassVar[str] = KIND
    requires: ClassVar[tuple[str, ...]] = ("combed",)
    provides: ClassVar[tuple[str, ...]] = ("allocation", "budget")

    def __call__(self, state: State) -> State:
        """Fill in `allocation`."""
        return replace(state, allocation=lossless(state.need("combed", "comb")), budget={"kind": KIND})
