"""Shape inference (`fold`): shapes of all tensors, and the values of small ones.

Open dimensions are symbols, and sizes are expressions over them (`ops.sizes`): a size that is a number is the same for
all inputs. In addition each symbol is bound to several numbers, different for each symbol, and the graph is inferred
under each of these bindings, so that sizes of operators without a symbolic shape function are recognised by their
numbers. `value_info` in the file is trusted for custom operators alone. Shape arithmetic is computed element by
element, and the provenance of each element is recorded.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper, shape_inference

from cpd_onnx.errors import ModelError
from cpd_onnx.ir.interface import kept_by
from cpd_onnx.ir.model import (
    Array,
    Model,
    attributes_of,
    bodies_of,
    called_by,
    constant_array,
    functions_of,
    to_array,
    translate_errors,
)
from cpd_onnx.ops.evaluate import MAX_ELEMENTS, Call, compute_outputs
from cpd_onnx.ops.matrix_view import key_of
from cpd_onnx.ops.output_shapes import open_shapes, output_shapes, output_type
from cpd_onnx.ops.quantized_view import LIMITS
from cpd_onnx.ops.required import Equation, is_broadcasting, required, required_exactly, suggested
from cpd_onnx.ops.sizes import (
    Bindings,
    Expressions,
    Size,
    compute_sizes,
    is_constant,
    is_less,
    objects,
    product,
    solved_quotient,
    unknown,
)
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.bodies import formal_inputs, if_outputs, loop_outputs, renamed, with_attributes
from cpd_onnx.shapes.checks import NODE_CHECKS, credible_shape, require_bodies, require_bounded_calls
from cpd_onnx.shapes.constants import evaluate_weights
from cpd_onnx.shapes.open_inputs import (
    SIZE_PROFILES,
    OpenInputs,
    given_symbols,
    has_open_inputs,
    real_inputs,
)
from cpd_onnx.shapes.order import topological_order
from cpd_onnx.shapes.origins import Provenance
from cpd_onnx.shapes.sequences import sequence_outputs
from cpd_onnx.shapes.solving import solved
from cpd_onnx.shapes.values import (
    BINDINGS,
    COMPUTABLE_TYPES,
    PLACEHOLDER_SIZES,
    Folded,
    Numbers,
    Place,
    Scope,
    Shape,
    Value,
    for_all_bindings,
    is_decided_by_data,
)

Inputs: TypeAlias = "Sequence[Value | None]"
"""The inputs of a node; None for an optional input that is absent."""
Inferred: TypeAlias = "tuple[int, tuple[int | None, ...] | None]"
"""Element type (0 if unknown) and shape (None for an unknown size or rank)."""
_MAX_SMALL_FLOATS = 8
"""Largest size, in elements, of a float constant that may be shape arithmetic (scales, bounds), not a weight.
Heuristic."""
_MOST_SOLVED = 8
"""Number of times that a model is inferred to solve its open sizes (heuristic)."""
_MAX_DEPTH = 64
"""Largest nesting depth of subgraphs and function calls. Heuristic that stops recursive functions."""


def fold(
    model: Model,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    numbers: Mapping[str, int] | None = None,
    *,
    evaluates: bool = True,
    like: Folded | None = None,
) -> Folded:
    """Infer all shapes and evaluate the shape arithmetic of a model.

    `input_shapes` fixes the shapes of inputs, by name, if the file leaves them open and the default sizes do not fit.
    `numbers` gives the numbers of symbols under the first binding, by name; the dimensions remain symbolic.
    `like` gives sizes that operators require, as they were found in another form of the model, and a profile for the
    others.
    Weights that the graph computes from others are evaluated too, in a copy of the model, unless `evaluates` is false.
    Raises ModelError if the graph has a cycle, an input without a producer, or is invalid otherwise.
    """
    shapes = {name: tuple(shape) for name, shape in (input_shapes or {}).items()}
    bound = dict(numbers or {})
    with translate_errors(model):
        found = _best_inferred(model, shapes, bound, like)
        weights = evaluate_weights(model, found.scope) if evaluates else None
        if weights is None:
            return found
        return replace(_best_inferred(weights.model, shapes, bound, found), evaluated=weights, source=model)


def fold_again(folded: Folded, model: Model, numbers: Mapping[str, int] | None = None) -> Folded:
    """Infer a model with the same inputs under the input shapes and, unless given, the numbers of `folded`.

    Inputs of the model that have lost channels get the shapes without them. Other sizes stay as operators of the
    original require them, which the model may have lost.
    """
    shapes = folded.input_shapes
    if shapes and model is not folded.model:
        kept = kept_by(model)
        shapes = {
            name: tuple(len(kept.get(name, {}).get(axis, range(size))) for axis, size in enumerate(shape))
            for name, shape in shapes.items()
        }
    return fold(model, shapes, folded.numbers if numbers is None else numbers, like=folded)


def _best_inferred(
    model: Model, input_shapes: Mapping[str, Shape], numbers: Mapping[str, int], like: Folded | None
) -> Folded:
    """Return the model inferred with the sizes that its operators require.

    A size that is solved may be what another operator's requirement is known by, so that this is repeated; so are sizes
    that the symbols do not show to be a number, but an operator requires to be. Where shapes
    remain unknown, sizes that operators probably require are taken if they leave fewer unknown.
    """
    inference, folded, known = _solved(model, input_shapes, numbers, dict(like.solved) if like else {}, like)
    more = {name: number for name, number in solved(inference.suggestions).items() if name not in known}
    if not folded.unknown or not more:
        return folded
    _, other, _ = _solved(model, input_shapes, numbers, known | more, like)
    return other if len(other.unknown) < len(folded.unknown) else folded


def _solved(
    model: Model,
    input_shapes: Mapping[str, Shape],
    numbers: Mapping[str, int],
    known: dict[str, int],
    like: Folded | None,
) -> tuple[_Inference, Folded, dict[str, int]]:
    """Return the inference of a model with the sizes that operators require, its result, and all known sizes."""
    fixed: dict[Size, int] = {}
    counts, first = (like.counts, like.profile) if like else ({}, 0)
    for _ in range(_MOST_SOLVED):
        inference, folded = _of_best_profile(model, input_shapes, numbers, known, _Required(counts, fixed), first)
        more = {name: number for name, number in solved(inference.equations).items() if name not in known}
        found = {place: number for place, number in inference.required_counts.items() if place not in counts}
        also = {size: number for size, number in inference.required_sizes.items() if size not in fixed}
        if not more and not found and not also:
            break
        known, counts, fixed = known | more, {**counts, **found}, fixed | also
    return inference, folded, known


def _of_best_profile(
    model: Model,
    input_shapes: Mapping[str, Shape],
    numbers: Mapping[str, int],
    known: Mapping[str, int],
    required: _Required,
    first: int,
) -> tuple[_Inference, Folded]:
    """Return the inference of the profile that leaves fewest operators unknown, the earliest in order, and its result.

    The profile with the number `first` comes before all others. Where a profile shows that operators require sizes that
    are not known yet, no other is tried: what is unknown may follow from them. The inference has the suggestions of all
    profiles that were tried.
    """
    best: tuple[_Inference, Folded] | None = None
    suggestions: list[Equation] = []
    count = len(SIZE_PROFILES) if has_open_inputs(model) and not input_shapes else 1
    for profile in sorted(range(count), key=lambda number: number != first):
        inference = _Inference(model, profile, input_shapes, numbers, known, required)
        try:
            folded = inference.run()
        except ModelError:
            if best is None:
                raise
            continue  # products of its sizes, which are larger, are not credible
        suggestions += inference.suggestions
        if best is None or len(folded.unknown) < len(best[1].unknown):
            best = inference, folded
        if not best[1].unknown or solved(best[0].equations).keys() - known.keys():
            break
    assert best is not None
    best[0].suggestions = suggestions
    return best


@dataclass(frozen=True)
class _Required:
    """What operators require of sizes that are not symbols, as an inference before has found it.

    Attributes:
        counts: Sizes that data decide, by the axis of a tensor.
        sizes: Sizes that are the rest of a division by open sizes, with the number that each has to be.
    """

    counts: Mapping[Place, int]
    sizes: Mapping[Size, int]


class _Inference:
    """Inference of a model whose symbols are bound by one profile."""

    def __init__(
        self,
        model: Model,
        profile: int,
        input_shapes: Mapping[str, Shape],
        numbers: Mapping[str, int],
        known: Mapping[str, int],
        required: _Required,
    ) -> None:
        self.model, self.profile, self.counts, self.fixed = model, profile, required.counts, required.sizes
        self.required_sizes: dict[Size, int] = {}
        self.required_counts: dict[Place, int] = {}
        self.bindings = Bindings()
        given = given_symbols(model, input_shapes)
        self.inputs = OpenInputs(SIZE_PROFILES[profile], input_shapes, numbers, self.bindings, known, given)
        self.equations: list[Equation] = []
        self.suggestions: list[Equation] = []
        self.has_limits = False  # a rounded size is at its limit: what follows is probable, not required
        self.declared = {info.name: info for info in (*model.graph.value_info, *model.graph.output)}
        self.provenance = Provenance()
        self.unknown: dict[str, str] = {}
        self.opsets = {"": 1} | _opsets(model.proto.opset_import)
        self.opset_ids = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        self.functions = functions_of(model.proto)
        self.depth = 0
        require_bounded_calls(model, self.functions)

    def run(self) -> Folded:
        graph, inputs = self.model.graph, real_inputs(self.model)
        values = {tensor.name: self.weight(tensor.name, tensor, tensor) for tensor in graph.initializer}
        for sparse in graph.sparse_initializer:
            name = sparse.values.name
            values[name] = Value(name, sparse.values.data_type, for_all_bindings(tuple(sparse.dims)))
        values |= {info.name: self.inputs.value(info) for info in inputs}
        with np.errstate(all="ignore"):
            scope = self.scope("", graph, values, ())
        first = values[inputs[0].name] if inputs else None
        batch = first.shape[0] if first is not None and first.shape and not first.has_fixed(0) else 1
        uses, products = tuple(self.provenance.uses), tuple(self.provenance.products)
        return Folded(
            self.model, scope, uses, products, self.unknown, batch,
            input_shapes=self.inputs.shapes, numbers=self.inputs.numbers, solved=self.inputs.solved, counts=self.counts,
            profile=self.profile, equal=dict(self.provenance.equal),
        )  # fmt: skip  # the result, then its conditions

    # Scopes.

    def scope(
        self,
        path: str,
        graph: GraphProto,
        values: dict[str, Value],
        address: tuple[tuple[int, str], ...],
        parent: Scope | None = None,
    ) -> Scope:
        names = set(values).union(*(scope.values for scope in parent.outwards())) if parent else set(values)
        order = topological_order(graph.node, names, path or "the graph")
        scope = Scope(path, [graph.node[i] for i in order], values, [o.name for o in graph.output], parent)
        scope.function = parent is not None and parent.function
        scope.inputs = [i.name for i in graph.input]
        scope.order, scope.address, scope.opset = order, address, self.opsets[""]
        self.sweep(scope)
        return scope

    def sweep(self, scope: Scope) -> None:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ModelError(
                f"{scope.path}: subgraphs or functions nest more than {_MAX_DEPTH} deep (recursive function?)"
            )
        for position, node in enumerate(scope.nodes):
            inputs = [scope.lookup(name) if name else None for name in node.input]
            for value in self.node(scope, position, node, inputs):
                if value.name:
                    scope.values[value.name] = value
        self.depth -= 1

    def node(self, scope: Scope, position: int, node: NodeProto, inputs: Inputs) -> Sequence[Value]:
        """Return the outputs of a node."""
        if traits_of(node).is_constant:
            return [self.constant(node)]
        if traits_of(node).has_bodies:
            return self.body_node(scope, position, node, inputs)
        if called_by(node) in self.functions:
            return self.call(scope, position, node, inputs)
        call = Call(attributes_of(node), self.opsets[""], len(node.output))
        if (check := NODE_CHECKS.get(key_of(node))) is not None:
            check(node, call, inputs)
        if scope.parent is None:
            self.require(scope, node, call, inputs)
        if is_broadcasting(key_of(node)):
            inputs = _with_met_sizes(inputs)
        results = (
            sequence_outputs(node, call, inputs)
            or self.computed(scope, position, node, call, inputs)
            or self.inferred(scope, position, node, call, inputs)
        )
        if scope.parent is None and any(value.name and value.shapes is None for value in results):
            self.suggestions += suggested(key_of(node), call, *_known_of(inputs))
        parents = [value for value in inputs if value is not None]
        # ConstantOfShape, Range and Shape of constants are included: they depend on weights alone.
        if parents and all(value.constants is not None for value in parents):
            merged = frozenset(itertools.chain.from_iterable(value.constants or () for value in parents))
            moved = traits_of(node).keeps_zeros and all(value.moved for value in parents)
            for value in results:
                value.constants, value.moved = merged, moved
        return results

    def require(self, scope: Scope, node: NodeProto, call: Call, inputs: Inputs) -> None:
        """Record the equations that a node's inputs violate; what is in a branch may never run."""
        self.require_counts(scope, node, call, inputs)
        if all(value is None or value.extents is None for value in inputs):
            return
        key, known = key_of(node), _known_of(inputs)
        for size, number in required(key, call, *known):
            if not size.has_unknowns and not self.is_always(size, number):
                (self.suggestions if self.has_limits else self.equations).append((size, number))
        for size, number in required_exactly(key, call, *known):
            if not size.has_unknowns and self.is_always(size, number) and (found := solved_quotient(size, number)):
                self.required_sizes[found[0]] = found[1]

    def is_always(self, size: Size, number: int) -> bool:
        """Return whether a size is a number under all bindings."""
        return all(self.bindings.at(size, binding) == number for binding in BINDINGS)

    def require_counts(self, scope: Scope, node: NodeProto, call: Call, inputs: Inputs) -> None:
        """Record the sizes that data decide and this node requires to be a number, such as the length of a slice."""
        shapes = [
            None if v is None or v.shapes is None else _with_counts(v.shapes, slot) for slot, v in enumerate(inputs)
        ]
        if not any(isinstance(size, Size) for shape in shapes for size in shape or ()):
            return
        for size, number in required(key_of(node), call, shapes, [None] * len(inputs)):
            (((term, _), *_), *_) = size.coefficients
            place = self.maker_of_count(scope, node.input[term.arguments[0]])
            if place is not None and number > 1:
                self.required_counts.setdefault(place, number)

    def maker_of_count(self, scope: Scope, name: str) -> Place | None:
        """Return the only axis of a tensor whose size data decide, on the way back from another tensor; or None."""
        while (position := scope.producers.get(name)) is not None:
            value = scope.values[name]
            if value.has_placeholder and value.shapes is not None:
                axes = [i for i, numbers in enumerate(zip(*value.shapes, strict=True)) if numbers == PLACEHOLDER_SIZES]
                return (scope.path, name, axes[0]) if len(axes) == 1 else None
            name = scope.nodes[position].input[0] if scope.nodes[position].input else ""
        return None

    def call(self, scope: Scope, position: int, node: NodeProto, inputs: Inputs) -> list[Value]:
        """Return the outputs of a call of a model-local function, whose body is inferred with the arguments."""
        function, opsets = self.functions[called_by(node)], self.opsets
        given = {a.name: a for a in (*function.attribute_proto, *node.attribute)}
        values = {formal: actual for formal, actual in zip(function.input, inputs, strict=False) if formal and actual}
        order = topological_order(function.node, set(function.input), node.op_type)
        nodes = [with_attributes(function.node[i], given) for i in order]
        path = f"{scope.path}/{node.name or node.output[0]}"
        inner = Scope(path, nodes, values, list(function.output), function=True)
        inner.inputs, inner.order = list(function.input), order
        scope.bodies[position] = {"body": inner}
        self.opsets = opsets | _opsets(function.opset_import)
        inner.opset = self.opsets[""]
        self.sweep(inner)
        self.opsets = opsets
        return [renamed(inner.values.get(f), name) for f, name in zip(function.output, node.output, strict=False)]

    def body_node(self, scope: Scope, position: int, node: NodeProto, inputs: Inputs) -> list[Value]:
        """Return the outputs of an If, Loop or Scan: the properties on which all branches or iterations agree."""
        bodies = bodies_of(node)
        require_bodies(node, bodies)
        scopes: dict[str, Scope] = {}
        for name, graph in bodies.items():
            values = {tensor.name: self.weight(tensor.name, tensor, tensor) for tensor in graph.initializer}
            values |= formal_inputs(node, graph, inputs)
            address = (*scope.address, (scope.order[position], name))
            path = f"{scope.path}/{node.name or node.output[0]}.{name}"
            scopes[name] = self.scope(path, graph, values, address, scope)
        scope.bodies[position] = scopes
        if traits_of(node).branches:
            return if_outputs(node, inputs[0], scopes, self.bindings)
        return loop_outputs(node, bodies["body"], inputs, scopes["body"], self.bindings)

    # Constants.

    def weight(self, name: str, tensor: TensorProto, source: TensorProto | AttributeProto) -> Value:
        """Return the value of a stored tensor."""
        shape = credible_shape(tuple(tensor.dims))
        value = Value(name, tensor.data_type, for_all_bindings(shape), weight=name, source=source)
        value.constants, value.moved = frozenset((name,)), True
        if math.prod(shape) <= (_MAX_SMALL_FLOATS if tensor.data_type in COMPUTABLE_TYPES else MAX_ELEMENTS):
            is_main = self.model.has(tensor.name) and self.model.tensor(tensor.name) is tensor
            value.values = for_all_bindings(self.model.array(tensor.name) if is_main else to_array(tensor))
        return value

    def constant(self, node: NodeProto) -> Value:
        """Return the output of a Constant node."""
        name = node.output[0]
        for attribute in node.attribute:
            if attribute.name == "value":
                return self.weight(name, attribute.t, attribute)
            array = constant_array(attribute)
            if array is not None:
                value = _known(name, for_all_bindings(array))
                value.weight, value.source = name, attribute
                value.constants, value.moved = frozenset((name,)), True
                return value
        return Value(name, TensorProto.STRING)

    # Shape arithmetic.

    def computed(
        self, scope: Scope, position: int, node: NodeProto, call: Call, inputs: Inputs
    ) -> Sequence[Value] | None:
        """Return the outputs by evaluation; None if an input is unknown or the operator is not evaluated here."""
        domain, op_type = key_of(node)
        if domain:
            return None
        if traits_of(node).reads_sizes and inputs[0] is not None and inputs[0].shapes is not None:
            return None if inputs[0].has_placeholder else [self.shape_of(node, call, inputs[0])]
        present = [value for value in inputs if value is not None]
        if not present or any(value.values is None for value in present) or _is_weight(node, present[0]):
            return None
        is_static = all(value.is_static for value in present)
        found: list[tuple[Array, ...]] = []
        for binding in BINDINGS[:1] if is_static else BINDINGS:
            outputs = compute_outputs(op_type, call, [v and v.values and v.values[binding] for v in inputs])
            if outputs is None or len(node.output) > len(outputs) or (not found and _are_large(outputs)):
                return None
            found.append(outputs)
        origins = self.provenance.of_outputs((scope, position), node, call, inputs, found[0][0])
        sizes = [] if is_static else _as_expressions(node, call, inputs)
        results = []
        for index, name in enumerate(node.output):
            value = _known(
                name,
                tuple(outputs[index] for outputs in found) if len(found) > 1 else for_all_bindings(found[0][index]),
            )
            value.from_shape = any(v.from_shape for v in present)
            value.origins = None if origins is None else origins[index]
            if value.is_open:
                self.open_shape(value, node, call, inputs, (scope.path, position, index))
            elif not is_static:
                place = (scope.path, position, index)
                self.open(value, sizes[index] if index < len(sizes) else None, place, _limits_of(node, value))
            results.append(value)
        return results

    def open(
        self, value: Value, found: Expressions | None, place: tuple[Any, ...], limits: tuple[int, ...] = ()
    ) -> None:
        """Record the symbolic elements of a value; without any, each becomes an unknown of the inputs.

        Elements that are clipped to `limits` become the limit that they reach under all bindings.
        """
        assert value.shapes is not None
        assert value.values is not None
        if found is None or found.shape != value.shapes[0]:
            found = np.empty(value.shapes[0], object)
            for index in np.ndindex(found.shape):
                numbers = tuple(array[index].item() for array in value.values)
                is_limit = len({*numbers}) == 1 and numbers[0] in limits
                found[index] = numbers[0] if is_limit else self.bindings.bind(unknown(*place, *index), numbers)
                self.has_limits |= is_limit
        _set_expressions(value, found)

    def open_shape(self, value: Value, node: NodeProto, call: Call, inputs: Inputs, place: tuple[Any, ...]) -> None:
        """Record the symbolic shape of a value whose number of elements differs between bindings."""
        if value.shapes is not None and len({*map(len, value.shapes)}) == 1:
            sizes = _inferred_sizes(node, call, inputs)
            self.set_sizes(value, sizes[place[-1]] if place[-1] < len(sizes) else None, inputs, place)

    def shape_of(self, node: NodeProto, call: Call, value: Value) -> Value:
        """Return the output of a Shape or Size node."""
        assert value.shapes is not None
        arrays = [np.asarray(shape, np.int64) for shape in value.shapes]
        sizes = objects(np.asarray(value.sizes, object))
        if traits_of(node).multiplies_sizes:
            result = _known(node.output[0], tuple(np.asarray(array.prod()) for array in arrays))
            result.origins, sizes = self.provenance.of_size(value), objects(np.asarray(product(sizes.tolist()), object))
        else:
            part = slice(call.get("start", 0), call.get("end"))
            result = _known(node.output[0], tuple(array[part] for array in arrays))
            result.origins, sizes = self.provenance.of_shape(value)[part], sizes[part]
        result.from_shape = True
        _set_expressions(result, sizes)
        return result

    # Shape inference.

    def inferred(self, scope: Scope, position: int, node: NodeProto, call: Call, inputs: Inputs) -> list[Value]:
        """Return the outputs by shape inference, under all bindings and as symbolic sizes."""
        first = self.infer(node, call, inputs, 0)
        is_dynamic = any(value is not None and not _is_independent_of_bindings(value) for value in inputs)
        rest = [self.infer(node, call, inputs, binding) if is_dynamic else first for binding in BINDINGS[1:]]
        sizes = _inferred_sizes(node, call, inputs) if is_dynamic else []
        results = []
        for index, name in enumerate(node.output):
            value = Value(name, first[index][0])
            shapes = [found[index][1] for found in (first, *rest)]
            complete = [
                tuple(
                    self.counts.get((scope.path, value.name, axis)) if size is None else size
                    for axis, size in enumerate(shape)
                )
                for shape in shapes
                if shape is not None
            ]
            if len(complete) == len(shapes) and len({*map(len, complete)}) == 1:
                value.has_placeholder = any(None in shape for shape in complete)
                value.shapes = tuple(
                    _complete(shape, guess) for shape, guess in zip(complete, PLACEHOLDER_SIZES, strict=True)
                )
                if is_dynamic:
                    place = (scope.path, position, index)
                    self.set_sizes(value, sizes[index] if index < len(sizes) else None, inputs, place)
            elif name and (declared := self.declared_shape(scope, node, name)) is not None:
                value.dtype, shape = declared
                value.shapes = for_all_bindings(shape)
            elif name:
                self.unknown.setdefault(f"{node.domain or 'ai.onnx'}::{node.op_type}", node.name or node.output[0])
            results.append(value)
        return results

    def declared_shape(self, scope: Scope, node: NodeProto, name: str) -> tuple[int, Shape] | None:
        """Return element type and shape that the file declares for an output, if they cannot be inferred.

        None if the operator is one of ONNX itself, whose sizes do not fit then, or if the declared shape is open.
        """
        domain, _ = key_of(node)
        if scope.path or not domain or name not in self.declared:
            return None
        dtype, dims = _dims(self.declared[name].type)
        if dims is None or not all(dims):
            return None
        return dtype, credible_shape(tuple(size for size in dims if size))

    def set_sizes(self, value: Value, sizes: Any, inputs: Inputs, place: tuple[Any, ...]) -> None:
        """Set the symbolic sizes of a value: the given ones, if they evaluate to its shape under all bindings.

        Otherwise a size is matched to one of the inputs, or is a number if it is the same under all bindings. If an
        operand holds sizes (a start, a count), equal numbers prove nothing, since the operator may take a minimum.
        """
        assert value.shapes is not None
        known = [size for v in inputs if v is not None for size in v.sizes or () if not is_constant(size)]
        has_operands = any(v is not None and v.holds_sizes for v in inputs)
        found: list[Any] = []
        for axis, numbers in enumerate(zip(*value.shapes, strict=True)):
            size = sizes[axis] if sizes is not None and axis < len(sizes) else None
            if size is None or not self.bindings.evaluates_to(size, numbers):
                if has_operands and len(set(numbers)) == 1:
                    size = self.bindings.bind(unknown(*place, axis), numbers)
                else:
                    size = self.bindings.measure((*place, axis), numbers, known)
            found.append(self.fixed.get(size, size) if self.fixed and isinstance(size, Size) else size)
        value.set_sizes(tuple(found))

    def infer(self, node: NodeProto, call: Call, inputs: Inputs, binding: int) -> Sequence[Inferred]:
        """Return types and shapes of the outputs under a binding, by a shape function or else by onnx."""
        shapes = [None if v is None or v.shapes is None else v.shapes[binding] for v in inputs]
        values = [None if v is None or v.values is None else v.values[binding] for v in inputs]
        own = output_shapes(key_of(node), call, shapes, values)
        if own is None:
            return self.infer_by_onnx(node, inputs, binding)
        types = [None if v is None else v.dtype for v in inputs]
        results: list[Inferred] = [
            (output_type(node, call, types, slot), shape) for slot, shape in enumerate(own[: call.outputs])
        ]
        return results + [(0, None)] * (call.outputs - len(results))

    def infer_by_onnx(self, node: NodeProto, inputs: Inputs, binding: int) -> Sequence[Inferred]:
        domain, _ = key_of(node)
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets.get(domain, 1), domain)
            # A function's values have the names of the formal inputs. onnx identifies inputs by name, so a value that
            # a node takes twice is passed once.
            named = {name: v for name, v in zip(node.input, inputs, strict=True) if v is not None}
            types = {name: v.type(binding) for name, v in named.items()}
            data = {name: numpy_helper.from_array(v.values[binding], name) for name, v in named.items() if v.values}
            found = shape_inference.infer_node_outputs(
                schema, node, types, data, opset_imports=self.opset_ids, ir_version=self.model.proto.ir_version or 3
            )
        except (
            onnx.defs.SchemaError, onnx.checker.ValidationError, shape_inference.InferenceError,
            RuntimeError, ValueError, TypeError,
        ):  # fmt: skip  # a table
            found = {}
        return [_dims(found.get(name)) if name else (0, None) for name in node.output]


