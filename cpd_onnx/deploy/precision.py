"""Precision: which operators compute in 8-bit integers and which stay float, by measured time.

An operator may take longer in 8-bit integers than in float32, and each border between the two costs a conversion. The
kernels of the model are timed in both forms. The choice with the least total time is then a minimum cut: a node on the
side of the integers pays its time there, one on the other side that in float32, and a tensor between nodes of both
sides its conversion. As fusions differ with the choice, the chosen model is timed kernel by kernel as well, the times
are corrected, and the cut is repeated. The fastest of all models that were tried is taken, whole and measured.

Where rounding to integers loses too much of the answers, nodes stay float in the order of what that restores, weighed
against their time.

A file becomes smaller still where weights are stored in four bits and the model computes in float32. Those that lose
too much have eight bits.

Where neither is a gain, the whole model may compute in 16-bit floats, or store its weights in them.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from onnx import NodeProto
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from cpd_onnx.budget.latency import KernelTime, LatencyProbe
from cpd_onnx.data.sources import Source
from cpd_onnx.deploy.converting import ignore
from cpd_onnx.deploy.float16 import to_half
from cpd_onnx.deploy.quantize import OPSET, Quantization, Ranges, prepared, quantize_recorded
from cpd_onnx.deploy.steps import convert_opset, fold_constants
from cpd_onnx.deploy.weight_bits import BITS, Rounded, WeightBits, in_few_bits, rounded
from cpd_onnx.errors import UnsupportedError
from cpd_onnx.io.progress import advance, step
from cpd_onnx.ir.model import Model
from cpd_onnx.ops.traits import operators_with, traits_of

PRECISIONS = ("float32", "float16", "int8", "int4", "auto")
"""Number formats of a compressed model: as it is, 16-bit floats, 8-bit integers wherever possible, weights stored in 4
bits, or what serves the target: 8-bit integers only where they are faster, or 16-bit floats if those are, or weights in
as few bits as the loss allows."""
_FASTER = 0.97
"""Latency relative to the float model above which integers are no gain (heuristic)."""
_CUTS = 3
"""Maximum number of cuts, each with the kernel times of the model of the one before (heuristic)."""
_SECONDS = 1.0
"""Minimum duration in seconds of the measurement of one model."""
_SEGMENTS = 12
"""Maximum number of runs of consecutive nodes whose effect on the answers is measured (heuristic)."""
_PRICES = 6
"""Maximum number of weights of the answers against the time that are tried (heuristic)."""
_DEARER = 4.0
"""Factor from one of these weights to the next (heuristic)."""
_LEAST = 1e-12
"""Loss by which others are divided at least."""
_UNITS = 1 << 28
"""Units of capacity that all times add up to: the maximum flow is that of whole numbers."""
_NEVER = 1 << 30
"""Capacity that no cut goes through: more than all times together."""
_MEASURED, _MEASURED_ROWS = 128, 1 << 14
"""Number of samples and rows that a model is fitted to which is only measured (heuristic)."""
_WIDE = (0.0, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Parts of the weights that are tried in eight bits (heuristic)."""
_OWN_END = re.compile(r"_token_\d+$|_nchwc$")
"""What onnxruntime appends to the name of a node or tensor for a kernel that replaces it."""


@dataclass(frozen=True, eq=False)
class Precision:
    """A form with 8-bit integers of all models of one graph, for measurements: its ranges are those of the original.

    Attributes:
        options: Options of the quantisation.
        ranges: Ranges of the tensors.
        latency: Measured latency of the original in this form, relative to itself in float32.
        nodes: Number of nodes that may become integer ones.
        mean: Mean number of bits of the weights.
    """

    options: Quantization
    ranges: Ranges
    latency: float = 1.0
    nodes: int = 0
    mean: ClassVar[float] = 8.0

    def __call__(self, model: Model) -> Model:
        """Return a model in this form; raises UnsupportedError as `quantize`."""
        return quantize_recorded(_newer(model), self.ranges, self.options)[0]

    def size_of(self, model: Model) -> int:
        """Return the bytes of the file of a model in this form."""
        return self(model).size_bytes()

    @property
    def floats(self) -> frozenset[str]:
        """First outputs of the nodes that stay float, of those that may become integer ones."""
        return frozenset(self.options.float_nodes)

    def with_floats(self, names: Iterable[str]) -> Precision:
        """Return the form in which other nodes stay float."""
        return replace(self, options=replace(self.options, float_nodes=tuple(sorted(names))))

    @property
    def what(self) -> str:
        """The form in words."""
        count = self.nodes - len(self.floats)
        return f"8-bit integers in {count} of {self.nodes} operators that can compute in them"


