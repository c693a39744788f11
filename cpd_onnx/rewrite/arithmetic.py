"""Shape arithmetic of a pruned model, computed from the sizes of its surviving axes."""

from __future__ import annotations

from collections.abc import Container

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.groups import Combed
from cpd_onnx.ir.model import Array, attributes_of, constant_array
from cpd_onnx.ops.evaluate import Call, compute_outputs
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.editor import Editor
from cpd_onnx.shapes.values import Scope, Value


class Arithmetic:
    """Values of the shape tensors of an edited model under the first binding of the open sizes."""

    def __init__(self, combed: Combed, keep: KeepMask, editor: Editor, dead: Container[int] = ()) -> None:
        """Compute all values, in the order of the graph, except those of `dead` nodes of the main graph."""
        self._combed, self._keep, self._editor, self._dead = combed, keep, editor, dead
        self._values: dict[tuple[str, str], Array] = {}
        for scope in combed.folded.scope.walk():
            if not scope.function:
                self._sweep(scope)

    def value(self, scope: Scope, name: str) -> Array | None:
        """Return the elements of the tensor that a name refers to in a scope; None if they are unknown."""
        for here in scope.outwards():
            if (here.path, name) in self._values:
                return self._values[(here.path, name)]
            original = here.values.get(name)
            if original is not None:
                return self._constant(here, original) if original.weight is not None else original.value
        return self._editor.model.array(name) if self._editor.model.has(name) else None

    def _sweep(self, scope: Scope) -> None:
        for position, original in enumerate(scope.nodes):
            values = [scope.values.get(name) for name in original.output]
            if not scope.path and position in self._dead:
                continue
            if position in scope.bodies or not values or any(v is None or v.values is None for v in values):
                continue
            if values[0] is None or values[0].weight is not None:
                continue
            outputs = self._computed(scope, self._editor.node(scope, position))
            for name, output in zip(original.output, outputs, strict=False):
                self._values[(scope.path, name)] = output

    def _computed(self, scope: Scope, node: NodeProto) -> tuple[Array, ...]:
        """Return the outputs of a node; an empty tuple if they cannot be computed."""
        call = Call(attributes_of(node), scope.opset)
        if traits_of(node).reads_sizes:
            sizes = np.asarray(self._shape(scope, node.input[0]), np.int64)
            if traits_of(node).multiplies_sizes:
                return (np.asarray(sizes.prod(), np.int64),)
            return (sizes[slice(call.get("start", 0), call.get("end"))],)
        inputs = [self.value(scope, name) if name else None for name in node.input]
        if any(array is None and name for array, name in zip(inputs, node.input, strict=True)):
            return ()
        with np.errstate(all="ignore"):
            return compute_outputs(node.op_type, call, inputs) or ()

    def _shape(self, scope: Scope, name: str) -> list[int]:
        for here in scope.outwards():
            tensor = self._combed.tensors.get((here.path, name))
            if tensor is not None and tensor.axes is not None:
                return [self._keep.count(axis) for axis in tensor.axes]
            value = here.values.get(name)
            if value is not None:
                new = self._constant(here, value) if value.weight is not None else None
                return list(new.shape if new is not None else value.shape or ())
        return []

    def _constant(self, scope: Scope, value: Value) -> Array | None:
        """Return a weight of the edited model."""
        if isinstance(value.source, AttributeProto):
            attribute = next(
                a for a in self._editor.constant_node(scope, value.name).attribute if a.name == value.source.name
            )
            return constant_array(attribute)
        if isinstance(value.source, TensorProto) and not scope.address and self._editor.model.has(value.name):
            return self._editor.model.array(value.name)
        return value.value
