"""Checks that reject damaged models before they crash onnx or onnxruntime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from onnx import FunctionProto, GraphProto, NodeProto

from cpd_onnx.errors import ModelError
from cpd_onnx.ir.model import FunctionName, Model, attributes_of, bodies_of, called_by
from cpd_onnx.ops.evaluate import Call
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.values import Shape, Value

_MAX_DIM = 1 << 28
"""Longest credible axis, in elements. Heuristic: at this length one int64 index array of the axis takes 2 GiB."""
_MAX_CALLED_NODES = 200_000
"""Largest number of nodes after expansion of all function calls. Heuristic that bounds the time of inference."""


def require_bounded_calls(model: Model, functions: Mapping[FunctionName, FunctionProto]) -> None:
    """Raise ModelError if the function calls of a model expand to more than `_MAX_CALLED_NODES` nodes."""
    known: dict[FunctionName, int] = {}

    def inside(nodes: Iterable[NodeProto]) -> int:
        bodies = (body.node for node in nodes for body in bodies_of(node).values())
        return sum(called(called_by(node)) for node in nodes) + sum(map(inside, bodies))

    def called(key: FunctionName) -> int:
        if key in functions and key not in known:
            known[key] = 0  # where it calls itself, the depth of the calls stops it
            known[key] = len(functions[key].node) + inside(functions[key].node)
        return known.get(key, 0)

    try:
        count = inside(model.graph.node)
    except RecursionError as error:
        raise ModelError("subgraphs or functions nest too deep (recursive function?)") from error
    if count > _MAX_CALLED_NODES:
        raise ModelError(f"function calls expand to {count:,} nodes; at most {_MAX_CALLED_NODES:,} are supported")


def credible_shape(shape: Shape) -> Shape:
    """Return the shape; raise ModelError if a size is negative or larger than any real tensor has."""
    if max(shape, default=0) > _MAX_DIM or min(shape, default=0) < 0:
        raise ModelError(f"a tensor of shape {list(shape)} is not credible: is the file damaged?")
    return shape


def require_bodies(node: NodeProto, bodies: Mapping[str, GraphProto]) -> None:
    """Raise ModelError if subgraphs of an If, Loop or Scan are missing or their inputs and outputs do not fit it."""
    attributes, inputs, outputs = attributes_of(node), len(node.input), len(node.output)
    own = traits_of(node)
    wanted = ("then_branch", "else_branch") if own.branches else ("body",)
    fits = all(name in bodies for name in wanted)
    if own.branches:
        fits = fits and inputs == 1 and all(len(bodies[name].output) >= outputs for name in wanted)
    elif not own.scans:
        fits = fits and inputs >= 2 and len(bodies["body"].input) == inputs and len(bodies["body"].output) > outputs
    else:
        scans = attributes.get("num_scan_inputs", 0)
        axes = [(name, attributes.get(f"scan_{name}_axes")) for name in ("input", "output")]
        count = {"input": scans, "output": outputs - (inputs - scans)}
        fits = fits and 0 < scans <= inputs and len(bodies["body"].output) >= outputs
        fits = fits and len(bodies["body"].input) in (inputs - 1, inputs)  # one less before opset 9
        fits = fits and all(found is None or len(found) == count[name] for name, found in axes)
    if not fits:
        name = node.name or (node.output[0] if outputs else "")
        raise ModelError(f"the subgraphs of {node.op_type} {name!r} do not fit its inputs and outputs")


def _require_scales(node: NodeProto, call: Call, inputs: Sequence[Value | None]) -> None:
    """Reject scales that are not positive: negative sizes abort the onnxruntime process at the next Slice."""
    given = inputs[2 if call.opset > 10 else 1 :]
    if given and given[0] is not None and given[0].values is not None:
        scales = given[0].values[0].ravel().tolist()
        if not all(scale > 0 for scale in scales):
            raise _damaged(node, f"must have positive scales, got {scales}")


def _require_batch_dims(node: NodeProto, call: Call, _inputs: Sequence[Value | None]) -> None:
    """Reject negative `batch_dims`: the shape inference of onnx and onnxruntime reads out of bounds."""
    _require_number(node, call, "batch_dims", 0, range(1 << 10))


def _require_groups(node: NodeProto, call: Call, _inputs: Sequence[Value | None]) -> None:
    """Reject group counts below one, by which onnxruntime divides."""
    _require_number(node, call, "group", 1, range(1, _MAX_DIM))


def _require_heads(node: NodeProto, call: Call, inputs: Sequence[Value | None]) -> None:
    """Reject more heads than channels: onnxruntime divides by the number of channels of a head."""
    for value, name in zip(inputs, ("q_num_heads", "kv_num_heads"), strict=False):
        if value is not None and value.shapes is not None and len(value.shapes[0]) == 3:
            _require_number(node, call, name, 0, range(1, value.shapes[0][2] + 1))


def _require_number(node: NodeProto, call: Call, name: str, default: int, among: range) -> None:
    found = call.get(name, default)
    if not isinstance(found, int) or found not in among:
        raise _damaged(node, f"must have {name} from {among.start:,} to {among.stop - 1:,}, got {found!r}")


def _require_five_inputs(node: NodeProto, _call: Call, inputs: Sequence[Value | None]) -> None:
    """Reject fewer than five inputs: onnxruntime reads all five when it builds its lookup table."""
    if len(inputs) < 5:
        raise _damaged(node, f"must have at least 5 inputs, got {len(inputs)}")


def _damaged(node: NodeProto, what: str) -> ModelError:
    """Return the ModelError for a node; `what` follows its name in the message."""
    return ModelError(f"node {node.name or node.output[0]!r} {what}: is the file damaged?")


NODE_CHECKS = {
    ("", "Attention"): _require_heads,
    ("", "ConvTranspose"): _require_groups,
    ("", "GatherND"): _require_batch_dims,
    ("", "Resize"): _require_scales,
    ("com.microsoft", "QLinearLeakyRelu"): _require_five_inputs,
    ("com.microsoft", "QLinearSigmoid"): _require_five_inputs,
}
"""Checks by (domain, operator) of nodes on which onnx or onnxruntime would crash the process."""
