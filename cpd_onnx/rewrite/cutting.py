"""Cut branches out of a model whose channels all go, and put constants in their place.

The model that is cut has all nodes of the original, at their positions. Those that compute constants have the sizes of
the surviving channels; those that compute nothing that is left are unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.branches import Branches
from cpd_onnx.channels.groups import Combed, Piece
from cpd_onnx.ir.model import Array, Model, element_type, graphs_of, replace_values, to_array
from cpd_onnx.ir.tensors import constant_tensors
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.rewrite.pruned import Edit, Pruned
from cpd_onnx.rules.api import Remainder
from cpd_onnx.runtime.sessions import open_model
from cpd_onnx.shapes.editor import Editor, keep_entries


def without_branches(combed: Combed, found: Branches, keep: KeepMask, whole: Pruned) -> Pruned:
    """Return a model without the nodes that disappear, and with the constants that they compute as initializers.

    Args:
        combed: The original.
        found: What disappears.
        keep: The mask of the pruned model.
        whole: The pruned model with all nodes of the original.
    """
    return _Cutter(combed, found, keep, whole.model).run(whole.edits) if found.gone else whole


Sized: TypeAlias = tuple[KeepMask, Model]
"""A mask, and the model with all nodes of the original and the sizes of the mask."""


def with_values(combed: Combed, found: Branches, source: Sized, target: Sized) -> Model:
    """Return a copy of a model with the values of another that has other channels in the branches that disappear.

    Values that the source does not have are zero where they are multiplied by a channel that it does not have either,
    and stay as they are in nodes that compute nothing that is left. Sizes and positions stay as they are too, since
    they count the channels of their own model: these are integers of 64 bits, which are never fitted, and the operands
    that the rules record as sizes.
    """
    sizes = {(each.scope.address, each.node, each.slot) for each in combed.recorder.size_uses}
    taken, given = Editor(source[1]), Editor(target[1].copy())
    here, there = constant_tensors(source[1]), constant_tensors(given.model)
    done: dict[str, Array] = {}
    for use in (use for weight in combed.weights for use in weight.uses):
        scope, position, slot = use.use.scope, use.use.node, use.use.slot
        if scope.function or (not scope.path and position in found.dead):
            continue
        old, new = (editor.node(scope, position).input[slot] for editor in (taken, given))
        if new in done or not (given.model.has(new) or new in there):
            continue
        if not scope.path and position in found.roots and slot != combed.recorder.remainders[("", position)].slot:
            array = given.model.array(new) if given.model.has(new) else to_array(there[new])
            done[new] = np.zeros(array.shape, array.dtype)
        elif (taken.model.has(old) or old in here) and (scope.address, position, slot) not in sizes:
            array = taken.model.array(old) if taken.model.has(old) else to_array(here[old])
            if array.dtype == np.int64:
                continue
            done[new] = _moved_rows(combed.pieces(use.axes), array, source[0], target[0])
    for name, array in done.items():
        if given.model.has(name):
            given.model.set_array(name, array)
        else:
            replace_values(there[name], array)
    return given.model


def _moved_rows(pieces: Sequence[Piece], array: Array, source: KeepMask, target: KeepMask) -> Array:
    """Return the elements of an array as `_moved` does, separately for pieces of its rows."""
    if len(pieces) == 1:
        return _moved(pieces[0].axes, array, source, target)
    ends = np.cumsum([source.count(piece.axes[0]) for piece in pieces])
    parts = zip(pieces, np.split(array, ends[:-1]), strict=True)
    return np.concatenate([_moved(piece.axes, rows, source, target) for piece, rows in parts])


def _moved(axes: Sequence[Axis], array: Array, source: KeepMask, target: KeepMask) -> Array:
    """Return the elements of an array of one mask at the places of another, zero where there are none."""
    for place, axis in enumerate(axes):
        before, after = source.mask(axis), target.mask(axis)
        if np.array_equal(before, after) or array.shape[place] != np.count_nonzero(before):
            continue
        shape = list(array.shape)
        shape[place] = int(np.count_nonzero(after))
        moved = np.zeros(shape, array.dtype)
        both = before & after
        index: list[Any] = [slice(None)] * array.ndim
        index[place] = both[after]
        moved[tuple(index)] = np.compress(both[before], array, axis=place)
        array = moved
    return array


class _Cutter(Editor):
    def __init__(self, combed: Combed, found: Branches, keep: KeepMask, model: Model) -> None:
        super().__init__(model.copy())
        self.combed, self.found, self.keep, self.scope = combed, found, keep, combed.folded.scope
        self.edits: list[Edit] = []
        self.shapes: dict[str, Array] = {}

    def run(self, edits: Iterable[Edit]) -> Pruned:
        before = _read(self.model.graph)
        self.enter(self.constants())
        self.shorten()
        places = {self.scope.order[position] for position in self.found.nodes}
        gone = [node for index, node in enumerate(self.model.graph.node) if index in places]
        names = {name for node in gone for name in node.output if name}
        for node in gone:
            self.edits.append(Edit("gone", node.name or node.output[0], "its branch has no channels any more"))
        kept = [node for index, node in enumerate(self.model.graph.node) if index not in places]
        _replace_nodes(self.model.graph, kept)
        self.bypass()
        weights = self.drop_unread(before)
        self.drop_infos(names | weights | self.found.dequantised)
        return Pruned(self.model, (*(edit for edit in edits if edit.where not in weights), *self.edits))

    # Constants.

    def constants(self) -> dict[str, Array]:
        """Return the constants that meet other tensors, by name."""
        found, nodes = {}, []
        for position in self.found.constants:
            node = self.node(self.scope, position)
            remainder = self.combed.recorder.remainders.get(("", position))
            if position in self.found.roots:
                assert remainder is not None
                found[node.output[0]] = self.left(node, remainder)
            else:
                nodes.append(self.as_constant(position, node))
        wanted = {self.node(self.scope, position).input[slot] for position, slot in self.found.entries}
        return found | (self.computed(nodes, found, sorted(wanted - found.keys())) if wanted - found.keys() else {})

    def left(self, node: NodeProto, remainder: Remainder) -> Array:
        """Return what is left of a node's output: the input that is added to the sum, or zero."""
        tensor = self.combed.tensors[("", node.output[0])]
        shape, dtype = [1] * tensor.rank, element_type(tensor.value.dtype)
        if remainder.slot is None:
            axis = -1 if remainder.axis is None else remainder.axis
            shape[axis] = self.keep.count(tensor[axis])
            return np.zeros(shape, dtype)
        added = self.array(node.input[remainder.slot])
        if remainder.axis is None:
            shape[len(shape) - added.ndim :] = added.shape
        else:
            shape[remainder.axis] = added.size
        return np.asarray(added.reshape(shape) * np.asarray(remainder.factor, dtype), dtype)

    def as_constant(self, position: int, node: NodeProto) -> NodeProto:
        """Return a node that computes a constant; one that divides or merges axes with the shape of that constant."""
        if not traits_of(node).is_view:
            return node
        shape = [-1 if size != 1 else 1 for size in self.found.constants[position]]
        name = self.fresh(f"{node.output[0]}_shape")
        self.shapes[name] = np.asarray(shape, np.int64)
        return helper.make_node("Reshape", [node.input[0], name], [node.output[0]])

    def array(self, name: str) -> Array:
        """Return the values of a weight, or of a tensor that is computed from weights."""
        if self.model.has(name):
            return self.model.array(name)
        return self.computed([], {}, [name])[name]

    def computed(self, nodes: Sequence[NodeProto], known: Mapping[str, Array], wanted: list[str]) -> dict[str, Array]:
        """Return tensors that nodes compute from known ones and from weights."""
        makers = {name: node for node in self.in_order() for name in node.output}
        makers |= {name: node for node in nodes for name in node.output}
        chosen = {node.output[0]: node for node in nodes}
        waiting = [*wanted, *(name for node in chosen.values() for name in node.input)]
        weights: dict[str, Array] = {}
        while waiting:
            name = waiting.pop()
            if not name or name in known or name in weights:
                continue
            if name in self.shapes:
                weights[name] = self.shapes[name]
            elif self.model.has(name):
                weights[name] = self.model.array(name)
            elif makers[name].output[0] not in chosen:
                chosen[makers[name].output[0]] = makers[name]
                waiting += makers[name].input
        ordered = [chosen[node.output[0]] for node in self.in_order() if node.output and node.output[0] in chosen]
        outputs = [helper.make_tensor_value_info(name, self.dtype(name), None) for name in wanted]
        arrays = (numpy_helper.from_array(array, name) for name, array in (weights | dict(known)).items())
        graph = helper.make_graph(ordered, "constants", [], outputs, list(arrays))
        proto = ModelProto(ir_version=self.model.proto.ir_version)
        proto.graph.CopyFrom(graph)
        proto.opset_import.extend(self.model.proto.opset_import)
        proto.functions.extend(self.model.proto.functions)
        if proto.ir_version < _WITHOUT_INPUTS:
            proto.ir_version = _WITHOUT_INPUTS
        return dict(zip(wanted, open_model(proto, optimise=False).run(wanted, {}), strict=True))

    def in_order(self) -> list[NodeProto]:
        """Return the nodes of the main graph in topological order."""
        return [self.node(self.scope, position) for position in range(len(self.scope.nodes))]

    def dtype(self, name: str) -> int:
        value = self.scope.lookup(name)
        assert value is not None
        return value.dtype

    # Edits.

    def enter(self, constants: Mapping[str, Array]) -> None:
        """Connect the constants to the nodes that they enter."""
        added: dict[str, str] = {}
        for position, slot in self.found.entries:
            node = self.node(self.scope, position)
            name = node.input[slot]
            if name not in added:
                added[name] = self.add_fresh(f"{name}_constant", constants[name])
                self.edits.append(Edit("constant", name, f"-> {added[name]} {list(constants[name].shape)}"))
            node.input[slot] = added[name]

    def shorten(self) -> None:
        """Leave inputs that do not exist out of concatenations."""
        dropped: dict[int, set[int]] = {}
        for position, slot in self.found.dropped:
            dropped.setdefault(position, set()).add(slot)
        for position, slots in dropped.items():
            node = self.node(self.scope, position)
            left = [name for slot, name in enumerate(node.input) if slot not in slots]
            del node.input[:]
            node.input.extend(left)
            self.edits.append(Edit("operand", node.name or node.output[0], f"{len(slots)} inputs removed"))

    def bypass(self) -> None:
        """Connect what reads the output of a node that adds zero to the other term."""
        terms = {}
        for position, slot in self.found.neutral:
            node = self.scope.nodes[position]
            terms[node.output[0]] = node.input[1 - slot]
        for graph in graphs_of(self.model.graph):
            for node in graph.node:
                for slot, name in enumerate(node.input):
                    while name in terms:
                        name = terms[name]
                    node.input[slot] = name

    def drop_unread(self, before: set[str]) -> set[str]:
        """Remove the initializers that were read before and are not any more, and return their names."""
        now = _read(self.model.graph) | {output.name for output in self.model.graph.output}
        dropped = {tensor.name for tensor in self.model.graph.initializer} & (before - now)
        for name in sorted(dropped):
            self.model.drop_initializer(name)
            self.edits.append(Edit("gone", name, "its branch has no channels any more"))
        return dropped

    def drop_infos(self, names: set[str]) -> None:
        """Remove the entries of tensors that do not exist any more."""
        for entries in (self.model.graph.value_info, self.model.graph.input):
            keep_entries(entries, lambda name: name not in names)


_WITHOUT_INPUTS = 4
"""IR version from which an initializer need not be an input of its graph."""


def _read(graph: GraphProto) -> set[str]:
    """Return all names that nodes read, or that are outputs of bodies."""
    found = {name for each in graphs_of(graph) for node in each.node for name in node.input}
    return found | {output.name for each in graphs_of(graph) if each is not graph for output in each.output}


def _replace_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)