def _known_of(inputs: Inputs) -> tuple[list[Any], list[Any]]:
    """Return the sizes and the elements of a node's inputs, None for those unknown."""
    shapes = [None if value is None else value.sizes for value in inputs]
    return shapes, [None if value is None else value.entries for value in inputs]


def _with_counts(shapes: Sequence[Shape], slot: int) -> tuple[Any, ...]:
    """Return a shape with an unknown for each size that data decide, and None for one that depends on the inputs'."""
    return tuple(
        unknown(slot, axis) if numbers == PLACEHOLDER_SIZES else numbers[0] if len(set(numbers)) == 1 else None
        for axis, numbers in enumerate(zip(*shapes, strict=True))
    )


def _with_met_sizes(inputs: Inputs) -> Inputs:
    """Return the inputs of a node that broadcasts them, where sizes that data decide are the known ones that they meet.

    They are those, or 1; in both cases, the output has the known size, unless that may be 1 itself.
    """
    shaped = [value for value in inputs if value is not None and value.shapes is not None]
    columns = {id(value): list(zip(*(value.shapes or ()), strict=True)) for value in shaped}
    if not any(is_decided_by_data(numbers) for each in columns.values() for numbers in each):
        return inputs
    met: dict[int, tuple[Numbers, Any]] = {}
    for known in shaped:
        for back, numbers in enumerate(reversed(columns[id(known)]), start=1):
            size = (known.sizes or ())[-back]
            if not is_decided_by_data(numbers) and is_less(1, size) is True:
                met.setdefault(back, (numbers, size))
    found: list[Value | None] = []
    for given in inputs:
        value, own = given, columns.get(id(given), [])
        places = {len(own) - b: m for b, m in met.items() if b <= len(own) and is_decided_by_data(own[len(own) - b])}
        if value is not None and places:
            sizes = value.sizes or ()
            numbers = [places[axis][0] if axis in places else each for axis, each in enumerate(own)]
            value = replace(value, shapes=tuple(zip(*numbers, strict=True)), extents=None)
            value.set_sizes(tuple(places[axis][1] if axis in places else size for axis, size in enumerate(sizes)))
        found.append(value)
    return found


