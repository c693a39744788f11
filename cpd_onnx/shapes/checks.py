"""Refusals of damaged models, before onnx or onnxruntime trip over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from onnx import FunctionProto, GraphProto, NodeProto

from cpd_onnx.errors import ModelError
from cpd_onnx.ir.model import FunctionName, Model, attributes_of, bodies_of, called_by
from cpd_onnx.ops.evaluate import Call
from cpd_onnx.shapes.values import Shape, Value

_MAX_DIM = 1 << 28
"""No axis is longer; each index of it would take eight bytes."""
_MOST_CALLED = 200_000
"""Nodes in functions that are looked at, each as often as it is called."""


def require_few_calls(model: Model, functions: Mapping[FunctionName, FunctionProto]) -> None:
    """Raise ModelError where functions that call functions come to more nodes than anybody can look at."""
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
    if count > _MOST_CALLED:
        raise ModelError(f"functions that call functions come to {count:,} nodes, more than {_MOST_CALLED:,}")


def sane(shape: Shape) -> Shape:
    """The shape, unless a damaged file made it absurd."""
    if max(shape, default=0) > _MAX_DIM or min(shape, default=0) < 0:
        raise ModelError(f"a tensor of shape {list(shape)} is not credible: is the file damaged?")
    return shape


def require_bodies(node: NodeProto, bodies: Mapping[str, GraphProto]) -> None:
    """Raise ModelError where subgraphs are missing, or have not the inputs and outputs that the node calls for."""
    attributes, given, made = attributes_of(node), len(node.input), len(node.output)
    wanted = {"If": ("then_branch", "else_branch")}.get(node.op_type, ("body",))
    fits = all(name in bodies for name in wanted)
    if node.op_type == "If":
        fits = fits and given == 1 and all(len(bodies[name].output) >= made for name in wanted)
    elif node.op_type == "Loop":
        fits = fits and given >= 2 and len(bodies["body"].input) == given and len(bodies["body"].output) > made
    else:
        scans = attributes.get("num_scan_inputs", 0)
        axes = [(name, attributes.get(f"scan_{name}_axes")) for name in ("input", "output")]
        count = {"input": scans, "output": made - (given - scans)}
        fits = fits and 0 < scans <= given and len(bodies["body"].output) >= made
        fits = fits and len(bodies["body"].input) in (given - 1, given)  # one less before opset 9
        fits = fits and all(found is None or len(found) == count[name] for name, found in axes)
    if not fits:
        name = node.name or (node.output[0] if made else "")
        raise ModelError(f"the subgraphs of {node.op_type} {name!r} do not fit its inputs and outputs")


def _require_scales(node: NodeProto, call: Call, inputs: Sequence[Value | None]) -> None:
    """Refuse scales that make a size below zero: onnxruntime ends the whole process at the next Slice."""
    given = inputs[2 if call.opset > 10 else 1 :]
    if given and given[0] is not None and given[0].values is not None:
        scales = given[0].values[0].ravel().tolist()
        if not all(scale > 0 for scale in scales):
            raise _damaged(node, f"resizes by {scales}, not all above zero")


def _require_batch_dims(node: NodeProto, call: Call, _inputs: Sequence[Value | None]) -> None:
    """Refuse axes counted from the end: the shape inference of onnx and onnxruntime reads what is not its own."""
    _require_number(node, call, "batch_dims", 0, range(1 << 10))


def _require_groups(node: NodeProto, call: Call, _inputs: Sequence[Value | None]) -> None:
    """Refuse what onnxruntime divides by."""
    _require_number(node, call, "group", 1, range(1, _MAX_DIM))


def _require_heads(node: NodeProto, call: Call, inputs: Sequence[Value | None]) -> None:
    """Refuse heads that have no channels: onnxruntime divides by how many each has."""
    for value, name in zip(inputs, ("q_num_heads", "kv_num_heads"), strict=False):
        if value is not None and value.shapes is not None and len(value.shapes[0]) == 3:
            _require_number(node, call, name, 0, range(1, value.shapes[0][2] + 1))


def _require_number(node: NodeProto, call: Call, name: str, default: int, among: range) -> None:
    found = call.get(name, default)
    if not isinstance(found, int) or found not in among:
        raise _damaged(node, f"has {name} {found!r}, which makes no sense")


def _require_five(node: NodeProto, _call: Call, inputs: Sequence[Value | None]) -> None:
    """Refuse fewer inputs than onnxruntime makes its table of when it opens the model."""
    if len(inputs) < 5:
        raise _damaged(node, f"has {len(inputs)} inputs instead of 5")


def _damaged(node: NodeProto, what: str) -> ModelError:
    """The error that says what is wrong with a node."""
    return ModelError(f"node {node.name or node.output[0]!r} {what}: is the file damaged?")


DEADLY = {
    ("", "Attention"): _require_heads,
    ("", "ConvTranspose"): _require_groups,
    ("", "GatherND"): _require_batch_dims,
    ("", "Resize"): _require_scales,
    ("com.microsoft", "QLinearLeakyRelu"): _require_five,
    ("com.microsoft", "QLinearSigmoid"): _require_five,
}
"""Checks of what onnx or onnxruntime would not survive."""
