"""Write a pruned model: slice the weights, and rewrite the operands and attributes that name sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, TensorShapeProto, ValueInfoProto, helper

from cpd_onnx.algebra.atoms import Mask
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.branches import Branches, branches, gone_groups, with_last
from cpd_onnx.channels.constraints import Element, elements, is_number, operand_value
from cpd_onnx.channels.groups import ALL_ROWS, Combed, Weight
from cpd_onnx.channels.weights import lazy_weight, weight_array
from cpd_onnx.errors import REPORT_BUG, PlanError, ProofError
from cpd_onnx.ir.interface import Kept, record
from cpd_onnx.ir.model import Array, Lazy, Model, drop_attribute, map_lazy, set_attribute
from cpd_onnx.rewrite.arithmetic import Arithmetic
from cpd_onnx.rewrite.cutting import Sized, with_values, without_branches
from cpd_onnx.rewrite.pruned import Edit, Pruned
from cpd_onnx.rules.api import DROP, SizeUse, Tensor
from cpd_onnx.shapes.editor import Editor
from cpd_onnx.shapes.inference import fold_again
from cpd_onnx.shapes.values import PLACEHOLDER_SIZES, Folded, Origin, Role, Scope, Use, Value


def rewrite(combed: Combed, keep: KeepMask) -> Pruned:
    """Remove from a model all indices that do not survive in `keep`, and the branches of which no channel survives.

    Raises ProofError if an inferred shape of the result is not that of the surviving channels, an error of a rule, and
    PlanError if a group of which no channel survives cannot be removed as a whole.
    """
    return _Rewriter(combed, keep, _branches(combed, keep)).run()


def resized(combed: Combed, keep: KeepMask) -> Model:
    """Return the model that `rewrite` makes where no branch disappears, without a check of its shapes.

    For models that are only compared with each other.
    """
    return _Rewriter(combed, keep, Branches(frozenset())).sized().model


def _branches(combed: Combed, keep: KeepMask) -> Branches:
    """Return the branches of which no channel survives; raises PlanError if they cannot be removed."""
    gone = gone_groups(combed, keep)
    found = branches(combed, gone)
    if found.obstacle:
        names = ", ".join(repr(combed.groups[index].name) for index in sorted(gone))
        raise PlanError(f"not all channels of {names} can be removed: {found.obstacle}")
    return found


def in_line(combed: Combed, keep: KeepMask, pruned: Model) -> Model:
    """Return a pruned model with all nodes of the original: a channel survives where `pruned` has none.

    Everything else has the values of `pruned`, since what reads that channel multiplies it by zero.
    """
    found = _branches(combed, keep)
    if not found.gone:
        return pruned
    narrow, wide = with_all_nodes(combed, keep)
    for tensor in pruned.graph.initializer:
        if narrow[1].has(tensor.name):
            narrow[1].set_array(tensor.name, pruned.lazy_array(tensor.name))
    return _described_as(pruned, with_values(combed, found, narrow, wide))


def _described_as(source: Model, model: Model) -> Model:
    """Return a model with the metadata of another, which names its plan, for one."""
    del model.proto.metadata_props[:]
    model.proto.metadata_props.extend(source.proto.metadata_props)
    return model


def out_of_line(combed: Combed, keep: KeepMask, model: Model) -> Model:
    """Return a model with all nodes of the original, as `in_line` returns it, without its branches."""
    found = _branches(combed, keep)
    if not found.gone:
        return model
    narrow = keep, _Rewriter(combed, keep, found).sized().model
    filled = with_values(combed, found, (with_last(combed, keep, found.gone), model), narrow)
    return _described_as(model, without_branches(combed, found, keep, Pruned(filled, ())).model)


def with_all_nodes(combed: Combed, keep: KeepMask) -> tuple[Sized, Sized]:
    """Return the pruned model before branches disappear, and one in which a channel of each survives.

    The first has the sizes of `keep`, but does not run: nodes that disappear are those of the original.
    """
    found = _branches(combed, keep)
    whole = with_last(combed, keep, found.gone)
    narrow = _Rewriter(combed, keep, found).sized().model
    return (keep, narrow), (whole, _Rewriter(combed, whole, Branches(frozenset())).sized().model)


def evaluation_of(folded: Folded) -> tuple[Edit, ...]:
    """Return the edits of `fold`: weights evaluated before combing, and what is unused after that."""
    found = folded.evaluated
    if found is None:
        return ()
    unused = (Edit("gone", what, "served only what was evaluated") for what in (*found.nodes, *found.tensors))
    evaluated = (Edit("evaluated", name, f"{', '.join(sources)} -> {name}") for name, sources in found.weights.items())
    return (*evaluated, *unused)


@dataclass(eq=False)
class _Variants:
    """The different arrays that the uses of one weight need.

    Attributes:
        arrays: The arrays; the first keeps the name of the weight.
        uses: For each array, the uses that take it.

    """

    arrays: list[Array | Lazy] = field(default_factory=list)
    uses: list[list[Use]] = field(default_factory=list)

    def add(self, use: Use, array: Array | Lazy) -> None:
        for known, uses in zip(self.arrays, self.uses, strict=True):
            if _same(known, array):
                uses.append(use)
                return
        self.arrays.append(array)
        self.uses.append([use])


class _Rewriter(Editor):
    """Edits a copy of the model; nodes that disappear stay as they are."""

    def __init__(self, combed: Combed, keep: KeepMask, found: Branches) -> None:
        super().__init__(combed.folded.model.copy())
        self.combed, self.keep, self.found = combed, keep, found
        self.edits: list[Edit] = []
        self.operands: dict[tuple[int, int, int], Array] = {}
        self.constants: dict[Use, Array] = {}
        self.computed: list[tuple[SizeUse, Value]] = []

    def run(self) -> Pruned:
        """Return the pruned model, without the branches that disappear."""
        pruned = without_branches(self.combed, self.found, self.keep, self.sized())
        self.check(fold_again(self.combed.folded, pruned.model))
        return pruned

    def sized(self) -> Pruned:
        """Return the model with the sizes of the surviving channels, and all nodes of the original."""
        self.edits += evaluation_of(self.combed.folded)
        self.replace_donors()
        for size_use in self.combed.recorder.size_uses:
            if self.is_dead(Use(size_use.scope, size_use.node, 0)):
                continue
            value = operand_value(size_use)
            if value is not None and value.weight is None and value.value is not None and not size_use.scope.function:
                self.computed.append((size_use, value))
            elif any(map(self.keep.shrinks, size_use.axes)):
                self.rewrite_use(size_use)
        self.rewrite_constants()
        self.slice_weights()
        self.slice_returned()
        self.update_value_info()
        while self.replace_computed(Arithmetic(self.combed, self.keep, self, self.found.dead)):
            pass
        return Pruned(self.model, tuple(self.edits))

    def replace_donors(self) -> None:
        """Let nodes that read the sizes of a tensor which disappears read those of another."""
        for position, name in sorted(self.found.donors.items()):
            node = self.node(self.combed.folded.scope, position)
            self.log("operand", node.name or node.output[0], f"{node.input[0]} -> {name}")
            node.input[0] = name

    def is_dead(self, use: Use) -> bool:
        """Return whether a node disappears, and computes nothing that is left."""
        return not use.scope.path and use.node in self.found.dead

    # Operands and attributes.

    def rewrite_use(self, size_use: SizeUse) -> None:
        """Rewrite the attribute or operand of a size use."""
        node = self.node(size_use.scope, size_use.node)
        if isinstance(size_use.slot, str):
            self.rewrite_attribute(size_use, node, size_use.slot)
            return
        value = operand_value(size_use)
        if value is None:
            new = size_use.rewrite(self.keep, None)
            if new is not None:
                while len(node.input) <= size_use.slot:
                    node.input.append("")
                node.input[size_use.slot] = self.add_fresh(f"{node.output[0]}_operand", new)
                self.log("operand", self.slot_name(size_use), f"absent -> {new.tolist()}")
        else:
            key = (id(size_use.scope), size_use.node, size_use.slot)
            stored = self.combed.weight_of.get(value)
            held = value.value if stored is None else weight_array(self.combed.folded.model, stored)
            old = self.operands.get(key, held)
            self.operands[key] = size_use.rewrite(self.keep, old)
            self.log("operand", self.slot_name(size_use), f"{_short(old)} -> {_short(self.operands[key])}")

    def rewrite_attribute(self, size_use: SizeUse, node: NodeProto, name: str) -> None:
        attribute = next((a for a in node.attribute if a.name == name), None)
        old = None if attribute is None else helper.get_attribute_value(attribute)
        new = size_use.rewrite(self.keep, old)
        where = f"{node.op_type} {node.name or node.output[0]!r} {name}"
        if new is DROP:
            drop_attribute(node, name)
            self.log("attribute", where, f"{old} -> removed")
        elif new is not None and new != old:
            set_attribute(node, name, new)
            self.log("attribute", where, f"{old} -> {new}")

    def rewrite_constants(self) -> None:
        """Rewrite the constants that enter computed operands as sizes."""
        wanted: dict[int, dict[Origin, int]] = defaultdict(dict)
        arithmetic = cache(lambda: Arithmetic(self.combed, self.keep, self, self.found.dead))
        for size_use, value in self.computed:
            if size_use.per_element and not value.is_static:
                for element in elements(size_use, value):
                    if element.origin.role == Role.FACTOR and self.follows(arithmetic, size_use, element):
                        continue
                    if element.origin.role in (Role.ELEMENT, Role.FACTOR):
                        wanted[element.origin.source][element.origin] = self.keep.count(element.axis)
        for number, sizes in sorted(wanted.items()):
            self.rewrite_constant(number, sizes)

    def follows(self, arithmetic: Callable[[], Arithmetic], size_use: SizeUse, element: Element) -> bool:
        """Return whether a product follows its axis by another factor, such as a size that is read from a tensor."""
        if not self.keep.shrinks(element.axis):
            return False
        assert isinstance(size_use.slot, int)
        name = self.node(size_use.scope, size_use.node).input[size_use.slot]
        now = arithmetic().value(size_use.scope, name)
        return now is not None and now.reshape(-1)[element.position].item() == self.keep.count(element.axis)

    def rewrite_constant(self, number: int, sizes: dict[Origin, int]) -> None:
        """Set elements of the constant that enters at one use, by provenance."""
        use = self.combed.folded.uses[number]
        value = use.scope.lookup(use.scope.nodes[use.node].input[use.slot])
        assert value is not None
        array = np.array(value.value)
        for origin, size in sizes.items():
            if origin.role == Role.FACTOR:
                array[...] = self.factor(number, size, array)
            else:
                array.reshape(-1)[origin.element] = size
        if value.weight is None:
            self.constants[use] = array
        elif not np.array_equal(array, np.asarray(value.value)):
            self.operands[(id(use.scope), use.node, use.slot)] = array
            self.log("operand", self.use_name(use), f"{_short(value.value)} -> {_short(array)}")

    def factor(self, number: int, size: int, factor: Array) -> int:
        """Return the factor that makes a product equal `size`: factor * size / old product."""
        old = next(
            e.axis
            for d, v in self.computed
            if d.per_element
            for e in elements(d, v)
            if e.origin.is_constant and e.origin.source == number
        )
        return int(factor.item()) * size // len(old)

    # Weights.

    def slice_weights(self) -> None:
        outputs = {o.name for o in self.model.graph.output}
        for weight in self.combed.weights:
            if weight.scope.function:
                continue
            variants = self.variants(weight)
            if variants is None:
                continue
            if weight.keeps_original or (weight.value.name in outputs and not weight.scope.address):
                variants.arrays.insert(0, lazy_weight(self.combed.folded.model, weight))
                variants.uses.insert(0, [])
            self.store(weight, variants)

    def slice_returned(self) -> None:
        """Slice the weights that a subgraph returns as they are."""
        for scope, tensor in self.combed.recorder.returned:
            axes = tensor.axes or []
            if any(map(self.keep.shrinks, axes)):
                weight = Weight(tensor.value, scope, (), False)
                old, masks = lazy_weight(self.combed.folded.model, weight), [[self.keep.mask(axis) for axis in axes]]
                new = _compressed(old, [ALL_ROWS], masks)
                self.replace(tensor.value, scope, new)
                self.log("weight", weight.name, f"{list(old.shape)} -> {list(new.shape)}")

    def variants(self, weight: Weight) -> _Variants | None:
        """Return the arrays that the uses of a weight need; None if all need the original."""
        edited = any((id(u.use.scope), u.use.node, u.use.slot) in self.operands for u in weight.uses)
        if not edited and not any(self.keep.shrinks(axis) for axes in weight.axes for axis in axes):
            return None
        if all(self.is_dead(use.use) for use in weight.uses):
            return None
        original = lazy_weight(self.combed.folded.model, weight)
        sliced: dict[bytes, Array | Lazy] = {}
        found = _Variants()
        for use in weight.uses:
            if self.is_dead(use.use):
                continue
            key = (id(use.use.scope), use.use.node, use.use.slot)
            if key in self.operands:
                found.add(use.use, self.operands[key])
                continue
            pieces = self.combed.pieces(use.axes)
            masks = [[self.keep.mask(axis) for axis in piece.axes] for piece in pieces]
            packed = b"|".join(np.packbits(mask).tobytes() for own in masks for mask in own)
            if packed not in sliced:
                sliced[packed] = _compressed(original, [piece.rows for piece in pieces], masks)
            found.add(use.use, sliced[packed])
        return found

    def store(self, weight: Weight, variants: _Variants) -> None:
        old = lazy_weight(self.combed.folded.model, weight)
        if not _same(old, variants.arrays[0]):
            self.replace(weight.value, weight.scope, variants.arrays[0])
            if tuple(old.shape) != tuple(variants.arrays[0].shape):
                self.log("weight", weight.name, f"{list(old.shape)} -> {list(variants.arrays[0].shape)}")
        for array, uses in list(zip(variants.arrays, variants.uses, strict=True))[1:]:
            name = self.add_fresh(f"{weight.value.name}_pruned", array)
            for use in uses:
                self.node(use.scope, use.node).input[use.slot] = name
            self.log("copy", weight.name, f"{list(old.shape)} -> {name} {list(array.shape)} for {len(uses)} users")

    # Shapes stored in the file.

    def update_value_info(self) -> None:
        """Update the sizes in value_info and in graph inputs that name initializers.

        Wrong sizes in value_info, which onnxruntime tolerates in some originals, are removed.
        """
        for scope in self.combed.folded.scope.walk():
            if scope.function:
                continue
            graph = self.graph(scope)
            for info in graph.value_info:
                if _is_misdescribed(info, scope.values.get(info.name)):
                    info.type.tensor_type.ClearField("shape")
                    self.log("shape", f"{scope.path}:{info.name}", "wrong sizes are removed")
            for info in (*graph.value_info, *graph.input, *graph.output):
                axes, before = self.axes_of(scope, info), info.SerializeToString()
                if axes is not None:
                    self.set_sizes(info, axes)
                elif info.type.HasField("sequence_type") and self.is_sequence_pruned(scope, info.name):
                    info.type.sequence_type.elem_type.tensor_type.ClearField("shape")
                if info.SerializeToString() != before:
                    self.log("shape", f"{scope.path}:{info.name}", f"sizes of the axes {list(axes or [])}")
        record(self.model, self.kept_at_interface())

    def kept_at_interface(self) -> Kept:
        """Return the indices that inputs and outputs of the model keep which lose others."""
        found: Kept = {}
        for name in sorted(self.model.free_io):
            tensor = self.combed.tensors.get(("", name))
            lost = {i: axis for i, axis in enumerate((tensor and tensor.axes) or []) if self.keep.shrinks(axis)}
            if lost:
                found[name] = {i: np.flatnonzero(self.keep.mask(axis)).tolist() for i, axis in lost.items()}
        return found

    def is_sequence_pruned(self, scope: Scope, name: str) -> bool:
        """Return whether an element of a sequence loses channels: its type has one shape for all elements."""
        tensor = self.combed.tensors.get((scope.path, name))
        return tensor is not None and any(map(self.keep.shrinks, tensor.all_axes))

    def axes_of(self, scope: Scope, info: ValueInfoProto) -> Sequence[Any] | None:
        """Return the new sizes of a tensor; None if they are unchanged, or for a size that is."""
        if not scope.address and self.model.has(info.name):
            return list(self.model.tensor(info.name).dims)
        tensor = self.combed.tensors.get((scope.path, info.name))
        if tensor is not None and tensor.axes is not None and any(map(self.keep.shrinks, tensor.axes)):
            return [self.keep.count(a) if self.keep.shrinks(a) else None for a in tensor.axes]
        value = scope.values.get(info.name)
        if value is not None and isinstance(value.source, AttributeProto) and value.source.name == "value":
            return list(self.constant_node(scope, info.name).attribute[0].t.dims)
        return None

    def set_sizes(self, info: ValueInfoProto, sizes: Sequence[int | None]) -> None:
        """Set the sizes of an entry; replace them all if it has another rank than the tensor."""
        dims = info.type.tensor_type.shape.dim
        if not info.type.tensor_type.HasField("shape"):
            return
        if len(dims) != len(sizes):
            del dims[:]
            dims.extend(TensorShapeProto.Dimension(dim_value=size) for size in sizes)
        for dim, size in zip(dims, sizes, strict=True):
            if size is not None and dim.dim_value != size:
                if not dim.HasField("dim_value") and not dim.HasField("dim_param"):
                    continue
                dim.dim_value = size

    # Values computed by the shape arithmetic of the pruned model.

    def replace_computed(self, now: Arithmetic) -> bool:
        """Replace computed operands and scales that are wrong in the pruned model; return whether there were any."""
        changed = False
        together: dict[tuple[int, int, int | str], list[tuple[SizeUse, Value]]] = defaultdict(list)
        for size_use, value in self.computed:
            together[(id(size_use.scope), size_use.node, size_use.slot)].append((size_use, value))
        for size_uses in together.values():
            size_use, value = size_uses[0]
            node = self.node(size_use.scope, size_use.node)
            assert isinstance(size_use.slot, int)
            actual = now.value(size_use.scope, node.input[size_use.slot])
            wanted = np.asarray(value.value)
            for each, _ in size_uses:
                wanted = np.asarray(each.rewrite(self.keep, wanted))
            if actual is None or _same(wanted, actual):
                continue
            if not value.is_static:
                changed |= self.pin_constants(size_use, value, now, wanted)
                continue
            node.input[size_use.slot] = self.add_fresh(f"{node.input[size_use.slot]}_pruned", wanted)
            self.log("operand", self.slot_name(size_use), f"{_short(value.value)} -> {_short(wanted)}")
            changed = True
        return self.pin_numbers(now) or changed

    def pin_constants(self, size_use: SizeUse, value: Value, now: Arithmetic, wanted: Array) -> bool:
        """Replace inputs of the arithmetic that computes a shape operand where its elements are wrong."""
        if not size_use.per_element:
            return False
        changed = False
        for element in elements(size_use, value):
            if not element.origin.is_constant:
                continue
            use = self.combed.folded.uses[element.origin.source]
            if element.origin.role == Role.DIVISOR:
                array = self.divisor(use, now, int(wanted.reshape(-1)[element.position]))
            else:
                array = self.constants.pop(use, None)
            if array is not None:
                node = self.node(use.scope, use.node)
                node.input[use.slot] = self.add_fresh(f"{node.input[use.slot]}_pruned", array)
                self.log("operand", self.use_name(use), f"-> {_short(array)}")
                changed = True
        return changed

    def divisor(self, use: Use, now: Arithmetic, quotient: int) -> Array | None:
        """Return the divisor of a size that gives `quotient`; None if the present one does."""
        node = self.node(use.scope, use.node)
        dividend, old = (now.value(use.scope, name) for name in node.input)
        if dividend is None or old is None or not quotient or dividend.item() // old.item() == quotient:
            return None
        return np.full_like(old, dividend.item() // quotient)

    def pin_numbers(self, now: Arithmetic) -> bool:
        """Replace numbers derived from a pruned size, such as 1/sqrt(d), by constants: they belong to the function."""
        changed = False
        for scope, name, value in self.derived():
            actual = now.value(scope, name)
            if actual is None or value.value is None or actual.shape != value.value.shape or _same(actual, value.value):
                continue
            users = [use for use in scope.consumers.get(name, []) if self.is_data(use, name)]
            if users:
                pinned = self.add_fresh(f"{name}_kept", value.value)
                for use in users:
                    self.node(use.scope, use.node).input[use.slot] = pinned
                self.log("operand", name, f"keeps {_short(value.value)}, which the pruned sizes would change")
                changed = True
        return changed

    def is_data(self, use: Use, name: str) -> bool:
        """Return whether a slot takes a tensor as a number, not as a size or position."""
        if use.scope.function or self.node(use.scope, use.node).input[use.slot] != name:
            return False
        return is_number(self.combed.recorder, use)

    def derived(self) -> Iterator[tuple[Scope, str, Value]]:
        for scope in self.combed.folded.scope.walk():
            if scope.function:
                continue
            for name, value in scope.values.items():
                if value.from_shape and value.is_static:
                    yield scope, name, value

    def check(self, folded: Folded) -> None:
        """Raise ProofError unless every tensor has the sizes of its surviving channels."""
        for scope in folded.scope.walk():
            for name, value in scope.values.items():
                tensor = self.combed.tensors.get((scope.path, name))
                if tensor is None or tensor.axes is None or value.shape is None or tensor.value.weight is not None:
                    continue
                if tensor.value.has_placeholder or value.has_placeholder:
                    continue
                if not scope.path and name in self.found.dequantised:
                    continue
                expected = tuple(self.keep.count(axis) for axis in tensor.axes)
                if not _fits(value, expected):
                    raise ProofError(
                        f"internal error: tensor {name!r} of the pruned model must have shape {list(expected)}, "
                        f"got {list(value.shape)}; {REPORT_BUG}"
                    )
                self.check_open(name, tensor, value)
        if lost := sorted(folded.unknown.keys() - self.combed.folded.unknown.keys()):
            operator, node = lost[0], folded.unknown[lost[0]]
            raise ProofError(f"internal error: {operator} {node!r} does not accept the pruned shapes; {REPORT_BUG}")

    def check_open(self, name: str, tensor: Tensor, now: Value) -> None:
        """Raise ProofError unless axes of open size that lose nothing have their old sizes under all bindings."""
        before = tensor.value
        if before.extents is None or before.shapes is None or now.shapes is None:
            return
        for number, axis in enumerate(tensor.axes or []):
            sizes = [[shape[number] for shape in shapes] for shapes in (before.shapes, now.shapes)]
            is_open = tuple(sizes[1]) == PLACEHOLDER_SIZES
            if not self.keep.shrinks(axis) and sizes[0] != sizes[1] and not is_open:
                raise ProofError(
                    f"internal error: axis {number} of tensor {name!r} depends on the input sizes differently than in "
                    f"the original; {REPORT_BUG}"
                )

    def log(self, what: str, where: str, change: str) -> None:
        self.edits.append(Edit(what, where, change))

    def slot_name(self, size_use: SizeUse) -> str:
        assert isinstance(size_use.slot, int)
        return self.use_name(Use(size_use.scope, size_use.node, size_use.slot))

    @staticmethod
    def use_name(use: Use) -> str:
        node = use.scope.nodes[use.node]
        return f"{node.op_type} {node.name or node.output[0]!r} input {use.slot}"


def _fits(value: Value, expected: Sequence[int]) -> bool:
    """Return whether a tensor has a shape, but for sizes that data decide."""
    sizes = list(zip(*(value.shapes or ()), strict=True))
    pairs = zip(sizes, expected, strict=False)
    return len(sizes) == len(expected) and all(found[0] == size or found == PLACEHOLDER_SIZES for found, size in pairs)


def _is_misdescribed(info: ValueInfoProto, value: Value | None) -> bool:
    """Return whether an entry states another size than a tensor has, where that is fixed."""
    dims = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
    if value is None or value.shape is None or value.has_placeholder or len(dims) != len(value.shape):
        return False
    stated = [axis for axis, size in enumerate(dims) if size and value.has_fixed(axis)]
    return any(dims[axis] != value.shape[axis] for axis in stated)


def _compressed(array: Array | Lazy, rows: Sequence[slice], masks: Sequence[Sequence[Mask]]) -> Array | Lazy:
    """Return the part of an array that masks select, separately for pieces of its rows; lazily for a lazy array."""
    if all(mask.all() for own in masks for mask in own):
        return array
    sizes = [[int(np.count_nonzero(mask)) for mask in own] for own in masks]
    if len(rows) == 1:
        return map_lazy(array, sizes[0], lambda values: _cut(values, masks[0]))
    assert len({tuple(own[1:]) for own in sizes}) == 1, "all groups of a convolution keep equally many channels"
    shape = (sum(own[0] for own in sizes), *sizes[0][1:])
    pairs = list(zip(rows, masks, strict=True))
    return map_lazy(array, shape, lambda values: np.concatenate([_cut(values[own], mask) for own, mask in pairs]))


def _cut(array: Array, masks: Sequence[Mask]) -> Array:
    for axis, mask in enumerate(masks):
        if not mask.all():
            array = np.compress(mask, array, axis=axis)
    return array


def _same(a: Array | Lazy, b: Array | Lazy) -> bool:
    """Return whether two arrays are equal; lazy ones only if they are the same object."""
    if isinstance(a, Lazy) or isinstance(b, Lazy):
        return a is b
    return a.shape == b.shape and (a is b or a.tobytes() == b.tobytes())


def _short(array: Any) -> str:
    listed = np.asarray(array).ravel().tolist()
    return str(listed) if len(listed) <= 8 else f"{str(listed[:6])[:-1]}, … {len(listed)} numbers]"
