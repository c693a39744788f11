"""Shared by the conversions with tools of onnx and onnxruntime: preparation, clean-up, validation and quiet calls."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto

from cpd_onnx.errors import UnsupportedError
from cpd_onnx.ir.model import Model, graphs_of, load
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.runtime.sessions import register_custom_operators
from cpd_onnx.shapes.editor import keep_entries
from cpd_onnx.shapes.order import topological_order

Notify: TypeAlias = Callable[[str], None]
"""Callback that receives each message for the user, one sentence at a time."""

_TOOL_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)
"""Errors that the tools raise for models that they do not support."""
_ADDED = ("onnx.infer", "onnx.quant.pre_process")
"""Keys of metadata that the tools add for each other."""


def ignore(_: str) -> None:
    """Discard a message; the default for `Notify` parameters."""


def embedded(model: Model) -> ModelProto:
    """Return a copy of the proto with all data embedded, and without initializers among the inputs.

    Up to IR version 3 every initializer is also listed as an input.
    """
    proto = model.complete_proto()
    if proto.ir_version < 4:
        weights = {tensor.name for tensor in proto.graph.initializer}
        inputs = [info for info in proto.graph.input if info.name not in weights]
        del proto.graph.input[:]
        proto.graph.input.extend(inputs)
        proto.ir_version = 4
    return proto


def optimised(model: Model, path: Path, failure: str) -> ModelProto:
    """Return the model after the basic optimisation of onnxruntime, which uses operators of the standard only.

    Constants are computed, batch normalisation becomes part of convolutions, and nodes without effect are removed.

    Args:
        model: The model.
        path: Where the optimised model is written on the way.
        failure: Start of the message if it fails.

    Raises:
        UnsupportedError: onnxruntime cannot load the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    register_custom_operators(options)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    with translate_tool_errors(failure):
        ort.InferenceSession(embedded(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(path)


def keep_described(proto: ModelProto, names: set[str]) -> None:
    """Remove the value descriptions of all tensors except those of the given names."""
    keep_entries(proto.graph.value_info, names.__contains__)


def require_one_message(model: Model, verb: str) -> None:
    """Raise UnsupportedError if a model is over 2 GiB, which the tools cannot convert."""
    if model.is_over_limit:
        raise UnsupportedError(f"models over 2 GiB cannot be {verb}: prune the model below that first")


def valid(proto: ModelProto, before: Model, what: str) -> Model:
    """Return the result of a tool as a model; raises UnsupportedError if the tool made a valid model invalid."""
    model = load(proto)
    model.path = before.path
    reason = model.defect()
    if reason is not None and before.defect() is None:
        raise UnsupportedError(f"{what} gives no valid model: {reason}")
    return model


def tensors_of(proto: ModelProto) -> Iterator[TensorProto]:
    """Yield the initializers and constants of all graphs."""
    for graph in graphs_of(proto.graph):
        yield from graph.initializer
        yield from (
            a.t for node in graph.node if traits_of(node).is_constant for a in node.attribute if a.HasField("t")
        )


def name_nodes(proto: ModelProto) -> None:
    """Give each node a unique name, by which it can be excluded."""
    taken: set[str] = set()
    for number, node in enumerate(proto.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}_{number}_"
        taken.add(node.name)


def tidied(proto: ModelProto, before: ModelProto) -> ModelProto:
    """Return the result of a tool with its nodes sorted topologically and the tool's additions to metadata removed."""
    _sort_nodes(proto)
    keep_described(proto, {name for node in proto.graph.node for name in node.output})
    used = {node.domain for graph in graphs_of(proto.graph) for node in graph.node} | {"", "ai.onnx"}
    used |= {opset.domain for opset in before.opset_import} | {function.domain for function in proto.functions}
    opsets = [opset for opset in proto.opset_import if opset.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(opsets)
    del proto.metadata_props[:]
    proto.metadata_props.extend(entry for entry in before.metadata_props if entry.key not in _ADDED)
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(proto, name, getattr(before, name))
    proto.graph.name = before.graph.name
    proto.ir_version = max(before.ir_version, 4)
    return proto


def _sort_nodes(proto: ModelProto) -> None:
    """Sort the nodes of the main graph topologically."""
    graph = proto.graph
    known = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    nodes = list(graph.node)
    order = topological_order(nodes, known, "the quantised model")
    del graph.node[:]
    graph.node.extend(nodes[place] for place in order)


@contextlib.contextmanager
def quiet(notify: Notify) -> Iterator[None]:
    """Suppress output and logs inside the block, and pass each warning to `notify` once."""
    warnings = _Warnings()
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, [warnings]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.handlers = handlers
    for sentence in warnings.sentences:
        notify(sentence)


class _Warnings(logging.Handler):
    """Collects the first lines of warnings that a user can act on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.sentences: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Record a warning, once, except the advice to preprocess the model, which has been done."""
        line = record.getMessage().strip().splitlines()[0][:200]
        if "pre-process" not in line:
            self.sentences[f"onnxruntime: {line}"] = None


@contextlib.contextmanager
def translate_tool_errors(what: str) -> Iterator[None]:
    """Turn errors of onnx and onnxruntime inside the block into UnsupportedError whose message starts with `what`."""
    try:
        yield
    except Exception as error:  # onnxruntime's own exception classes share no base but Exception
        if not isinstance(error, _TOOL_ERRORS) and not type(error).__module__.startswith(("onnx.", "onnxruntime.")):
            raise
        raise UnsupportedError(f"{what}: {first_line(error)}") from error


def quantised_node(model: Model) -> NodeProto | None:
    """Return the first node that shows that the model is quantised; None if there is none."""
    nodes = (node for graph in graphs_of(model.graph) for node in graph.node)
    return next((node for node in nodes if traits_of(node).is_quantized), None)


def first_line(error: Exception) -> str:
    """Return the message of an error as one line, without onnx's source position; its type if it has no message."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^.*Assertion `.*?` failed: (?=.)", "", line)[:300]
