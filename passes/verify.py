"""Verify: the pruned model computes what the original computes with the deleted channels silenced."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
from onnx import ModelProto

from cpd_onnx.compare import Comparison, compare, distance, runs_needed, tolerance
from cpd_onnx.data import Batch, Source, fixed_batch, inputs_of
from cpd_onnx.errors import ProofError, UnsupportedError
from cpd_onnx.graph import Array, Model, graphs_of
from cpd_onnx.groups import QUANTIZED, Combed
from cpd_onnx.kept import Kept
from cpd_onnx.masking import masked
from cpd_onnx.passes.comb import planned
from cpd_onnx.plan import Plan
from cpd_onnx.rewrite import rewrite
from cpd_onnx.rules import FLOATS
from cpd_onnx.runtime import Runner, execute_all, open_model, working_feeds
from cpd_onnx.state import State
from cpd_onnx.stepwise import Piecewise

_PIECEWISE_BYTES = 1 << 28
"""Models with more bytes of weights are run piece by piece, and what is made of them."""


def verify(combed: Combed, kept: Kept, pruned: Model, feeds: Iterable[Mapping[str, Array]] | None = None) -> Comparison:
    """Compare the pruned model with the masked original in onnxruntime, optimisations off.

    Runs on random inputs if none are given. Raises UnsupportedError if onnxruntime cannot run the original, ProofError
    if it runs that but not the pruned model, DataError if the original gives NaN.
    """
    runner: Callable[[Model], Runner] = partial(open_model, optimise=False)
    if combed.folded.model.data_bytes() > _PIECEWISE_BYTES:  # models that may be larger than memory
        runner = Piecewise
    original = runner(combed.folded.original)
    allowed = tolerance(combed)
    given = list(feeds if feeds is not None else working_feeds(combed.folded, original, runs_needed(allowed)))
    plain = execute_all(original, given)
    del original  # what it holds is not needed twice
    try:
        if combed.folded.evaluated is not None:
            _require_same(runner(combed.folded.model), given, plain, allowed)
        reference, smaller = (runner(model) for model in (masked(combed, kept, pruned), pruned))
        return compare(plain, reference, smaller, given, allowed)
    except UnsupportedError as error:
        raise ProofError(f"onnxruntime runs the original but not what was made of it: {error}") from error


def _require_same(
    evaluated: Runner, feeds: list[Mapping[str, Array]], plain: list[list[Array]], allowed: float
) -> None:
    """Raise ProofError unless the model with weight arithmetic evaluated gives what the original gives."""
    found = execute_all(evaluated, feeds)
    pairs = (pair for ours, theirs in zip(found, plain, strict=True) for pair in zip(theirs, ours, strict=True))
    apart = max((distance(expected, got, expected) for expected, got in pairs), default=0.0)
    if not apart <= allowed:
        raise ProofError(
            f"evaluating the weights that the graph computes changes its outputs by {apart:.2g}, "
            f"allowed are {allowed:.0e}; nothing is written. This is a defect of ours: please report it with the model"
        )


@dataclass(frozen=True)
class Verify:
    """Prove that the pruned model computes what the masked original computes.

    Where weights have been given other values since, that is shown of what the plan makes of the original, and that
    nothing else differs. `batches` batches of the data are used where there is data, random inputs otherwise.
    """

    batches: int = 2
    name: ClassVar[str] = "verify"

    def __call__(self, state: State) -> State:
        """Fill in `verification`; raises ProofError if the proof fails."""
        combed, chosen = state.need("combed", "comb"), state.need("allocation", "allocate")
        feeds = None if state.data is None else data_feeds(state.original, state.data, self.batches)
        if state.repaired is not None or state.distilled is not None:
            plan = state.need("plan", "prune")
            return replace(state, verification=verify_files(state.original, state.model, plan, feeds).comparison)
        kept = Kept(combed.atoms)
        kept.remove(chosen.channels(combed))
        return replace(state, verification=proved(verify(combed, kept, state.model, feeds)))


def proved(found: Comparison) -> Comparison:
    """The verification if it passed; raises ProofError otherwise."""
    if not found.passed:
        raise ProofError(
            f"the pruned model differs from the masked original by {found.difference:.2g}, "
            f"allowed are {found.tolerance:.0e}; nothing is written. "
            "This is a defect of ours: please report it with the model"
        )
    return found


def data_feeds(model: Model, source: Source, batches: int) -> Iterator[Batch]:
    """The first batches of a source, without labels."""
    inputs = inputs_of(model.proto)
    size = None if source.count is None else fixed_batch(inputs)  # whole feeds are as large as they are
    for batch in itertools.islice(source.batches(size or 2), batches):
        if size is None or all(len(array) == size for array in batch.values() if array.ndim):
            yield {entry.name: batch[entry.name] for entry in inputs}


@dataclass(frozen=True)
class FileVerification:
    """Outcome of checking a pruned file against its original and its plan.

    Attributes:
        is_replay: whether the file is, byte for byte, what the plan makes of the original.
        trained: weights whose values differ from the replay's (after distillation), in order.
        comparison: the mask check of what the plan makes of the original.

    """

    is_replay: bool
    trained: tuple[str, ...]
    comparison: Comparison


def verify_files(
    original: Model, pruned: Model, plan: Plan, feeds: Iterable[Mapping[str, Array]] | None = None
) -> FileVerification:
    """Check that a file is what a plan makes of an original, and that this computes what it should.

    Values of weights may have been trained since; nothing else may differ. Raises PlanError if the plan belongs to
    another original, ProofError if the file is something else or the mask check fails.
    """
    combed, kept = planned(original, plan)
    replay = rewrite(combed, kept, plan.input_shapes).model
    plan.stamp(replay)
    trained = _trained(replay, pruned)
    comparison = proved(verify(combed, kept, replay, feeds))
    return FileVerification(not trained, trained, comparison)


def _trained(replay: Model, pruned: Model) -> tuple[str, ...]:
    """Names of the weights whose values differ; raises ProofError if anything else does."""
    ours, theirs = ({t.name: t for t in m.graph.initializer} for m in (replay, pruned))
    if list(ours) != list(theirs):
        odd = next(iter(sorted(set(ours) ^ set(theirs))), "their order")
        raise ProofError(f"the file is not what the plan makes of the original: its initializers differ ({odd!r})")
    changed = []
    for name, tensor in ours.items():
        other = theirs[name]
        if list(tensor.dims) != list(other.dims) or tensor.data_type != other.data_type:
            raise ProofError(
                f"the file is not what the plan makes of the original: initializer {name!r} has other dims or type"
            )
        if not _equal(replay.array(name), pruned.array(name)):
            changed.append(name)
    structures = [_without_values(model) for model in (replay, pruned)]
    if structures[0] != structures[1]:
        raise ProofError(f"the file is not what the plan makes of the original: {_first_difference(*structures)}")
    held = _dequantised(replay)
    integers = [name for name in changed if ours[name].data_type not in FLOATS | QUANTIZED and name not in held]
    if integers:
        raise ProofError(
            f"the file is not what the plan makes of the original: constant {integers[0]!r} has other values"
        )
    return tuple(changed)


def _equal(a: Array, b: Array) -> bool:
    """Whether all bytes of two arrays of one type and shape are the same."""
    left, right = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (a, b))
    return np.array_equal(left, right)


def _dequantised(model: Model) -> set[str]:
    """Tensors that nothing but DequantizeLinear takes, as its numbers: biases of quantised models, say."""
    uses = [
        (name, node.op_type == "DequantizeLinear" and slot == 0)
        for graph in graphs_of(model.proto.graph)
        for node in graph.node
        for slot, name in enumerate(node.input)
    ]
    return {name for name, is_number in uses if is_number} - {name for name, is_number in uses if not is_number}


def _without_values(model: Model) -> ModelProto:
    """The model without the values of its trained weights, in initializers and Constant nodes of any graph."""
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    for graph in graphs_of(proto.graph):
        constants = [a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
        for tensor in (*graph.initializer, *constants):
            if graph is proto.graph or tensor.data_type in FLOATS | QUANTIZED:
                for field in ("raw_data", "float_data", "int32_data", "double_data"):
                    tensor.ClearField(field)
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
    return proto


def _first_difference(replay: ModelProto, pruned: ModelProto) -> str:
    nodes = (replay.graph.node, pruned.graph.node)
    if len(nodes[0]) != len(nodes[1]):
        return f"it has {len(nodes[1])} nodes instead of {len(nodes[0])}"
    for ours, theirs in zip(*nodes, strict=True):
        if ours != theirs:
            return f"node {theirs.op_type} {theirs.name or (theirs.output[0] if theirs.output else '')!r} differs"
    return "its inputs, outputs, metadata or described shapes differ"
