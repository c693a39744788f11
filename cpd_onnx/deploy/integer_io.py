"""Integers at the inputs and outputs of a quantised model, and where it converts between them and float32.

A conversion with one scale and one zero point for the whole tensor commutes with operators that only move elements. So
an input can be quantised before it is transposed, which moves a quarter of the bytes; and an input that is read by
QuantizeLinear alone, directly or behind such operators, may as well be given as the integers themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from cpd_onnx.deploy.converting import Notify, quantised_node
from cpd_onnx.errors import UnsupportedError
from cpd_onnx.ir.interface import INTEGER_TYPES, Integers, record_integers
from cpd_onnx.ir.model import Array, Model, bodies_of
from cpd_onnx.ops.quantized_view import level_of
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.editor import put_nodes
from cpd_onnx.shapes.order import all_inputs

Ports: TypeAlias = dict[str, dict[str, dict[str, Any]]]
"""What the integers of "inputs" and "outputs" stand for, by name, as plain values."""

_LEVEL = (1, 2)
"""Input slots of the scale and the zero point of QuantizeLinear and DequantizeLinear."""
_ENDING = "_quantized"
"""Ending of the names of tensors of integers, as onnxruntime's quantiser gives them."""


def integer_io(model: Model, notify: Notify) -> tuple[Model, Ports]:
    """Return a quantised model that takes and gives integers, and what they stand for; it computes the same.

    Float32 inputs that are only quantised, and float32 outputs that are only dequantised, become integers, which the
    metadata of the model describe; `notify` is told which, and why others stay float32. Without any, the model is the
    given one.

    Raises UnsupportedError if the model is not quantised.
    """
    if quantised_node(model) is None:
        raise UnsupportedError("inputs and outputs become integers only in a quantised model: give --int8 as well")
    changed = model.copy()
    graph, ports = _Graph(changed), Ports()
    for kind, infos, convert in (
        ("input", graph.inputs(), graph.take_integers),
        ("output", list(changed.graph.output), graph.give_integers),
    ):
        ports[f"{kind}s"] = {}
        for info in filter(_is_float, infos):
            found = convert(info)
            if isinstance(found, str):
                notify(f"{kind} {info.name!r} stays {_type_of(info)}: {found}")
            else:
                ports[f"{kind}s"][info.name] = asdict(found)
                notify(f"{kind} {info.name!r} is {found}")
    if not any(ports.values()):
        return model, ports
    graph.write()
    record_integers(changed, {name: Integers(**each) for part in ports.values() for name, each in part.items()})
    return _checked(changed, model), ports


