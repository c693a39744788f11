"""Choice of the tensors to compare: the outputs, and tensors that outputs of little information are computed from.

A decision (an ArgMax, an index, a comparison) changes in steps or not at all, and a saturated sigmoid or a dead
rectifier hides its input. The numbers that such outputs are computed from are compared as well, found by following the
graph backwards through operators that only move numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import TypeAlias

from onnx import NodeProto, TensorProto

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.groups import Combed
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.proof.comparison import DISCRETE, SATURATING, VALUES, ComparedTensor
from cpd_onnx.rules.api import FLOATS
from cpd_onnx.shapes.order import all_inputs
from cpd_onnx.shapes.values import Scope, Value

_MOST = 64
"""Limit on the tensors that are compared for one output (heuristic)."""
_Node: TypeAlias = tuple[str, int]
"""A node: the path of its scope, and its position there."""
_DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Domains whose operators are followed backwards."""


def compared_tensors(combed: Combed, keep: KeepMask, floating: frozenset[str] = frozenset()) -> list[ComparedTensor]:
    """Return the tensors to compare, the graph outputs first and in order.

    `floating` names tensors that are integers in the file but floats in the models that run.
    """
    return _Classifier(combed, keep, floating).run()


class _Classifier:
    def __init__(self, combed: Combed, keep: KeepMask, floating: frozenset[str]) -> None:
        self.combed, self.keep, self.floating = combed, keep, floating
        self.scope = combed.folded.scope
        removal = _Removal(combed, keep)
        takers = removal.takers()
        self.behind = removal.behind(takers)
        self.affected = removal.behind(removal.sums(takers))
        self.declared = {o.name: o.type.tensor_type.elem_type for o in combed.folded.model.graph.output}
        self.kinds: dict[str, str] = {}
        self.waiting: list[str] = []
        self.seen: set[str] = set()
        self.inside: list[tuple[str, str]] = []

    def run(self) -> list[ComparedTensor]:
        outputs = list(dict.fromkeys(o.name for o in self.combed.folded.model.graph.output))
        found: list[ComparedTensor] = []
        behind: dict[str, dict[str, str]] = {}
        for output in outputs:
            self.kinds, self.waiting, self.seen, self.inside = {}, [output], set(), []
            while self.waiting and len(self.kinds) < _MOST:
                self.classify(self.waiting.pop())
            for whole, part in reversed(self.inside):  # a tensor that shows a decision is one
                if self.kinds.get(part) == DISCRETE:
                    self.kinds[whole] = DISCRETE
            behind[output] = self.kinds
        for output in outputs:
            found.append(self.compared(output, output, behind[output].pop(output, VALUES)))
        taken = set(outputs)
        for output in outputs:
            for name, kind in behind[output].items():
                if name not in taken and name in self.affected and self.can_be_shown(name):
                    taken.add(name)
                    found.append(self.compared(name, output, kind))
        return found

    def compared(self, name: str, output: str, kind: str) -> ComparedTensor:
        tensor = self.combed.tensors.get(("", name))
        axes = (tensor.axes if tensor is not None else None) or []
        masks = {place: self.keep.mask(axis) for place, axis in enumerate(axes) if self.keep.shrinks(axis)}
        offset = self.offset(name) if kind == SATURATING else 0.0  # others are compared by their own size
        return ComparedTensor(name, output, kind, name in self.affected, name in self.behind, masks, offset)

    def offset(self, name: str) -> float:
        """Return the offset of the function whose values a tensor consists of."""
        while (node := self.maker(name)) is not None:
            own = traits_of(node)
            if not own.moves_elements or own.joins:
                return own.offset
            name = node.input[own.moved[0]]
        return 0.0

    def can_be_shown(self, name: str) -> bool:
        value = self.scope.values.get(name)
        return value is not None and value.dtype != TensorProto.UNDEFINED and value.weight is None

    def is_number(self, name: str) -> bool:
        value = self.scope.values.get(name)
        kind = value.dtype if value is not None and value.dtype else self.declared.get(name, TensorProto.UNDEFINED)
        return kind in FLOATS or name in self.floating

    def classify(self, top: str) -> None:
        """Decide how a tensor is compared, and queue the tensors it is computed from where it shows little."""
        if top in self.seen or top not in self.affected:
            return
        self.seen.add(top)
        if not self.is_number(top):
            self.kinds[top] = DISCRETE
            self.waiting += self.numbers_before(top)
            return
        self.kinds[top] = VALUES
        name: str | None = top
        while name is not None:
            name = self.before(top, name)

    def before(self, top: str, name: str) -> str | None:
        """Return the tensor that `name` is a moved copy of; None where the search ends, after `top` is classified."""
        node = self.maker(name)
        if node is None or node.domain not in _DOMAINS:
            return None
        own, data = traits_of(node), [i for i in node.input if i and not self.is_constant(i)]
        numbers = [i for i in data if self.is_number(i)]
        decisions = [i for i in data if i not in numbers and i in self.affected and self.numbers_before(i)]
        if decisions and own.selects_by_input:
            self.kinds[top] = DISCRETE
            self.waiting += [*numbers, *(n for i in decisions for n in self.numbers_before(i))]
        elif own.is_step_function or (own.casts and not numbers):
            self.kinds[top] = DISCRETE
            self.waiting += [*numbers, *decisions]
        elif self.is_rounding(node) or any(map(self.is_leap, numbers)):
            self.kinds[top] = DISCRETE
            self.waiting += numbers
        elif (own.saturates or own.is_activation) and numbers:
            self.kinds[top] = SATURATING
            self.waiting.append(numbers[0])
            self.inside.append((top, numbers[0]))
        elif own.joins:
            self.waiting += numbers
            self.inside += [(top, number) for number in numbers]
        elif own.reveals_operand and len(numbers) == 1:
            return str(numbers[0])
        return None

    def is_rounding(self, node: NodeProto) -> bool:
        return node.op_type == "QuantizeLinear" and node.output[0] not in self.floating

    def is_leap(self, name: str) -> bool:
        """Return whether a float tensor is a decision cast to float, such as a mask."""
        while name in self.affected and (node := self.maker(name)) is not None:
            numbers = [i for i in node.input if i and not self.is_constant(i) and self.is_number(i)]
            own = traits_of(node)
            if own.casts and not numbers:
                return True
            if not own.reveals_operand or len(numbers) != 1:
                return own.is_step_function
            name = numbers[0]
        return False

    def maker(self, name: str) -> NodeProto | None:
        position: int | None = self.scope.producers.get(name)
        return None if position is None else self.scope.nodes[position]

    def is_constant(self, name: str) -> bool:
        value = self.scope.values.get(name)
        return value is not None and value.constants is not None

    def numbers_before(self, name: str) -> list[str]:
        """Return the nearest affected float tensors that an integer or truth value is computed from."""
        waiting, seen, found = [name], {name}, list[str]()
        while waiting:
            node = self.maker(waiting.pop())
            if node is None or traits_of(node).reads_sizes:
                continue
            for before in sorted(all_inputs(node) - {""} - seen):
                seen.add(before)
                if before not in self.affected:
                    continue
                if self.is_number(before):
                    found.append(before)
                else:
                    waiting.append(before)
        return found