def _as_expressions(node: NodeProto, call: Call, inputs: Inputs) -> Sequence[Expressions]:
    """Return the outputs as symbolic elements; empty if the operator or an input has no symbolic form."""
    present = [value for value in inputs if value is not None]
    if any(value.entries is None for value in present):
        return []
    arrays = [None if v is None else v.expressions if v.is_open else objects(np.asarray(v.value)) for v in inputs]
    is_whole = {value.value.dtype.kind for value in present if value.value is not None} <= set("iub")
    call = replace(call, attributes=call.attributes | {"is_whole": is_whole})
    return compute_sizes(node.op_type, call, arrays, [v is not None and v.is_open for v in inputs])


def _inferred_sizes(node: NodeProto, call: Call, inputs: Inputs) -> Sequence[Any]:
    """Return the symbolic shapes of the outputs; empty if there is no shape function."""
    key, shapes = key_of(node), [None if value is None else value.sizes for value in inputs]
    values = [None if value is None else value.entries for value in inputs]
    plain = output_shapes(key, call, shapes, values)
    return plain or open_shapes(key, call, shapes, values) or []


def _set_expressions(value: Value, found: Expressions) -> None:
    if any(isinstance(entry, Size) for entry in found.ravel().tolist()):
        value.expressions = found


def _is_independent_of_bindings(value: Value) -> bool:
    """Whether shape and elements are the same under all bindings."""
    return value.extents is None and (value.shapes is None or value.shapes[0] == value.shapes[1]) and not value.is_open


