"""The original with all that a plan deletes made zero: what the pruned model must compute.

Weights that are summed over are zeroed at the deleted indices, and so is one factor of a product of two activations. An
operator whose result depends on which indices are there (a normalisation, a mean) is evaluated on the kept ones alone:
gathered before it, spread again behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from onnx import NodeProto, helper

from cpd_onnx.algebra.atoms import Axis, Mask
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.groups import Combed, Weight
from cpd_onnx.channels.weights import constant_of, lazy_weight
from cpd_onnx.ir.model import Array, Model, element_type, map_lazy
from cpd_onnx.rules.api import EVERY_AXIS
from cpd_onnx.shapes.editor import Editor
from cpd_onnx.shapes.values import Scope


def masked(combed: Combed, keep: KeepMask, pruned: Model) -> Model:
    """The original model with the dropped indices masked; `pruned` gives the attributes of the gathered operators."""
    return _Masker(combed, keep, pruned).run()


def is_bound_to_sizes(combed: Combed, keep: KeepMask) -> bool:
    """Whether the masked model would only run at the sizes that the model was combed at.

    It does where masks lie along an axis of open size that holds channels, as when they are merged with the batch.
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
        self.pruned = Editor(pruned)
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
        """Zero a weight at the deleted indices, for each user as it sees them."""
        original = lazy_weight(self.combed.folded.model, weight)
        for number, use in enumerate(weight.uses):
            if not any(map(self.keep.shrinks, use.axes)):
                continue
            masks = {axis: self.keep.mask(use.axes[axis]) for axis in self.summed(weight)}
            zero = zero_of(self.combed, weight)
            array = map_lazy(original, original.shape, partial(_masked_weight, masks=masks, zero=zero))
            if number == 0 or not weight.has_own_axes_per_use:
                self.replace(weight.value, weight.scope, array)
            else:
                node = self.node(use.use.scope, use.use.node)
                node.input[use.use.slot] = self.added(f"{weight.value.name}_masked", array)

    def summed(self, weight: Weight) -> list[int]:
        """The axes along which a weight is zeroed."""
        axes = self.combed.recorder.kernels[weight.value.name]
        return list(range(len(weight.shape))) if EVERY_AXIS in axes else sorted(axes)

    def rebuild(self, scope: Scope, gathered: set[int], zeroed: set[int]) -> None:
        """Put nodes around those of a graph that need it."""
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
        """The node on kept indices alone."""
        made = NodeProto()
        made.CopyFrom(node)
        del made.attribute[:]
        made.attribute.extend(self.pruned.node(scope, position).attribute)
        before = [n for slot, name in enumerate(node.input) for n in self.around(scope, position, made, slot, name)]
        after: list[NodeProto] = []
        for slot, name in enumerate(node.output):
            axes = self.axes(scope, position, name, None)
            shrinking = [(i, self.keep.mask(a)) for i, a in enumerate(axes) if self.keep.shrinks(a)]
            if shrinking:
                made.output[slot] = self.fresh(f"{name}_of_kept")
                after += self.chain(made.output[slot], name, [(i, _spread(mask)) for i, mask in shrinking])
        return [*before, made, *after]

    def zeroed(self, scope: Scope, position: int, node: NodeProto) -> list[NodeProto]:
        """The node with some of its inputs zeroed at the deleted indices."""
        before, made = [], NodeProto()
        made.CopyFrom(node)
        for slot, axis in sorted(self.combed.recorder.masked_slots[(scope.path, position)]):
            axes = self.axes(scope, position, node.input[slot], slot)
            if not axes or not self.keep.shrinks(axes[axis]):
                continue
            shape = [-1 if i == axis else 1 for i in range(len(axes))]
            stays = self.added("stays", self.keep.mask(axes[axis]).reshape(shape))
            value = scope.lookup(node.input[slot])
            assert value is not None
            nothing = self.added("nothing", np.zeros((), element_type(value.dtype)))
            made.input[slot] = self.fresh(f"{node.input[slot]}_zeroed")
            before.append(helper.make_node("Where", [stays, node.input[slot], nothing], [made.input[slot]]))
        return [*before, made]

    def around(self, scope: Scope, position: int, made: NodeProto, slot: int, name: str) -> list[NodeProto]:
        axes = self.axes(scope, position, name, slot)
        shrinking = [(i, np.flatnonzero(self.keep.mask(a))) for i, a in enumerate(axes) if self.keep.shrinks(a)]
        if not shrinking:
            return []
        made.input[slot] = self.fresh(f"{name}_kept")
        return self.chain(name, made.input[slot], shrinking)

    def axes(self, scope: Scope, position: int, name: str, slot: int | None) -> list[Axis]:
        """Atoms of a tensor as the node sees it."""
        if not name:
            return []
        here: Scope | None = scope
        while here is not None:
            tensor = self.combed.tensors.get((here.path, name))
            if tensor is not None:
                return tensor.axes or []
            if name in here.values:
                break
            here = here.parent
        value = scope.lookup(name)
        weight = self.combed.weight_of.get(value) if value is not None else None
        for use in weight.uses if weight is not None else []:
            if (use.use.scope, use.use.node, use.use.slot) == (scope, position, slot):
                return use.axes
        return []

    def chain(self, source: str, target: str, steps: list[tuple[int, Array]]) -> list[NodeProto]:
        """Gather along one axis after another."""
        nodes = []
        for number, (axis, index) in enumerate(steps):
            to = target if number == len(steps) - 1 else self.fresh(f"{target}_axis{axis}")
            nodes.append(helper.make_node("Gather", [source, self.index(index)], [to], axis=axis))
            source = to
        return nodes

    def index(self, index: Array) -> str:
        key = ("index", index.tobytes())
        if key not in self.indices:
            self.indices[key] = self.added("kept_indices", index.astype(np.int64))
        return self.indices[key]


def _masked_weight(array: Array, masks: Mapping[int, Mask], zero: Array) -> Array:
    """A weight with zero where the mask of some axis says so."""
    stays = np.ones([1] * array.ndim, np.bool_)
    for axis, mask in masks.items():
        stays = stays & mask.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
    return np.where(stays, array, zero.astype(array.dtype))


def _spread(mask: Mask) -> Array:
    """For each old index its place among the kept; the deleted ones show the first, which nobody may look at."""
    return np.where(mask, np.cumsum(mask) - 1, 0)


def zero_of(combed: Combed, weight: Weight) -> Array:
    """What stands for zero in a weight, broadcast against it: the zero point of a quantised one."""
    quantized = combed.recorder.quantized.get(weight.value)
    value = quantized.zero_point if quantized is not None else None
    found = constant_of(combed, value) if value is not None else None
    if quantized is None or found is None:
        return np.zeros(())
    return quantized.aligned(found, weight.shape)