def _newer(model: Model, opset: int = OPSET) -> Model:
    """Return the model at an opset that its form needs, by default to have a scale for each channel."""
    return convert_opset(model, opset) if model.opset < opset else model


def whole(model: Model, source: Source, options: Quantization | None = None) -> Precision:
    """Return the form with 8-bit integers wherever possible.

    Raises:
        UnsupportedError: The model cannot be quantised.
        DataError: The samples do not fit the model.
    """
    options = options or Quantization()
    quantised, ranges = quantize_recorded(_newer(model), source, options)
    return Precision(options, ranges, nodes=len(_integer_nodes(quantised)))


@dataclass(frozen=True)
class Halves:
    """A form with 16-bit floats of all models of one graph; its inputs and outputs stay as they are.

    Attributes:
        storage_only: Whether weights are stored in 16 bits and computed with in float32.
        latency: Measured latency of the original in this form, relative to itself in float32.
        mean: Mean number of bits of the weights.
    """

    storage_only: bool = False
    latency: float = 1.0
    mean: ClassVar[float] = 16.0

    def __call__(self, model: Model) -> Model:
        """Return a model in this form; raises UnsupportedError as `to_half`."""
        return to_half(model, storage_only=self.storage_only)

    def size_of(self, model: Model) -> int:
        """Return the bytes of the file of a model in this form."""
        return self(model).size_bytes()

    @property
    def what(self) -> str:
        """The form in words."""
        return "weights stored as 16-bit floats" if self.storage_only else "16-bit floats"


def fastest(
    probe: LatencyProbe,
    source: Source,
    options: Quantization | None = None,
    *,
    loss: Callable[[Model], float] = lambda _: 0.0,
    most: float = 0.0,
) -> Precision | Halves | None:
    """Return the form in which the probe's model is fastest and loses at most `most`; None if that is float32.

    Args:
        probe: Measures latencies beside the model.
        source: Samples for the ranges of activations.
        options: Options of the quantisation.
        loss: Returns what a model loses of the answers.
        most: Largest loss of the original in this form.

    Raises DataError if the samples do not fit the model.
    """
    with step("precision", is_whole=True):
        found: list[Precision | Halves] = []
        with suppress(UnsupportedError):  # it cannot be quantised
            integers = whole(probe.combed.folded.original, source, options)
            found += filter(None, [_Choice(probe, integers).best(loss, most)])
        with suppress(UnsupportedError):  # it has no 16-bit form
            found += filter(None, [_halved(probe, loss, most)])
    return min(found, key=lambda form: form.latency, default=None)


def _halved(probe: LatencyProbe, loss: Callable[[Model], float], most: float) -> Halves | None:
    """Return the form with 16-bit floats, None if it is not faster or loses too much."""
    original = probe.combed.folded.original
    model = Halves()(original)
    form = Halves(latency=probe.ratio_of(model, _SECONDS) / probe.ratio_of(original, _SECONDS))
    return form if form.latency < _FASTER and loss(model) <= most else None


@dataclass(frozen=True, eq=False)
class _Graph:
    """The prepared model as the cut sees it.

    Attributes:
        names: Names of nodes and tensors, by the names that kernels may start with: the first output of the node.
        integer: First outputs of the nodes that may become integer ones, in order.
        producers: First output of the node that makes each tensor.
        consumers: First outputs of the nodes that read each tensor; None stands for an output of the model.
    """

    names: Mapping[str, str]
    integer: tuple[str, ...]
    producers: Mapping[str, str]
    consumers: Mapping[str, tuple[str | None, ...]]