def _limits_of(node: NodeProto, value: Value) -> tuple[int, ...]:
    """Return the smallest and the largest number to which a node clips its output; empty if it does not."""
    return LIMITS.get(value.dtype, ()) if traits_of(node).is_quantizer else ()


def _is_weight(node: NodeProto, value: Value) -> bool:
    """Return whether a node rounds a tensor that is too large for shape arithmetic, or its inverse."""
    return traits_of(node).is_quantizer and value.value is not None and value.value.size > _MAX_SMALL_FLOATS


def _are_large(arrays: Sequence[Array]) -> bool:
    return any(array.size > MAX_ELEMENTS for array in arrays)


def _known(name: str, arrays: tuple[Array, ...]) -> Value:
    return Value(name, _tensor_type(arrays[0].dtype), tuple(array.shape for array in arrays), values=arrays)


@functools.cache
def _tensor_type(dtype: np.dtype[Any]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(dtype))


def _dims(proto: TypeProto | None) -> Inferred:
    """Return element type and shape of an ONNX type."""
    if proto is None or not proto.HasField("tensor_type"):
        return 0, None
    kind = proto.tensor_type
    if not kind.HasField("shape"):
        return kind.elem_type, None
    dims = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in kind.shape.dim)
    return kind.elem_type, dims


def _complete(shape: Sequence[int | None], guess: int) -> Shape:
    return credible_shape(tuple(guess if size is None else size for size in shape))


def _opsets(imports: Any) -> dict[str, int]:
    """Return the versions of the imported operator sets by domain."""
    return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in imports}
