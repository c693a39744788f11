"""Memory for activations: the peak of a run, and the arena of a static planner.

Nodes run one after another in the order of the graph. A tensor occupies memory from the node that computes it (an input
of the model: from the start) to the last node that reads it (an output: to the end); weights are not counted. Reshapes
share the memory of their input. An activation function, a normalisation, or a sum or product with constants overwrites
its input if nothing else reads it, since runtimes fuse these or run them in place; no other operator does. The planner
places the largest buffer first, each into the smallest gap among the buffers that live at the same time, as the greedy
planners of runtimes for microcontrollers do, without rounding of addresses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.deployed import STACK, element_size
from cpd_onnx.channels.costs import Peak, Product
from cpd_onnx.channels.groups import Combed
from cpd_onnx.channels.judged import judged, term_at
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.rules.api import Tensor
from cpd_onnx.shapes.values import Scope, Use, Value

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Buffer:
    """Memory that is occupied for some time.

    Attributes:
        first: Number of the step that writes it.
        last: Number of the last step that reads it.
        size: Size in bytes.
    """

    first: int
    last: int
    size: float


def peak(buffers: Sequence[Buffer]) -> float:
    """Return the largest sum of the sizes of buffers that live at the same time, a lower bound of every planner."""
    starts = {buffer.first for buffer in buffers}
    return max((sum(b.size for b in buffers if b.first <= step <= b.last) for step in starts), default=0.0)


def planned(buffers: Sequence[Buffer]) -> list[float]:
    """Return the address of each buffer in one arena, by greedy best fit: the largest buffer first."""
    order = sorted(range(len(buffers)), key=lambda k: (-buffers[k].size, buffers[k].first, k))
    address = [0.0] * len(buffers)
    placed: list[int] = []
    for index in order:
        buffer = buffers[index]
        beside = [k for k in placed if buffers[k].first <= buffer.last and buffer.first <= buffers[k].last]
        taken = sorted((address[k], address[k] + buffers[k].size) for k in beside)
        address[index] = _best_gap(taken, buffer.size)
        placed.append(index)
    return address


def arena(buffers: Sequence[Buffer]) -> float:
    """Return the size of the arena in which the planner places buffers."""
    ends = (start + buffer.size for start, buffer in zip(planned(buffers), buffers, strict=True))
    return max(ends, default=0.0)


def _best_gap(taken: Sequence[tuple[float, float]], size: float) -> float:
    """Return the start of the smallest gap between taken ranges that has the size; their end if there is none."""
    best, least, end = math.inf, math.inf, 0.0
    for start, stop in taken:
        if size <= start - end < least:
            best, least = end, start - end
        end = max(end, stop)
    return end if best == math.inf else best


@dataclass(frozen=True)
class Lifetimes:
    """When the tensors of a graph occupy memory.

    Attributes:
        owner: For each tensor that needs memory, the tensor in whose memory it lies: itself, or another one.
        spans: First and last step in which the memory of each owner is occupied; step 0 is before the first node.
    """

    owner: Mapping[str, str]
    spans: Mapping[str, tuple[int, int]]


class MemoryModel:
    """The memory for activations of a combed model, for any set of surviving channels; one sample at a time."""

    def __init__(self, combed: Combed, stored_as: str = "") -> None:
        """Find when each tensor lives.

        `stored_as` is "int8" or "float16" if the deployed model computes in that type; empty for the types of the file.
        """
        self._combed, self._stored_as = combed, stored_as
        scope = combed.folded.scope
        self._spans = [(scope.values[name], *span) for name, span in lifetimes(scope).spans.items()]

    @cached_property
    def terms(self) -> list[Product]:
        """The size of each buffer in bytes, as a factor and the axes that it is multiplied with."""
        there, folded = judged(self._combed), self._combed.folded
        found: list[Product] = []
        for value, _, _ in self._spans:
            key = (folded.scope.path, value.name)
            here = self._combed.tensors.get(key)
            size = element_size(value.dtype, self._type_of(value)) / _samples(value, folded.batch)
            axes = None if here is None else here.axes
            if axes is None:
                found.append((size * math.prod(_shape(value, there.tensors.get(key))), ()))
                continue
            other = there.tensors.get(key)
            found.append(term_at(self._combed, size, axes, None if other is None else other.axes))
        return found

    def _type_of(self, value: Value) -> str:
        """Return the element type in which a tensor is stored: operators that stay float in int8 give floats."""
        scope = self._combed.folded.scope
        producer = scope.producers.get(value.name)
        stays_float = producer is not None and traits_of(scope.nodes[producer]).stays_float
        return "" if stays_float and self._stored_as == "int8" else self._stored_as

    @property
    def peak(self) -> Peak:
        """The buffers, and which of them live at the same time; sets that can never be the largest are left out."""
        live = np.zeros((max((last for _, _, last in self._spans), default=-1) + 1, len(self._spans)), np.bool_)
        for number, (_, first, last) in enumerate(self._spans):
            live[first : last + 1, number] = True
        live, terms = _largest(np.unique(live, axis=0)), self.terms
        full = np.asarray([factor * math.prod(map(len, axes)) for factor, axes in terms])
        fixed = np.asarray([0.0 if axes else factor for factor, axes in terms])
        return Peak(terms, live[live @ full >= (live @ fixed).max(initial=0.0)].T.astype(np.float64))

    @property
    def program(self) -> Peak:
        """The peak of all RAM of a program: with its stack."""
        peak = self.peak
        sums = peak.sums if peak.sums.shape[1] else np.zeros((len(peak.terms), 1))
        return Peak([*peak.terms, (float(STACK), ())], np.vstack([sums, np.ones((1, sums.shape[1]))]))

    def buffers(self, keep: KeepMask) -> list[Buffer]:
        """Return the buffers of the pruned model."""
        sizes = (factor * math.prod(keep.count(axis) for axis in axes) for factor, axes in self.terms)
        return [Buffer(first, last, size) for (_, first, last), size in zip(self._spans, sizes, strict=True)]

    def arena(self, keep: KeepMask) -> float:
        """Return the bytes of the planner's arena for the pruned model."""
        return arena(self.buffers(keep))

    def ram(self, keep: KeepMask) -> float:
        """Return the bytes of RAM of a program of the pruned model: its arena and its stack."""
        return self.arena(keep) + STACK


