"""Multiply linear operators that follow each other into one, where that costs less.

Between two of them there may be affine operators, which scale and shift each channel. Such runs are exported so, or are
what is left where a branch between two layers has been removed. A convolution or matrix product to few channels and the
next one to many cost less apart than as one; once pruning has left fewer channels around them than between them, one
operator with the product of their weights is cheaper, and reads and writes one tensor less. Kim et al. (Efficient
Latency-Aware CNN Depth Compression via Two-Stage Dynamic Programming, ICML 2023, arXiv 2301.12187) train activations
away to merge more. Here the model computes the same as before, up to rounding: products are computed in float64 and
rounded once, to the type of the weights.

One node of a run stays, with its name, operator, place and attributes, except for those that name sizes. Its output is
the last tensor of the run. The others are removed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from onnx import NodeProto

from cpd_onnx.ir.model import Array, Model, attributes_of, graphs_of, set_attribute
from cpd_onnx.ops.composition import Composition
from cpd_onnx.ops.matrix_view import Vector
from cpd_onnx.rewrite.linear_runs import WEIGHT, Finder, LinearRun, Pair, Work, linear_runs
from cpd_onnx.shapes.editor import Editor, keep_entries
from cpd_onnx.shapes.inference import fold
from cpd_onnx.shapes.values import Folded
from cpd_onnx.summary import count

Saving: TypeAlias = Callable[[LinearRun, Folded], float]
"""A function of a run and its model that returns what it saves as one operator, in any unit; it stays as it is if that
is not above 0."""


def saved_macs(run: LinearRun, _: Folded) -> float:
    """Return how many multiply-accumulates a run saves as one operator."""
    return run.before.macs - run.after.macs


def saved_bytes(run: LinearRun, _: Folded) -> float:
    """Return how many bytes of weights a run saves as one operator."""
    return run.before.bytes - run.after.bytes


_NO_WORK = Work()


@dataclass(frozen=True, eq=False)
class Merged:
    """A model with single operators in place of linear runs.

    Attributes:
        model: The model; the given one if nothing was merged.
        rounds: The runs that were merged, round by round: a later one may contain what an earlier one made. With these,
            `merge_again` does the same.
        gone: Nodes that were removed, by name, or by their first output if they have none.
        notes: What was merged, and how many runs were left, and why.
        before, after: Costs of the runs that were merged, as they were and as they are.
    """

    model: Model
    rounds: tuple[tuple[Pair, ...], ...] = ()
    gone: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    before: Work = _NO_WORK
    after: Work = _NO_WORK


def merge(model: Model, saving: Saving = saved_macs) -> Merged:
    """Return a model with single operators in place of the linear runs that save something; it is not changed.

    Those that save most come first. Nothing is merged whose weights their type cannot hold, see `rounded`.
    """
    now = Merged(model)
    refused: dict[Pair, str] = {}
    while True:
        folded = fold(now.model, evaluates=False)
        runs = [run for run in linear_runs(folded) if run.pair not in refused]
        chosen = worthwhile(runs, folded, saving)
        if not chosen:
            left = refused | {run.pair: run.obstacle or "one operator would not cost less" for run in runs}
            return replace(now, notes=(*now.notes, *_left(left)))
        now = _merged(now, folded, chosen, refused)


def worthwhile(runs: Sequence[LinearRun], folded: Folded, saving: Saving = saved_macs) -> list[LinearRun]:
    """Return runs of a model that save something as one operator and share no node; those that save most come first."""
    worth = {run.pair: saving(run, folded) if run.composition is not None else 0.0 for run in runs}
    chosen: list[LinearRun] = []
    for run in sorted(runs, key=lambda run: -worth[run.pair]):
        if worth[run.pair] > 0 and all(run.nodes.isdisjoint(other.nodes) for other in chosen):
            chosen.append(run)
    return chosen


def merge_again(model: Model, rounds: Sequence[Sequence[Sequence[str]]]) -> Model:
    """Return a model with single operators in place of given linear runs, as `Merged.rounds` names them.

    Raises ValueError if the model has no such run, or if it cannot be merged.
    """
    now = Merged(model)
    for pairs in rounds:
        folded = fold(now.model, evaluates=False)
        runs = {run.pair: run for run in linear_runs(folded) if run.composition is not None}
        missing = [tuple(pair) for pair in pairs if tuple(pair) not in runs]
        if missing:
            raise ValueError(f"the model has no linear run {' to '.join(map(repr, missing[0]))} that can be merged")
        chosen = [runs[first, second] for first, second in pairs]
        if sum(len(run.nodes) for run in chosen) > len(frozenset[int]().union(*(run.nodes for run in chosen))):
            raise ValueError("two linear runs of a round have a node in common")
        refused: dict[Pair, str] = {}
        now = _merged(now, folded, chosen, refused)
        if refused:
            raise ValueError(f"the linear run {' to '.join(map(repr, next(iter(refused))))} cannot be merged")
    return now.model


def _merged(now: Merged, folded: Folded, chosen: Sequence[LinearRun], refused: dict[Pair, str]) -> Merged:
    """Return the model with some runs merged, which share no node; those whose weights cannot be held are refused."""
    merger = _Merger(folded)
    done = []
    for run in chosen:
        reason = merger.enter(run)
        if reason:
            refused[run.pair] = reason
        else:
            done.append(run)
    if not done:
        return now
    merger.clean()
    return Merged(
        merger.model,
        (*now.rounds, tuple(run.pair for run in done)),
        (*now.gone, *merger.gone),
        (*now.notes, *merger.notes),
        sum((run.before for run in done), now.before),
        sum((run.after for run in done), now.after),
    )


def _left(reasons: dict[Pair, str]) -> list[str]:
    """Return one sentence for each reason why runs were not merged."""
    by_reason: dict[str, list[Pair]] = {}
    for pair, reason in sorted(reasons.items()):
        by_reason.setdefault(reason, []).append(pair)
    return [
        f"{len(pairs)} linear run{'s' if len(pairs) > 1 else ''} not merged, as {reason}: {pairs[0][0]!r} to "
        f"{pairs[0][1]!r}{', …' if len(pairs) > 1 else ''}"
        for reason, pairs in by_reason.items()
    ]


# Writing.


class _Merger(Editor):
    """Replaces runs that share no node in a copy of a model.

    Attributes:
        notes: What was merged, one sentence for each run.
        gone: Nodes that were removed, by name or first output.
    """

    def __init__(self, folded: Folded) -> None:
        super().__init__(folded.model.copy())
        self.scope, self.finder = folded.scope, Finder(folded)
        self.notes: list[str] = []
        self.gone: list[str] = []
        self.removed: set[int] = set()
        self.vanished: set[str] = set()
        self.read = _read(self.model)

    def enter(self, run: LinearRun) -> str:
        """Replace a run, and return an empty text; return the reason instead if its weights cannot be held."""
        made, operators = run.composition, (run.first, run.second)
        arrays = [self.weight(each.position) for each in operators]
        assert made is not None
        one, two = (
            np.asarray(each.linear.matrix(array.astype(np.float64)))
            for each, array in zip(operators, arrays, strict=True)
        )
        weight = rounded(made.result.weight(made.matrix(one, two, run.gain)), arrays[0].dtype)
        constant = made.constant(two, run.shift) + (0.0 if run.second.bias is None else run.second.bias)
        if run.sum is not None and run.sum not in run.between:
            constant = constant + self.addend(run, run.sum)
        added = rounded(constant, arrays[0].dtype)
        if weight is None or added is None:
            return f"{arrays[0].dtype} cannot hold the product of the weights"
        stays = run.second if made.is_second else run.first
        node = self.node(self.scope, stays.position)
        before = [self.label(position) for position in sorted(run.nodes)]
        self.resize(node, made)
        self.put(stays.position, WEIGHT, weight, "")
        if run.sum is not None:
            self.put(run.sum, self.constant_slot(run, run.sum), added, "")
        elif (
            stays.bias_slot >= 0 and run.second.bias is not None and (added.any() or len(node.input) > stays.bias_slot)
        ):
            self.put(stays.position, stays.bias_slot, added, f"{node.input[WEIGHT]}_bias")
        self.connect(run, node)
        costs = f"{count(run.before.macs)} -> {count(run.after.macs)} multiply-accumulates"
        gone = [label for label, position in zip(before, sorted(run.nodes), strict=True) if position in self.removed]
        self.notes.append(f"{', '.join(gone)} merged into {self.label(stays.position)}: {costs}")
        return ""

    def of(self, position: int) -> NodeProto:
        """Return a node as it was before."""
        return self.scope.nodes[position]

    def weight(self, position: int) -> Array:
        """Return the weight of a linear operator, as it was before."""
        array = self.finder.constant(self.of(position).input[WEIGHT])
        assert array is not None
        return array

    def label(self, position: int) -> str:
        node = self.of(position)
        return f"{node.op_type} {_name(node)!r}"

    def data_of(self, run: LinearRun, position: int) -> str:
        """Return the tensor of a run that one of its additions adds a constant to."""
        if position not in run.between:
            return run.pair[1]
        place = run.between.index(position)
        return self.of(run.between[place - 1]).output[0] if place else run.pair[0]

    def constant_slot(self, run: LinearRun, position: int) -> int:
        return 1 if self.of(position).input[0] == self.data_of(run, position) else 0

    def addend(self, run: LinearRun, position: int) -> Vector:
        array = self.finder.constant(self.of(position).input[self.constant_slot(run, position)])
        assert array is not None
        return array.astype(np.float64).ravel()

    def resize(self, node: NodeProto, made: Composition) -> None:
        """Set the attributes of a node that name sizes."""
        given = attributes_of(node)
        if "kernel_shape" in given and tuple(given["kernel_shape"]) != made.kernel:
            set_attribute(node, "kernel_shape", list(made.kernel))
        if made.kernel and given.get("group", 1) != made.groups:
            set_attribute(node, "group", made.groups)

    def put(self, position: int, slot: int, array: Array, preferred: str) -> None:
        """Give a node other values of a constant: in its place if nothing else reads it, else as a new initializer."""
        old = self.of(position).input[slot] if slot < len(self.of(position).input) else ""
        node = self.node(self.scope, position)
        known = self.finder.constant(old) if array.ndim == 1 else None
        if known is not None and known.size == array.size:
            array = array.reshape(known.shape)
        array = np.ascontiguousarray(array)
        is_own = self.model.has(old) and len(self.scope.consumers[old]) == 1 and old not in self.scope.outputs
        if is_own:
            self.model.set_array(old, array)
            self.describe(old, array.shape)
            return
        while len(node.input) <= slot:
            node.input.append("")
        node.input[slot] = self.add_fresh(f"{old}_merged" if old else preferred, array)

    def describe(self, name: str, shape: Sequence[int]) -> None:
        """Write the sizes of an initializer where the file describes it elsewhere too."""
        entries = (*self.model.graph.input, *self.model.graph.value_info)
        for info in (info for info in entries if info.name == name):
            dims = info.type.tensor_type.shape.dim
            del dims[:]
            for size in shape:
                dims.add().dim_value = size

    def connect(self, run: LinearRun, stays: NodeProto) -> None:
        """Connect the node that stays, and remove the others."""
        assert run.composition is not None
        positions = {run.first.position, run.second.position, *run.between}
        if run.composition.is_second:
            stays.input[0] = self.node(self.scope, run.first.position).input[0]
            positions.remove(run.second.position)
        elif run.sum in run.between and run.sum is not None:
            added = self.node(self.scope, run.sum)
            added.input[1 - self.constant_slot(run, run.sum)] = run.pair[0]
            added.output[0] = run.pair[1]
            positions -= {run.first.position, run.sum}
        else:
            stays.output[0] = run.pair[1]
            positions.remove(run.first.position)
        self.removed |= positions
        inner = [run.first.position, *run.between]
        self.vanished |= {name for position in inner for name in self.of(position).output}

    def clean(self) -> None:
        """Remove the nodes of the runs, and what nothing reads any more."""
        self.drop({self.scope.order[position] for position in self.removed})
        outputs = {output.name for output in self.model.graph.output}
        unread = self.read - _read(self.model) - outputs
        while idle := {
            place
            for place, node in enumerate(self.model.graph.node)
            if any(node.output) and unread.issuperset(filter(None, node.output))
        }:
            names = self.drop(idle)
            self.notes.append(f"removed with that, as nothing else reads it: {', '.join(names)}")
            unread = self.read - _read(self.model) - outputs
        stored = {tensor.name for tensor in self.model.graph.initializer} & unread
        for name in sorted(stored):
            self.model.drop_initializer(name)
        keep_entries(self.model.graph.value_info, lambda name: name not in self.vanished | unread)
        keep_entries(self.model.graph.input, lambda name: name not in stored)

    def drop(self, places: set[int]) -> list[str]:
        """Remove nodes of the main graph, by their places in the file, and return their names."""
        nodes = [NodeProto.FromString(node.SerializeToString()) for node in self.model.graph.node]
        names = [_name(node) for place, node in enumerate(nodes) if place in places]
        self.gone += names
        del self.model.graph.node[:]
        self.model.graph.node.extend(node for place, node in enumerate(nodes) if place not in places)
        return names


def rounded(values: Array, dtype: np.dtype[Any]) -> Array | None:
    """Return values in the type of the weights; None if it rounds them more than it rounds numbers in its normal range.

    Rounding to the nearest number changes each by at most half a unit in its last place. A type that overflows, or in
    which the greater part of the values is below its smallest normal number, changes them by more.
    """
    with np.errstate(over="ignore", under="ignore"):
        found = values.astype(dtype)
    if not np.isfinite(found).all():
        return None
    error = np.linalg.norm(found.astype(np.float64) - values)
    return found if error <= np.finfo(dtype).eps / 2 * np.linalg.norm(values) else None


def _name(node: NodeProto) -> str:
    return node.name or node.output[0]


def _read(model: Model) -> set[str]:
    """Return all names that nodes read, or that are outputs of bodies."""
    found = {name for graph in graphs_of(model.graph) for node in graph.node for name in node.input}
    inner = (graph for graph in graphs_of(model.graph) if graph is not model.graph)
    return found | {output.name for graph in inner for output in graph.output}
