"""Partial runs of a model on several batches, so that weights can be changed in between, or loaded when needed.

Each node runs once. Tensors that later nodes need are held in memory up to a limit, and in files beyond it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from cpd_onnx.errors import UnsupportedError
from cpd_onnx.ir.interface import interface_of
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.runtime.sessions import Feed, execute, open_model
from cpd_onnx.shapes.editor import Editor
from cpd_onnx.shapes.order import all_inputs
from cpd_onnx.shapes.values import Folded, Value

HELD_BYTES = 1 << 30
"""Maximum number of bytes of tensors held in memory (heuristic)."""
PIECE_BYTES = 1 << 26
"""Maximum number of bytes of weights in one piece of a large model of several nodes (heuristic)."""
_ENTERING_BYTES = 1 << 20
"""Size in bytes from which weights of a large model are inputs of their piece, which onnxruntime does not copy
(heuristic)."""

_MOST_AXES = 8
"""Largest number of elements of a tensor that may hold the sizes of another; pruning leaves their number."""


class Parts:
    """Makes models of some of a model's nodes, with the weights that these need.

    A copy of a model with the same nodes (a pruned one) can be cut at the same places as the original.

    Attributes:
        last: Position of the last node that takes each tensor.
        is_constant: Whether the outputs of each node are computed from weights alone; every part computes them anew.
        is_half: Whether the model computes in half precision, for which onnxruntime has hardly any kernels on a
            processor: its fusions crash on parts of some such models, which therefore run as they are.
    """

    def __init__(self, folded: Folded, model: Model, entering_bytes: int | None = None) -> None:
        """Prepare the parts of a model.

        Args:
            folded: The original, which determines the order of nodes.
            model: The original or a copy with other weights and sizes, which are read when a part is made.
            entering_bytes: Size from which weights are inputs of the parts instead of initializers; None for none.
        """
        self._scope, self._model, self._entering = folded.scope, model, entering_bytes
        values = folded.scope.values.values()
        self.is_half = any(value.dtype == TensorProto.FLOAT16 and value.constants is None for value in values)
        self._editor = Editor(model)
        self.last: dict[str, int] = {}
        self.is_constant = [self._made_of_constants(node) for node in self._scope.nodes]
        for position in range(len(self._scope.nodes)):
            for name in all_inputs(self.node(position)):
                self.last[name] = position

    def _made_of_constants(self, node: NodeProto) -> bool:
        values = [self._scope.values.get(name) for name in node.output if name]
        return bool(values) and all(v is not None and (v.constants is not None or v.weight is not None) for v in values)

    def node(self, position: int) -> NodeProto:
        """Return the node at a position of the main graph."""
        return self._editor.node(self._scope, position)

    def make(self, outputs: Sequence[str], start: int) -> tuple[Model, list[str], list[str]]:
        """Return a model from tensors made before a position to others, its inputs, and the weights among these."""
        nodes: dict[int, NodeProto] = {}
        inputs, weights = dict[str, None](), dict[str, None]()
        waiting = [self._scope.producers[name] for name in outputs]
        while waiting:
            position = waiting.pop()
            if position in nodes:
                continue
            nodes[position] = self.node(position)
            for name in sorted(all_inputs(nodes[position]) - {""}):
                maker = self._scope.producers.get(name)
                if self._model.has(name):
                    weights[name] = None
                elif maker is not None and (self.is_constant[maker] or maker >= start):
                    waiting.append(maker)
                else:
                    inputs[name] = None
        part = ModelProto()
        part.ir_version = self._model.proto.ir_version
        part.opset_import.extend(self._model.proto.opset_import)
        part.functions.extend(self._model.proto.functions)
        part.graph.name = "part"
        part.graph.node.extend(nodes[position] for position in sorted(nodes))
        model = Model(part, {})
        entering = [name for name in weights if self._enters(name)]
        for name in weights:
            tensor = self._model.tensor(name)
            if name not in entering:
                model.add_initializer(name, self._model.array(name))
            if part.ir_version < 4 or name in entering:
                part.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        part.graph.input.extend(self._described(name) for name in inputs)
        part.graph.output.extend(self._described(name) for name in outputs)
        return model, list(inputs), entering

    def _enters(self, name: str) -> bool:
        values = self._model.lazy_array(name)
        return self._entering is not None and values.nbytes >= self._entering and values.dtype.kind in "fiu"

    def _described(self, name: str) -> ValueInfoProto:
        """Return name, element type and number of axes of a tensor; the shape is that of the arrays.

        Where a tensor holds the sizes of another, onnxruntime has to know how many.
        """
        value = self._scope.values.get(name)
        if value is None or value.dtype == TensorProto.UNDEFINED:
            raise UnsupportedError(f"the model cannot be run in pieces: {name!r} is not a tensor of a known type")
        shape = None if value.shape is None else [size if _counts_axes(value) else None for size in value.shape]
        return helper.make_tensor_value_info(name, value.dtype, shape)


def _counts_axes(value: Value) -> bool:
    """Return whether the length of a tensor is the same in all runs and in a pruned model: it may hold sizes."""
    if value.entries is None or value.shape is None or len(value.shape) != 1:  # computed from values, or no vector
        return False
    return value.has_fixed(0) and value.shape[0] <= _MOST_AXES


class Stepwise:
    """A partial run of a model on all batches, with tensors held until no node needs them.

    Weights are read when their piece runs. A copy of a model with the same nodes (a pruned one) can be run in the same
    steps as the original.
    """

    def __init__(
        self,
        folded: Folded,
        model: Model,
        feeds: Sequence[Feed],
        wanted: Iterable[str] = (),
        *,
        held_bytes: int = HELD_BYTES,
        entering_bytes: int | None = None,
    ) -> None:
        """Start a run before the first node.

        Args:
            folded: The original, which determines the order of nodes.
            model: The original or a copy with other weights and sizes.
            feeds: Inputs, one dictionary for each batch.
            wanted: Tensors that are held until they are released as often as they are listed here.
            held_bytes: Maximum number of bytes of tensors in memory; others are held in files.
            entering_bytes: Size from which weights are inputs of the pieces instead of initializers; None for none.
        """
        self._is_entering, self._model, self._scope = entering_bytes is not None, model, folded.scope
        self._parts = Parts(folded, model, entering_bytes)
        self._limit = held_bytes
        self._done = 0
        self._wanted = Counter(wanted)
        self._held: dict[str, list[Array]] = {}
        feeds = [interface_of(model).taken(feed) for feed in feeds]
        for name in feeds[0]:
            if self._is_needed(name):
                self._hold(name, [feed[name] for feed in feeds])
        self._batches = len(feeds)

    def after(self, position: int) -> None:
        """Run all nodes up to and including the one at a position that have not run yet."""
        if position < self._done:
            return
        start, self._done = self._done, position + 1
        makers = [p for p in range(start, self._done) if not self._parts.is_constant[p]]
        names = [name for p in makers for name in self._parts.node(p).output]
        outputs = [name for name in names if self._is_needed(name)]
        if outputs:
            self._run(start, outputs)
        for name in [name for name in self._held if not self._is_needed(name)]:
            del self._held[name]

    def _is_needed(self, name: str) -> bool:
        return self._wanted[name] > 0 or self._parts.last.get(name, -1) >= self._done

    def tensor(self, name: str) -> list[Array]:
        """Return a held tensor as one array for each batch, which must not be modified."""
        return self._held[name]

    def release(self, name: str) -> None:
        """Release a tensor once."""
        self._wanted[name] -= 1

    def _run(self, start: int, outputs: Sequence[str]) -> None:
        part, inputs, entering = self._parts.make(outputs, start)
        session = open_model(part, optimise=not (self._is_entering or self._parts.is_half))
        weights = {name: self._model.array(name) for name in entering}
        results: list[list[Array]] = [[] for _ in outputs]
        for batch in range(self._batches):
            feed = {name: np.asarray(self._held[name][batch]) for name in inputs} | weights
            for arrays, array in zip(results, execute(session, feed), strict=True):
                arrays.append(array)
        for name, arrays in zip(outputs, results, strict=True):
            self._hold(name, arrays)

    def _hold(self, name: str, arrays: list[Array]) -> None:
        held = sum(a.nbytes for given in self._held.values() for a in given if not isinstance(a, np.memmap))
        if held + sum(a.nbytes for a in arrays) > self._limit:
            arrays = [in_file(array) for array in arrays]
        self._held[name] = arrays


class Piecewise:
    """A large model that runs in pieces, with each weight read when its piece runs.

    It replaces a session of onnxruntime without optimizations.
    """

    def __init__(self, folded: Folded) -> None:
        """Create a runner of a model."""
        self._folded = folded
        self._outputs = [output.name for output in folded.model.graph.output]

    def run(self, names: None, feed: Feed, limits: Any = None) -> list[Array]:
        """Return all outputs."""
        return self.run_all([feed])[0]

    def run_all(self, feeds: Sequence[Feed]) -> list[list[Array]]:
        """Return all outputs for each of several inputs, reading each weight once."""
        model = self._folded.model
        steps = Stepwise(self._folded, model, feeds, self._outputs, entering_bytes=_ENTERING_BYTES)
        for position in self._ends():
            steps.after(position)
        return [list(outputs) for outputs in zip(*(steps.tensor(name) for name in self._outputs), strict=True)]

    def _ends(self) -> Iterator[int]:
        """Yield the last node of each piece."""
        model, nodes, taken = self._folded.model, self._folded.scope.nodes, 0
        for position, node in enumerate(nodes):
            weights = sum(model.lazy_array(name).nbytes for name in all_inputs(node) if model.has(name))
            if position and taken + weights > PIECE_BYTES:
                yield position - 1
                taken = 0
            taken += weights
        yield len(nodes) - 1


def in_file(array: Array) -> Array:
    """Return the array mapped from an unnamed temporary file, which is deleted with it."""
    if not array.size:
        return array
    with tempfile.TemporaryFile() as file:
        array.tofile(file)
        return np.memmap(file, array.dtype, "r", shape=array.shape)
