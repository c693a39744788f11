"""Write a pruned model: slice the weights, mend what names a size, leave all else as it was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, TensorShapeProto, ValueInfoProto, helper

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.constraints import elements, is_number, operand_value
from cpd_onnx.channels.groups import Combed, Weight
from cpd_onnx.channels.weights import lazy_weight
from cpd_onnx.errors import ProofError
from cpd_onnx.ir.model import Array, Lazy, Model, drop_attribute, map_lazy, set_attribute
from cpd_onnx.rewrite.arithmetic import Arithmetic
from cpd_onnx.rules.api import DROP, SizeUse, Tensor
from cpd_onnx.shapes.editor import Editor
from cpd_onnx.shapes.inference import fold_again
from cpd_onnx.shapes.values import Folded, Origin, Role, Scope, Use, Value


@dataclass(frozen=True)
class Edit:
    """One thing that differs between the original and the pruned file.

    Attributes:
        what: "weight", "copy" (a constant that users came to need in different versions), "operand", "attribute",
            "shape" (a value_info or an input entry of an initializer), "evaluated" (a weight that the graph computed
            from others, now an initializer), "gone" (a node or tensor that nothing uses any more for that).
        where: name of the tensor, or node and slot.
        change: what became of it, in words.

    """

    what: str
    where: str
    change: str


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned model and what was done to it."""

    model: Model
    edits: tuple[Edit, ...]

    def __repr__(self) -> str:
        """One line, with the number of edits."""
        return f"Pruned({self.model!r}, {len(self.edits)} edits)"


def rewrite(combed: Combed, keep: KeepMask) -> Pruned:
    """Delete from a model all indices that `keep` drops.

    Raises ProofError if the result does not have the shapes that the channels say it should (a defect of a rule).
    """
    return _Rewriter(combed, keep).run()


def evaluation_of(folded: Folded) -> tuple[Edit, ...]:
    """What was evaluated before channels were looked for, and what is gone since nothing uses it any more."""
    found = folded.evaluated
    if found is None:
        return ()
    gone = (Edit("gone", what, "served only what was evaluated") for what in (*found.nodes, *found.tensors))
    made = (Edit("evaluated", name, f"{', '.join(sources)} -> {name}") for name, sources in found.weights.items())
    return (*made, *gone)