class _Removal:
    """The nodes and tensors of a model that the removal of channels affects."""

    def __init__(self, combed: Combed, keep: KeepMask) -> None:
        self.combed, self.keep = combed, keep
        self.scope = combed.folded.scope
        self.scopes = {scope.path: scope for scope in self.scope.walk()}

    def behind(self, nodes: set[_Node]) -> set[str]:
        """Return the tensors of the main graph that depend on the outputs of the given nodes, these included."""
        return self.reached(self.scope, nodes, frozenset())

    def reached(self, scope: Scope, nodes: set[_Node], outside: AbstractSet[str]) -> set[str]:
        """Return the tensors of a graph, and those given from outside, that depend on the outputs of given nodes.

        An output of an If depends on what its own counterparts in the branches do, one of any other node with bodies on
        all that these contain.
        """
        found = set(outside)
        for position, node in enumerate(scope.nodes):
            own, bodies = traits_of(node), scope.bodies.get(position, {}).values()
            if own.branches and found.isdisjoint(node.input):
                for body in bodies:
                    inner = self.reached(body, nodes, found)
                    found.update(name for name, of in zip(node.output, body.outputs, strict=True) if of in inner)
            elif (
                (scope.path, position) in nodes
                or (not own.reads_sizes and not found.isdisjoint(all_inputs(node)))
                or any((inner.path, place) in nodes for b in bodies for inner in b.walk() for place in _places(inner))
            ):
                found.update(name for name in node.output if name)
        return found

    def takers(self) -> set[_Node]:
        """Return the nodes with a pruned input or output."""
        found = {
            (use.use.scope.path, use.use.node)
            for weight in self.combed.weights
            for use in weight.uses
            if any(map(self.keep.shrinks, use.axes))
        }
        for (path, name), tensor in self.combed.tensors.items():
            if any(map(self.keep.shrinks, tensor.all_axes)):
                found.update(self.uses(self.scopes[path], name))
        return found

    def sums(self, takers: set[_Node]) -> set[_Node]:
        """Return those of the nodes that sum or normalise over removed channels, which changes surviving values.

        A node that only reads the size of a tensor does not: masks leave sizes as they are. A loop counts as one that
        does, since what it carries is not followed.
        """
        recorder = self.combed.recorder
        factors = {f.value for product in recorder.products for f in product if self.keep.shrinks(f.atoms)}
        summing = {*recorder.count_dependent, *recorder.masked_slots}
        return {
            (path, position)
            for path, position in takers
            if not traits_of(self.node(path, position)).reads_sizes
            and (
                (path, position) in summing
                or self.is_followed_whole(path, position)
                or not factors.isdisjoint(self.values(path, position))
            )
        }

    def is_followed_whole(self, path: str, position: int) -> bool:
        """Return whether a node has bodies other than branches, or lies in such a body."""
        scope: Scope | None = self.scopes[path]
        if self.scopes[path].bodies.get(position) and not traits_of(self.node(path, position)).branches:
            return True
        while scope is not None and scope.path:
            owner = self.owners.get(scope.path)
            if owner is not None and not traits_of(owner).branches:
                return True
            scope = scope.parent
        return False

    @cached_property
    def owners(self) -> dict[str, NodeProto]:
        """The node that each body belongs to, by the path of the body."""
        return {
            body.path: scope.nodes[position]
            for scope in self.scopes.values()
            for position, bodies in scope.bodies.items()
            for body in bodies.values()
        }

    def node(self, path: str, position: int) -> NodeProto:
        return self.scopes[path].nodes[position]

    def values(self, path: str, position: int) -> set[Value | None]:
        scope = self.scopes[path]
        return {scope.lookup(name) for name in self.node(path, position).input if name}

    def uses(self, scope: Scope, name: str) -> Iterator[_Node]:
        yield from ((use.scope.path, use.node) for use in scope.consumers.get(name, []))
        if name in scope.producers:
            yield scope.path, scope.producers[name]


def _places(scope: Scope) -> range:
    return range(len(scope.nodes))
