"""The activation behind a fitted tensor, whichever operators compute it: what a repair makes of errors there counts."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper

from cpd_onnx.errors import UnsupportedError
from cpd_onnx.fitting.graph import Graph
from cpd_onnx.fitting.least_squares import Rows
from cpd_onnx.fitting.units import Unit
from cpd_onnx.ir.model import Array, Model, attributes_of
from cpd_onnx.ops.matrix_view import along
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.runtime.sessions import execute, open_model

_MOST_NODES = 32
"""Maximum number of nodes of an activation (heuristic)."""


class Activation:
    """A function that a graph computes of each element of a tensor, which may differ between channels."""

    def __init__(self, session: ort.InferenceSession, start: str) -> None:
        """Wrap a session that computes the function of its only input, whose last axis is that of the channels."""
        self._session, self._start = session, start

    def __call__(self, rows: Rows) -> Rows:
        """Return the function of rows [groups, rows, outputs]."""
        (found,) = execute(self._session, {self._start: rows})
        return np.asarray(found, np.float32).reshape(rows.shape)


def activation_of(graph: Graph, unit: Unit) -> Activation | None:
    """Return the activation behind the target of a unit; None if there is none, or other nodes take the target as well.

    Args:
        graph: The model whose weights are fitted.
        unit: A unit of it.
    """
    is_plain = unit.is_observed and not unit.linear.is_stacked and unit.target not in unit.levels
    if not is_plain or graph.type_of(unit.target) != TensorProto.FLOAT:
        return None
    rank = len(graph.shape(unit.target))
    return _Finder(graph, unit, unit.linear.out_axis % max(1, rank) - rank).found()


class _Finder:
    """Follows a tensor through nodes that compute something of each of its elements alone."""

    def __init__(self, graph: Graph, unit: Unit, axis: int) -> None:
        """Start at the target of a unit, with its axis of channels counted from the end."""
        self.graph, self.unit, self.axis = graph, unit, axis
        self.constants: dict[str, Array] = {}
        self.nodes: list[NodeProto] = []

    def found(self) -> Activation | None:
        """Return the function of the target that all other nodes take instead of it."""
        start = self.unit.target
        made, taken, seen = {start}, set[str](), set[int]()
        waiting = list(self.users(start, taken))
        heapq.heapify(waiting)
        while waiting:
            position = heapq.heappop(waiting)
            if position in seen:
                continue
            seen.add(position)
            node = self.graph.node(position)
            if len(self.nodes) < _MOST_NODES and self.is_elementwise(node, made):
                self.nodes.append(node)
                made.add(node.output[0])
                for user in self.users(node.output[0], taken):
                    heapq.heappush(waiting, user)
            else:
                taken |= made & {*node.input}
        if len(taken) != 1 or taken == {start}:
            return None
        (end,) = taken
        if self.graph.type_of(end) == TensorProto.FLOAT:
            with suppress(UnsupportedError):
                found = Activation(self.session(end), start)
                groups = self.unit.linear.groups
                found(np.zeros((groups, 1, self.unit.gain.size // groups), np.float32))  # may not fit these ranks
                return found
        return None

    def users(self, name: str, taken: set[str]) -> Iterator[int]:
        """Yield the nodes of the main graph that take a tensor; adds it to `taken` if anything else does."""
        scope = self.graph.scope
        if name in scope.outputs:
            taken.add(name)
        for use in scope.consumers.get(name, []):
            if use.scope is scope:
                yield use.node
            else:
                taken.add(name)

    def is_elementwise(self, node: NodeProto, made: set[str]) -> bool:
        """Return whether a node computes one tensor of elements of known ones, and of constants for each channel."""
        traits = traits_of(node)
        is_local = traits.is_local and not (traits.moves_elements or traits.stores_statistics)
        is_smooth = not (traits.is_step_function or traits.is_random)
        if not (traits.is_identity or (is_local and is_smooth)) or sum(map(bool, node.output)) != 1:
            return False
        if {"axis", "broadcast"} & {*attributes_of(node)}:
            return False
        return all(name in made or not name or self.is_known(name) for name in node.input)

    def is_known(self, name: str) -> bool:
        """Return whether a tensor is a constant that is one number, or one for each channel; remembers it."""
        array = self.graph.constant(name)
        if array is None:
            return False
        if array.size == 1:
            self.constants[name] = array.reshape(())
            return True
        vector = along(array, self.axis)
        if vector is None or vector.size != self.unit.gain.size:
            return False
        # Some operators, such as BiasGelu, take vectors alone.
        groups = self.unit.linear.groups
        self.constants[name] = array.reshape((groups, 1, -1) if groups > 1 else (-1,))
        return True

    def session(self, end: str) -> ort.InferenceSession:
        """Return a session that computes a tensor from the target, of which the channels are the last axis."""
        part, source = ModelProto(), self.graph.model.proto
        part.ir_version = max(source.ir_version, 4)  # before, each initializer has to be an input too
        part.opset_import.extend(source.opset_import)
        part.graph.name = "activation"
        part.graph.node.extend(self.nodes)
        model = Model(part, {})
        for name in {name for node in self.nodes for name in node.input} & self.constants.keys():
            model.add_initializer(name, self.constants[name])
        for entry, name in ((part.graph.input, self.unit.target), (part.graph.output, end)):
            entry.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        return open_model(model, threads=1)
