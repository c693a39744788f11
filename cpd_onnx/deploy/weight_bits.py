"""Weights in few bits: each is stored as integers and a scale for each output, and computed with in float32.

Weights of linear operators are rounded one after the other. Before that, each is fitted to the float model's output of
its operator, on the inputs in the model whose earlier weights are rounded already, and within one weight the elements
that follow make up for the rounding of those before (Frantar et al., GPTQ, ICLR 2023). Rounding to the nearest integer
instead, which needs no samples, loses far more.

Tables that an operator looks up, the gates of recurrent operators and weights that several nodes take are rounded to
nearest, in eight bits.

The file holds the integers, a Cast and a Mul by the scales, whose output has the name of the weight. onnxruntime
computes both once, when it loads the model, so that runs take as long as those of the float model; a
DequantizeLinear it would compute in each run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from cpd_onnx.budget.deployed import FEWEST, scaled_axis
from cpd_onnx.data.images.crops import cropped
from cpd_onnx.data.sources import Source, calibration, few_samples, inputs_of, numbers_in_sample
from cpd_onnx.deploy.converting import Notify, embedded, ignore, require_one_message, valid
from cpd_onnx.errors import TargetError, UnsupportedError
from cpd_onnx.fitting.least_squares import MAX_FEATURES, Matrix, Sampler, one_thread
from cpd_onnx.fitting.problem import Block, Problem
from cpd_onnx.fitting.steps import Steps
from cpd_onnx.fitting.units import SHARED, Unit, Units, units_of
from cpd_onnx.io.progress import step, tracked
from cpd_onnx.ir.model import Array, Model, element_type, to_array
from cpd_onnx.ir.tensors import constant_tensors, values_sha256
from cpd_onnx.ops.quantized_view import LIMITS
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.runtime.sessions import Feed, sample_count
from cpd_onnx.runtime.shards import Divided
from cpd_onnx.runtime.stream import Stop, Stream, Tensors, apart, batch_size, cuts_before, held_feeds
from cpd_onnx.shapes.inference import fold
from cpd_onnx.shapes.values import Folded

BITS = (4, 8)
"""Numbers of bits that a weight can be stored in."""
OPSET, IR = 21, 10
"""First opset and IR version with 4-bit integers (ONNX specification)."""
_KINDS = {4: TensorProto.INT4, 8: TensorProto.INT8}
_BATCH, _CHECKED = 32, 8
"""Number of samples in a run, and one in this many is held out to validate fits (heuristic)."""
_NUMBERS = {4: 1 << 26, 8: 1 << 23}
"""Numbers in all samples by the number of bits, if these are not very few (heuristic): those of 446 and of 55 images of
224x224. In eight bits, the nearest integers are nearly as good as any."""
_RIDGE, _ROUNDS = 1e-3, 3
"""Minimum regularization of a fit and rounds for clipped targets, see `Problem` (heuristic)."""
_SHRINKS = np.linspace(0.4, 1.0, 25)
"""Scales that are tried, relative to the one with which the largest element is in range (heuristic)."""

_AT_ONCE = 1 << 22
"""Number of elements whose scales are searched for at once, which takes several times their memory (heuristic)."""

Integers: TypeAlias = Mapping[str, tuple[Array, ...]]
"""Integers in the shape of each weight, in their element type, by its name, and scales that broadcast against them."""


@dataclass(frozen=True)
class WeightBits:
    """Options of the rounding of weights.

    Attributes:
        bits: Number of bits of a weight, one of `BITS`.
        wide: Names of weights that have eight bits nevertheless; those that a model lacks are ignored.
        samples: Maximum number of samples that weights are fitted to; of large ones fewer serve.
        rows: Approximate number of rows (positions in the samples) for each fit.
        seed: Seed of the choice of samples and rows.
    """

    bits: int = 4
    wide: tuple[str, ...] = ()
    samples: int = 512
    rows: int = 1 << 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise TargetError for another number of bits."""
        if self.bits not in BITS:
            raise TargetError(f"weights can have {' or '.join(map(str, BITS))} bits, got {self.bits}")

    def of(self, weight: str) -> int:
        """Return the number of bits of a weight."""
        return max(BITS) if weight in self.wide else self.bits

    @property
    def opset(self) -> int:
        """First opset that has the integers."""
        return OPSET if self.bits == min(BITS) else 0


