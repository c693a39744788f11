"""The main graph of a model, or of a copy with the same nodes, with its constants and quantised numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto

from cpd_onnx.fitting.moved import Moved
from cpd_onnx.fitting.stored import Scale
from cpd_onnx.ir.model import Array, Model, attributes_of, constant_array
from cpd_onnx.ir.tensors import constant_tensors
from cpd_onnx.ops.evaluate import Call, compute_outputs
from cpd_onnx.ops.quantized_view import Packing, level_of
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.rules.api import FLOATS, Quantized
from cpd_onnx.shapes.editor import Editor
from cpd_onnx.shapes.values import Folded, Use


class Graph:
    """The main graph: nodes by position, and what is known of tensors by name.

    Attributes:
        model: The model.
        scope: The main graph of the original.
        uses: Number of input slots that take a tensor, by name.
    """

    def __init__(self, folded: Folded, model: Model) -> None:
        """Read the nodes of a model that has those of an original."""
        self.model, self.scope = model, folded.scope
        self._editor = Editor(model)
        self.uses = Counter(name for uses in self.scope.consumers.values() for name in self._names(uses))

    def _names(self, uses: Iterable[Use]) -> Iterator[str]:
        """Yield the names at the corresponding inputs in the copy."""
        for use in uses:
            node = self._editor.node(use.scope, use.node) if not use.scope.function else use.scope.nodes[use.node]
            yield node.input[use.slot]

    def node(self, position: int) -> NodeProto:
        """Return the node at a position."""
        return self._editor.node(self.scope, position)

    def maker(self, name: str) -> NodeProto | None:
        """Return the node of the main graph that makes a tensor."""
        position = self.scope.producers.get(name)
        return None if position is None else self.node(position)

    def only_user(self, name: str) -> NodeProto | None:
        """Return the only user of a tensor, if that is a node of the main graph."""
        uses = self.scope.consumers.get(name, [])
        if len(uses) != 1 or uses[0].scope is not self.scope or name in self.scope.outputs:
            return None
        return self.node(uses[0].node)

    def constant(self, name: str) -> Array | None:
        """Return the values of a constant, which may be dequantised or `moved`; None for other tensors."""
        while not self.model.has(name):
            node = self.maker(name)
            if node is not None and traits_of(node).is_constant:
                return next((array for a in node.attribute if (array := constant_array(a)) is not None), None)
            if node is not None and traits_of(node).is_quantizer:
                return self._dequantised(node)
            if node is None or not self.passes_on(node):
                moved = self.moved(name)
                return None if moved is None else moved.array(self.model)
            name = node.input[0]
        return self.model.array(name)

    def passes_on(self, node: NodeProto) -> bool:
        """Return whether a node returns its input, but for the precision of floating-point numbers.

        Exporters put an Identity behind constants that several nodes share, and a Cast behind those that are stored in
        half precision.
        """
        names = node.input[0] if node.input else "", node.output[0]
        return traits_of(node).is_identity or (traits_of(node).casts and {*map(self.type_of, names)} <= FLOATS)

    def type_of(self, name: str) -> int:
        """Return the element type of a tensor (`onnx.TensorProto`); 0 if it is not known."""
        value = self.scope.values.get(name)
        return self.kind(name) if value is None else value.dtype

    def _dequantised(self, node: NodeProto) -> Array | None:
        """Return the real numbers that a node dequantises with one scale, or one each along its axis."""
        array, level = self.constant(node.input[0]), level_of(node, (1, 2), self.constant)
        if array is None or array.dtype.kind not in "iu":
            return None
        if level is not None:
            return level.real(array)
        scale = self.scale(node.input, (1, 2), 1)
        given = attributes_of(node)
        if scale is None or given.get("block_size", 0) or not array.ndim:
            return None
        spread = Quantized(None, None, given.get("axis", 1) % array.ndim)
        scales, zeros = (spread.aligned(numbers, array.shape) for numbers in (scale.values, scale.zero_point))
        return np.asarray((array - zeros) * scales, np.float32)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in the original; empty if it is not known."""
        value = self.scope.values.get(name)
        return (value.shape if value is not None else None) or ()

    def zero_points(self, name: str) -> Array | None:
        """Return zero points, which some exporters compute from their number."""
        found = self.constant(name) if name else None
        maker = self.maker(name) if found is None else None
        if maker is None:
            return found
        values = [self.zero_points(each) for each in maker.input]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        outputs = compute_outputs(maker.op_type, Call(attributes_of(maker), self.model.opset), known)
        return None if outputs is None else outputs[0]

    @cached_property
    def _constants(self) -> dict[str, TensorProto]:
        """The tensors that Constant nodes hold, by name."""
        return constant_tensors(self.model)

    def held_type(self, name: str) -> tuple[int, tuple[int, ...]] | None:
        """Return element type and shape of an initializer or a Constant node; None for other tensors."""
        tensor = self.model.tensor(name) if self.model.has(name) else self._constants.get(name)
        return None if tensor is None else (tensor.data_type, tuple(tensor.dims))

    def kind(self, name: str) -> int:
        """Return the element type of an initializer or a Constant node (`onnx.TensorProto`); 0 for other tensors."""
        found = self.held_type(name)
        return 0 if found is None else found[0]

    def moved(self, name: str) -> Moved | None:
        """Return a tensor that nodes make by moving the elements of initializers, each of which it has once.

        None for other tensors, and where anything else uses what the nodes take or make.
        """
        sources: dict[str, int] = {}
        slots: Counter[str] = Counter()
        places, size = self._places(name, sources, slots), self._elements(sources)
        if places is None or places.size != size or any(self.uses[each] != count for each, count in slots.items()):
            return None
        if len({self.kind(source) for source in sources}) > 1 or not slots.keys().isdisjoint(self.scope.outputs):
            return None
        is_whole = (np.bincount(places.ravel(), minlength=size) == 1).all()
        return Moved(tuple(sources), places) if is_whole else None

    def _places(self, name: str, sources: dict[str, int], slots: Counter[str]) -> npt.NDArray[np.int64] | None:
        """Return the numbers of a tensor's elements in its sources laid end to end; None if they are not moved ones.

        Args:
            name: The tensor.
            sources: Initializers so far, with the number of the first element of each.
            slots: Number of input slots of the nodes so far that take a tensor.
        """
        held, node, value = self.held_type(name), self.maker(name), self.scope.values.get(name)
        if value is None or value.constants is None:
            return None
        if held is not None and held[0] in FLOATS:
            if name not in sources:
                sources[name] = self._elements(sources)
            return np.arange(math.prod(held[1])).reshape(held[1]) + sources[name]
        row = None if node is None else traits_of(node)
        if node is None or row is None or not (row.moves_elements and (not row.casts or self.passes_on(node))):
            return None
        if row.casts or row.is_identity:
            slots[node.input[0]] += 1
            return self._places(node.input[0], sources, slots)
        inputs: list[Array | None] = []
        for slot, given in enumerate(node.input):
            is_moved = slot in range(*slice(*row.moved).indices(len(node.input)))
            slots.update([given] if is_moved else [])
            inputs.append(self._places(given, sources, slots) if is_moved else self.constant(given) if given else None)
            if given and inputs[-1] is None:
                return None
        call = Call(attributes_of(node), self.model.opset, len(node.output))
        outputs = compute_outputs(node.op_type, call, inputs)
        return None if outputs is None else np.asarray(outputs[list(node.output).index(name)], np.int64)

    def _elements(self, names: Iterable[str]) -> int:
        """Return the number of elements of some initializers or Constant nodes."""
        return sum(math.prod(found[1]) for found in map(self.held_type, names) if found is not None)

    def is_held(self, name: str) -> bool:
        """Return whether a tensor is an initializer or a Constant node."""
        return self.held_type(name) is not None

    def scale(
        self, names: Sequence[str], slots: tuple[int, int], users: int, packing: Packing | None = None
    ) -> Scale | None:
        """Return the scales and zero points at some slots, whose initializer has that many users if it is not shared.

        None if they are not float32, or not constant.
        """
        name, zero_name = (names[slot] if 0 <= slot < len(names) else "" for slot in slots)
        scales, zeros = self.constant(name) if name else None, self.zero_points(zero_name)
        if scales is None or scales.dtype != np.float32 or (zero_name and zeros is None):
            return None
        middle = 0 if packing is None else packing.middle
        numbers = np.full(1, middle) if zeros is None else zeros if packing is None else packing.zero_points(zeros)
        points = numbers.astype(np.float64).ravel()
        if points.size not in (1, scales.size) or not np.isfinite(scales).all() or not scales.all():
            return None
        points = points[:1] if (points == points[0]).all() else points
        is_own = self.is_held(name)
        is_zero_own = self.is_held(zero_name) and self.uses[zero_name] == users
        return Scale(
            name if is_own else "", scales.astype(np.float64).ravel(), points, zero_name if is_zero_own else "",
            is_own and self.uses[name] == users and name not in self.scope.outputs,
        )  # fmt: skip  # what and how

    def is_passed(self, node: NodeProto) -> bool:
        """Return whether a node quantises, dequantises or changes nothing."""
        row, kinds = traits_of(node), [self.scope.values.get(name) for name in (node.input[0], node.output[0])]
        if row.casts:
            return None not in kinds and len({value.dtype for value in kinds if value is not None}) == 1
        return row.is_quantizer
