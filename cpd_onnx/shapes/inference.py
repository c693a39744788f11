"""Shapes of all tensors, and the values of the small ones: what `fold` finds out.

Open dimensions are symbols, and sizes are expressions over them (`sizes`): what is a number there is the same whatever
the model is fed. Beside that each symbol is bound to several numbers, which differ from symbol to symbol, and the graph
is inferred under all of these bindings: operators whose shapes nobody here writes down as expressions are known by what
they come to. `value_info` in the file is not trusted. Shape arithmetic is computed element by element, and each element
knows which constant it came from.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, helper, numpy_helper, shape_inference

from cpd_onnx.errors import ModelError
from cpd_onnx.ir.model import (
    Array,
    Model,
    attributes_of,
    bodies_of,
    called_by,
    functions_of,
    to_array,
    translate_errors,
)
from cpd_onnx.ops import shapes_contrib as contrib
from cpd_onnx.ops import shapes_standard as common
from cpd_onnx.ops.evaluate import EVALUATORS, MAX_ELEMENTS, Call, TooLarge
from cpd_onnx.ops.sizes import (
    Bindings,
    Expressions,
    Extent,
    Extents,
    Size,
    computed_sizes,
    is_constant,
    objects,
    product,
    symbol,
    unknown,
)
from cpd_onnx.ops.traits import traits_of, type_slot
from cpd_onnx.shapes.checks import DEADLY, require_bodies, require_few_calls, sane
from cpd_onnx.shapes.constants import evaluated
from cpd_onnx.shapes.order import topological
from cpd_onnx.shapes.profiles import PROFILES, Profile
from cpd_onnx.shapes.values import (
    BINDINGS,
    COMPUTABLE_TYPES,
    DIVISOR,
    GUESSES,
    SCALED,
    Folded,
    Leaves,
    Numbers,
    Scope,
    Shape,
    Use,
    Value,
    taken_branch,
)

T = TypeVar("T")

_SMALL_FLOATS = 8
"""Float constants up to this many elements may be shape arithmetic (scales, bounds); larger ones are weights."""
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip  # a table


def fold(
    model: Model,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    numbers: Mapping[str, int] | None = None,
) -> Folded:
    """Infer all shapes and compute the shape arithmetic of a model.

    `input_shapes` fixes the shapes of inputs by name where the file leaves them open and the defaults do not fit.
    `numbers` says what symbols are bound to first; they stay symbols.
    Raises ModelError if the graph is cyclic, uses values that nobody makes or makes no sense otherwise.
    """
    shapes = {name: tuple(shape) for name, shape in (input_shapes or {}).items()}
    bound = dict(numbers or {})
    with translate_errors(model):
        found = _best_folded(model, shapes, bound)
        known = {v.name: (v.dtype, v.shape) for scope in found.scope.walk() for v in scope.values.values()}
        made = evaluated(model, known)
        if made is None:
            return found
        return replace(_best_folded(made.model, shapes, bound), evaluated=made, source=model)


def fold_again(folded: Folded, model: Model, numbers: Mapping[str, int] | None = None) -> Folded:
    """Fold a model with the same inputs, under the same input shapes and, unless others are given, numbers."""
    return fold(model, folded.input_shapes, folded.numbers if numbers is None else numbers)


def _best_folded(model: Model, input_shapes: Mapping[str, Shape], numbers: Mapping[str, int]) -> Folded:
    best: Folded | None = None
    open_inputs = any(_open_dims(v) for v in _real_inputs(model))
    for profile in PROFILES if open_inputs and not input_shapes else PROFILES[:1]:
        folded = _Folder(model, profile, input_shapes, numbers).run()
        if best is None or len(folded.unknown) < len(best.unknown):
            best = folded
        if not best.unknown:
            break
    assert best is not None
    return best


def _real_inputs(model: Model) -> list[ValueInfoProto]:
    return [v for v in model.graph.input if not model.has(v.name)]


def _open_dims(value: ValueInfoProto) -> bool:
    return any(d.dim_value <= 0 for d in value.type.tensor_type.shape.dim)


class _Folder:
    """One sweep over the model with one way to bind its symbols."""

    def __init__(
        self, model: Model, profile: Profile, input_shapes: Mapping[str, Shape], first_numbers: Mapping[str, int]
    ) -> None:
        self.model = model
        self.profile = profile
        self.first_numbers = first_numbers
        self.input_shapes = input_shapes
        self.symbols: dict[str, Extent] = {}
        self.bindings = Bindings()
        self.counts: Counter[int] = Counter()
        self.measured: dict[Numbers, Size] = {}
        self.uses: list[Use] = []
        self.dims: list[tuple[tuple[Value, int], ...]] = []
        self.unknown: dict[str, str] = {}
        self.opsets = {o.domain if o.domain != "ai.onnx" else "": o.version for o in model.proto.opset_import}
        self.opsets.setdefault("", 1)
        self.opset_ids = [helper.make_opsetid(d, v) for d, v in self.opsets.items()]
        self.functions = functions_of(model.proto)
        self.depth = 0
        require_few_calls(model, self.functions)

    def run(self) -> Folded:
        graph = self.model.graph
        values: dict[str, Value] = {}
        for tensor in graph.initializer:
            values[tensor.name] = self.weight(tensor)
        for sparse in graph.sparse_initializer:
            name = sparse.values.name
            values[name] = Value(name, sparse.values.data_type, (tuple(sparse.dims),) * len(BINDINGS))
        for info in _real_inputs(self.model):
            values[info.name] = self.graph_input(info)
        with np.errstate(all="ignore"):
            scope = self.scope("", graph, values, ())
        first = next((values[i.name] for i in _real_inputs(self.model)), None)
        batch = first.shape[0] if first is not None and first.shape and not first.has_fixed(0) else 1
        return Folded(
            self.model, scope, tuple(self.uses), tuple(self.dims), self.unknown, batch,
            input_shapes=self.input_shapes, numbers=self.first_numbers,
        )  # fmt: skip  # what was found, and under what

    def weight(self, tensor: TensorProto) -> Value:
        shape = sane(tuple(tensor.dims))
        value = Value(tensor.name, tensor.data_type, _always(shape), weight=tensor.name, source=tensor)
        value.constants, value.moved = frozenset((tensor.name,)), True
        if math.prod(shape) <= (_SMALL_FLOATS if tensor.data_type in COMPUTABLE_TYPES else MAX_ELEMENTS):
            value.values = _always(self.model.array(tensor.name) if self._is_main(tensor) else to_array(tensor))
        return value

    def _is_main(self, tensor: TensorProto) -> bool:
        return self.model.has(tensor.name) and self.model.tensor(tensor.name) is tensor

    def graph_input(self, info: ValueInfoProto) -> Value:
        kind = info.type.tensor_type
        if not info.type.HasField("tensor_type") or not kind.HasField("shape"):
            return Value(info.name, kind.elem_type)
        if info.name in self.input_shapes:
            return Value(info.name, kind.elem_type, _always(self.input_shapes[info.name]))
        dims = list(kind.shape.dim)
        # Recurrent states are (layers, batch, hidden).
        is_state = [d.dim_value > 0 for d in dims] == [True, False, True]
        extents = tuple(
            self.bind(info, dim, 0 if is_state else axis, (info.name, axis)) for axis, dim in enumerate(dims)
        )
        return self.sized(Value(info.name, kind.elem_type), extents)

    def sized(self, value: Value, extents: Extents) -> Value:
        """The value with a shape of known expressions."""
        if all(map(is_constant, extents)):
            value.shapes = _always(sane(extents))  # type: ignore[arg-type]  # all numbers
            return value
        numbers = [[self.bindings.at(extent, binding) for extent in extents] for binding in BINDINGS]
        value.shapes, value.extents = tuple(sane(tuple(map(int, row))) for row in numbers), extents  # type: ignore[arg-type]  # of known symbols
        return value

    def bind(self, info: ValueInfoProto, dim: Any, axis: int, place: tuple[str, int]) -> Extent:
        """The size of an input's axis; `axis` is what it seems to be, `place` where it is."""
        if dim.dim_value > 0:
            return int(dim.dim_value)
        name = dim.dim_param or "{}[{}]".format(*place)
        if name not in self.symbols:
            kind = self.kind(0 if "batch" in name else axis, info)
            found = self.expression(name, self.profile.sequence if "sequence" in name else kind)
            if found is not None:
                return found
            self.symbols[name] = self.new_symbol(name, kind)
        return self.symbols[name]

    def new_symbol(self, name: str, kind: Sequence[Numbers]) -> Extent:
        """A symbol and what it is bound to; a number where the profile knows but one."""
        row = self.profile.row(kind, self.counts[id(kind)])
        self.counts[id(kind)] += 1
        if len(set(row)) == 1:
            return row[0]
        return self.bindings.bind(symbol(name), (self.first_numbers.get(name, row[0]), *row[1:]))

    def kind(self, axis: int, info: ValueInfoProto) -> Sequence[Numbers]:
        """What a symbol may be bound to."""
        profile, rank = self.profile, len(info.type.tensor_type.shape.dim)
        if axis == 0:
            return profile.batch
        if info.type.tensor_type.elem_type not in COMPUTABLE_TYPES:
            return profile.sequence
        if rank >= 4:
            return profile.image
        if rank == 2:
            return profile.sound
        return profile.frames if rank == 3 else profile.sequence

    def expression(self, name: str, kind: Sequence[Numbers]) -> Extent | None:
        """A size that is computed from other symbols, as exporters write ("past + 1", "8*height")."""
        if name == "total_sequence_length":
            name = "past_sequence_length + sequence_length"
        try:
            tree = ast.parse(name.strip(), mode="eval").body
            return None if isinstance(tree, ast.Name) else self.parsed(tree, kind)
        except (SyntaxError, ValueError, RecursionError, MemoryError, ZeroDivisionError):
            return None  # a name like any other

    def parsed(self, tree: ast.expr, kind: Sequence[Numbers]) -> Any:
        """What an expression of symbols comes to; ValueError where it has other parts than exporters write."""
        if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
            return tree.value
        if isinstance(tree, ast.Name):
            if tree.id not in self.symbols:
                self.symbols[tree.id] = self.new_symbol(tree.id, kind)
            return self.symbols[tree.id]
        if isinstance(tree, ast.BinOp) and type(tree.op) in _ARITHMETIC:
            factor = tree.left.value if isinstance(tree.left, ast.Constant) else 1
            if (
                isinstance(tree.op, ast.Mult) and isinstance(factor, int) and factor > 1
            ):  # the product is of the usual size
                kind = [tuple(max(1, number // factor) for number in row) for row in kind]
            return _ARITHMETIC[type(tree.op)](self.parsed(tree.left, kind), self.parsed(tree.right, kind))
        raise ValueError

    def scope(
        self,
        path: str,
        graph: GraphProto,
        values: dict[str, Value],
        address: tuple[tuple[int, str], ...],
        parent: Scope | None = None,
    ) -> Scope:
        order = topological(graph.node, set(values) | self.outer_names(parent), path or "the graph")
        scope = Scope(path, [graph.node[i] for i in order], values, [o.name for o in graph.output], parent)
        scope.function = parent is not None and parent.function
        scope.inputs = [i.name for i in graph.input]
        scope.order, scope.address, scope.opset = order, address, self.opsets[""]
        self.sweep(scope)
        return scope

    @staticmethod
    def outer_names(scope: Scope | None) -> set[str]:
        names: set[str] = set()
        while scope is not None:
            names.update(scope.values)
            scope = scope.parent
        return names

    def sweep(self, scope: Scope) -> None:
        self.depth += 1
        if self.depth > 64:
            raise ModelError(f"{scope.path}: subgraphs or functions nest more than 64 deep (recursive function?)")
        for position, node in enumerate(scope.nodes):
            inputs = [scope.lookup(name) if name else None for name in node.input]
            for value in self.node(scope, position, node, inputs):
                if value.name:
                    scope.values[value.name] = value
        self.depth -= 1

    def node(self, scope: Scope, position: int, node: NodeProto, inputs: list[Value | None]) -> list[Value]:
        if traits_of(node).is_constant:
            return [self.constant(node)]
        if traits_of(node).has_bodies:
            return self.body_node(scope, position, node, inputs)
        if called_by(node) in self.functions:
            return self.call(scope, position, node, inputs)
        attributes = attributes_of(node)
        call = Call(attributes, self.opsets[""])
        if (check := DEADLY.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))) is not None:
            check(node, call, inputs)
        results = self.computed(scope, position, node, call, inputs) or self.inferred(
            scope, position, node, call, inputs
        )
        parents = [v for v in inputs if v is not None]
        # ConstantOfShape, Range and Shape of constants count too: they depend on weights alone.
        if parents and all(v.constants is not None for v in parents):
            merged = frozenset(itertools.chain.from_iterable(v.constants or () for v in parents))
            moved = traits_of(node).keeps_zeros and all(v.moved for v in parents)
            for value in results:
                value.constants, value.moved = merged, moved
        return results

    def constant(self, node: NodeProto) -> Value:
        name = node.output[0]
        for attribute in node.attribute:
            if attribute.name == "value":
                shape = tuple(attribute.t.dims)
                value = Value(name, attribute.t.data_type, _always(shape), weight=name, source=attribute)
                value.constants, value.moved = frozenset((name,)), True
                limit = _SMALL_FLOATS if attribute.t.data_type in COMPUTABLE_TYPES else MAX_ELEMENTS
                if math.prod(shape) <= limit:
                    value.values = _always(to_array(attribute.t))
                return value
            if attribute.name in ("value_int", "value_ints", "value_float", "value_floats"):
                kind = np.int64 if "int" in attribute.name else np.float32
                array = np.asarray(helper.get_attribute_value(attribute), kind)
                dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
                value = Value(name, dtype, _always(array.shape), values=_always(array), weight=name)
                value.constants, value.source, value.moved = frozenset((name,)), attribute, True
                return value
        return Value(name, TensorProto.STRING)

    def computed(
        self, scope: Scope, position: int, node: NodeProto, call: Call, inputs: list[Value | None]
    ) -> list[Value] | None:
        """The outputs by arithmetic, if all inputs are known."""
        if node.domain not in ("", "ai.onnx"):
            return None
        if traits_of(node).reads_sizes and inputs[0] is not None and inputs[0].shapes is not None:
            return None if inputs[0].guessed else [self.shape_of(node, call, inputs[0])]
        function = EVALUATORS.get(node.op_type)
        present = [v for v in inputs if v is not None]
        if function is None or not present or any(v.values is None for v in present):
            return None
        same = all(v.is_static for v in present)
        try:
            found = [
                function(call, *[None if v is None else v.values[binding] for v in inputs])  # type: ignore[index]  # checked
                for binding in (BINDINGS[:1] if same else BINDINGS)
            ]
            leaves = self.moved(scope, position, node, function, call, inputs)
        except (TooLarge, NotImplementedError, ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError):
            return None
        outputs = [o if isinstance(o, tuple) else (o,) for o in found]
        if len(node.output) > len(outputs[0]) or any(o.size > MAX_ELEMENTS for o in outputs[0]):
            return None
        tainted, expressions = any(v.from_shape for v in present), [] if same else self.symbolic(node, call, inputs)
        made = []
        for index, name in enumerate(node.output):
            arrays = tuple(np.asarray(output[index]) for output in outputs)
            value = self.known(name, arrays if len(arrays) > 1 else _always(arrays[0]))
            value.from_shape, value.leaves = tainted, None if leaves is None else leaves[index]
            if not same:
                said = expressions[index] if index < len(expressions) else None
                place = (scope.path, position, index)
                if any(array.shape != arrays[0].shape for array in arrays):
                    self.open_shape(value, node, call, inputs, place)
                else:
                    self.open(value, said, place)
            made.append(value)
        return made

    @staticmethod
    def known(name: str, arrays: tuple[Array, ...]) -> Value:
        return Value(name, _tensor_type(arrays[0].dtype), tuple(a.shape for a in arrays), values=arrays)

    @staticmethod
    def symbolic(node: NodeProto, call: Call, inputs: list[Value | None]) -> list[Expressions]:
        """The outputs as expressions, none if the operator or an input has none."""
        arrays, is_open = [], [v is not None and v.is_open for v in inputs]
        for value in inputs:
            if value is not None and value.is_open and value.expressions is None:
                return []
            arrays.append(None if value is None or value.value is None else _expressions(value))
        kinds = {v.value.dtype.kind for v in inputs if v is not None and v.value is not None}
        call = Call(call.attributes | {"is_whole": kinds <= set("iub")}, call.opset)
        try:
            return computed_sizes(node.op_type, call, arrays, is_open)
        except (NotImplementedError, ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError):
            return []

    def open(self, value: Value, found: Expressions | None, place: tuple[Any, ...]) -> None:
        """Put the expressions of the elements on record; without any, each may depend on the inputs."""
        assert value.shapes is not None
        assert value.values is not None
        if found is None or found.shape != value.shapes[0]:
            found = np.empty(value.shapes[0], object)
            for index in np.ndindex(found.shape):
                numbers = tuple(array[index].item() for array in value.values)
                found[index] = self.bindings.bind(unknown(*place, *index), numbers)
        if any(isinstance(entry, Size) for entry in found.ravel().tolist()):
            value.expressions, value.is_open = found, True

    def open_shape(
        self, value: Value, node: NodeProto, call: Call, inputs: list[Value | None], place: tuple[Any, ...]
    ) -> None:
        """Put the shape of a value that has another number of elements under each binding on record."""
        value.is_open = True
        if value.shapes is not None and len({*map(len, value.shapes)}) == 1:
            sizes = self.inferred_sizes(node, call, inputs)
            self.expressed(value, sizes[place[-1]] if place[-1] < len(sizes) else None, inputs, place)

    def measure(self, place: tuple[Any, ...], numbers: Numbers, known: Iterable[Extent] = ()) -> Extent:
        """The expression of a size of which only the numbers are known: one of those at hand that comes to them.

        What is the same under all bindings is constant if nothing at hand is that depends on the inputs; sizes that
        agree under all of them are one, since operators demand it.
        """
        alike = [e for e in known if all(self.bindings.at(e, binding) == numbers[binding] for binding in BINDINGS)]
        if alike:
            return min(alike, key=lambda extent: isinstance(extent, Size) and extent.is_unsaid)
        if len(set(numbers)) == 1:
            return numbers[0]
        if numbers not in self.measured:
            self.measured[numbers] = self.bindings.bind(unknown(*place), numbers)
        return self.measured[numbers]

    def shape_of(self, node: NodeProto, call: Call, value: Value) -> Value:
        assert value.shapes is not None
        arrays = [np.asarray(s, np.int64) for s in value.shapes]
        sizes = objects(np.asarray(value.sizes, object)) if value.extents is not None else None
        if node.op_type == "Size":
            leaves = np.asarray(-2 - len(self.dims), np.int64)
            self.dims.append(tuple((value, axis) for axis in range(len(arrays[0]))))
            arrays = [np.asarray(a.prod(), np.int64) for a in arrays]
            sizes = None if sizes is None else _one(product(sizes.tolist()))
        else:
            part = slice(call.get("start", 0), call.get("end"))
            sizes = None if sizes is None else sizes[part]
            leaves = -2 - len(self.dims) - np.arange(len(arrays[0]), dtype=np.int64)[part]
            self.dims += [((value, axis),) for axis in range(len(arrays[0]))]
            arrays = [a[part] for a in arrays]
        made = self.known(node.output[0], tuple(arrays))
        made.leaves, made.from_shape = leaves, True
        if sizes is not None and any(isinstance(size, Size) for size in sizes.ravel().tolist()):
            made.expressions, made.is_open = sizes, True
        return made

    def moved(
        self, scope: Scope, position: int, node: NodeProto, function: Any, call: Call, inputs: list[Value | None]
    ) -> list[Leaves] | None:
        """Where each output element comes from, for operators that only move elements."""
        if node.op_type == "Div":
            return self.scaled(scope, position, inputs, divided=True)
        if node.op_type == "Mul":
            return self.scaled(scope, position, inputs) or self.multiplied(inputs)
        if node.op_type == "ReduceProd" and inputs[0] is not None and inputs[0].value is not None:
            result = np.asarray(function(call, *[v and v.value for v in inputs]))
            return self.multiplied(inputs[:1], result.ndim) if result.size == 1 else None
        if not traits_of(node).moves_elements:
            return None
        carried = traits_of(node).carried(len(inputs))
        operands: list[Array | None] = []
        for slot, value in enumerate(inputs):
            is_carried = value is not None and slot in carried
            operands.append(self.leaves_of(scope, position, slot, value) if is_carried else value and value.value)  # type: ignore[arg-type]  # not None if carried
        if node.op_type == "Cast":
            return [np.asarray(operands[0])]
        result = function(call, *operands)
        return [np.asarray(r) for r in (result if isinstance(result, tuple) else (result,))]

    def leaves_of(self, scope: Scope, position: int, slot: int, value: Value) -> Leaves:
        assert value.value is not None
        if value.leaves is not None and (value.leaves >= 0).all():
            return value.leaves
        if value.weight is not None or value.is_static:
            self.uses.append(Use(scope, position, slot))
            codes = ((len(self.uses) - 1) << 32) + np.arange(value.value.size, dtype=np.int64)
            return codes.reshape(value.value.shape)
        return value.leaves if value.leaves is not None else np.full(value.value.shape, -1, np.int64)

    def scaled(
        self, scope: Scope, position: int, inputs: list[Value | None], *, divided: bool = False
    ) -> list[Leaves] | None:
        """Leaves of a size that depends on the inputs, times or by a number that does not (batch x heads)."""
        static = [slot for slot, value in enumerate(inputs) if value is not None and value.is_static]
        if len(static) != 1 or len(inputs) != 2:
            return None
        if any(v is None or v.value is None or v.value.size != 1 for v in inputs) or (divided and static != [1]):
            return None
        self.uses.append(Use(scope, position, static[0]))
        rank = max(v.value.ndim for v in inputs if v is not None and v.value is not None)
        code = ((len(self.uses) - 1) << 32) + (DIVISOR if divided else SCALED)
        return [np.full((1,) * rank, code, np.int64)]

    def multiplied(self, inputs: list[Value | None], rank: int | None = None) -> list[Leaves] | None:
        """Leaves of a product of sizes."""
        codes: list[int] = []
        for value in inputs:
            if value is None or value.leaves is None or not (value.leaves < -1).all():
                return None
            codes += value.leaves.ravel().tolist()
        if rank is None:
            if len(codes) != len(inputs):
                return None
            rank = max(v.leaves.ndim for v in inputs if v is not None and v.leaves is not None)
        self.dims.append(tuple(pair for code in codes for pair in self.dims[-2 - code]))
        return [np.full((1,) * rank, -1 - len(self.dims), np.int64)]

    def inferred(
        self, scope: Scope, position: int, node: NodeProto, call: Call, inputs: list[Value | None]
    ) -> list[Value]:
        """The outputs by shape inference under all bindings, and as expressions."""
        first = self.infer(node, call, inputs, 0)
        is_dynamic = any(v is not None and not _is_the_same(v) for v in inputs)
        rest = [self.infer(node, call, inputs, binding) if is_dynamic else first for binding in BINDINGS[1:]]
        sizes = self.inferred_sizes(node, call, inputs) if is_dynamic else []
        made = []
        for index, name in enumerate(node.output):
            dtype = first[index][0]
            shapes = [found[index][1] for found in (first, *rest)]
            value = Value(name, dtype)
            if all(shape is not None and len(shape) == len(shapes[0] or ()) for shape in shapes):
                value.guessed = any(None in (shape or ()) for shape in shapes)
                value.shapes = tuple(_complete(shape or (), binding) for binding, shape in enumerate(shapes))
                if is_dynamic:
                    place = (scope.path, position, index)
                    self.expressed(value, sizes[index] if index < len(sizes) else None, inputs, place)
            elif name:
                self.unknown.setdefault(f"{node.domain or 'ai.onnx'}::{node.op_type}", node.name or node.output[0])
            made.append(value)
        return made

    def inferred_sizes(self, node: NodeProto, call: Call, inputs: list[Value | None]) -> Sequence[Any]:
        """The shapes of the outputs as expressions where functions give them; none if there are none."""
        shapes = [None if v is None else v.sizes for v in inputs]
        values = [None if v is None else v.expressions if v.is_open else v.value for v in inputs]
        domain = "" if node.domain == "ai.onnx" else node.domain
        plain = None
        if not domain:
            plain = common.output_shapes(node.op_type, call, shapes, values, len(node.output))
            plain = plain or common.open_shapes(node.op_type, call, shapes, values)
        return plain or contrib.output_shapes((domain, node.op_type), call.attributes, shapes, values) or []

    def expressed(self, value: Value, sizes: Any, inputs: list[Value | None], place: tuple[Any, ...]) -> None:
        """Give a value the expressions of its axes: those that were found where they come to its shape.

        A size that nobody wrote down is one of an input, or constant if it is under all bindings. Where an operand
        holds sizes, as a start or a count, that says nothing: the operator may take a minimum.
        """
        assert value.shapes is not None
        known = [extent for v in inputs if v is not None for extent in v.sizes or () if not is_constant(extent)]
        has_operands = any(v is not None and v.holds_sizes for v in inputs)
        extents: list[Extent] = []
        for axis, numbers in enumerate(zip(*value.shapes, strict=True)):
            extent = sizes[axis] if sizes is not None and axis < len(sizes) else None
            fits = extent is not None and all(self.bindings.at(extent, b) == numbers[b] for b in BINDINGS)
            if not fits and has_operands and len(set(numbers)) == 1:
                fits, extent = True, self.bindings.bind(unknown(*place, axis), numbers)
            extents.append(extent if fits and extent is not None else self.measure((*place, axis), numbers, known))
        if not all(map(is_constant, extents)):
            value.extents = tuple(extents)

    def infer(
        self, node: NodeProto, call: Call, inputs: list[Value | None], binding: int
    ) -> list[tuple[int, tuple[int | None, ...] | None]]:
        nothing: list[tuple[int, tuple[int | None, ...] | None]] = [(0, None)] * len(node.output)
        domain = "" if node.domain == "ai.onnx" else node.domain
        shapes = [None if v is None or v.shapes is None else v.shapes[binding] for v in inputs]
        values = [None if v is None or v.values is None else v.values[binding] for v in inputs]
        if not domain:
            plain = common.output_shapes(node.op_type, call, shapes, values, len(node.output))
            if plain is not None:
                dtype = common.output_type(node.op_type, call, [v.dtype if v else 0 for v in inputs])
                return [(dtype, shape) for shape in plain]
        own = contrib.output_shapes((domain, node.op_type), call.attributes, shapes, values)
        if own is not None:
            dtype = next((v.dtype for v in inputs[type_slot(node) :] or inputs if v is not None), 0)
            return ([(dtype, shape) for shape in own] + nothing)[: len(nothing)]
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets.get(domain, 1), domain)
            # In a function a value goes by the name of the formal input.
            named = [(name, v) for name, v in zip(node.input, inputs, strict=True) if v is not None]
            types = {name: v.type(binding) for name, v in named}
            data = {name: numpy_helper.from_array(v.values[binding], name) for name, v in named if v.values}
            # Inference wants names; a node that takes the same value twice gives it once.
            found = shape_inference.infer_node_outputs(
                schema, node, types, data, opset_imports=self.opset_ids, ir_version=self.model.proto.ir_version or 3
            )
        except (onnx.defs.SchemaError, onnx.checker.ValidationError, shape_inference.InferenceError):
            return nothing
        except (RuntimeError, ValueError, TypeError):
            return nothing
        return [_dims(found.get(name)) if name else (0, None) for name in node.output]

    def call(self, scope: Scope, position: int, node: NodeProto, inputs: list[Value | None]) -> list[Value]:
        """A call of a model-local function: its body with the arguments in place."""
        function = self.functions[called_by(node)]
        given = {a.name: a for a in node.attribute}
        given |= {a.name: a for a in function.attribute_proto if a.name not in given}
        arguments = itertools.zip_longest(function.input, inputs[: len(function.input)])
        values = {formal: actual for formal, actual in arguments if actual is not None and formal}
        order = topological(function.node, set(function.input), node.op_type)
        nodes = [_with_attributes(function.node[i], given) for i in order]
        label = node.name or node.output[0]
        inner = Scope(f"{scope.path}/{label}", nodes, dict(values), list(function.output), None, function=True)
        inner.inputs, inner.order = list(function.input), order
        scope.bodies[position] = {"body": inner}
        outer, self.opsets = (
            self.opsets,
            self.opsets | {"" if o.domain == "ai.onnx" else o.domain: o.version for o in function.opset_import},
        )
        inner.opset = self.opsets[""]
        self.sweep(inner)
        self.opsets = outer
        return [_renamed(inner.values.get(f), name) for f, name in zip(function.output, node.output, strict=False)]

    def body_node(self, scope: Scope, position: int, node: NodeProto, inputs: list[Value | None]) -> list[Value]:
        """If, Loop, Scan: sweep the bodies; outputs are what all branches or rounds agree on."""
        bodies = bodies_of(node)
        require_bodies(node, bodies)
        made: dict[str, Scope] = {}
        label = node.name or node.output[0]
        for name, graph in bodies.items():
            values = {t.name: self.weight(t) for t in graph.initializer}
            values |= self.body_inputs(node, graph, inputs)
            address = (*scope.address, (scope.order[position], name))
            made[name] = self.scope(f"{scope.path}/{label}.{name}", graph, values, address, scope)
        scope.bodies[position] = made
        if node.op_type == "If":
            return self.if_outputs(node, inputs, made)
        return self.loop_outputs(node, bodies["body"], inputs, made["body"])

    def body_inputs(self, node: NodeProto, graph: GraphProto, inputs: list[Value | None]) -> dict[str, Value]:
        """Formal inputs of a body: shapes of the arguments, values unknown."""
        if node.op_type == "If":
            return {}
        attributes = attributes_of(node)
        scans = attributes.get("num_scan_inputs", 0)
        outer = inputs if node.op_type == "Loop" else [*inputs]
        made = {}
        first_scan = len(graph.input) - scans
        for index, info in enumerate(graph.input):
            actual = outer[index] if index < len(outer) else None
            shapes, extents = (actual.shapes, actual.extents) if actual is not None else (None, None)
            if index >= first_scan and shapes is not None:
                axis = (attributes.get("scan_input_axes") or [0] * scans)[index - first_scan]
                shapes = tuple(_without(s, axis) for s in shapes)
                extents = None if extents is None else _without(extents, axis)
            if node.op_type == "Loop" and index < 2:
                shapes, extents = _always(()), None
            dtype = info.type.tensor_type.elem_type or (actual.dtype if actual is not None else 0)
            made[info.name] = Value(info.name, dtype, shapes, extents)
        return made

    def if_outputs(self, node: NodeProto, inputs: list[Value | None], made: dict[str, Scope]) -> list[Value]:
        taken = taken_branch(inputs[0])
        results = []
        for index, name in enumerate(node.output):
            branches = [made[b].lookup(made[b].outputs[index]) for b in ("then_branch", "else_branch")]
            if taken is not None:
                branches = [made[taken].lookup(made[taken].outputs[index])]
            agree = len({v.shapes if v else None for v in branches}) == 1
            source = branches[0]
            if source is None or not agree:
                results.append(Value(name, source.dtype if source else 0))
                continue
            result = _renamed(source, name)
            if taken is None:
                result.values, result.expressions, result.is_open = None, None, False
                self.agreed(result, [v for v in branches if v is not None], (made["then_branch"].path, index))
            results.append(result)
        return results

    def agreed(self, result: Value, branches: Sequence[Value], place: tuple[Any, ...]) -> None:
        """Give what an If makes the sizes that both branches have; one on which they differ depends on the inputs."""
        if all(value.extents is None for value in branches):
            return
        rows = zip(*(value.sizes or () for value in branches), strict=True)
        numbers = zip(*(result.shapes or ()), strict=True)
        result.extents = tuple(
            extents[0] if len(set(extents)) == 1 else self.bindings.bind(unknown(*place, axis), found)
            for axis, (extents, found) in enumerate(zip(rows, numbers, strict=True))
        )

    def loop_outputs(self, node: NodeProto, graph: GraphProto, inputs: list[Value | None], body: Scope) -> list[Value]:
        is_loop = node.op_type == "Loop"
        attributes = attributes_of(node)
        states = len(inputs) - 2 if is_loop else len(inputs) - attributes.get("num_scan_inputs", 0)
        skip = 1 if is_loop else 0
        made = []
        for index, name in enumerate(node.output):
            inner = body.lookup(graph.output[index + skip].name)
            value = Value(name, inner.dtype if inner else 0)
            if index < states:
                outer = inputs[index + (2 if is_loop else 0)]
                if inner is not None and outer is not None and inner.shapes == outer.shapes:
                    value.shapes, value.extents = inner.shapes, inner.extents or outer.extents
            elif inner is not None and inner.shapes is not None:
                scan = index - states
                axis = 0 if is_loop else (attributes.get("scan_output_axes") or [0] * len(node.output))[scan]
                lengths = self.rounds(node, inputs)
                shapes = zip(inner.shapes, lengths, strict=True)
                value.shapes = tuple((*s[:axis], length, *s[axis:]) for s, length in shapes)
                length = self.measure((body.path, index), lengths)
                if not is_constant(length) or inner.extents is not None:
                    sizes = inner.sizes or ()
                    value.extents = (*sizes[:axis], length, *sizes[axis:])
                value.guessed = is_loop or inner.guessed or inputs[-1] is None or inputs[-1].guessed
            made.append(value)
        return made

    @staticmethod
    def rounds(node: NodeProto, inputs: list[Value | None]) -> Numbers:
        """Length of what a Loop or Scan stacks: known for Scan, for Loop a stand-in unless its count is known."""
        if node.op_type == "Scan":
            last, axis = inputs[-1], (attributes_of(node).get("scan_input_axes") or [0])[-1]
            if last is None or last.shapes is None or not -len(last.shapes[0]) <= axis < len(last.shapes[0]):
                return GUESSES
            return tuple(shape[axis] for shape in last.shapes)
        count = inputs[0]
        if count is not None and count.values is not None and 0 < int(count.values[0].item()) < MAX_ELEMENTS:
            return tuple(int(array.item()) for array in count.values)
        return GUESSES