@dataclass(eq=False)
class Rounded:
    """A float model whose weights are products of integers and scales.

    Attributes:
        model: The model in float32.
        integers: Integers and scales by the name of the weight.
        tables: Names of the weights among them that were rounded to nearest in eight bits, see `scaled_axis`.
        biases: Names of biases that were changed to make up for the rounding.
        errors: Root mean square error of each weight's target over its standard deviation, on held-out rows; infinite
            where it was not measured.
        left: Weights of linear operators that stay as they are, and why.
    """

    model: Model
    integers: dict[str, tuple[Array, ...]] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def in_few_bits(
    model: Model, source: Source | None, options: WeightBits | None = None, notify: Notify | None = None
) -> tuple[Model, dict[str, Any]]:
    """Return the model with weights stored in few bits, and the record with which `in_few_bits_again` repeats it.

    Args:
        model: Model in float32, for four bits at opset 21 or newer.
        source: Samples; labels are not needed. None rounds to nearest, which serves to know the size of the file.
        options: Options of the rounding.
        notify: Called with what stays float32, and why.

    Raises:
        UnsupportedError: There is no such weight, the model has an older opset, or it is over 2 GiB.
        DataError: The data does not fit the model.
    """
    options = options or WeightBits()
    require_one_message(model, "stored in few bits")
    if model.opset < options.opset:
        raise UnsupportedError(f"4-bit integers need opset {OPSET} and the model has {model.opset}: convert it first")
    made = rounded(model, source, options)
    if not made.integers:
        said = f"no float32 weight of an operator has {FEWEST} elements or more"
        raise UnsupportedError(f"{said}{_reasons(made)}")
    if made.tables:
        (notify or ignore)(
            "tables, matrices of recurrent operators and weights of several nodes that are rounded to nearest in "
            f"{max(BITS)} bits: {len(made.tables)}, like {made.tables[0]!r}"
        )
    if made.left:
        (notify or ignore)(f"weights that stay as they are: {len(made.left)}{_reasons(made)}")
    model = _with_initializers(model, {*made.integers, *made.biases})
    packed = _packed(model, made.integers, {name: made.model.array(name) for name in made.biases})
    weights = [name for name in made.integers if name not in made.tables]
    values = [name for weight in weights for name in _names(weight)] + made.biases
    record = {"weights": weights, "values": {name: _digest(packed, name) for name in values}}
    return packed, record | ({"tables": made.tables} if made.tables else {})


def in_few_bits_again(
    model: Model,
    written: Model | None,
    weights: Sequence[str],
    values: Mapping[str, str],
    tables: Sequence[str] = (),
) -> Model:
    """Return the model in the same form with the integers, scales and biases that a file holds.

    What was fitted to samples cannot be computed again without these. All else is that of the model, and what is taken
    from the file has the SHA-256 of the record.

    Args:
        model: The model before the step.
        written: The model after it.
        weights: Names of the weights, which the model holds as floats.
        values: SHA-256 of their integers and scales and of the biases, by the names of the tensors in the file.
        tables: Names of the weights that are rounded to nearest, which are computed again.

    Raises TargetError if the file does not hold them.
    """
    model = _with_initializers(model, {*weights, *values, *tables})
    if written is None:
        raise TargetError("weights that were fitted to samples are only known from the file that holds them")
    for name, digest in values.items():
        if not written.has(name) or _digest(written, name) != digest:
            raise TargetError(f"the file does not hold the values of {name!r} that were recorded")
    integers = {weight: tuple(written.array(name) for name in _names(weight)) for weight in weights}
    fitted = {name for weight in weights for name in _names(weight)}
    biases = {name: written.array(name) for name in values if name not in fitted}
    missing = next((name for name in (*weights, *biases, *tables) if not model.has(name)), None)
    if missing is not None or any(model.array(name).shape != numbers.shape for name, (numbers, _) in integers.items()):
        raise TargetError("the model before the step does not have the weights that were recorded")
    if any(scaled_axis(model.array(name).shape) is None for name in tables):
        raise TargetError("the model before the step does not have the tables that were recorded")
    return _packed(model, integers | {name: _nearest(model.array(name)) for name in tables}, biases)


def samples_to_fit(model: Model, source: Source, options: WeightBits) -> int:
    """Return how many samples weights are fitted to, if there are as many; raises DataError as `rounded`."""
    return few_samples(options.samples, numbers_in_sample(model, source), _NUMBERS[options.bits])


def _with_initializers(model: Model, names: Collection[str]) -> Model:
    """Return the model with the tensors of these names that Constant nodes hold as initializers."""
    held = {name: tensor for name, tensor in constant_tensors(model).items() if name in names}
    if not held:
        return model
    made = model.copy()
    nodes = [node for node in made.graph.node if not held.keys() & set(node.output)]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    for name, tensor in held.items():
        made.add_initializer(name, to_array(tensor))
    return made