def _largest(live: Mask) -> Mask:
    """Return the rows that are no subsets of others."""
    common = live.astype(np.int64) @ live.T.astype(np.int64)
    inside = common == common.diagonal()[:, None]
    np.fill_diagonal(inside, val=False)
    return np.asarray(live[~inside.any(axis=1)])


def _samples(value: Value, batch: int) -> int:
    """Return the number of samples in a tensor: that of the batch if its first axis is open and has that size."""
    is_batch = bool(value.shape) and not value.has_fixed(0) and (value.shape or (0,))[0] % batch == 0
    return batch if is_batch else 1


def _shape(value: Value, there: Tensor | None) -> Sequence[int]:
    shape = value.shape if there is None else there.shape
    return shape or ()


def lifetimes(scope: Scope) -> Lifetimes:
    """Return when the tensors of a graph occupy memory; weights and other constants do not."""
    steps = {id(body): position + 1 for position, bodies in scope.bodies.items() for body in bodies.values()}
    outputs = set(scope.outputs)
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for name, value in scope.values.items():
        if value.weight is not None or value.constants is not None or value.shape is None:
            continue
        first[name] = scope.producers.get(name, -1) + 1
        readers = [_step(use, scope, steps) for use in scope.consumers.get(name, [])]
        last[name] = len(scope.nodes) + 1 if name in outputs else max([first[name], *readers])
    owner = {name: name for name in first}
    for number, node in enumerate(scope.nodes, start=1):
        source, result = _overwritten(node, scope), next(iter(node.output), "")
        if source in owner and result in owner:
            held = owner[source]
            if _shares(node, scope, source, first[held], last[held] - number):
                owner[result] = held
                last[held] = max(last[held], last[result])
    return Lifetimes(owner, {name: (first[name], last[name]) for name in first if owner[name] == name})


def _step(use: Use, scope: Scope, steps: Mapping[int, int]) -> int:
    """Return the step of a reader: that of the node whose body holds it, if it is in one."""
    inside: Scope | None = use.scope
    while inside is not None and inside is not scope:
        if id(inside) in steps:
            return steps[id(inside)]
        inside = inside.parent
    return use.node + 1


def _overwritten(node: NodeProto, scope: Scope) -> str:
    """Return the input whose memory the output of an operator may share; empty if there is none."""
    traits = traits_of(node)
    if traits.is_view or traits.is_activation or traits.runs_in_place:
        return next(iter(node.input), "")
    computed = {name for name in node.input if name and not _is_constant(scope, name)}
    joins = traits.is_local and (traits.is_additive or traits.is_bilinear)
    return computed.pop() if joins and len(computed) == 1 else ""


def _is_constant(scope: Scope, name: str) -> bool:
    value = scope.lookup(name)
    return value is not None and (value.weight is not None or value.constants is not None)


def _shares(node: NodeProto, scope: Scope, source: str, first: int, later: int) -> bool:
    """Return whether the output shares the memory of an input, as `_overwritten` returns it.

    That memory is written at step `first`, 0 for an input of the model, and read for `later` further steps.
    """
    given, result = scope.values[source], scope.values[node.output[0]]
    is_alike = given.shape == result.shape and given.dtype == result.dtype
    return traits_of(node).is_view or (is_alike and first > 0 and later == 0)