def integer_io_again(model: Model, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Model:
    """Repeat the step; raises ValueError if the integers do not stand for what was recorded."""
    again, ports = integer_io(model, lambda _: None)
    if ports != {"inputs": inputs, "outputs": outputs}:
        raise ValueError("the integers of inputs and outputs stand for other numbers")
    return again


def converted_at_border(model: Model) -> Model:
    """Return a model that quantises inputs before operators that reorder them, and dequantises outputs after these.

    It computes the same. If there is nothing to move, it is the given one.
    """
    changed = model.copy()
    graph = _Graph(changed)
    moved = [graph.quantise_first(info.name) for info in filter(_is_float, graph.inputs())]
    moved += [graph.dequantise_last(info.name) for info in filter(_is_float, changed.graph.output)]
    if not any(moved):
        return model
    graph.write()
    return _checked(changed, model)


def _checked(changed: Model, before: Model) -> Model:
    """Return the changed model; raises UnsupportedError if a valid model has become invalid."""
    reason = changed.defect()
    if reason is not None and before.defect() is None:
        raise UnsupportedError(f"moving conversions to integers gives no valid model: {reason}")
    return changed


class _Graph:
    """The main graph of a model, in which conversions between integers and floats move."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self._stored = {node.output[0]: node for node in self.nodes if traits_of(node).is_constant and node.output}
        self._names = model.names() | {info.name for info in (*model.graph.input, *model.graph.output)}
        self._index()

    def _index(self) -> None:
        """Find the producers and readers of all tensors."""
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        self.inside: set[str] = set()
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers[name].append(node)
            if bodies_of(node):
                self.inside |= all_inputs(node)
        self.outputs = {info.name for info in self.model.graph.output}

    def inputs(self) -> list[ValueInfoProto]:
        """Return the inputs that are not weights."""
        return [info for info in self.model.graph.input if not self.model.has(info.name)]

    def write(self) -> None:
        """Write the nodes back, without the weights and descriptions of tensors that are no longer used."""
        put_nodes(self.model, self.nodes, {name for node in self.model.graph.node for name in all_inputs(node)})

    # Conversions at the border of the graph.

    def take_integers(self, info: ValueInfoProto) -> Integers | str:
        """Let an input be integers, and return what they stand for; or the reason why it stays float."""
        found = self._only_quantised(info.name)
        if isinstance(found, str):
            return found
        quantisers, carried = found
        levels = [self._level(node) for node in quantisers]
        level = levels[0]
        if level is None:
            return f"{_named(quantisers[0])} has another scale for each channel, or none that is constant"
        if any(other != level for other in levels):
            return "it is quantised with several scales"
        held = next((n.output[0] for n in quantisers if n.output[0] in self.outputs | self.inside), None)
        if held is not None:
            return f"its integers, {held!r}, are an output or read by a subgraph"
        for node in quantisers:
            self._rename(node.output[0], node.input[0])
            self.nodes.remove(node)
        self._retype(info, carried, level)
        self._index()
        return level

    def _only_quantised(self, name: str) -> tuple[list[NodeProto], list[str]] | str:
        """Return what quantises an input, and the tensors that operators move it to; or what reads it as float."""
        quantisers: list[NodeProto] = []
        carried, waiting = [name], [name]
        while waiting:
            tensor = waiting.pop()
            if tensor in self.outputs | self.inside:
                return f"{tensor!r} is an output, or read by a subgraph"
            for node in self.readers[tensor]:
                is_data = list(node.input).count(tensor) == 1 and node.input[0] == tensor
                if is_data and _quantises(node):
                    quantisers.append(node)
                elif is_data and _moves(node):
                    carried.append(node.output[0])
                    waiting.append(node.output[0])
                elif not traits_of(node).reads_sizes:
                    return f"{_named(node)} reads it as float"
        return (quantisers, carried) if quantisers else "nothing quantises it"

    def give_integers(self, info: ValueInfoProto) -> Integers | str:
        """Let an output be integers, and return what they stand for; or the reason why it stays float."""
        chain = self._chain_of(info.name)
        node = self.producers.get(chain[-1].input[0] if chain else info.name)
        if node is None or not _dequantises(node):
            return f"{_named(node)} computes it as float" if node is not None else "nothing dequantises it"
        level, integers = self._level(node), node.input[0]
        if level is None:
            return f"{_named(node)} has no constant scale and zero point of one number and at most 16 bits"
        if integers not in self.producers or integers in self.outputs | self.inside or info.name in self.inside:
            return f"its integers, {integers!r}, are an input or another output, or read by a subgraph"
        if chain and self.readers[info.name]:
            return f"{_named(self.readers[info.name][0])} reads it as float"
        if chain:
            chain[-1].input[0] = integers
        else:
            self._rename(info.name, self._new(f"{info.name}_float"))
            self._rename(integers, info.name)
        self._index()
        if not self.readers[node.output[0]]:
            self.nodes.remove(node)
        self._retype(info, [each.output[0] for each in chain], level)
        self._index()
        return level

    def _chain_of(self, output: str) -> list[NodeProto]:
        """Return the operators that do nothing but move an output, the last one first."""
        chain: list[NodeProto] = []
        node = self.producers.get(output)
        while node is not None and _moves(node):
            if chain and not self._is_read_once(node.output[0]):
                break
            chain.append(node)
            node = self.producers.get(node.input[0])
        return chain

    def _is_read_once(self, name: str) -> bool:
        """Return whether a tensor is read by one node, and neither an output nor read by a subgraph."""
        return len(self.readers[name]) == 1 and name not in self.outputs | self.inside

    def quantise_first(self, name: str) -> bool:
        """Quantise an input before operators that reorder it, instead of after them; return whether it can be."""
        chain: list[NodeProto] = []
        waiting = [name]
        while waiting:
            found = [node for node in self.readers[waiting.pop()] if _reorders(node)]
            chain += found
            waiting += [node.output[0] for node in found]
        moved = [self._quantise_before(node) for node in reversed(chain)]
        return any(moved)

    def _quantise_before(self, node: NodeProto) -> bool:
        """Let what quantises the output of a node quantise its input instead; return whether it can."""
        made, readers = node.output[0], self.readers[node.output[0]]
        levels = {self._level(each) for each in readers if _quantises(each) and each.input[0] == made}
        is_alone = bool(readers) and all(map(_quantises, readers))
        held = {made, *(each.output[0] for each in readers)} & (self.outputs | self.inside)
        if not is_alone or len(levels) != 1 or None in levels or held or list(node.input).count(node.input[0]) != 1:
            return False
        first = readers[0]
        for other in readers[1:]:
            self._rename(other.output[0], first.output[0])
            self.nodes.remove(other)
        self.nodes.remove(first)
        first.input[0], node.output[0] = node.input[0], first.output[0]
        first.output[0] = node.input[0] = self._new(f"{first.input[0]}{_ENDING}")
        self.nodes.insert(self.nodes.index(node), first)
        self._index()
        return True

    def dequantise_last(self, output: str) -> bool:
        """Dequantise an output after the operators that only reorder it; return whether it moved."""
        chain = [node for node in self._chain_of(output) if _reorders(node)]
        node = self.producers.get(chain[-1].input[0] if chain else "")
        is_whole = len(chain) == len(self._chain_of(output))
        if not is_whole or node is None or not _dequantises(node) or self._level(node) is None:
            return False
        if not self._is_read_once(node.output[0]) or self.readers[output] or output in self.inside:
            return False
        self.nodes.remove(node)
        chain[-1].input[0] = node.input[0]
        for each in chain:
            each.output[0] = self._new(f"{each.output[0]}{_ENDING}")
        for later, each in pairwise(chain):
            later.input[0] = each.output[0]
        node.input[0], node.output[0] = chain[0].output[0], output
        self.nodes.insert(self.nodes.index(chain[0]) + 1, node)
        self._index()
        return True

    # Single changes.

    def _level(self, node: NodeProto) -> Integers | None:
        """Return what the integers of a conversion stand for; None without one constant scale and zero point."""
        if len(node.input) < len(_LEVEL) + 1 or not node.input[_LEVEL[1]]:
            return None
        level = level_of(node, _LEVEL, self._constant)
        kind = "" if level is None else helper.tensor_dtype_to_np_dtype(level.data_type).name
        if level is None or kind not in INTEGER_TYPES or not level.scale > 0:
            return None
        return Integers(kind, level.scale, int(level.zero_point))

    def _constant(self, name: str) -> Array | None:
        if self.model.has(name):
            return self.model.array(name)
        attributes = self._stored[name].attribute if name in self._stored else ()
        return next((numpy_helper.to_array(a.t) for a in attributes if a.HasField("t")), None)

    def _rename(self, old: str, new: str) -> None:
        """Give a tensor another name where nodes make and read it."""
        for node in self.nodes:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]

    def _new(self, wanted: str) -> str:
        """Return an unused name."""
        while wanted in self._names:
            wanted += "_"
        self._names.add(wanted)
        return wanted

    def _retype(self, info: ValueInfoProto, names: Iterable[str], level: Integers) -> None:
        """Declare an input or output, and tensors on the way to it, as integers."""
        known = {each.name: each for each in self.model.graph.value_info}
        for each in (info, *(known[name] for name in names if name in known)):
            each.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(level.dtype))


def _quantises(node: NodeProto) -> bool:
    """Return whether a node converts floats to integers."""
    return traits_of(node).is_quantizer and traits_of(node).saturates


def _dequantises(node: NodeProto) -> bool:
    """Return whether a node converts integers to floats."""
    return traits_of(node).is_quantizer and not traits_of(node).saturates


def _moves(node: NodeProto) -> bool:
    """Return whether the only output of a node consists of elements of its first input, in their type."""
    traits = traits_of(node)
    is_plain = traits.moves_elements and traits.moved == (0, 1) and not traits.casts
    return is_plain and len([name for name in node.output if name]) == 1


def _reorders(node: NodeProto) -> bool:
    """Return whether the output of a node is a permutation of the elements of its first input."""
    traits = traits_of(node)
    return _moves(node) and (traits.is_view or traits.is_local)


def _is_float(info: ValueInfoProto) -> bool:
    return info.type.tensor_type.elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


def _type_of(info: ValueInfoProto) -> str:
    return str(helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type).name)


def _named(node: NodeProto) -> str:
    return f"{node.op_type} {(node.name or node.output[0])!r}"