@functools.cache
def _tensor_type(dtype: np.dtype[Any]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(dtype))


def _dims(proto: TypeProto | None) -> tuple[int, tuple[int | None, ...] | None]:
    if proto is None or not proto.HasField("tensor_type"):
        return 0, None
    kind = proto.tensor_type
    if not kind.HasField("shape"):
        return kind.elem_type, None
    dims = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in kind.shape.dim)
    return kind.elem_type, dims


def _complete(shape: Sequence[int | None], binding: int) -> Shape:
    return sane(tuple(GUESSES[binding] if d is None else d for d in shape))


def _is_the_same(value: Value) -> bool:
    """Whether shape and elements are the same under all bindings."""
    return value.extents is None and (value.shapes is None or value.shapes[0] == value.shapes[1]) and not value.is_open


def _always(found: T) -> tuple[T, ...]:
    """What is the same under all bindings."""
    return (found,) * len(BINDINGS)


def _one(entry: Any) -> Expressions:
    """An array of a single object."""
    made = np.empty((), object)
    made[()] = entry
    return made


def _expressions(value: Value) -> Expressions:
    """The elements of a value as expressions."""
    if value.expressions is not None:
        return value.expressions
    assert value.value is not None
    return objects(value.value)


def _without(shape: tuple[T, ...], axis: int) -> tuple[T, ...]:
    axis %= max(1, len(shape))
    return (*shape[:axis], *shape[axis + 1 :])


def _renamed(value: Value | None, name: str) -> Value:
    """The same tensor under the name that it has outside; its elements are known outside as inside."""
    if value is None:
        return Value(name)
    return replace(value, name=name, leaves=None, weight=None, constants=None, moved=False, source=None, _types=None)


def _with_attributes(node: NodeProto, given: Mapping[str, onnx.AttributeProto]) -> NodeProto:
    """A function's node with references to the call's attributes resolved, in its subgraphs too."""
    if not _refers(node):
        return node
    made = NodeProto()
    made.CopyFrom(node)
    del made.attribute[:]
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            copied = made.attribute.add()
            copied.CopyFrom(attribute)
            inner = [_with_attributes(each, given) for each in attribute.g.node]
            del copied.g.node[:]
            copied.g.node.extend(inner)
        elif attribute.ref_attr_name in given:
            copied = made.attribute.add()
            copied.CopyFrom(given[attribute.ref_attr_name])
            copied.name = attribute.name
    return made


def _refers(node: NodeProto) -> bool:
    """Whether a node, or one inside it, takes an attribute of the function's call."""
    return any(a.ref_attr_name or any(map(_refers, a.g.node)) for a in node.attribute)