@dataclass(eq=False)
class _Choice:
    """The search for the fastest form of one model."""

    probe: LatencyProbe
    all_integers: Precision
    floats: dict[str, float] = field(default_factory=dict)
    integers: dict[str, float] = field(default_factory=dict)
    conversions: dict[str, float] = field(default_factory=dict)

    def best(self, loss: Callable[[Model], float], most: float) -> Precision | None:
        """Return the fastest form, None for float32."""
        plain, found = self.timed(frozenset(self.graph.integer)), self.timed(frozenset())
        tried = {found.floats: found}
        for number in range(_CUTS):
            advance(number, _CUTS, f"latency {min(each.latency for each in tried.values()):.3f}")
            floats = self.cut({})
            if floats in tried or floats == plain.floats:
                break
            try:
                tried[floats] = self.timed(floats)
            except UnsupportedError:  # what is left only moves integers that others make
                break
        best = min(tried.values(), key=lambda each: each.latency)
        kept = self.harmless(best, loss, most)
        return kept if kept is not None and kept.latency < _FASTER * plain.latency else None

    @cached_property
    def model(self) -> Model:
        """The model in float32."""
        return _newer(self.probe.combed.folded.original)

    @cached_property
    def graph(self) -> _Graph:
        """The graph of the prepared model."""
        with tempfile.TemporaryDirectory(prefix="cpd-onnx.") as folder:
            proto = prepared(self.model, Path(folder) / "prepared.onnx", ignore)
        nodes = [node for node in proto.graph.node if node.output]
        integer = _integer_nodes(self.all_integers(self.model))
        names: dict[str, str] = {}
        consumers: dict[str, list[str | None]] = defaultdict(list)
        for node in nodes:
            names |= dict.fromkeys((node.name, *filter(None, node.output)), node.output[0])
            for name in dict.fromkeys(node.input):
                consumers[name].append(node.output[0])
        for info in proto.graph.output:
            consumers[info.name].append(None)
        return _Graph(
            names,
            tuple(node.output[0] for node in nodes if node.name in integer),
            {name: node.output[0] for node in nodes for name in node.output if name},
            {name: tuple(readers) for name, readers in consumers.items()},
        )

    def timed(self, floats: frozenset[str]) -> Precision:
        """Return a form with its latency, and correct the times of kernels by those in it."""
        form = self.all_integers.with_floats(floats)
        is_float = len(floats) == len(self.graph.integer)
        model = self.model if is_float else form(self.model)
        kernels, _, _ = self.probe.profile(model, {})
        self.note(kernels, floats)
        return replace(form, latency=self.probe.ratio_of(model, _SECONDS))

    def note(self, kernels: Mapping[str, KernelTime], floats: frozenset[str]) -> None:
        """Record the times of a model's kernels by node and form, and those of conversions by tensor."""
        graph, found, converted = self.graph, dict[str, float](), dict[str, float]()
        for name, kernel in kernels.items():
            if kernel.operator in _QUANTIZERS:
                tensor = name.rpartition("_")[0]
                converted[tensor] = max(converted.get(tensor, 0.0), kernel.ms)
            elif (node := _named(name, graph.names)) is not None:
                found[node] = found.get(node, 0.0) + kernel.ms
        self.conversions |= converted
        for node in graph.integer:
            (self.floats if node in floats else self.integers)[node] = found.get(node, 0.0)

    @property
    def conversion(self) -> float:
        """Milliseconds of a conversion that was not measured: the median of those that were."""
        return float(np.median(list(self.conversions.values()))) if self.conversions else 0.0

    def cut(self, damage: Mapping[str, float]) -> frozenset[str]:
        """Return the nodes that stay float where the total time is least; `damage` is added to the time as integers."""
        usual = self.conversion
        cut = _Cut(self.graph.integer)
        for node in self.graph.integer:
            cut.pay(node, self.floats[node], self.integers[node] + damage.get(node, 0.0))
        for tensor, readers in self.graph.consumers.items():
            makers = self.graph.producers.get(tensor)
            if makers in cut.place or any(reader in cut.place for reader in readers):
                cut.convert(makers, readers, self.conversions.get(tensor, usual))
        return frozenset(self.graph.integer) - cut.integer()

    def harmless(self, best: Precision, loss: Callable[[Model], float], most: float) -> Precision | None:
        """Return a form that loses at most `most`, None if there is none: the given one, or one with more in float."""
        lost = loss(best(self.model))
        if lost <= most:
            return best
        damage = self.damage(best, lost, loss)
        if not damage:
            return None
        price = sum(self.floats.values()) / max(sum(damage.values()), _LEAST) * _DEARER ** (-_PRICES / 2)
        for number in range(_PRICES):
            advance(number, _PRICES, f"loss {lost:.3g}")
            floats = self.cut({node: price * value for node, value in damage.items()}) | best.floats
            if floats == frozenset(self.graph.integer):
                return None
            lost = loss(best.with_floats(floats)(self.model))
            if lost <= most:
                return self.timed(floats)
            price *= _DEARER
        return None

    def damage(self, best: Precision, lost: float, loss: Callable[[Model], float]) -> dict[str, float]:
        """Return what each integer node costs of the answers: a part of what its segment in float restores."""
        nodes = [node for node in self.graph.integer if node not in best.floats]
        found: dict[str, float] = {}
        for segment in np.array_split(np.asarray(nodes, object), min(_SEGMENTS, len(nodes))):
            without = best.with_floats(best.floats | set(segment.tolist()))
            try:
                restored = lost - loss(without(self.model))
            except UnsupportedError:  # no other node is left
                restored = lost
            found |= {node: max(0.0, restored) / len(segment) for node in segment.tolist()}
        return found


