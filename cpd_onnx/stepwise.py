"""Run a model piece by piece over some batches, so that weights can be changed on the way.

Each node runs once. Between two pieces the tensors that later nodes take are held, in memory as far as they fit into a
limit and in files beyond it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from cpd_onnx.editing import Editor
from cpd_onnx.errors import UnsupportedError
from cpd_onnx.graph import Array, Model
from cpd_onnx.runtime import Feed, execute, open_model
from cpd_onnx.shapes import Folded, all_inputs

HELD_BYTES = 1 << 30
"""Bytes of tensors that are held in memory."""


class Stepwise:
    """A model on its way through its nodes, on all batches at once.

    Weights are read when the piece that they are in runs. A copy of a model that has its nodes (a pruned one) goes in
    the same steps as the original.
    """

    def __init__(
        self,
        folded: Folded,
        model: Model,
        feeds: Sequence[Feed],
        wanted: Iterable[str] = (),
        *,
        held_bytes: int = HELD_BYTES,
        threads: int = 0,
    ) -> None:
        """Stand before the first node.

        Args:
            folded: the original, whose order of nodes counts.
            model: the original or a copy with other weights and sizes.
            feeds: inputs, one dictionary for each batch.
            wanted: tensors that are held until they are released as often as they are named here.
            held_bytes: tensors beyond so many bytes go to files.
            threads: of onnxruntime; 0 leaves its choice.
        """
        self._scope, self._model = folded.scope, model
        self._editor = Editor(model)
        self._limit, self._threads = held_bytes, threads
        self._done = 0
        self._wanted = Counter(wanted)
        self._last: dict[str, int] = {}
        self._is_constant = [self._made_of_constants(node) for node in self._scope.nodes]
        for position in range(len(self._scope.nodes)):
            for name in all_inputs(self._node(position)):
                self._last[name] = position
        self._held: dict[str, list[Array]] = {}
        for name in feeds[0]:
            if self._is_needed(name):
                self._hold(name, [feed[name] for feed in feeds])
        self._batches = len(feeds)

    def _made_of_constants(self, node: NodeProto) -> bool:
        values = [self._scope.values.get(name) for name in node.output if name]
        return bool(values) and all(v is not None and (v.constants is not None or v.weight is not None) for v in values)

    def _node(self, position: int) -> NodeProto:
        return self._editor.node(self._scope, position)

    def after(self, position: int) -> None:
        """Run all nodes up to and with the one at a position; nothing if they have been."""
        if position < self._done:
            return
        piece = [p for p in range(self._done, position + 1) if not self._is_constant[p]]
        self._done = position + 1
        made = [name for p in piece for name in self._node(p).output]
        outputs = [name for name in made if self._is_needed(name)]
        if outputs:
            self._run(piece, outputs)
        for name in [name for name in self._held if not self._is_needed(name)]:
            del self._held[name]

    def _is_needed(self, name: str) -> bool:
        return self._wanted[name] > 0 or self._last.get(name, -1) >= self._done

    def tensor(self, name: str) -> list[Array]:
        """What is wanted, or a later node takes: one array for each batch; do not write into them."""
        return self._held[name]

    def release(self, name: str) -> None:
        """A tensor is wanted once less."""
        self._wanted[name] -= 1

    def _run(self, piece: Sequence[int], outputs: Sequence[str]) -> None:
        part, inputs = self._part(piece, outputs)
        session = open_model(part, threads=self._threads)
        made: list[list[Array]] = [[] for _ in outputs]
        for batch in range(self._batches):
            feed = {name: np.asarray(self._held[name][batch]) for name in inputs}
            for arrays, array in zip(made, execute(session, feed), strict=True):
                arrays.append(array)
        for name, arrays in zip(outputs, made, strict=True):
            self._hold(name, arrays)

    def _part(self, piece: Sequence[int], outputs: Sequence[str]) -> tuple[Model, list[str]]:
        """Some nodes as a model of their own, with all that is computed from weights, and the names of its inputs."""
        nodes: dict[int, NodeProto] = {}
        waiting, inputs, weights = list(piece), dict[str, None](), dict[str, None]()
        inside = set(piece)
        while waiting:
            position = waiting.pop()
            if position in nodes:
                continue
            nodes[position] = self._node(position)
            for name in sorted(all_inputs(nodes[position]) - {""}):
                maker = self._scope.makers.get(name)
                if self._model.has(name):
                    weights[name] = None
                elif maker is not None and self._is_constant[maker]:
                    waiting.append(maker)
                elif maker not in inside:
                    inputs[name] = None
        part = ModelProto()
        part.ir_version = self._model.proto.ir_version
        part.opset_import.extend(self._model.proto.opset_import)
        part.functions.extend(self._model.proto.functions)
        part.graph.name = "part"
        part.graph.node.extend(nodes[position] for position in sorted(nodes))
        made = Model(part, {})
        for name in weights:
            made.add_initializer(name, self._model.array(name))
            if part.ir_version < 4:
                tensor = self._model.tensor(name)
                part.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        part.graph.input.extend(self._described(name) for name in inputs)
        part.graph.output.extend(self._described(name) for name in outputs)
        return made, list(inputs)

    def _described(self, name: str) -> ValueInfoProto:
        """Name and element type; the shape is what the arrays have."""
        value = self._scope.values.get(name)
        if value is None or value.dtype == TensorProto.UNDEFINED:
            raise UnsupportedError(f"the model cannot be run piece by piece: {name!r} is no tensor of a known type")
        return helper.make_tensor_value_info(name, value.dtype, None)

    def _hold(self, name: str, arrays: list[Array]) -> None:
        held = sum(a.nbytes for given in self._held.values() for a in given if not isinstance(a, np.memmap))
        if held + sum(a.nbytes for a in arrays) > self._limit:
            arrays = [_in_file(array) for array in arrays]
        self._held[name] = arrays


def _in_file(array: Array) -> Array:
    """The same array in a file without a name, which is gone with it."""
    if not array.size:
        return array
    with tempfile.TemporaryFile() as file:
        array.tofile(file)
        return np.memmap(file, array.dtype, "r", shape=array.shape)
