"""What the tools that convert models have in common: what goes in, what comes out, and that they are quiet."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator
from typing import TypeAlias

from onnx import ModelProto, NodeProto, TensorProto

from cpd_onnx.errors import UnsupportedError
from cpd_onnx.ir.model import Model, graphs_of, load
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.order import topological

Notify: TypeAlias = Callable[[str], None]
"""Called with what the user should know, a sentence each."""

_COMPLAINTS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)
"""What the tools raise where a model has what they do not expect."""
_ADDED = ("onnx.infer", "onnx.quant.pre_process")
"""Metadata that the tools leave for each other."""


def ignore(_: str) -> None:
    """Hears nothing."""


def embedded(model: Model) -> ModelProto:
    """A copy of the model with all data in it, whose weights are no inputs where the IR version calls them so.

    Up to IR version 3 every initializer is an input too, though nobody may feed it.
    """
    proto = model.complete_proto()
    if proto.ir_version < 4:
        weights = {tensor.name for tensor in proto.graph.initializer}
        inputs = [info for info in proto.graph.input if info.name not in weights]
        del proto.graph.input[:]
        proto.graph.input.extend(inputs)
        proto.ir_version = 4
    return proto


def keep_described(proto: ModelProto, names: set[str]) -> None:
    """Leave no described tensors but those of these names."""
    kept = [info for info in proto.graph.value_info if info.name in names]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)


def require_one_message(model: Model, verb: str) -> None:
    """Raise UnsupportedError where a model is over 2 GiB, which no tool of onnx converts."""
    if model.is_over_limit:
        raise UnsupportedError(f"models over 2 GiB cannot be {verb}: prune it below that first")


def valid(proto: ModelProto, before: Model, what: str) -> Model:
    """A model of what a tool has made; UnsupportedError if that is not valid while what it was made of is."""
    made = load(proto)
    made.path = before.path
    reason = made.defect()
    if reason is not None and before.defect() is None:
        raise UnsupportedError(f"{what} gives no valid model: {reason}")
    return made


def tensors_of(proto: ModelProto) -> Iterator[TensorProto]:
    """Constants of all graphs."""
    for graph in graphs_of(proto.graph):
        yield from graph.initializer
        yield from (a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.HasField("t"))


def name_nodes(proto: ModelProto) -> None:
    """Give each node a name of its own, by which it can be excluded."""
    taken: set[str] = set()
    for number, node in enumerate(proto.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}_{number}_"
        taken.add(node.name)


def tidied(proto: ModelProto, before: ModelProto) -> ModelProto:
    """What a tool has made, with its nodes in order, and with nothing of the tool but what it was asked for."""
    _in_order(proto)
    made = {name for node in proto.graph.node for name in node.output}
    keep_described(proto, made)
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


def _in_order(proto: ModelProto) -> None:
    """Put the nodes of the main graph where all come after what they take."""
    graph = proto.graph
    known = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    nodes = list(graph.node)
    order = topological(nodes, known, "the quantised model")
    del graph.node[:]
    graph.node.extend(nodes[place] for place in order)


@contextlib.contextmanager
def quiet(notify: Notify) -> Iterator[None]:
    """Nothing is printed or logged inside; each warning is passed to `notify` once."""
    heard = _Heard()
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, [heard]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.handlers = handlers
    for sentence in heard.sentences:
        notify(sentence)


class _Heard(logging.Handler):
    """Keeps the first lines of warnings that a user can do something about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.sentences: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning, but not a second time and not the advice to do what was done."""
        line = record.getMessage().strip().splitlines()[0][:200]
        if "pre-process" not in line:
            self.sentences[f"onnxruntime: {line}"] = None


@contextlib.contextmanager
def translate_tool_errors(what: str) -> Iterator[None]:
    """Raise UnsupportedError for what a tool of onnx or onnxruntime complains of inside; `what` cannot be done then."""
    try:
        yield
    except Exception as error:  # onnxruntime raises classes of its own that share no base but Exception
        if not isinstance(error, _COMPLAINTS) and not type(error).__module__.startswith(("onnx.", "onnxruntime.")):
            raise
        raise UnsupportedError(f"{what}: {first_line(error)}") from error


def quantised_node(model: Model) -> NodeProto | None:
    """A node that says that the model is quantised, if there is one."""
    nodes = (node for graph in graphs_of(model.graph) for node in graph.node)
    return next((node for node in nodes if traits_of(node).is_quantized), None)


def first_line(error: Exception) -> str:
    """What an error says, as one line without the place in the code of onnx; its kind where it says nothing."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^.*Assertion `.*?` failed: (?=.)", "", line)[:300]