# Weights in few bits.


@dataclass(frozen=True, eq=False)
class InFewBits:
    """A form with weights in few bits of all models of one graph, for measurements on a part of the samples.

    Attributes:
        options: Options of the rounding.
        source: Samples.
        is_folded: Whether constants are computed first, and batch normalisation becomes part of linear operators.
        mean: Mean number of bits of the weights.
        weights: Number of weights of the original in this form.
        latency: Latency of the original in this form, relative to itself in float32: the weights are computed once.
    """

    options: WeightBits
    source: Source
    is_folded: bool = True
    mean: float = 0.0
    weights: int = 0
    latency: float = 1.0

    def __call__(self, model: Model) -> Model:
        """Return a model in this form; raises UnsupportedError and DataError as `in_few_bits`."""
        return in_few_bits(self.prepared(model), self.source, self.quick)[0]

    def size_of(self, model: Model) -> int:
        """Return the bytes of the file of a model in this form."""
        return in_few_bits(self.prepared(model), None, self.options)[0].size_bytes()

    def prepared(self, model: Model) -> Model:
        """Return the model that is rounded."""
        model = _newer(model, self.options.opset)
        return fold_constants(model) if self.is_folded else model

    @property
    def quick(self) -> WeightBits:
        """The options for measurements."""
        return replace(self.options, samples=min(_MEASURED, self.options.samples), rows=_MEASURED_ROWS)

    @property
    def what(self) -> str:
        """The form in words."""
        wide = len(self.options.wide)
        said = f"weights in {self.options.bits} bits"
        return f"{said}, {wide} of {self.weights} in {max(BITS)}" if wide else said


def in_four_bits(model: Model, source: Source, options: WeightBits) -> InFewBits:
    """Return the form with weights in as many bits as the options say; raises as `narrowest`."""
    return _chosen(*_first(model, source, options, None))  # the numbers of bits do not depend on samples


def narrowest(
    model: Model, source: Source, options: WeightBits, loss: Callable[[Model], float], most: float
) -> InFewBits | None:
    """Return the form with the fewest bits that loses at most `most`; None if even eight bits for all lose more.

    Weights get eight bits in the order of the errors that four bits leave, as many as it takes.

    Args:
        model: The original.
        source: Samples; labels are not needed.
        options: Options of the rounding; the number of bits and the wide weights are chosen.
        loss: Returns what a model loses of the answers.
        most: Largest loss.

    Raises UnsupportedError if the model has no such weights, DataError if the samples do not fit it.
    """
    with step("precision", is_whole=True):
        form, made = _first(model, source, options, source)
        worst = sorted(made.errors, key=lambda name: -made.errors[name])
        for number, part in enumerate(_WIDE):
            advance(number, len(_WIDE), f"{part:.0%} of the weights in {max(BITS)} bits")
            wide = tuple(worst[: math.ceil(part * len(worst))])
            bits = max(BITS) if len(wide) == len(worst) else options.bits
            found = _chosen(replace(form, options=replace(options, bits=bits, wide=wide)), made)
            if loss(found(model)) <= most:
                return found
    return None