@dataclass(eq=False)
class _Variants:
    """The versions of one weight that its users want."""

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
    def __init__(self, combed: Combed, keep: KeepMask) -> None:
        super().__init__(combed.folded.model.copy())
        self.combed, self.keep = combed, keep
        self.edits: list[Edit] = []
        self.operands: dict[tuple[int, int, int], Array] = {}
        self.leaves: dict[Use, Array] = {}
        self.pins: list[tuple[SizeUse, Value]] = []

    def run(self) -> Pruned:
        self.edits += evaluation_of(self.combed.folded)
        for size_use in self.combed.recorder.size_uses:
            value = operand_value(size_use)
            if value is not None and value.weight is None and value.value is not None and not size_use.scope.function:
                self.pins.append((size_use, value))
            elif any(map(self.keep.shrinks, size_use.axes)):
                self.meet(size_use)
        self.leaf_operands()
        self.slice_weights()
        self.describe()
        while self.mend(Arithmetic(self.combed, self.keep, self)):
            pass
        self.check(fold_again(self.combed.folded, self.model))
        return Pruned(self.model, tuple(self.edits))

    # Operands and attributes.

    def meet(self, size_use: SizeUse) -> None:
        """Rewrite an attribute or an operand, or leave it for when the pruned model's arithmetic is known."""
        node = self.node(size_use.scope, size_use.node)
        if isinstance(size_use.slot, str):
            self.meet_attribute(size_use, node, size_use.slot)
            return
        value = operand_value(size_use)
        if value is None:
            made = size_use.rewrite(self.keep, None)
            if made is not None:
                while len(node.input) <= size_use.slot:
                    node.input.append("")
                node.input[size_use.slot] = self.added(f"{node.output[0]}_operand", made)
                self.log("operand", self.slot_name(size_use), f"absent -> {made.tolist()}")
        else:
            key = (id(size_use.scope), size_use.node, size_use.slot)
            old = self.operands.get(key, value.value)
            self.operands[key] = size_use.rewrite(self.keep, old)
            self.log("operand", self.slot_name(size_use), f"{_short(old)} -> {_short(self.operands[key])}")

    def meet_attribute(self, size_use: SizeUse, node: NodeProto, name: str) -> None:
        attribute = next((a for a in node.attribute if a.name == name), None)
        old = None if attribute is None else helper.get_attribute_value(attribute)
        new = size_use.rewrite(self.keep, old)
        where = f"{node.op_type} {node.name or node.output[0]!r} {name}"
        if new is DROP:
            drop_attribute(node, name)
            self.log("attribute", where, f"{old} -> taken away")
        elif new is not None and new != old:
            set_attribute(node, name, new)
            self.log("attribute", where, f"{old} -> {new}")

    def leaf_operands(self) -> None:
        """Rewrite the constants from which sizes in computed operands come."""
        wanted: dict[int, dict[Origin, int]] = defaultdict(dict)
        for size_use, value in self.pins:
            if size_use.per_element and not value.is_static:
                for element in elements(size_use, value):
                    if element.origin.role in (Role.ELEMENT, Role.FACTOR):
                        wanted[element.origin.source][element.origin] = self.keep.count(element.axis)
        for number, sizes in sorted(wanted.items()):
            self.leaf_operand(number, sizes)

    def leaf_operand(self, number: int, sizes: dict[Origin, int]) -> None:
        """New values for some elements of what enters at one use."""
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
            self.leaves[use] = array
        elif not np.array_equal(array, np.asarray(value.value)):
            self.operands[(id(use.scope), use.node, use.slot)] = array
            self.log("operand", self.use_name(use), f"{_short(value.value)} -> {_short(array)}")

    def factor(self, number: int, size: int, factor: Array) -> int:
        """The factor that makes a product `size`: factor * size / old product."""
        old = next(
            e.axis
            for d, v in self.pins
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

    def variants(self, weight: Weight) -> _Variants | None:
        """What the users of a weight want; None if all want it as it is."""
        edited = any((id(u.use.scope), u.use.node, u.use.slot) in self.operands for u in weight.uses)
        if not edited and not any(self.keep.shrinks(axis) for axes in weight.axes for axis in axes):
            return None
        original = lazy_weight(self.combed.folded.model, weight)
        sliced: dict[bytes, Array | Lazy] = {}
        found = _Variants()
        for use in weight.uses:
            key = (id(use.use.scope), use.use.node, use.use.slot)
            if key in self.operands:
                found.add(use.use, self.operands[key])
                continue
            masks = [self.keep.mask(axis) for axis in use.axes]
            mark = b"|".join(np.packbits(mask).tobytes() for mask in masks)
            if mark not in sliced:
                sliced[mark] = _compressed(original, masks)
            found.add(use.use, sliced[mark])
        return found

    def store(self, weight: Weight, variants: _Variants) -> None:
        old = lazy_weight(self.combed.folded.model, weight)
        if not _same(old, variants.arrays[0]):
            self.replace(weight.value, weight.scope, variants.arrays[0])
            if tuple(old.shape) != tuple(variants.arrays[0].shape):
                self.log("weight", weight.name, f"{list(old.shape)} -> {list(variants.arrays[0].shape)}")
        for array, uses in list(zip(variants.arrays, variants.uses, strict=True))[1:]:
            name = self.added(f"{weight.value.name}_pruned", array)
            for use in uses:
                self.node(use.scope, use.node).input[use.slot] = name
            self.log("copy", weight.name, f"{list(old.shape)} -> {name} {list(array.shape)} for {len(uses)} users")

    # Shapes written down in the file.

    def describe(self) -> None:
        """Bring value_info, and the inputs that name initializers, up to date."""
        for scope in self.combed.folded.scope.walk():
            if scope.function:
                continue
            graph = self.graph(scope)
            for info in (*graph.value_info, *graph.input, *graph.output):
                axes, before = self.axes_of(scope, info), info.SerializeToString()
                if axes is not None:
                    self.redescribe(info, axes)
                if info.SerializeToString() != before:
                    self.log("shape", f"{scope.path}:{info.name}", f"sizes of the axes {list(axes or [])}")

    def axes_of(self, scope: Scope, info: ValueInfoProto) -> Sequence[Any] | None:
        """New sizes of a described tensor, None where they are those of old."""
        if not scope.address and self.model.has(info.name):
            return list(self.model.tensor(info.name).dims)
        tensor = self.combed.tensors.get((scope.path, info.name))
        if tensor is not None and tensor.axes is not None and any(map(self.keep.shrinks, tensor.axes)):
            return [self.keep.count(a) if self.keep.shrinks(a) else None for a in tensor.axes]
        value = scope.values.get(info.name)
        if value is not None and isinstance(value.source, AttributeProto) and value.source.name == "value":
            return list(self.maker(scope, info.name).attribute[0].t.dims)
        return None

    def redescribe(self, info: ValueInfoProto, sizes: Sequence[int | None]) -> None:
        """Correct the entry, or replace it if it has another number of axes than the tensor."""
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

    # What follows from the pruned model's own arithmetic.

    def mend(self, now: Arithmetic) -> bool:
        """Write down operands and scales that come out wrong; whether there were any."""
        changed = False
        together: dict[tuple[int, int, int | str], list[tuple[SizeUse, Value]]] = defaultdict(list)
        for size_use, value in self.pins:
            together[(id(size_use.scope), size_use.node, size_use.slot)].append((size_use, value))
        for size_uses in together.values():
            size_use, value = size_uses[0]
            node = self.node(size_use.scope, size_use.node)
            assert isinstance(size_use.slot, int)
            actual = now.value(size_use.scope, node.input[size_use.slot])
            right = np.asarray(value.value)
            for each, _ in size_uses:
                right = np.asarray(each.rewrite(self.keep, right))
            if actual is None or _same(right, actual):
                continue
            if not value.is_static:
                changed |= self.pin_leaves(size_use, value, now, right)
                continue
            node.input[size_use.slot] = self.added(f"{node.input[size_use.slot]}_pruned", right)
            self.log("operand", self.slot_name(size_use), f"{_short(value.value)} -> {_short(right)}")
            changed = True
        return self.pin_numbers(now) or changed

    def pin_leaves(self, size_use: SizeUse, value: Value, now: Arithmetic, right: Array) -> bool:
        """Write down what enters a list of sizes from other arithmetic and no longer comes out right."""
        if not size_use.per_element:
            return False
        changed = False
        for element in elements(size_use, value):
            if not element.origin.is_constant:
                continue
            use = self.combed.folded.uses[element.origin.source]
            if element.origin.role == Role.DIVISOR:
                array = self.divisor(use, now, int(right.reshape(-1)[element.position]))
            else:
                array = self.leaves.pop(use, None)
            if array is not None:
                node = self.node(use.scope, use.node)
                node.input[use.slot] = self.added(f"{node.input[use.slot]}_pruned", array)
                self.log("operand", self.use_name(use), f"-> {_short(array)}")
                changed = True
        return changed

    def divisor(self, use: Use, now: Arithmetic, quotient: int) -> Array | None:
        """What a size must be divided by to give `quotient`; None if it is that already."""
        node = self.node(use.scope, use.node)
        dividend, old = (now.value(use.scope, name) for name in node.input)
        if dividend is None or old is None or not quotient or dividend.item() // old.item() == quotient:
            return None
        return np.full_like(old, dividend.item() // quotient)

    def pin_numbers(self, now: Arithmetic) -> bool:
        """Numbers derived from a pruned size, such as 1/sqrt(d), belong to the function and stay as they were."""
        changed = False
        for scope, name, value in self.derived():
            actual = now.value(scope, name)
            if actual is None or value.value is None or actual.shape != value.value.shape or _same(actual, value.value):
                continue
            users = [use for use in scope.consumers.get(name, []) if self.is_data(use, name)]
            if users:
                pinned = self.added(f"{name}_kept", value.value)
                for use in users:
                    self.node(use.scope, use.node).input[use.slot] = pinned
                self.log("operand", name, f"stays {_short(value.value)}, which the pruned sizes would change")
                changed = True
        return changed

    def is_data(self, use: Use, name: str) -> bool:
        """Whether a slot takes a number for its value, not for the size or position that it names."""
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
        """Every tensor must have as many indices as channels were kept."""
        for scope in folded.scope.walk():
            for name, value in scope.values.items():
                tensor = self.combed.tensors.get((scope.path, name))
                if tensor is None or tensor.axes is None or value.shape is None or tensor.value.weight is not None:
                    continue
                if tensor.value.has_placeholder or value.has_placeholder:
                    continue
                expected = tuple(self.keep.count(axis) for axis in tensor.axes)
                if value.shape != expected:
                    raise ProofError(f"tensor {name!r} came out as {list(value.shape)} instead of {list(expected)}")
                self.check_open(name, tensor, value)
        if folded.unknown.keys() - self.combed.folded.unknown.keys():
            operator, node = next(iter(sorted(folded.unknown.items())))
            raise ProofError(f"{operator} {node!r} does not fit the pruned shapes")

    def check_open(self, name: str, tensor: Tensor, now: Value) -> None:
        """Axes of open sizes that lose nothing must be as long as before under all bindings."""
        before = tensor.value
        if before.extents is None or before.shapes is None or now.shapes is None:
            return
        for number, axis in enumerate(tensor.axes or []):
            sizes = [[shape[number] for shape in shapes] for shapes in (before.shapes, now.shapes)]
            if not self.keep.shrinks(axis) and sizes[0] != sizes[1]:
                raise ProofError(
                    f"axis {number} of tensor {name!r} depends on the size of the input otherwise than before"
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


def _compressed(array: Array | Lazy, masks: Sequence[Array]) -> Array | Lazy:
    """What masks leave of an array: of one that is not read yet, once it is."""
    if all(mask.all() for mask in masks):
        return array
    return map_lazy(array, (int(np.count_nonzero(mask)) for mask in masks), lambda values: _cut(values, masks))


def _cut(array: Array, masks: Sequence[Array]) -> Array:
    for axis, mask in enumerate(masks):
        if not mask.all():
            array = np.compress(mask, array, axis=axis)
    return array


def _same(a: Array | Lazy, b: Array | Lazy) -> bool:
    """Whether two arrays are equal; those that are not read yet, whether they are one."""
    if isinstance(a, Lazy) or isinstance(b, Lazy):
        return a is b
    return a.shape == b.shape and (a is b or a.tobytes() == b.tobytes())


def _short(array: Any) -> str:
    listed = np.asarray(array).ravel().tolist()
    return str(listed) if len(listed) <= 8 else f"{str(listed[:6])[:-1]}, … {len(listed)} numbers]"
