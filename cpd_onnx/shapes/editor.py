"""Editing of a copy of a model whose scopes and nodes were inferred on the original."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from onnx import AttributeProto, GraphProto, NodeProto, helper

from cpd_onnx.ir.model import Array, Lazy, Model, materialize, replace_values
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.order import all_inputs
from cpd_onnx.shapes.values import Scope, Value


class Editor:
    """Locates the counterparts of scopes, nodes and weights in a copy of the model, and edits them.

    Attributes:
        model: Copy of the model, edited in place.
        names: All names in use in the copy.

    """

    def __init__(self, model: Model) -> None:
        """Create an editor of a copy of the model."""
        self.model = model
        self.names = model.names()
        self._graphs: dict[str, GraphProto] = {}
        self._constant_nodes: dict[str, dict[str, NodeProto]] = {}

    def graph(self, scope: Scope) -> GraphProto:
        """Return the graph of a scope."""
        if scope.path not in self._graphs:
            graph = self.model.graph
            for position, attribute in scope.address:
                graph = next(a.g for a in graph.node[position].attribute if a.name == attribute)
            self._graphs[scope.path] = graph
        return self._graphs[scope.path]

    def node(self, scope: Scope, position: int) -> NodeProto:
        """Return the node at a position of a scope."""
        found: NodeProto = self.graph(scope).node[scope.order[position]]
        return found

    def constant_node(self, scope: Scope, name: str) -> NodeProto:
        """Return the Constant node whose output has the given name."""
        if scope.path not in self._constant_nodes:
            nodes = self.graph(scope).node
            self._constant_nodes[scope.path] = {n.output[0]: n for n in nodes if traits_of(n).is_constant}
        return self._constant_nodes[scope.path][name]

    def fresh(self, preferred: str) -> str:
        """Return an unused name and reserve it: `preferred`, with a numeric suffix if it is taken."""
        name, number = preferred, 1
        while name in self.names:
            name, number = f"{preferred}_{number}", number + 1
        self.names.add(name)
        return name

    def add_fresh(self, preferred: str, array: Array | Lazy) -> str:
        """Add an initializer to the main graph, visible in all subgraphs, and return its name."""
        name = self.fresh(preferred)
        self.add(name, array)
        return name

    def add(self, name: str, array: Array | Lazy) -> None:
        """Add an initializer with an unused name to the main graph."""
        self.model.add_initializer(name, array)
        if self.model.proto.ir_version < 4:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            self.model.graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))

    def replace(self, weight: Value, scope: Scope, values: Array | Lazy) -> None:
        """Replace the values of a weight of a scope, wherever they are stored."""
        name, source = weight.name, weight.source
        if not scope.address and not isinstance(source, AttributeProto):
            self.model.set_array(name, values)
            return
        array = materialize(values)
        if isinstance(source, AttributeProto):
            attribute = next(a for a in self.constant_node(scope, name).attribute if a.name == source.name)
            if attribute.name == "value":
                replace_values(attribute.t, array)
            else:
                fresh = array.tolist() if array.ndim else array.item()
                attribute.CopyFrom(helper.make_attribute(attribute.name, fresh))
        else:
            replace_values(next(t for t in self.graph(scope).initializer if t.name == name), array)


def put_nodes(model: Model, nodes: Iterable[NodeProto], read: Collection[str]) -> None:
    """Replace the nodes of the main graph, and drop the weights and descriptions that belong to the former ones alone.

    `read` has the names that were read before.
    """
    graph = model.graph
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    unread = set(read) - {name for node in kept for name in all_inputs(node)} - {info.name for info in graph.output}
    dropped = {tensor.name for tensor in graph.initializer} & unread
    for name in sorted(dropped):
        model.drop_initializer(name)
    made = {name for node in kept for name in node.output}
    keep_entries(graph.value_info, made.__contains__)
    keep_entries(graph.input, lambda name: name not in dropped)


def keep_entries(entries: Any, is_kept: Callable[[str], bool]) -> None:
    """Remove the descriptions of tensors that are not to be kept."""
    kept = [type(entry).FromString(entry.SerializeToString()) for entry in entries if is_kept(entry.name)]
    if len(kept) < len(entries):
        del entries[:]
        entries.extend(kept)
