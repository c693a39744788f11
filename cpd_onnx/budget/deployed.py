"""Size of a deployed model: flash and RAM of its program on a control unit, and the file with weights in few bits.

What is counted is what `deploy --c-source` leaves in a compiled program: the weights, with the batch normalisation that
has become part of them, the scales of int8, and the code. A program has no graph and no names; what the file itself
weighs is the target `bytes`, which counts weights in few bits where `deploy --weight-bits` is to store them so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnx import NodeProto, TensorProto

from cpd_onnx.channels.costs import Term
from cpd_onnx.channels.groups import Combed, Weight
from cpd_onnx.ir.model import attributes_of, element_bytes
from cpd_onnx.ops.matrix_view import BOUNDS, key_of, linear_of
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.rewrite.absorbing import tails
from cpd_onnx.rewrite.linear_runs import WEIGHT
from cpd_onnx.shapes.values import COMPUTABLE_TYPES, Folded

STORED = ("int8", "float16")
"""Element types that a model can be deployed in, see `deploy --int8` and `deploy --half float16`."""
STACK = 384
"""Bytes of RAM of a program besides the arena of its activations: the deepest stack, 316 to 620 bytes, as measured of
six networks on a Cortex-M4F (`benchmarks/results/binary.json` and `tiny.json`)."""
_START = {"": 2500.0, "float16": 2500.0, "int8": 6500.0}
"""Bytes of code of a program without its operators: start, exponential function and, for int8, arithmetic of the
library (1.7 to 3.2 kB and 4.8 to 7.4 kB in the same measurement)."""
_OPERATOR = {"": 420.0, "float16": 420.0, "int8": 580.0}
"""Bytes of code of an operator, the mean of a network (300 to 530 and 520 to 690 in the same measurement)."""
_SCALES = 5.0
"""Bytes of the float32 scale and the int8 zero point of each channel of a quantised weight."""
FEWEST = 256
"""Minimum number of elements of a weight that is stored in few bits: a smaller one saves less than its scales and nodes
take (heuristic)."""
_SCALE = 4.0
"""Bytes of the float32 scale of each output of a weight in few bits."""
_MOST_INTEGER = 8
"""Number of bits up to which weights are stored as integers."""
_LEAST_SCALED = 16
"""Minimum number of elements of a table that share a scale (heuristic): they take four times its memory."""
_FEW_BITS = re.compile(r"([0-9.]+) bits and ([0-9]+) B")
_BIAS = 4.0
"""Bytes of each element of a quantised bias, an int32."""


@dataclass(frozen=True)
class FewBits:
    """How a file stores weights in few bits, as text beside the types in `STORED`.

    Attributes:
        mean: Mean number of bits of these weights: up to 8 as integers with scales, 16 as floats.
        rest: Bytes of the file besides its weights and their scales: nodes, names and descriptions.
    """

    mean: float
    rest: float = 0.0

    def __str__(self) -> str:
        """Return the text, as in "4 bits and 20148 B"."""
        return f"{self.mean:.6g} bits and {self.rest:.0f} B"


def few_bits(stored_as: str) -> FewBits | None:
    """Return what a text says of weights in few bits; None for the types in `STORED`.

    >>> few_bits("4 bits and 20148 B"), few_bits("int8")
    (FewBits(mean=4.0, rest=20148.0), None)
    """
    found = _FEW_BITS.fullmatch(stored_as)
    return None if found is None else FewBits(*map(float, found.groups()))


def file_terms(combed: Combed, stored: FewBits) -> list[Term]:
    """Return the bytes of the folded file with weights in few bits as a sum over products of axes."""
    absorbed = _Absorbed(combed.folded)
    each, scale = (stored.mean / 8, 0.0) if stored.mean > _MOST_INTEGER else (1.0, _SCALE)
    terms: list[Term] = [(stored.rest, ())]
    for weight in combed.weights:
        axes, size = tuple(weight.axes[0]), element_bytes(weight.value.dtype)
        if absorbed.holds(weight):
            continue
        is_matrix = weight.value.dtype == TensorProto.FLOAT and not weight.is_vector
        place = _output_axis(weight) if is_matrix and len(weight.uses) == 1 else None
        table = scaled_axis(weight.shape) if is_matrix and place is None and _is_table(weight) else None
        if math.prod(weight.shape) >= FEWEST and place is not None:
            terms += [(stored.mean / 8, axes), (scale, (axes[place],))]
        elif table is not None:
            terms += [(each, axes), (scale, (axes[table],))]
        else:
            terms.append((size, axes))
    return terms


def scaled_axis(shape: Sequence[int]) -> int | None:
    """Return the axis of a table in eight bits whose indices have a scale of their own; None if it is not stored so.

    It is the longest axis, if another one is long enough for a scale to be shared. Tables are matrices that are rounded
    without a fit: those that an operator looks up, the gates of a recurrent one, and weights that several nodes take.

    >>> scaled_axis([1000, 64]), scaled_axis([1, 256, 64]), scaled_axis([1000, 4])
    (0, 1, None)
    """
    if math.prod(shape) < FEWEST or sum(length >= _LEAST_SCALED for length in shape) < 2:
        return None
    return max(range(len(shape)), key=lambda axis: shape[axis])


def element_size(dtype: int, stored_as: str) -> float:
    """Return the bytes of an element of an ONNX type in the deployed model."""
    if dtype not in COMPUTABLE_TYPES:
        return element_bytes(dtype)
    return {"int8": 1.0, "float16": 2.0}.get(stored_as, element_bytes(dtype))


def flash_terms(combed: Combed, stored_as: str) -> list[Term]:
    """Return the bytes of flash of the program as a sum over products of axes."""
    absorbed = _Absorbed(combed.folded)
    terms: list[Term] = []
    for weight in combed.weights:
        if absorbed.holds(weight):
            continue
        axes, dtype = tuple(weight.axes[0]), _computed_as(weight)
        terms.append((_stored_bytes(weight, dtype, stored_as), axes))
        if stored_as == "int8" and dtype == TensorProto.FLOAT and not weight.is_vector:
            terms.append((_SCALES, (axes[_output_axis(weight) or 0],)))
    functions = sum(1 for _ in _functions(combed.folded, absorbed.positions, stored_as))
    return [*terms, (_START[stored_as] + _OPERATOR[stored_as] * functions, ())]


class _Absorbed:
    """Affine operators of the main graph that become part of linear ones, and the weights that disappear with them.

    Attributes:
        positions: Positions of these operators, with that of the linear operator.
    """

    def __init__(self, folded: Folded) -> None:
        self.positions: dict[int, int] = {}
        self._scope, self._without_bias = folded.scope, set[int]()
        for tail in tails(folded):
            operator, nodes = tail.operator, folded.scope.nodes
            self.positions |= dict.fromkeys(tail.nodes, operator.position)
            given = nodes[operator.position].input
            is_biased = 0 <= operator.bias_slot < len(given) and bool(given[operator.bias_slot])
            if tail.shift.any() and not is_biased:
                self._without_bias.add(operator.position)

    def holds(self, weight: Weight) -> bool:
        """Return whether a weight disappears: all but one vector, which becomes the bias of an operator without one."""
        uses = [use.use for use in weight.uses]
        if not uses or any(use.scope is not self._scope or use.node not in self.positions for use in uses):
            return False
        linear = self.positions[uses[0].node]
        if linear in self._without_bias and math.prod(weight.shape) > 1:
            self._without_bias.remove(linear)
            return False
        return True


def _output_axis(weight: Weight) -> int | None:
    """Return the axis of a weight whose indices have a scale of their own: that of the outputs of its operator.

    None if no linear operator of the main graph multiplies by it.
    """
    for use in weight.uses:
        node = use.use.scope.nodes[use.use.node]
        linear = linear_of(node, weight.shape) if use.use.slot == WEIGHT else None
        if linear is not None:
            return linear.weight_axis
    return None


def _is_table(weight: Weight) -> bool:
    """Return whether an operator looks a matrix up or has it for its gates, or several nodes multiply by it."""
    nodes = [(use.use.scope.nodes[use.use.node], use.use.slot) for use in weight.uses]
    is_shared = len(nodes) > 1 and _output_axis(weight) is not None
    return is_shared or any(slot in traits_of(node).matrix_slots for node, slot in nodes)


def _functions(folded: Folded, absorbed: Mapping[int, int], stored_as: str) -> Iterator[NodeProto]:
    """Yield the nodes of the main graph that a program has a function for."""
    for position, node in enumerate(folded.scope.nodes):
        found, traits = [folded.scope.values.get(name) for name in node.output if name], traits_of(node)
        is_computed = any(value is None or (value.constants is None and value.weight is None) for value in found)
        is_kept = not traits.is_view and not traits.is_constant and traits.training_slot is None
        clips = key_of(node) in BOUNDS and not traits.is_quantizer  # integers saturate by themselves
        if is_computed and is_kept and position not in absorbed and not (clips and stored_as == "int8"):
            yield node


def _computed_as(weight: Weight) -> int:
    """Return the element type in which a program has a weight: that to which the graph converts it, which is folded."""
    found = {weight.value.dtype}
    for use in weight.uses:
        node = use.use.scope.nodes[use.use.node]
        kind = attributes_of(node).get("to", weight.value.dtype) if traits_of(node).casts else weight.value.dtype
        found.add(int(kind))
    return max(found, key=element_bytes)


def _stored_bytes(weight: Weight, dtype: int, stored_as: str) -> float:
    if stored_as == "int8" and weight.is_vector and dtype in COMPUTABLE_TYPES:
        return _BIAS
    return element_size(dtype, stored_as)
