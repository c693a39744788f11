"""Obstacles: what keeps a model from becoming smaller or faster, each with the section of the page that explains it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cpd_onnx.channels.groups import Combed
from cpd_onnx.channels.judged import judged
from cpd_onnx.ops.traits import Traits, traits_of
from cpd_onnx.shapes.values import Value
from cpd_onnx.summary import count, share

_LEAST = 0.05
"""Share of the weights from which a kind of reason is worth a line (heuristic)."""
_SMALL = 2e5
"""Multiply-accumulates below which starting a kernel takes longer than its work: those of 10 microseconds on one thread
(heuristic)."""
_FEW = 16.0
"""Multiply-accumulates for each element read or written below which memory sets the time, as a processor does several
tens in the time that it moves one (heuristic)."""
_MANY, _PART = 20, 0.5
"""Number of operators from which the time to start them counts, and part of them, or of the elements, that is worth a
line (heuristics)."""
_OF_KIND: dict[str, tuple[str, str]] = {
    "interface": ("inputs-and-outputs", "inputs and outputs hold"),
    "no rule": ("operators-without-a-rule", "operators without a rule hold"),
    "operator": ("operators-that-need-an-axis-unchanged", "operators that need an axis unchanged hold"),
    "structure": ("the-graph-around-it", "what lies around them in the graph holds"),
}
"""Section and words for each kind of reason, see `Reason`; axes without channels are no obstacle."""


@dataclass(frozen=True)
class Obstacle:
    """One obstacle.

    Attributes:
        section: Anchor of the section in docs/limits.md that explains it, and what helps.
        text: What was found in the model, as a sentence.
    """

    section: str
    text: str


def obstacles(combed: Combed) -> list[Obstacle]:
    """Return the obstacles of a model: kinds of reasons that hold many weights, and why the time would not follow."""
    return [*_of_weights(combed), *_of_time(combed)]


def _of_weights(combed: Combed) -> Iterator[Obstacle]:
    """Yield the kinds of reasons that hold many weights, the one with the most first."""
    sizes = {weight.name: weight.size for weight in combed.weights}
    held: dict[str, dict[str, int]] = defaultdict(dict)
    for frozen in combed.frozen():
        numbers = sizes[frozen.tensor] * frozen.indices // frozen.of
        for reason in frozen.reasons:
            tensors = held[reason.kind]
            tensors[frozen.tensor] = max(tensors.get(frozen.tensor, 0), numbers)
    whole = sum(sizes.values())
    found = {kind: sum(held[kind].values()) for kind in _OF_KIND}
    for kind, numbers in sorted(found.items(), key=lambda pair: -pair[1]):
        if numbers > _LEAST * whole:
            section, words = _OF_KIND[kind]
            yield Obstacle(section, f"{words} an axis of {count(numbers)} of the {count(whole)} weights")


def _of_time(combed: Combed) -> Iterator[Obstacle]:
    """Yield why the time would not follow the work, as far as the graph shows it.

    Bodies of loops are not counted, nor are views and what runtimes fuse into the operator before it.
    """
    swept = judged(combed)
    scope = swept.folded.scope
    own = [place for place, node in enumerate(scope.nodes) if not _is_fused(traits_of(node))]
    macs: dict[int, float] = defaultdict(float)
    for cost in swept.recorder.costs:
        if not cost.scope.path:
            macs[cost.node] += cost.factor * math.prod(map(len, cost.axes))
    moved = {place: _elements(scope.values, scope.nodes[place]) for place in own}
    works = [work for place, work in macs.items() if place in moved]
    small = sum(work < _SMALL for work in works)
    if len(works) >= _MANY and small >= _PART * len(works):
        yield Obstacle(
            "fixed-time-per-kernel",
            f"{small} of {len(works)} operators that multiply do fewer than {count(_SMALL)} multiply-accumulates, "
            "which takes less time than starting a kernel",
        )
    whole = sum(moved.values())
    bound = sum(each for place, each in moved.items() if macs.get(place, 0.0) < _FEW * each)
    if whole and len(moved) >= _MANY and bound >= _PART * whole:
        yield Obstacle(
            "memory-bound-layers",
            f"{share(bound, whole)} of the elements that are read and written belong to operators that do fewer than "
            f"{_FEW:.0f} multiply-accumulates for each",
        )


def _is_fused(traits: Traits) -> bool:
    """Return whether a runtime usually computes an operator within the one before it, or not at all."""
    return traits.runs_in_place or traits.is_view or traits.is_rectifier or traits.is_activation


def _elements(values: Mapping[str, Value], node: Any) -> int:
    """Return how many elements of activations a node reads and writes, as far as their shapes are known."""
    found = 0
    for name in dict.fromkeys((*node.input, *node.output)):
        value = values.get(name)
        if name and value is not None and value.constants is None and value.shape is not None:
            found += math.prod(value.shape)
    return found
