"""The masked original: the original with the removed channels set to zero, which the pruned model must equal.

Weights that are summed over are zeroed at the removed indices, and so is one factor of a product of two activations. An
operator whose result depends on the number of indices (a normalisation, a mean) is evaluated on the surviving indices
alone: its inputs are gathered, its outputs scattered back. In a branch of which no channel survives, that is done for
one channel, which is multiplied by zero later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from onnx import NodeProto, helper

from cpd_onnx.algebra.atoms import Axis, Mask
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.branches import branches, gone_groups
from cpd_onnx.channels.groups import Combed, Weight
from cpd_onnx.channels.weights import constant_of, lazy_weight
from cpd_onnx.ir.model import Array, Model, element_type, map_lazy
from cpd_onnx.rewrite.rewriter import with_all_nodes
from cpd_onnx.rules.api import EVERY_AXIS
from cpd_onnx.shapes.editor import Editor
from cpd_onnx.shapes.values import Scope


def masked(combed: Combed, keep: KeepMask, pruned: Model) -> Model:
    """Return the original with the removed indices masked; operators on gathered inputs take attributes of `pruned`."""
    return _Masker(combed, keep, pruned).run()


def is_bound_to_sizes(combed: Combed, keep: KeepMask) -> bool:
    """Return whether the masked original runs only at the sizes that the model was combed at.

    It does if an axis of open size is masked, as where channels are merged with the batch.
    """
    scopes = {scope.path: scope for scope in combed.folded.scope.walk()}
    for path, position in (*combed.recorder.count_dependent, *combed.recorder.masked_slots):
        node = scopes[path].nodes[position]
        for name in (*node.input, *node.output):
            tensor, value = combed.tensors.get((path, name)), scopes[path].lookup(name)
            axes = (tensor and tensor.axes) or []
            if value is not None and any(keep.shrinks(a) and not value.has_fixed(i) for i, a in enumerate(axes)):
                return True
    return False


class _Masker(Editor):
    def __init__(self, combed: Combed, keep: KeepMask, pruned: Model) -> None:
        super().__init__(combed.folded.model.copy())
        self.combed, self.keep = combed, keep
        gone = gone_groups(combed, keep)
        self.dead = branches(combed, gone).dead
        narrow, wide = with_all_nodes(combed, keep) if gone else ((keep, pruned), (keep, pruned))
        self.gathering = {is_dead: (mask, Editor(sized)) for is_dead, (mask, sized) in ((False, narrow), (True, wide))}
        self.indices: dict[tuple[str, bytes], str] = {}

    def run(self) -> Model:
        for weight in self.combed.weights:
            if weight.value.name in self.combed.recorder.kernels and not weight.scope.function:
                self.mask_weight(weight)
        for scope in reversed(list(self.combed.folded.scope.walk())):
            found = self.combed.recorder
            gathered = {p for path, p in found.count_dependent if path == scope.path}
            zeroed = {p for path, p in found.masked_slots if path == scope.path} - gathered
            if (gathered or zeroed) and not scope.function:
                self.rebuild(scope, gathered, zeroed)
        return self.model

    def mask_weight(self, weight: Weight) -> None:
        """Zero a weight at the removed indices, separately for uses with separate atoms."""
        original = lazy_weight(self.combed.folded.model, weight)
        for number, use in enumerate(weight.uses):
            if not any(map(self.keep.shrinks, use.axes)):
                continue
            pieces = self.combed.pieces(use.axes)
            masks = [{axis: self.keep.mask(piece.axes[axis]) for axis in self.summed(weight)} for piece in pieces]
            zero, rows = zero_of(self.combed, weight), [piece.rows for piece in pieces]
            array = map_lazy(original, original.shape, partial(_masked_weight, rows=rows, masks=masks, zero=zero))
            if number == 0 or not weight.has_own_axes_per_use:
                self.replace(weight.value, weight.scope, array)
            else:
                node = self.node(use.use.scope, use.use.node)
                node.input[use.use.slot] = self.add_fresh(f"{weight.value.name}_masked", array)

    def summed(self, weight: Weight) -> list[int]:
        """Return the axes along which a weight is zeroed."""
        axes = self.combed.recorder.kernels[weight.value.name]
        return list(range(len(weight.shape))) if EVERY_AXIS in axes else sorted(axes)

    def rebuild(self, scope: Scope, gathered: set[int], zeroed: set[int]) -> None:
        """Add nodes before and after those of a graph that need them."""
        graph = self.graph(scope)
        place = {index: position for position, index in enumerate(scope.order)}
        nodes: list[NodeProto] = []
        for index, node in enumerate(graph.node):
            if place[index] in gathered:
                nodes += self.gathered(scope, place[index], node)
            elif place[index] in zeroed:
                nodes += self.zeroed(scope, place[index], node)
            else:
                nodes.append(node)
        copies = [NodeProto() for _ in nodes]
        for copy, node in zip(copies, nodes, strict=True):
            copy.CopyFrom(node)
        del graph.node[:]
        graph.node.extend(copies)

    def gathered(self, scope: Scope, position: int, node: NodeProto) -> list[NodeProto]:
        """Return nodes that compute a node on the surviving indices alone."""
        keep, pruned = self.gathering[not scope.path and position in self.dead]
        copy = NodeProto()
        copy.CopyFrom(node)
        del copy.attribute[:]
        copy.attribute.extend(pruned.node(scope, position).attribute)
        before = [n for slot, name in enumerate(node.input) for n in self.around(scope, position, copy, slot, name)]
        after: list[NodeProto] = []
        for slot, name in enumerate(node.output):
            axes = self.axes(scope, position, name, None)
            shrinking = [(i, keep.mask(a)) for i, a in enumerate(axes) if keep.shrinks(a)]
            if shrinking:
                copy.output[slot] = self.fresh(f"{name}_of_surviving")
                after += self.chain(copy.output[slot], name, [(i, _scattered(mask)) for i, mask in shrinking])
        return [*before, copy, *after]

    def zeroed(self, scope: Scope, position: int, node: NodeProto) -> list[NodeProto]:
        """Return a node after nodes that zero its inputs at the removed indices."""
        before, copy = [], NodeProto()
        copy.CopyFrom(node)
        for slot, axis in sorted(self.combed.recorder.masked_slots[(scope.path, position)]):
            axes = self.axes(scope, position, node.input[slot], slot)
            if not axes or not self.keep.shrinks(axes[axis]):
                continue
            shape = [-1 if i == axis else 1 for i in range(len(axes))]
            surviving = self.add_fresh("surviving", self.keep.mask(axes[axis]).reshape(shape))
            value = scope.lookup(node.input[slot])
            assert value is not None
            zero = self.add_fresh("zero", np.zeros((), element_type(value.dtype)))
            copy.input[slot] = self.fresh(f"{node.input[slot]}_zeroed")
            before.append(helper.make_node("Where", [surviving, node.input[slot], zero], [copy.input[slot]]))
        return [*before, copy]

    def around(self, scope: Scope, position: int, copy: NodeProto, slot: int, name: str) -> list[NodeProto]:
        """Return nodes that gather an input of a node, and connect its copy to them."""
        keep, _ = self.gathering[not scope.path and position in self.dead]
        axes = self.axes(scope, position, name, slot)
        shrinking = [(i, np.flatnonzero(keep.mask(a))) for i, a in enumerate(axes) if keep.shrinks(a)]
        if not shrinking:
            return []
        copy.input[slot] = self.fresh(f"{name}_surviving")
        return self.chain(name, copy.input[slot], shrinking)

    def axes(self, scope: Scope, position: int, name: str, slot: int | None) -> list[Axis]:
        """Return the axes of a tensor at an input slot or output of a node."""
        if not name:
            return []
        for here in scope.outwards():
            tensor = self.combed.tensors.get((here.path, name))
            if tensor is not None:
                return tensor.axes or []
            if name in here.values:
                break
        value = scope.lookup(name)
        weight = self.combed.weight_of.get(value) if value is not None else None
        for use in weight.uses if weight is not None else []:
            if (use.use.scope, use.use.node, use.use.slot) == (scope, position, slot):
                return use.axes
        return []

    def chain(self, source: str, target: str, steps: list[tuple[int, Array]]) -> list[NodeProto]:
        """Return nodes that gather a tensor along one axis after another."""
        nodes = []
        for number, (axis, index) in enumerate(steps):
            to = target if number == len(steps) - 1 else self.fresh(f"{target}_axis{axis}")
            nodes.append(helper.make_node("Gather", [source, self.index(index)], [to], axis=axis))
            source = to
        return nodes

    def index(self, index: Array) -> str:
        key = ("index", index.tobytes())
        if key not in self.indices:
            self.indices[key] = self.add_fresh("surviving_indices", index.astype(np.int64))
        return self.indices[key]


def _masked_weight(array: Array, rows: Sequence[slice], masks: Sequence[Mapping[int, Mask]], zero: Array) -> Array:
    """Return a weight with zeros at the indices that axis masks exclude, which belong to pieces of its rows."""
    excluded = np.zeros(array.shape, np.bool_)
    for own, by_axis in zip(rows, masks, strict=True):
        for axis, mask in by_axis.items():
            excluded[own] |= ~mask.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
    return np.where(excluded, zero.astype(array.dtype), array)


def _scattered(mask: Mask) -> Array:
    """Return the position of each old index among the surviving ones; 0, an arbitrary value, for removed ones."""
    return np.where(mask, np.cumsum(mask) - 1, 0)


def zero_of(combed: Combed, weight: Weight) -> Array:
    """Return the zero of a weight, broadcast against it: the zero point of a quantised weight."""
    quantized = combed.recorder.quantized.get(weight.value)
    value = quantized.zero_point if quantized is not None else None
    found = constant_of(combed, value) if value is not None else None
    if quantized is None or found is None:
        return np.zeros(())
    return quantized.aligned(found, weight.shape)