def _first(model: Model, source: Source, options: WeightBits, fitted: Source | None) -> tuple[InFewBits, Rounded]:
    """Return the form of some options, folded if onnxruntime can, and the model with its weights rounded.

    Weights are fitted to the samples `fitted`, or rounded to nearest without any.
    """
    form = InFewBits(options, source)
    try:
        plain = form.prepared(model)
    except UnsupportedError:
        form = replace(form, is_folded=False)
        plain = form.prepared(model)
    made = rounded(plain, fitted, form.quick)
    if not made.integers:
        raise UnsupportedError("the model has no weights that can be stored in few bits")
    return form, made


def _chosen(form: InFewBits, made: Rounded) -> InFewBits:
    """Return a form with the number of its weights, those of a rounded model, and of their bits."""
    sizes = {name: made.integers[name][0].size for name in made.errors}
    mean = sum(size * form.options.of(name) for name, size in sizes.items()) / max(1, sum(sizes.values()))
    wide = form.options.wide if form.options.bits < max(BITS) else ()
    return replace(form, options=replace(form.options, wide=wide), mean=mean, weights=len(sizes))


# Helpers.


_QUANTIZERS = operators_with("is_quantizer")


def _integer_nodes(model: Model) -> set[str]:
    """Return the names of the nodes of a quantised model that read integers, directly or through a conversion."""
    converted = {name for node in model.graph.node if _converts(node) for name in node.output}
    return {node.name for node in model.graph.node if not _converts(node) and converted.intersection(node.input)}


def _converts(node: NodeProto) -> bool:
    return bool(traits_of(node).is_quantizer)


def _named(kernel: str, names: Mapping[str, str]) -> str | None:
    """Return the node whose name or output a kernel's name starts with; None if there is none."""
    name = _OWN_END.sub("", kernel)
    while name and name not in names:
        name = name.rpartition("_")[0]
    return names.get(name)


class _Cut:
    """A graph whose minimum cut tells which nodes compute in integers: those on the side of the source."""

    def __init__(self, nodes: Sequence[str]) -> None:
        self.place = {node: number for number, node in enumerate(nodes, start=2)}
        self.count = 2 + len(nodes)
        self.edges: list[tuple[int, int, float | None]] = []

    def pay(self, node: str, as_float: float, as_integer: float) -> None:
        """Let a node pay its milliseconds on either side."""
        self._edge(0, self.place[node], as_float)
        self._edge(self.place[node], 1, as_integer)

    def convert(self, maker: str | None, readers: Iterable[str | None], ms: float) -> None:
        """Let a tensor pay its conversion once if any of its readers is on the other side than its maker."""
        maker_place = self.place.get(maker or "", 1)
        inputs, outputs = self.count, self.count + 1
        self.count += 2
        self._edge(inputs, maker_place, ms)
        self._edge(maker_place, outputs, ms)
        for reader in readers:
            place = self.place.get(reader or "", 1)
            self._edge(place, inputs, None)
            self._edge(outputs, place, None)

    def _edge(self, start: int, end: int, ms: float | None) -> None:
        if start != end and start != 1:
            self.edges.append((start, end, ms))

    def integer(self) -> frozenset[str]:
        """Return the nodes on the side of the source."""
        unit = sum(ms or 0.0 for *_, ms in self.edges) / _UNITS or 1.0
        summed: dict[tuple[int, int], int] = defaultdict(int)
        for start, end, ms in self.edges:
            capacity = _NEVER if ms is None else round(ms / unit)
            summed[start, end] = min(_NEVER, summed[start, end] + capacity)
        starts, ends = (np.asarray(column) for column in zip(*summed, strict=True))
        capacities = np.asarray(list(summed.values()), np.int32)
        shape = (self.count, self.count)
        graph = csr_array((capacities, (starts, ends)), shape=shape)
        left = graph - maximum_flow(graph, 0, 1).flow
        left.data = np.maximum(left.data, 0)
        left.eliminate_zeros()
        reached = set(breadth_first_order(left, 0, return_predecessors=False).tolist())
        return frozenset(node for node, place in self.place.items() if place in reached)
