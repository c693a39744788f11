"""Combing: find the coupled channels of a model in one forward sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from cpd_onnx.algebra.atoms import NOTHING, Atoms, Axis, Mask
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.algebra.reasons import Reason
from cpd_onnx.channels.balanced import is_finer, merged_convolutions
from cpd_onnx.channels.constraints import (
    freeze_last_channels,
    freeze_positions,
    freeze_uneditable,
    freeze_ungrouped,
)
from cpd_onnx.channels.groups import Combed, Swept, Weight, WeightUse, grouped, is_vector
from cpd_onnx.channels.weights import weight_array
from cpd_onnx.ir.model import ModelSource, attributes_of, bodies_of, load, translate_errors
from cpd_onnx.ops.evaluate import Call
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.rules import FLOATS, RULES, GiveUp, Op, Recorder, Tensor
from cpd_onnx.shapes.inference import fold, fold_again
from cpd_onnx.shapes.order import all_inputs
from cpd_onnx.shapes.values import Folded, Scope, Use, Value, taken_branch

_UNFOLLOWED = "uses this in a subgraph that is not followed"
"""Reason for freezing what the subgraph of an operator other than If, Loop and Scan captures."""
_UNPRUNABLE_TYPES = {TensorProto.STRING, TensorProto.UNDEFINED}
"""Element types of constants that are never sliced."""


def comb(source: ModelSource | Folded, input_shapes: Mapping[str, Sequence[int]] | None = None) -> Combed:
    """Find the coupled channels of a model, whose open input sizes `input_shapes` may fix.

    Raises ModelError if the graph has a cycle or uses a tensor that no node, input or initializer defines.
    """
    model = source.model if isinstance(source, Folded) else load(source)
    with translate_errors(model):
        folded = source if isinstance(source, Folded) else fold(model, input_shapes)
        found: Combed | None = _combed(folded, frozenset())
        while found is not None:
            best, found = found, _finer(found)
        return best


def _finer(combed: Combed) -> Combed | None:
    """Return the analysis of a model by which more of it is prunable, where more convolutions lose channels by group.

    None if there is none.
    """
    for merged in merged_convolutions(combed):
        found = _combed(combed.folded, combed.recorder.by_group | merged)
        if is_finer(found, combed):
            return found
    return None


def _combed(folded: Folded, by_group: frozenset[tuple[str, int]]) -> Combed:
    """Return the coupled channels, where the groups of some grouped convolutions lose channels of their own."""
    sweep = _Sweep(folded, by_group)
    swept = sweep.run()
    freeze_positions(swept)
    freeze_uneditable(swept)
    freeze_last_channels(swept)
    groups = grouped(swept)
    freeze_ungrouped(swept, groups)
    return Combed(
        swept.folded, swept.atoms, swept.recorder, swept.tensors, swept.weights,
        groups, sweep.without_rule, sweep.unaccounted,
    )  # fmt: skip  # its fields


def sweep(folded: Folded, by_group: frozenset[tuple[str, int]] = frozenset()) -> Swept:
    """Return the result of the sweep over a model, before constraints are applied and channels are grouped."""
    with translate_errors(folded.model):
        return _Sweep(folded, by_group).run()


def at_sizes(combed: Combed, keep: KeepMask, numbers: Mapping[str, int]) -> tuple[Combed, KeepMask] | None:
    """Comb the model again with other values of its open sizes, and return it with the same channels removed.

    None if the same indices of the weights cannot be removed there, because channels are coupled differently.
    """
    here = comb(fold_again(combed.folded, combed.folded.model, numbers))
    known = {(w.scope.path, w.value.name): w for w in combed.weights}
    removed, surviving = (np.zeros(len(here.atoms), np.bool_) for _ in range(2))
    wanted: list[tuple[Axis, Mask]] = []
    for weight in here.weights:
        counterpart = known.get((weight.scope.path, weight.value.name))
        uses = {use.use.key: use for use in counterpart.uses} if counterpart is not None else {}
        for use in weight.uses:
            if use.use.key not in uses:
                continue
            there, own = combed.pieces(uses[use.use.key].axes), here.pieces(use.axes)
            if len(there) != len(own):
                return None
            pairs = (pair for old, new in zip(there, own, strict=True) for pair in zip(old.axes, new.axes, strict=True))
            for other, axis in pairs:
                mask, parts = keep.mask(other), here.atoms.parts(axis)
                removed[parts[~mask]], surviving[parts[mask]] = True, True
                wanted.append((axis, mask))
    removed[NOTHING] = False
    found = KeepMask(here.atoms, np.flatnonzero(removed & ~surviving))
    return (here, found) if all(np.array_equal(found.mask(axis), mask) for axis, mask in wanted) else None


def _owner(scope: Scope, name: str) -> Scope:
    """Return the scope that defines a name, seen from a scope inside."""
    return next(here for here in scope.outwards() if name in here.values)


def _about(node: NodeProto, text: str) -> Reason:
    """Return a reason that concerns a node."""
    return Reason("operator", f"{node.op_type} {node.name!r}", text)


def _flow(text: str) -> Reason:
    """Return a reason that concerns If, Loop, Scan or a call of a function, not a single operator."""
    return Reason("structure", "", text)


class _Sweep:
    """The sweep over a model, node by node, which collects the content of `Swept`."""

    def __init__(self, folded: Folded, by_group: frozenset[tuple[str, int]]) -> None:
        self.folded = folded
        self.atoms = Atoms()
        self.recorder = Recorder(by_group=by_group)
        self.tensors: dict[tuple[str, str], Tensor] = {}
        self.uses: dict[Value, list[WeightUse]] = {}
        self.shared: dict[Value, list[Axis]] = {}
        self.without_rule: dict[str, str] = {}
        self.unaccounted: list[str] = []
        self.originals: set[Value] = set()

    def run(self) -> Swept:
        scope = self.folded.scope
        for value in scope.values.values():
            if value.name in scope.inputs and value.weight is None:
                self.put(scope, value.name, Tensor(value, self.input_axes(value)))
        self.sweep(scope)
        self.atoms.settle()
        for name in scope.outputs:
            tensor = self.get(scope, name)
            for number, axis in enumerate(tensor.all_axes if tensor is not None else []):
                if not self.is_free(scope.values[name], number) and not self.atoms.all_frozen(axis):
                    self.atoms.freeze(axis, Reason("interface", "", f"graph output {name!r}"))
            self.freeze_reported_sizes(scope, name)
        weights = tuple(
            Weight(value, _owner(uses[0].use.scope, value.name), tuple(uses), value in self.originals)
            for value, uses in self.uses.items()
        )
        return Swept(self.folded, self.atoms, self.recorder, self.tensors, weights)

    def sweep(self, scope: Scope) -> None:
        for position, node in enumerate(scope.nodes):
            if traits_of(node).is_constant:
                continue
            inputs = [self.at_slot(scope, position, slot, name) for slot, name in enumerate(node.input)]
            outputs = [Tensor(scope.values.get(name, Value(name)), None) for name in node.output]
            self.node(scope, position, inputs, outputs)
            for tensor in outputs:
                self.complete(tensor, _about(node, "makes this axis"))
                if tensor.value.name:
                    self.put(scope, tensor.value.name, tensor)

    def node(self, scope: Scope, position: int, inputs: list[Tensor | None], outputs: list[Tensor]) -> None:
        """Apply the rule of a node, or enter its bodies, and check that every axis is accounted for."""
        node = scope.nodes[position]
        if position in scope.bodies:
            self.enter(scope, position, inputs, outputs)
            return
        domain = "" if node.domain == "ai.onnx" else node.domain
        where = f"{domain}::{node.op_type}" if domain else node.op_type
        if bodies_of(node):
            for name in sorted(all_inputs(node) - set(node.input)):
                self.freeze_original(scope, name, Reason("operator", f"operator {where}", _UNFOLLOWED))
        rule = RULES.get((domain, node.op_type))
        if rule is None:
            self.without_rule.setdefault(where, node.name or node.output[0])
            self.give_up(inputs, outputs, Reason("no rule", f"operator {where}", "has no rule"))
            return
        if not traits_of(node).fills_sizes and self.is_arithmetic(inputs, outputs):
            return
        call = Call(attributes_of(node), scope.opset)
        op = Op(scope, position, call, inputs, outputs, self.atoms, self.recorder)
        marks = len(self.recorder.size_uses), len(self.recorder.costs)
        try:
            rule(op)
        except GiveUp as given:
            reason = Reason("operator", "", str(given))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            text = f"has inputs or attributes that its rule cannot handle ({error})"
            reason = Reason("operator", op.name, text)
            self.unaccounted.append(reason)
        else:
            self.account(op)
            return
        del self.recorder.size_uses[marks[0] :], self.recorder.costs[marks[1] :]
        self.give_up(inputs, outputs, reason)

    def is_arithmetic(self, inputs: list[Tensor | None], outputs: list[Tensor]) -> bool:
        """Return whether a node computes sizes or indices from frozen tensors, which needs no rule."""
        if any(t.value.dtype in FLOATS and t.value.values is None for t in outputs):
            return False
        for tensor in inputs:
            if tensor is not None and (tensor.axes is None or not all(map(self.atoms.all_frozen, tensor.axes))):
                return False
        return True

    def account(self, op: Op) -> None:
        """Freeze the node, and record an error of its rule, unless every input axis is carried on or accounted for."""
        carried = [*op.accounted, *(axis for tensor in op.outputs for axis in tensor.all_axes)]
        doubtful = [  # the same array needs no comparison of atoms
            (slot, number, axis)
            for slot, tensor in enumerate(op.inputs)
            for number, axis in enumerate(tensor.all_axes if tensor is not None else [])
            if not any(axis is other for other in carried) and not self.atoms.all_frozen(axis)
        ]
        settled = {NOTHING}.union(*(self.atoms.parts(a).ravel().tolist() for a in carried)) if doubtful else set()
        for slot, number, axis in doubtful:
            if not settled.issuperset(self.atoms.parts(axis).ravel().tolist()):
                text = f"the rule of {op.name} does not account for axis {number} of input {slot}"
                reason = Reason("operator", "", text)
                self.unaccounted.append(reason)
                for other in (*op.inputs, *op.outputs):  # its other statements are not reliable either
                    self.freeze(other, reason)
                return

    def give_up(self, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], reason: Reason) -> None:
        for tensor in (*inputs, *outputs):
            self.freeze(tensor, reason)
        for tensor in outputs:
            tensor.axes = tensor.elements = None
            self.complete(tensor, reason)

    def complete(self, tensor: Tensor, reason: Reason) -> None:
        """Give frozen axes to a tensor, or to the elements of a sequence, that no rule has given any."""
        if tensor.axes is None:
            tensor.axes = self.frozen_axes(tensor.value, reason)
        if tensor.elements is None and tensor.value.elements is not None:
            tensor.elements = [Tensor(each, self.frozen_axes(each, reason)) for each in tensor.value.elements]

    def freeze(self, tensor: Tensor | None, reason: Reason) -> None:
        for axis in tensor.all_axes if tensor is not None else []:
            if not self.atoms.all_frozen(axis):
                self.atoms.freeze(axis, reason)

    def frozen_axes(self, value: Value, reason: Reason) -> list[Axis] | None:
        """Return frozen axes for a tensor; None if its shape is unknown."""
        return None if value.shape is None else [self.atoms.frozen(size, reason) for size in value.shape]

    def input_axes(self, value: Value) -> list[Axis] | None:
        """Return the axes of a graph input, which are frozen but for those that may lose channels."""
        axes = self.frozen_axes(value, Reason("interface", "", f"graph input {value.name!r}"))
        return axes and [
            self.atoms.fresh(len(axis)) if self.is_free(value, number) else axis for number, axis in enumerate(axes)
        ]

    def is_free(self, value: Value, axis: int) -> bool:
        """Return whether an axis of a graph input or output may lose channels: its size is the same for all inputs."""
        return value.name in self.folded.model.free_io and value.has_fixed(axis)

    def put(self, scope: Scope, name: str, tensor: Tensor) -> None:
        self.tensors[(scope.path, name)] = tensor

    def get(self, scope: Scope, name: str) -> Tensor | None:
        """Return the tensor that a name refers to in a scope; a weight with the atoms that all its uses share."""
        for here in scope.outwards():
            if (here.path, name) in self.tensors:
                return self.tensors[(here.path, name)]
            if name in here.values:
                value = here.values[name]
                return Tensor(value, self.weight_axes(value)) if value.weight is not None else Tensor(value, None)
        return None

    def at_slot(self, scope: Scope, position: int, slot: int, name: str) -> Tensor | None:
        """Return the tensor at an input slot of a node, and record the use of a weight."""
        if not name:
            return None
        tensor = self.get(scope, name)
        if tensor is None or tensor.value.weight is None or (scope.path, name) in self.tensors:
            return tensor
        if is_vector(tensor.value) and not scope.function:
            tensor = Tensor(tensor.value, self.fresh_axes(tensor.value))
        assert tensor.axes is not None
        self.uses.setdefault(tensor.value, []).append(WeightUse(Use(scope, position, slot), tensor.axes))
        return tensor

    def weight_axes(self, value: Value) -> list[Axis]:
        """Return the atoms that all uses of a matrix share."""
        if value not in self.shared:
            self.shared[value] = self.fresh_axes(value)
        return self.shared[value]

    def fresh_axes(self, value: Value) -> list[Axis]:
        shape = value.shape or ()
        if value.dtype in _UNPRUNABLE_TYPES:
            reason = Reason("structure", "", f"{value.name!r} has a type that cannot be sliced")
            return [self.atoms.frozen(size, reason) for size in shape]
        return [self.atoms.fresh(size) for size in shape]

    def enter(self, scope: Scope, position: int, inputs: list[Tensor | None], outputs: list[Tensor]) -> None:
        """Sweep the bodies of If, Loop, Scan and of calls of model-local functions."""
        node, bodies = scope.nodes[position], scope.bodies[position]
        own = traits_of(node)
        if own.branches:
            self.branches(bodies, inputs, outputs)
        elif own.scans and scope.opset < 9:
            self.give_up(inputs, outputs, _flow("Scan had other inputs before opset 9"))
            self.freeze_captured(bodies["body"], _flow("is used in a Scan of before opset 9"))
        elif own.iterates:
            self.rounds(node, bodies["body"], inputs, outputs)
        else:
            self.call(bodies["body"], inputs, outputs)

    def freeze_captured(self, body: Scope, reason: Reason) -> None:
        """Freeze all tensors that a body which is not followed captures."""
        for name in body.consumers:
            self.freeze_original(body, name, reason)

    def freeze_original(self, scope: Scope, name: str, reason: Reason) -> None:
        """Freeze a tensor for a use that is not followed; other uses of a vector may still take a pruned copy."""
        tensor = self.get(scope, name)
        self.freeze(tensor, reason)
        if tensor is not None and tensor.value.weight is not None:
            self.originals.add(tensor.value)

    def call(self, body: Scope, inputs: list[Tensor | None], outputs: list[Tensor]) -> None:
        for name, tensor in zip(body.inputs, inputs, strict=False):
            if tensor is not None:
                self.put(body, name, tensor)
        for value in body.values.values():
            if (
                value.weight is not None
                and (body.path, value.name) not in self.tensors
                and value.name not in body.inputs
            ):
                reason = _flow("lies in a function that several nodes may call")
                self.put(body, value.name, Tensor(value, self.frozen_axes(value, reason)))
        self.sweep(body)
        for tensor, name in zip(outputs, body.outputs, strict=False):
            inner = self.result(body, name)
            tensor.axes = inner.axes if inner is not None else None
            if inner is not None and inner.elements is not None:
                self.freeze(inner, _flow("is an element of a sequence that a function returns"))

    def branches(self, bodies: dict[str, Scope], inputs: list[Tensor | None], outputs: list[Tensor]) -> None:
        """Unite the results of both branches of an If, or follow the branch that always runs."""
        taken = taken_branch(inputs[0].value if inputs[0] is not None else None)
        shapes = {key: tuple(getattr(b.lookup(name), "shape", None) for name in b.outputs) for key, b in bodies.items()}
        if not taken or len(set(shapes.values())) == 1:
            runs, rest = bodies, {}
        else:
            runs, rest = {taken: bodies[taken]}, {key: body for key, body in bodies.items() if key != taken}
        # A branch that never runs is followed too, as far as it has shapes: the file stays consistent.
        for key, body in (runs | rest).items():
            if key in runs or None not in shapes[key]:
                self.sweep(body)
            elif any(v is not None and v.weight is not None and v.shape for v in map(body.lookup, body.consumers)):
                reason = _flow("meets a weight in a branch of an If that never runs and has no shapes")
                self.freeze_captured(body, reason)
        for index, tensor in enumerate(outputs):
            results = [self.result(body, body.outputs[index]) for body in runs.values()]
            self.same(tensor, results, _flow("takes different shapes in the branches of an If"))
            for other in (self.result(body, body.outputs[index]) for body in rest.values()):
                self.alike(tensor, other)

    def alike(self, tensor: Tensor, other: Tensor | None) -> None:
        """Unite the axes of equal size of a result and of the same result of a branch that never runs."""
        if tensor.axes is None or other is None or other.axes is None or len(tensor.axes) != len(other.axes):
            return
        for left, right in zip(tensor.axes, other.axes, strict=True):
            if len(left) == len(right):
                self.atoms.unite(left, right)

    def result(self, body: Scope, name: str) -> Tensor | None:
        """Return an output of a body; a weight returned directly is frozen, unless it is returned alone and is zero."""
        tensor = self.get(body, name)
        if tensor is None or tensor.value.weight is None or (body.path, name) in self.tensors:
            return tensor
        is_alone = name in body.values and name not in body.consumers and not body.function
        if is_alone and self.is_zero(tensor.value, body):
            tensor = Tensor(tensor.value, self.fresh_axes(tensor.value))
            self.put(body, name, tensor)
            self.recorder.returned.append((body, tensor))
        else:
            self.freeze(tensor, _flow("is an output of a subgraph"))
        return tensor

    def is_zero(self, value: Value, scope: Scope) -> bool:
        """Return whether no element of a floating-point weight differs from zero: masked, it is the same."""
        return value.dtype in FLOATS and not weight_array(self.folded.model, Weight(value, scope, (), False)).any()

    def same(self, tensor: Tensor, results: Sequence[Tensor | None], reason: Reason) -> None:
        """Unite the axes of `results`, and give them to `tensor`; freeze those that differ, or all if the ranks do."""
        axes = [r.axes for r in results if r is not None]
        if len(axes) < len(results) or not self.agree(tensor.value, axes):
            self.give_up(results, [tensor], reason)
            return
        columns = zip(*(own or [] for own in axes), strict=True)
        tensor.axes = [
            self.together(column, size, reason) for column, size in zip(columns, tensor.value.shape or (), strict=True)
        ]

    def together(self, axes: Sequence[Axis], size: int, reason: Reason) -> Axis:
        """Unite axes of one size; freeze axes of several, and return one of the size that stands for them."""
        if {*map(len, axes)} == {size}:
            for other in axes[1:]:
                self.atoms.unite(axes[0], other)
            return axes[0]
        for axis in axes:
            self.atoms.freeze(axis, reason)
        return self.atoms.frozen(size, reason)

    @staticmethod
    def agree(value: Value, axes: Sequence[list[Axis] | None]) -> bool:
        if value.shape is None or {None if own is None else len(own) for own in axes} != {len(value.shape)}:
            return False
        return value.has_placeholder or {tuple(map(len, own or [])) for own in axes} == {value.shape}

    def rounds(self, node: NodeProto, body: Scope, inputs: list[Tensor | None], outputs: list[Tensor]) -> None:
        """Follow Loop and Scan: carried states keep their atoms, stacked outputs gain a frozen axis."""
        is_loop, attributes = not traits_of(node).scans, attributes_of(node)
        scans = attributes.get("num_scan_inputs", 0)
        first_in = 2 if is_loop else 0
        states = len(inputs) - first_in - scans
        for index, name in enumerate(body.inputs):
            outer = inputs[index] if index < len(inputs) else None
            inner = Tensor(body.values[name], None)
            if index >= first_in and outer is not None and outer.axes is not None:
                inner.axes = self.per_round(
                    attributes, outer, index - first_in - states, is_scanned=index - first_in >= states
                )
            if inner.axes is None or tuple(map(len, inner.axes)) != inner.value.shape:
                self.freeze(outer, _about(node, "changes its shape between iterations"))
                inner.axes = self.frozen_axes(inner.value, _about(node, "makes this axis"))
            self.put(body, name, inner)
        self.sweep(body)
        skip = 1 if is_loop else 0
        for index, tensor in enumerate(outputs):
            result = self.result(body, body.outputs[index + skip])
            if index < states:
                carried = self.tensors[(body.path, body.inputs[first_in + index])]
                self.same(tensor, [carried, inputs[first_in + index], result], _flow("changes its shape in a loop"))
            else:
                self.stack(attributes, tensor, result, index - states)

    def per_round(self, attributes: dict[str, Any], outer: Tensor, scan: int, *, is_scanned: bool) -> list[Axis] | None:
        axes = list(outer.axes or [])
        if not is_scanned:
            return axes
        where = (attributes.get("scan_input_axes") or [0] * (scan + 1))[scan]
        scanned = axes.pop(where)
        if not self.atoms.all_frozen(scanned):
            self.atoms.freeze(scanned, _flow("is scanned one by one"))
        return axes

    def stack(self, attributes: dict[str, Any], tensor: Tensor, result: Tensor | None, scan: int) -> None:
        if tensor.value.shape is None or result is None or result.axes is None:
            self.freeze(result, _flow("is stacked by a loop to an unknown shape"))
            return
        where = (attributes.get("scan_output_axes") or [0] * (scan + 1))[scan] % len(tensor.value.shape)
        axes = list(result.axes)
        axes.insert(where, self.atoms.frozen(tensor.value.shape[where], _flow("is stacked by a loop")))
        if tuple(map(len, axes)) == tensor.value.shape:
            tensor.axes = axes
        else:
            self.freeze(result, _flow("is stacked by a loop to an unknown shape"))

    def freeze_reported_sizes(self, scope: Scope, output: str) -> None:
        """Freeze the axes whose sizes a graph output reports."""
        makers = {name: node for node in scope.nodes for name in node.output} if scope.values[output].from_shape else {}
        reason = Reason("interface", "", f"graph output {output!r} gives this size")
        waiting, seen = [output], {output}
        while waiting:
            node = makers.get(waiting.pop())
            if node is None:
                continue
            if traits_of(node).reads_sizes:
                self.freeze(self.get(scope, node.input[0]), reason)
                continue
            waiting += [name for name in node.input if name not in seen]
            seen.update(node.input)