def _reasons(made: Rounded) -> str:
    name, why = next(iter(made.left.items()), ("", ""))
    return f", like {name!r}: {why}" if name else ""


def _digest(model: Model, name: str) -> str:
    """Return the SHA-256 of an initializer."""
    return values_sha256(model.tensor(name).data_type, model.array(name))


@step("rounding")
def rounded(model: Model, source: Source | None, options: WeightBits) -> Rounded:
    """Return the model with the weights of its linear operators rounded, fitted on samples one after the other.

    Without samples, they are rounded to nearest.

    Raises DataError if the data does not fit the model.
    """
    model = _with_initializers(model, constant_tensors(model))
    folded = fold(model)
    fed = {info.name for info in model.graph.input}
    known = units_of(folded)
    units, left = list[Unit](), dict(known.left)
    for unit in known.found:
        if unit.is_inner and unit.stored.moved is None:  # rounded as a table
            continue
        why = _why_left(unit, model, fed)
        if why:
            left[unit.weight] = why
        elif unit.matrix(model).size >= FEWEST:
            units.append(unit)
    tables = [name for name in _tables(folded, known) if name not in fed]
    if not units and not tables:
        return Rounded(model, left=left)
    made = Rounded(model.copy(), left=left)
    for name in tables:  # first, so that what is fitted makes up for them
        made.integers[name] = numbers, scales = _nearest(model.array(name))
        made.tables.append(name)
        made.left.pop(name, None)
        made.model.set_array(name, numbers * scales)
    if not units:
        return made
    if source is None:
        for unit in units:
            _round(made, unit, options)
        return made
    batch = batch_size(folded, _BATCH)
    samples = samples_to_fit(model, source, options)
    feeds = held_feeds(calibration(model, source, samples, batch=batch, seed=options.seed))
    checked = max(1, len(feeds) // _CHECKED) if len(feeds) > 1 else 0
    fitted = feeds[: len(feeds) - checked]
    more = cropped(fitted, inputs_of(model.proto), samples - sum(map(sample_count, feeds)), options.seed)
    with one_thread():
        _Rounder(folded, made, units, [*fitted, *more, *feeds[len(fitted) :]], options).run(checked)
    return made


def _why_left(unit: Unit, model: Model, fed: Collection[str]) -> str:
    """Return why a weight stays as it is; empty if it can be rounded."""
    names = {unit.weight} | ({unit.bias.name} if unit.bias is not None else set())
    if not unit.is_float or not names.isdisjoint(fed):
        return "it is quantised already, or an input"
    if model.tensor(unit.weight).data_type != TensorProto.FLOAT:
        return "it is not float32"
    if any(part is not None and part.moved is not None for part in (unit.stored, unit.bias)):
        return "nodes of the graph put it or its bias together from other tensors"
    return "it is a stack of matrices" if unit.linear.is_stacked else ""


def _tables(folded: Folded, known: Units) -> Iterator[str]:
    """Yield the names of the initializers that are rounded to nearest: finite tables in float32."""
    model, scope = folded.model, folded.scope
    names = dict.fromkeys(units[0].weight for units in known.shared)
    names |= dict.fromkeys(name for name, why in known.left.items() if why == SHARED)
    for node in scope.nodes:
        names |= dict.fromkeys(node.input[slot] for slot in traits_of(node).matrix_slots if slot < len(node.input))
    for name in names:
        if not model.has(name) or name in scope.outputs or model.tensor(name).data_type != TensorProto.FLOAT:
            continue
        array = model.array(name)
        if scaled_axis(array.shape) is not None and np.isfinite(array).all():
            yield name


def _nearest(array: Array) -> tuple[Array, Array]:
    """Return a table as integers of eight bits, and the scale of each index of one of its axes."""
    own = scaled_axis(array.shape)
    assert own is not None
    limits = LIMITS[_KINDS[max(BITS)]]
    largest = np.abs(array).max(axis=tuple(axis for axis in range(array.ndim) if axis != own), keepdims=True)
    scales = np.where(largest > np.finfo(np.float32).tiny, largest / np.float32(limits[1]), np.float32(1))
    return np.clip(np.rint(array / scales), *limits).astype(np.int8), scales.astype(np.float32)


class _Rounder:
    """Rounds weight after weight while samples stream through the float model and the rounded one."""

    def __init__(
        self, folded: Folded, made: Rounded, units: Sequence[Unit], feeds: Sequence[Feed], options: WeightBits
    ) -> None:
        """Prepare to round the weights of some units of `made`, which is changed."""
        self.made, self.options, self.units = made, options, units
        self.scope = folded.scope
        self.old, self.new = (Stream(folded, each, feeds) for each in (folded.model, made.model))
        for stream in (self.old, self.new):
            stream.keep_alive({unit.data: unit.position for unit in units})
        self.sampler = Sampler(options.rows, options.seed, self.old.sizes)

    def run(self, checked: int) -> None:
        """Round all weights; the last `checked` of the feeds validate the fits."""
        cuts = cuts_before([unit.position for unit in self.units], self.old)
        for number, unit in tracked(list(enumerate(self.units))):
            _round(self.made, unit, self.options, self.blocks(number, unit, cuts.get(number)), checked)

    def blocks(self, number: int, unit: Unit, cut: int | None) -> Divided[Block] | None:
        """Return features in the rounded model and targets of the float one, at the same positions of each batch.

        None where sizes depend on values, which may differ in the two models.
        """
        shape, value = unit.matrix(self.made.model).shape, self.scope.values.get(unit.data)
        if value is None or value.depends_on_values:
            return None

        def wanted(_: int, batch: int, tensors: Tensors) -> tuple[Array, Array]:
            out = tensors[unit.target]
            places = self.sampler.places((number, batch), unit.linear, shape, out)
            return places, apart(unit.linear.targets(np.asarray(out, np.float32), places))

        def given(_: int, batch: int, tensors: Tensors) -> Block:
            ((places, aims),) = targets.of(batch)
            rows = unit.linear.rows(np.asarray(tensors[unit.data], np.float32), places)
            other = None
            if unit.other is not None:
                other = unit.linear.targets(np.asarray(tensors[unit.other], np.float32), places)
                aims = aims - other
            return Block(apart(rows), apart(aims), apart(other) if other is not None and unit.is_clipped else None)

        stop = Stop(self.scope.producers[unit.target], (unit.target,))
        targets = self.old.looks([stop], wanted, cut=cut)
        names = (unit.data,) if unit.other is None else (unit.data, unit.other)
        return self.new.looks([Stop(unit.position - 1, names)], given, cut=cut).map(lambda found: found[0])


def _round(
    made: Rounded, unit: Unit, options: WeightBits, blocks: Divided[Block] | None = None, checked: int = 0
) -> None:
    """Round a weight, and store it with a bias that makes up for the rounding; to nearest if there are no blocks.

    The last `checked` of the blocks validate the fit.
    """
    kind = _KINDS[options.of(unit.weight)]
    start, limits = unit.matrix(made.model), LIMITS[kind]
    if not np.isfinite(start).all():
        made.left[unit.weight] = "it has infinite or undefined elements"
        return
    found = _Fit(np.inf, start, np.zeros((len(start), 1, start.shape[2])), _steps(start, limits, None))
    if blocks is not None and start.shape[1] <= MAX_FEATURES:
        is_biased = unit.bias is not None and made.model.has(unit.bias.name)
        held_out = min(checked, len(blocks) - 1)
        problem = Problem(blocks, held_out, start, unit.gain, unit.shift, is_biased, unit.bounds, _RIDGE, _ROUNDS)
        found = _fitted(problem, limits) or found
    each = found.steps.scales[found.steps.cells]
    numbers = np.clip(np.rint(found.matrix / each), *limits)
    integers = unit.linear.weight(numbers)
    integers = np.ascontiguousarray(integers.T if unit.flipped else integers, np.int8)
    made.integers[unit.weight] = integers.astype(element_type(kind)), _broadcastable(unit, each)
    made.errors[unit.weight] = found.error
    unit.store(made.model, numbers * each, found.constant)
    if found.constant.any():
        assert unit.bias is not None
        made.biases.append(unit.bias.name)


@dataclass(frozen=True, eq=False)
class _Fit:
    """A weight in steps, the constant that makes up for its rounding, and its error relative to its target."""

    error: float
    matrix: Matrix
    constant: Matrix
    steps: Steps


def _fitted(problem: Problem, limits: tuple[int, int]) -> _Fit | None:
    """Return the best weight in steps on held-out rows: of the least-squares fit and of the weight, or the nearest.

    None if the samples give no numbers.
    """
    moments = problem.moments()
    ridge, matrix, constant = problem.fitted(moments)
    lifted, nothing = moments.lifted(ridge), np.zeros_like(constant)
    found: list[_Fit] = []
    ways = (matrix, constant, True), (problem.start, nothing, True), (problem.start, nothing, False)
    for aim, added, is_fitted in ways:
        steps = _steps(aim, limits, np.diagonal(lifted, axis1=1, axis2=2))
        made = steps.rounded(aim, lifted)[0] if is_fitted else steps.nearest(aim, steps.scales[steps.cells], _ZERO)
        shift = added + moments.mean @ (aim - made) if problem.centred else nothing
        error = problem.error(made, shift) / (problem.deviation() or 1.0)
        if np.isfinite(error) and np.isfinite(made).all():
            found.append(_Fit(error, made, shift, steps))
    return min(found, key=lambda fit: fit.error, default=None)


_ZERO = np.zeros(())


def _steps(matrix: Matrix, limits: tuple[int, int], weights: Array | None) -> Steps:
    """Return the steps of a matrix [groups, features, outputs] with the least error, each output having one scale.

    Args:
        matrix: The matrix.
        limits: Smallest and largest integer.
        weights: What the square of an error counts for each feature [groups, features]; None counts all alike.
    """
    groups, features, outputs = matrix.shape
    counts = np.ones(matrix.shape[:2]) if weights is None else weights
    width = max(1, _AT_ONCE // (groups * features))
    parts = [matrix[:, :, place : place + width] for place in range(0, outputs, width)]
    best = np.concatenate([_scales(part, limits, counts) for part in parts], axis=2)
    cells = np.broadcast_to(np.arange(groups * outputs).reshape(groups, 1, outputs), matrix.shape)
    scales = best.astype(np.float32).astype(np.float64).ravel()
    return Steps(cells.astype(np.int64), scales, _ZERO, limits, False)


def _scales(matrix: Matrix, limits: tuple[int, int], counts: Array) -> Array:
    """Return the scale of each output with the least error [groups, 1, outputs], see `_steps`."""
    largest = np.maximum(matrix.max(axis=1, keepdims=True) / limits[1], matrix.min(axis=1, keepdims=True) / limits[0])
    largest = np.where(largest > np.finfo(np.float32).tiny, largest, 1.0)
    best, least = largest, np.full(largest.shape, np.inf)
    for shrink in _SHRINKS[::-1]:
        scales = largest * shrink
        wrong = np.clip(np.rint(matrix / scales), *limits) * scales - matrix
        error = np.einsum("gfo,gf->go", np.square(wrong), counts)[:, None]
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return best


def _broadcastable(unit: Unit, each: Matrix) -> Array:
    """Return the scale of each element in the shape of the stored weight, with axes of size 1 along which it is one."""
    scales = unit.linear.weight(each)
    scales = scales.T if unit.flipped else scales
    for axis in range(scales.ndim):
        first = scales.take([0], axis)
        scales = first if (scales == first).all() else scales
    return np.ascontiguousarray(scales, np.float32)


def _names(weight: str) -> tuple[str, str]:
    """Return the names of the integers and the scales of a weight."""
    return f"{weight}.integers", f"{weight}.scale"


def _packed(model: Model, integers: Integers, values: Mapping[str, Array]) -> Model:
    """Return a model with weights in integers, and other values of some other tensors."""
    proto = embedded(model)
    taken = model.names()
    clash = [name for weight in integers for name in _names(weight) if name in taken]
    if clash:
        raise UnsupportedError(f"the model has a tensor {clash[0]!r} already: its weights seem to be integers")
    first: list[NodeProto] = []
    tensors = list(proto.graph.initializer)
    del proto.graph.initializer[:]
    for tensor in tensors:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(values[tensor.name], np.float32), tensor.name))
        if tensor.name not in integers:
            proto.graph.initializer.append(tensor)
            continue
        numbers, scales = integers[tensor.name]
        stored, scale = _names(tensor.name)
        proto.graph.initializer.append(numpy_helper.from_array(numbers, stored))
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(scales, np.float32), scale))
        first.extend(_nodes(tensor.name, stored, scale))
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*first, *nodes])
    if any(tensor.data_type == _KINDS[min(BITS)] for tensor in proto.graph.initializer):
        proto.ir_version = max(proto.ir_version, IR)
    return valid(proto, model, "storing weights as integers")


def _nodes(weight: str, stored: str, scale: str) -> Iterator[NodeProto]:
    numbers = f"{stored}.cast"
    yield helper.make_node("Cast", [stored], [numbers], numbers, to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [numbers, scale], [weight], f"{weight}.mul")
