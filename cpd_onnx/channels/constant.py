"""Constant channels: channels of a tensor that have the same value for every input, by the weights alone.

A channel p of a tensor is constant with value c if every element whose index holds p is c. It begins where a row of
weights is zero, so that only the bias remains, and is followed through the graph: a rectifier makes a negative constant
zero, a product with zero is zero. Only what holds for every finite input counts; all else is unknown, which is safe.
Numbers below `NEGLIGIBLE` count as zero.

The facts remain true when further weights along summed axes become zero, as pruning makes them: no constant is computed
from products that are not zero.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, helper

from cpd_onnx.algebra.atoms import NOTHING, Axis, Mask
from cpd_onnx.channels.groups import Combed
from cpd_onnx.channels.weights import dequantized
from cpd_onnx.errors import UnsupportedError
from cpd_onnx.ir.model import Array, attributes_of, element_type
from cpd_onnx.ops.evaluate import EVALUATORS, Call, compute_outputs
from cpd_onnx.ops.matrix_view import AFFINE, key_of
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.rules import RULES
from cpd_onnx.rules.elementwise import broadcasting, prelu, unary
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.shapes.values import COMPUTABLE_TYPES, Scope, Value

Known: TypeAlias = dict[int, float]
"""Values of the constant channels of a tensor by their primitive atom."""
NEGLIGIBLE = 2.0**-100
"""Absolute value below which a weight or a constant counts as zero: training with weight decay leaves such numbers in
place of zeros, most of them subnormal. Heuristic: their products are lost in the rounding of any sum with terms above
2^-76 of the largest activation."""
_ELEMENTWISE = (unary, broadcasting, prelu)
"""Rules of elementwise operators."""
_FILLINGS = ("value", "extrapolation_value")
"""Attributes with the number that fills new elements."""


@dataclass(frozen=True, eq=False)
class _Operand:
    """A tensor at an input slot, or an output, with the atoms of its axes there."""

    value: Value
    axes: list[Axis]

    @property
    def is_constant(self) -> bool:
        return self.value.constants is not None


class Constants:
    """The constant channels of all activations of a model.

    Attributes:
        known: Constant channels of each activation that has any.
    """

    def __init__(self, combed: Combed) -> None:
        """Follow the constants through the graph and its subgraphs, in the order of the nodes."""
        self.known: dict[Value, Known] = {}
        self._combed = combed
        self._at_slot = {use.use.key: use.axes for weight in combed.weights for use in weight.uses}
        self._arrays: dict[Value, Array | None] = {}
        self._summed = _summed_axes(combed)
        self._sessions: dict[Hashable, ort.InferenceSession | None] = {}
        for scope in combed.folded.scope.walk():
            if scope.function:
                continue
            for position in range(len(scope.nodes)):
                self._visit(scope, position)

    def zeros(self, value: Value) -> set[int]:
        """Return the primitive atoms of the channels of an activation that are zero for every input."""
        return {p for p, constant in self.known.get(value, {}).items() if constant == 0}

    def array(self, value: Value) -> Array | None:
        """Return the real numbers that a constant stands for; None if they are not known.

        They are read anew at each call for a stored weight, as all weights together may not fit into memory.
        """
        weight = self._combed.weight_of.get(value)
        if weight is not None and self._combed.is_divided(weight.axes[0]):
            return None  # its columns are other channels in each block of rows
        if weight is not None:
            return dequantized(self._combed, weight)
        if value not in self._arrays:
            self._arrays[value] = self._moved(value) if value.value is None else value.value
        return self._arrays[value]

    def _moved(self, value: Value) -> Array | None:
        """Return a constant whose elements are those of others, rearranged or dequantised."""
        found = next(((s, s.producers[value.name]) for s in self._scopes() if s.values.get(value.name) is value), None)
        if found is None:
            return None
        scope, node = found[0], found[0].nodes[found[1]]
        given = [self.array(v) if (v := scope.lookup(name)) is not None else None for name in node.input]
        if not given or given[0] is None:
            return None
        if traits_of(node).is_quantizer and value.dtype in COMPUTABLE_TYPES:
            return given[0]  # of a stored weight, dequantised already
        if not traits_of(node).moves_elements or node.op_type not in EVALUATORS:
            return None
        call = Call(attributes_of(node), scope.opset, len(node.output))
        outputs = compute_outputs(node.op_type, call, given)
        array = None if outputs is None else outputs[list(node.output).index(value.name)]
        return array if array is not None and array.shape == value.shape else None

    def _scopes(self) -> Iterator[Scope]:
        return (s for s in self._combed.folded.scope.walk() if not s.function)

    def _visit(self, scope: Scope, position: int) -> None:
        node = scope.nodes[position]
        inputs = [self._operand(scope, position, slot, name) for slot, name in enumerate(node.input)]
        for number, name in enumerate(node.output):
            tensor = self._combed.tensors.get((scope.path, name))
            if not name or tensor is None or tensor.axes is None or tensor.is_constant:
                continue
            found = self._result(scope, node, number, inputs, _Operand(tensor.value, tensor.axes))
            if found:
                self.known[tensor.value] = {p: 0.0 if abs(c) < NEGLIGIBLE else c for p, c in found.items()}

    def _operand(self, scope: Scope, position: int, slot: int, name: str) -> _Operand | None:
        value = scope.lookup(name) if name else None
        if value is None:
            return None
        axes = self._at_slot.get((scope.path, position, slot))
        tensor = self._combed.tensor_of.get(value)
        return _Operand(value, axes if axes is not None else (tensor.axes if tensor is not None else None) or [])

    def _result(
        self, scope: Scope, node: NodeProto, number: int, inputs: Sequence[_Operand | None], out: _Operand
    ) -> Known:
        """Return the constant channels of an output."""
        row = traits_of(node)
        if row.sums_products and number == 0:
            return self._sum_of_products(scope, node, inputs, out)
        if key_of(node) in AFFINE and RULES.get(key_of(node)) not in _ELEMENTWISE:
            return self._affine(scope, node, inputs, out) if number == 0 else {}
        if not any(operand is not None and operand.value in self.known for operand in inputs):
            return {} if not row.annihilates else self._annihilated(inputs, out)
        if row.moves_elements and not row.casts:
            slots = row.carried(len(inputs))
            return self._same([inputs[slot] for slot in slots], out, is_aligned=row.selects_by_input and len(slots) > 1)
        if RULES.get(key_of(node)) in _ELEMENTWISE and number == 0 and not row.is_random:
            found = self._elementwise(scope, node, inputs, out)
            return found if not row.annihilates else found | self._annihilated(inputs, out)
        is_real = out.value.dtype in COMPUTABLE_TYPES  # the zero of quantised numbers is their zero point
        is_zero_kept = (row.maps_zeros_to_zeros and is_real) or (row.is_quantizer and row.keeps_zeros)
        if is_zero_kept and number == 0 and self._fills_with_zeros(node, row.fill_slot, inputs):
            return self._zeros_of(inputs[0], out)
        return {}

    def _places(self, operand: _Operand) -> dict[int, int]:
        """Return the primitives on exactly one axis of a tensor, with the number of the axis from the end."""
        found: dict[int, int] = {}
        twice: set[int] = set()
        for place, axis in enumerate(operand.axes):
            if self._combed.atoms.all_frozen(axis):
                continue
            for p in np.unique(self._combed.atoms.parts(axis)).tolist():
                twice.update([p] if p in found else [])
                found[p] = place - len(operand.axes)
        return {p: place for p, place in found.items() if p not in twice and p != NOTHING}

    def _channels(self, operand: _Operand | None) -> Known:
        """Return the constant channels of an operand: of an activation as far as known, of a constant by its values."""
        if operand is None:
            return {}
        if not operand.is_constant:
            return self.known.get(operand.value, {})
        array = self.array(operand.value)
        if array is None or array.shape != tuple(map(len, operand.axes)):
            return {}
        found: Known = {}
        for place in set(self._places(operand).values()):
            rows = np.moveaxis(array, place, 0).reshape(array.shape[place], -1)
            if not rows.size:
                continue
            steady = np.where((rows == rows[:, :1]).all(axis=1), rows[:, 0].astype(np.float64), np.nan)
            steady[np.abs(steady) < NEGLIGIBLE] = 0.0
            found |= self._by_primitive(operand.axes[place], steady)
        return found

    def _by_primitive(self, axis: Axis, values: Array) -> Known:
        """Return the value of each primitive of an axis, from one value per index (NaN where it varies)."""
        parts = self._combed.atoms.parts(axis)
        found: Known = {}
        varying = {NOTHING, *parts[np.isnan(values)].ravel().tolist()}
        for row, value in zip(parts.tolist(), values.tolist(), strict=True):
            for p in row:
                if p not in varying and found.setdefault(p, value) != value:
                    varying.add(p)
        return {p: value for p, value in found.items() if p not in varying}

    def _uniform(self, operand: _Operand) -> float | None:
        """Return the number that all elements of a constant equal; None if they differ or are not known."""
        array = self.array(operand.value) if operand.is_constant else None
        if array is None or not array.size or not bool((array == array.flat[0]).all()):
            return None
        return float(array.flat[0])

    def _at(self, operand: _Operand, out: Mapping[int, int]) -> Known:
        """Return the constant channels of an operand that is broadcast, aligned with those of the output."""
        places, held = self._places(operand), self._primitives(operand)
        known = self._channels(operand)
        found = {p: known[p] for p, place in out.items() if p in known and places.get(p) == place}
        number = self._uniform(operand)
        return found if number is None else found | {p: number for p in out if p not in held}

    def _primitives(self, operand: _Operand) -> set[int]:
        atoms = self._combed.atoms
        parts = [atoms.parts(axis).ravel().tolist() for axis in operand.axes if not atoms.all_frozen(axis)]
        return set().union(*parts) - {NOTHING}

    def _elementwise(self, scope: Scope, node: NodeProto, inputs: Sequence[_Operand | None], out: _Operand) -> Known:
        """Compute an elementwise operator on the channels that are constant in all operands."""
        places = self._places(out)
        first = RULES[key_of(node)] is unary  # further inputs are bounds
        data = [operand for operand in (inputs[:1] if first else inputs) if operand is not None]
        known = [self._at(operand, places) for operand in data]
        channels = sorted(set(places).intersection(*known))
        if not data or not channels or any(operand.value.dtype not in COMPUTABLE_TYPES for operand in (*data, out)):
            return {}
        feeds: list[Array | None] = [
            np.asarray([each[p] for p in channels], element_type(operand.value.dtype))
            for each, operand in zip(known, data, strict=True)
        ]
        if len(data) != sum(operand is not None for operand in inputs):
            feeds += [None if operand is None else self.array(operand.value) for operand in inputs[1:]]
            if any(array is None and operand is not None for array, operand in zip(feeds, inputs, strict=True)):
                return {}
        values = self._computed(node, scope.opset, feeds, out.value.dtype)
        if values is None or values.shape != (len(channels),):
            return {}
        return {p: float(c) for p, c in zip(channels, values.tolist(), strict=True) if np.isfinite(c)}

    def _computed(self, node: NodeProto, opset: int, feeds: Sequence[Array | None], dtype: int) -> Array | None:
        """Return the first output of an elementwise node: of a rectifier by numpy, of others by onnxruntime."""
        if traits_of(node).is_rectifier and feeds[0] is not None:
            return np.asarray(np.maximum(feeds[0], 0))
        attributes = b"".join(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
        kinds = tuple(None if array is None else (array.dtype.str, array.ndim) for array in feeds)
        key = (*key_of(node), opset, attributes, kinds, dtype)
        if key not in self._sessions:
            self._sessions[key] = _session_of(node, opset, feeds, dtype)
        session = self._sessions[key]
        feed = {f"input{slot}": array for slot, array in enumerate(feeds) if array is not None}
        try:
            return None if session is None else execute(session, feed)[0]
        except UnsupportedError:
            return None

    def _annihilated(self, inputs: Sequence[_Operand | None], out: _Operand) -> Known:
        """Return the channels of a product that are zero because those of an operand are."""
        if out.value.dtype not in COMPUTABLE_TYPES:
            return {}
        places = self._places(out)
        known = [self._at(operand, places) for operand in inputs if operand is not None]
        return {p: 0.0 for each in known for p, value in each.items() if value == 0}

    def _same(self, inputs: Sequence[_Operand | None], out: _Operand, *, is_aligned: bool) -> Known:
        """Return the channels that have the same value in all operands whose elements the output consists of."""
        places, found = self._places(out), list[Known]()
        held = set[int]()
        for operand in filter(None, inputs):
            own = self._primitives(operand)
            known = self._at(operand, places) if is_aligned else self._channels(operand)
            there = known.keys() & (self._places(operand).keys() if not is_aligned else known.keys())
            missing = (set(places) if is_aligned else own) - there
            held |= there
            found.append({p: known[p] for p in there} | dict.fromkeys(missing, np.nan))
        return {
            p: value
            for p in held & places.keys()
            if not np.isnan(value := _agreed(each[p] for each in found if p in each))
        }

    def _zeros_of(self, operand: _Operand | None, out: _Operand) -> Known:
        """Return the channels of the output that are zero in the operand it is computed from."""
        if operand is None or operand.is_constant:
            return {}
        own, places = self._places(operand), self._places(out)
        return {p: 0.0 for p in self.zeros(operand.value) if p in own and p in places}

    def _fills_with_zeros(self, node: NodeProto, slot: int | None, inputs: Sequence[_Operand | None]) -> bool:
        """Return whether new elements, where there are any, are zero."""
        given = attributes_of(node)
        operand = inputs[slot] if slot is not None and slot < len(inputs) else None
        return not any(given.get(name) for name in _FILLINGS) and (operand is None or self._uniform(operand) == 0)

    def _affine(self, scope: Scope, node: NodeProto, inputs: Sequence[_Operand | None], out: _Operand) -> Known:
        """Return the constant channels of a normalisation with stored statistics: constant input, or scale zero."""
        if len([name for name in node.output if name]) > 1 or scope.opset < 7 or len(out.axes) < 2 or not inputs[0]:
            return {}

        def constant(name: str) -> Array | None:
            value = scope.lookup(name)
            return self.array(value) if value is not None and value.constants is not None else None

        with np.errstate(invalid="ignore"):  # a variance below zero gives NaN, which is not zero
            found = AFFINE[key_of(node)](node, node.input[0], (1, 1 - len(out.axes)), constant)
        if found is None or found.factor.shape != (len(out.axes[1]),) or found.addend.shape != found.factor.shape:
            return {}
        data = np.full(len(out.axes[1]), np.nan)
        known = self._at(inputs[0], self._places(out)) if inputs[0].value in self.known else {}
        parts = self._combed.atoms.parts(out.axes[1])
        for index, row in enumerate(parts.tolist() if known else []):
            data[index] = next((known[p] for p in row if p in known), np.nan)
        values = np.where(np.abs(found.factor) < NEGLIGIBLE, 0.0, data * found.factor) + found.addend
        places = self._places(out)
        return {p: c for p, c in self._by_primitive(out.axes[1], values).items() if places.get(p) == 1 - len(out.axes)}

    def _sum_of_products(
        self, scope: Scope, node: NodeProto, inputs: Sequence[_Operand | None], out: _Operand
    ) -> Known:
        """Return the channels of a sum of products in which each product has a factor zero: the bias remains."""
        x, w = (inputs[0], inputs[1]) if len(inputs) > 1 else (None, None)
        axes = self._summed.get((x.value, w.value)) if x is not None and w is not None else None
        if x is None or w is None or axes is None:
            return {}
        zero = self._zero_rows(x, w, axes[1]) | self._zero_rows(w, x, axes[0])
        if not zero and x.value not in self.known and w.value not in self.known:
            return {}
        places = self._places(out)
        zero &= places.keys()
        summed = set(self._combed.atoms.parts(w.axes[axes[1]]).ravel().tolist())
        for operand in (x, w):  # groups and batches: products of the same channel of both
            zero |= (self.zeros(operand.value) & self._places(operand).keys() & places.keys()) - summed
        if not zero:
            return {}
        found = dict.fromkeys(zero, 0.0)
        for operand in filter(None, inputs[2:]):
            known, held, number = self._channels(operand), self._primitives(operand), self._uniform(operand)
            factor = attributes_of(node).get("beta", 1.0)
            added = {p: known.get(p, np.nan) if p in held else (np.nan if number is None else number) for p in found}
            found = {p: found[p] + factor * added[p] for p in found}
        return {p: value for p, value in found.items() if np.isfinite(value)}

    def _zero_rows(self, x: _Operand, w: _Operand, summed: int) -> set[int]:
        """Return the primitives of the axes of a constant that are not summed along which it is zero.

        Elements that are multiplied by a channel of `x` that is zero do not count.
        """
        array = self.array(w.value) if w.is_constant else None
        if array is None or array.shape != tuple(map(len, w.axes)):
            return set()
        return set().union(*(
            {p for p, value in self._by_primitive(w.axes[place], rows).items() if value == 0}
            for place, rows in self._rows(array, w, summed, self.zeros(x.value))
        ))  # fmt: skip  # a generator in a call

    def _rows(self, array: Array, w: _Operand, summed: int, zeros: set[int]) -> Iterator[tuple[int, Array]]:
        """Yield each axis that is not summed and has a zero row, with 0 for such rows and NaN for the others."""
        parts = self._combed.atoms.parts(w.axes[summed])
        used: Mask = ~np.asarray(np.isin(parts, list(zeros)).any(axis=1))
        filled = nonzero(array if used.all() else np.compress(used, array, axis=summed))
        for place in range(array.ndim):
            rows = np.asarray(filled.any(axis=tuple(i for i in range(array.ndim) if i != place)))
            if place != summed and not rows.all() and not self._combed.atoms.all_frozen(w.axes[place]):
                yield place, np.where(rows, np.nan, 0.0)


def nonzero(array: Array) -> Mask:
    """Return which elements are not zero, nor negligible; those that are not numbers are not zero."""
    return ~np.asarray(np.abs(array) < NEGLIGIBLE)


def _summed_axes(combed: Combed) -> dict[tuple[Value, Value], tuple[int, int]]:
    """Return the axes that pairs of factors are summed over; without pairs that are summed over several."""
    found: dict[tuple[Value, Value], tuple[int, int]] = {}
    doubtful = set()
    for product in combed.recorder.products:
        for left in product:
            for right in product:
                key, axes = (left.value, right.value), (left.axis, right.axis)
                if left is not right and found.setdefault(key, axes) != axes:
                    doubtful.add(key)
    return {key: axes for key, axes in found.items() if key not in doubtful and key[0] is not key[1]}


def _agreed(values: Iterable[float]) -> float:
    """Return the number that all values are; NaN if they differ."""
    return reduce(lambda left, right: left if left == right else np.nan, values)


def _session_of(node: NodeProto, opset: int, feeds: Sequence[Array | None], dtype: int) -> ort.InferenceSession | None:
    """Return a session that computes an elementwise node on vectors of any length; None if onnxruntime cannot."""
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = ["" if array is None else f"input{slot}" for slot, array in enumerate(feeds)]
    copy.output[:] = ["output"]
    proto = ModelProto(ir_version=8)
    proto.opset_import.extend([helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)])
    proto.graph.name = "constant_channels"
    proto.graph.node.append(copy)
    for slot, array in enumerate(feeds):
        if array is not None:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            shape = ["channels"] if array.ndim else []
            proto.graph.input.append(helper.make_tensor_value_info(f"input{slot}", kind, shape))
    proto.graph.output.append(helper.make_tensor_value_info("output", dtype, None))
    try:
        return open_model(proto, optimise=False, threads=1)
    except UnsupportedError:
        return None
