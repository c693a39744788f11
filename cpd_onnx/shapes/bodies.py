"""Inputs and outputs of subgraphs and of model-local functions during shape inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from onnx import AttributeProto, GraphProto, NodeProto

from cpd_onnx.ir.model import attributes_of
from cpd_onnx.ops.evaluate import MAX_ELEMENTS
from cpd_onnx.ops.sizes import Bindings, unknown
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.values import PLACEHOLDER_SIZES, Numbers, Scope, T, Value, for_all_bindings, taken_branch


def formal_inputs(node: NodeProto, body: GraphProto, inputs: Sequence[Value | None]) -> dict[str, Value]:
    """Return the inputs of a subgraph by name, with the shapes of the arguments and unknown values."""
    if traits_of(node).branches:
        return {}
    attributes = attributes_of(node)
    scans = attributes.get("num_scan_inputs", 0)
    first_scan, axes = len(body.input) - scans, attributes.get("scan_input_axes") or [0] * scans
    results = {}
    for index, info in enumerate(body.input):
        actual = (inputs[index] if index < len(inputs) else None) or Value(info.name)
        value = Value(info.name, info.type.tensor_type.elem_type or actual.dtype, actual.shapes, actual.extents)
        if index >= first_scan and actual.shapes is not None:
            axis = axes[index - first_scan]
            value.shapes = tuple(_without(shape, axis) for shape in actual.shapes)
            value.extents = None if actual.extents is None else _without(actual.extents, axis)
        if index < 2 and not traits_of(node).scans:
            value.shapes, value.extents = for_all_bindings(()), None
        results[info.name] = value
    return results


def if_outputs(
    node: NodeProto, condition: Value | None, branches: Mapping[str, Scope], bindings: Bindings
) -> list[Value]:
    """Return the outputs of an If: the properties on which all branches that may run agree.

    Data decide a size on which they do not.
    """
    taken = taken_branch(condition)
    scopes = [branches[name] for name in (("then_branch", "else_branch") if taken is None else (taken,))]
    results = []
    for index, name in enumerate(node.output):
        found = [scope.lookup(scope.outputs[index]) for scope in scopes]
        sources = [value for value in found if value is not None]
        shapes = _common_shapes(found)
        if found[0] is None or shapes is None:
            results.append(Value(name, found[0].dtype if found[0] else 0))
            continue
        result = renamed(found[0], name)
        if taken is None:
            result.shapes, result.values, result.expressions = shapes, None, None
            result.has_placeholder = any(value.has_placeholder for value in sources) or shapes != found[0].shapes
            _set_common_sizes(result, sources, bindings, (scopes[0].path, index))
        results.append(result)
    return results


def _common_shapes(found: Sequence[Value | None]) -> tuple[tuple[int, ...], ...] | None:
    """Return the shapes that the branches of an If agree on, with placeholders for sizes that differ; None without."""
    known = [value.shapes for value in found if value is not None and value.shapes is not None]
    if len(known) < len(found) or len({len(shapes[0]) for shapes in known}) > 1:
        return None
    sizes = [{tuple(shape[axis] for shape in shapes) for shapes in known} for axis in range(len(known[0][0]))]
    return tuple(zip(*(own.pop() if len(own) == 1 else PLACEHOLDER_SIZES for own in sizes), strict=True)) or known[0]


def _set_common_sizes(result: Value, sources: Sequence[Value], bindings: Bindings, place: tuple[str, int]) -> None:
    """Set the sizes of an If's output; a size on which the branches differ becomes an unknown of the inputs."""
    if all(value.extents is None for value in sources):
        return
    rows = zip(*(value.sizes or () for value in sources), strict=True)
    numbers = zip(*(result.shapes or ()), strict=True)
    result.extents = tuple(
        sizes[0] if len(set(sizes)) == 1 else bindings.bind(unknown(*place, axis), found)
        for axis, (sizes, found) in enumerate(zip(rows, numbers, strict=True))
    )


def loop_outputs(
    node: NodeProto, graph: GraphProto, inputs: Sequence[Value | None], body: Scope, bindings: Bindings
) -> list[Value]:
    """Return the outputs of a Loop or Scan: final states, then the per-iteration outputs stacked along an axis."""
    attributes, skipped = attributes_of(node), 0 if traits_of(node).scans else 1  # the condition
    arguments = inputs[2 * skipped :]
    states = len(arguments) - attributes.get("num_scan_inputs", 0)
    axes = attributes.get("scan_output_axes") or [0] * len(node.output)
    results = []
    for index, name in enumerate(node.output):
        inner = body.lookup(graph.output[index + skipped].name) or Value(name)
        value = Value(name, inner.dtype)
        if index < states:
            outer = arguments[index]
            if outer is not None and inner.shapes == outer.shapes:
                value.shapes, value.extents = inner.shapes, inner.extents or outer.extents
        elif inner.shapes is not None:
            lengths, axis = _rounds(node, inputs), 0 if skipped else axes[index - states]
            shapes = zip(inner.shapes, lengths, strict=True)
            value.shapes = tuple((*shape[:axis], length, *shape[axis:]) for shape, length in shapes)
            sizes, length = inner.sizes or (), bindings.measure((body.path, index), lengths)
            value.set_sizes((*sizes[:axis], length, *sizes[axis:]))
            value.has_placeholder = (
                bool(skipped) or inner.has_placeholder or inputs[-1] is None or inputs[-1].has_placeholder
            )
        results.append(value)
    return results


def _rounds(node: NodeProto, inputs: Sequence[Value | None]) -> Numbers:
    """Return the number of iterations of a Loop or Scan; a placeholder for a Loop whose trip count is unknown."""
    if traits_of(node).scans:
        last, axis = inputs[-1], (attributes_of(node).get("scan_input_axes") or [0])[-1]
        if last is None or last.shapes is None or not -len(last.shapes[0]) <= axis < len(last.shapes[0]):
            return PLACEHOLDER_SIZES
        return tuple(shape[axis] for shape in last.shapes)
    count = inputs[0]
    if count is not None and count.values is not None and 0 < int(count.values[0].item()) < MAX_ELEMENTS:
        return tuple(int(array.item()) for array in count.values)
    return PLACEHOLDER_SIZES


def renamed(value: Value | None, name: str) -> Value:
    """Return a tensor under another name, without the provenance that is valid only where it comes from.

    The elements of a sequence that leaves a body are not followed.
    """
    if value is None:
        return Value(name)
    return replace(
        value, name=name, origins=None, weight=None, constants=None, moved=False, source=None, elements=None,
        _types=None,
    )  # fmt: skip  # what is lost


def with_attributes(node: NodeProto, given: Mapping[str, AttributeProto]) -> NodeProto:
    """Return a node of a function with its attribute references resolved from the call, also in its subgraphs."""
    if not _refers(node):
        return node
    result = NodeProto()
    result.CopyFrom(node)
    del result.attribute[:]
    for attribute in node.attribute:
        source = given.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute
        if source is None:
            continue
        copied = result.attribute.add()
        copied.CopyFrom(source)
        copied.name = attribute.name
        if source is attribute:
            inner = [with_attributes(each, given) for each in attribute.g.node]
            del copied.g.node[:]
            copied.g.node.extend(inner)
    return result


def _refers(node: NodeProto) -> bool:
    """Whether a node, or one of its subgraphs, references an attribute of the function call."""
    return any(a.ref_attr_name or any(map(_refers, a.g.node)) for a in node.attribute)


def _without(shape: tuple[T, ...], axis: int) -> tuple[T, ...]:
    axis %= max(1, len(shape))
    return (*shape[:axis], *shape[axis + 1 :])
