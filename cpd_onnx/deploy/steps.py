"""Deployment: the conversion of a model for its target.

Sizes are fixed, the operator set is converted, linear operators are multiplied into one where that saves work, weights
and activations become 8-bit integers or 16-bit floats, or weights alone are stored in few bits, inputs and outputs may
become integers as well, and the result is written in the format of onnxruntime. Each step turns a model into another
one; `deploy` runs the requested steps in that order, compares the outputs before and after each, and records the
difference. The conversions are those of onnx and onnxruntime; added here are the proof, reproducible bytes, and
one-line errors.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, version_converter

from cpd_onnx.data.sources import Source, calibration, inputs_of
from cpd_onnx.deploy import float16 as halves
from cpd_onnx.deploy import quantize as integers
from cpd_onnx.deploy.c_source import CSource, c_source
from cpd_onnx.deploy.compiled import CompiledModel, compiler
from cpd_onnx.deploy.converting import (
    Notify,
    embedded,
    first_line,
    ignore,
    keep_described,
    optimised,
    quantised_node,
    require_one_message,
    tensors_of,
    tidied,
    translate_tool_errors,
    valid,
)
from cpd_onnx.deploy.float16 import HALVES, to_half
from cpd_onnx.deploy.integer_io import integer_io, integer_io_again
from cpd_onnx.deploy.merged import MEASURES, Rounds, merged, merged_again
from cpd_onnx.deploy.profiles import Profile, problems
from cpd_onnx.deploy.quantize import Quantization, Ranges, extremes, quantize_recorded, samples_at_once
from cpd_onnx.deploy.weight_bits import WeightBits, in_few_bits, in_few_bits_again, samples_to_fit
from cpd_onnx.errors import DataError, ProofError, TargetError, UnsupportedError
from cpd_onnx.io.files import require_free, write_atomically
from cpd_onnx.io.progress import announce
from cpd_onnx.ir.interface import interface_of
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.proof.comparison import QUANTIZED, TOLERANCES, OutputDifference, compare, output_difference, runs_needed
from cpd_onnx.rewrite.absorbing import absorbed
from cpd_onnx.runtime.sessions import (
    Feed,
    Runner,
    execute,
    execute_all,
    open_model,
    precisely,
    provider_pairs,
    register_custom_operators,
    working_feeds,
)
from cpd_onnx.shapes.inference import fold

Sizes: TypeAlias = Mapping[str, "int | Sequence[int]"]
"""Shapes by the name of an input, or sizes by the name of a symbolic dimension."""

LEVELS = ("disable", "basic", "extended", "all")
"""Levels of onnxruntime's graph optimisation; "all" ties the file to the type of processor that it was written on."""

_COMPARED = 64
"""Number of samples that the models before and after a step are compared on, if there is data (heuristic)."""
_COMPARED_IN_C = 8
"""Number of samples that a program is compared on, as it uses one core and no vector units (heuristic)."""
_LARGEST_HALF = 65504.0
"""Largest finite float16 (IEEE 754)."""
HABITS = {"int8": ("apart", "at_border"), "fold": ("affine",)}
"""What steps do by default that earlier versions, which recorded nothing of it, did not."""
_LISTS = ("exclude", "keep_float", "float_nodes")
"""Options of the quantisation that are tuples, and lists in a manifest; older ones lack some."""
_ROUNDS = ("fix", "opset", "IR version", "fold", "merge", "integer-io")
"""Steps that change the outputs by rounding only."""
_WEIGHTS = "weights"
"""The step that stores weights in few bits, after which there is none that changes the model."""
FITTED = (_WEIGHTS,)
"""Steps with values that are fitted to samples, which cannot be computed again without these."""
_EXACT = ("integer-io",)
"""Those that do not change them at all."""


@dataclass(frozen=True)
class Deployment:
    """A request for deployment; steps that are not requested are skipped.

    Attributes:
        sizes: Shapes of inputs by name, or sizes of symbolic dimensions by name, to fix.
        batch: Batch size to fix; None leaves it dynamic.
        opset: Version of the default operator set to convert to; None does not convert.
        fold: Whether constants are computed and batch normalisation becomes part of convolutions.
        affine: Whether `fold` makes affine operators part of all linear ones, which earlier versions did not.
        merge: What a linear operator must save that takes the place of several, one of `MEASURES`; None merges none.
        merges: Linear runs to merge, as an earlier step recorded them; None chooses them.
        int8: Options of the quantisation; None does not quantise.
        integer_io: Whether a quantised model takes and gives integers where it would only quantise and dequantise.
        half: 16-bit float type to convert to, one of `HALVES`; None keeps float32.
        storage_only: Whether weights are stored in 16 bits and computed with in float32.
        keep_io: Whether inputs and outputs stay float32 if the computation is in 16-bit floats.
        weights: How weights are stored in few bits; None stores them in float32.
        profile: Profile of the target; its batch, opset and IR version apply where none is given here.

    """

    sizes: Sizes = field(default_factory=dict)
    batch: int | None = None
    opset: int | None = None
    fold: bool = False
    affine: bool = True
    merge: str | None = None
    merges: Rounds | None = None
    int8: Quantization | None = None
    integer_io: bool = False
    half: str | None = None
    storage_only: bool = False
    keep_io: bool = True
    weights: WeightBits | None = None
    profile: Profile | None = None

    def __post_init__(self) -> None:
        """Raise TargetError for values that are unknown or exclude each other."""
        if self.half is not None and self.half not in HALVES:
            raise TargetError(f"16-bit float type must be one of {', '.join(HALVES)}, got {self.half!r}")
        if self.merge is not None and self.merge not in MEASURES:
            raise TargetError(f"what merging saves must be one of {', '.join(MEASURES)}, got {self.merge!r}")
        if sum(each is not None for each in (self.int8, self.half, self.weights)) > 1:
            raise TargetError(
                "weights become 8-bit integers or 16-bit floats, or are stored in few bits, not both: choose one"
            )


@dataclass(frozen=True)
class Step:
    """The record of one step.

    Attributes:
        name: Name of the step.
        what: Description for the user.
        difference: Difference of the outputs from the model before it; None if onnxruntime cannot run that one.
        bytes: Size of the model after it.
        seconds: Duration without the comparison.
        notes: Messages for the user.
        options: Arguments with which `redo` repeats the step; None if it was skipped.

    """

    name: str
    what: str
    difference: OutputDifference | None
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Deployed:
    """A model converted for its target.

    Attributes:
        model: The converted model.
        steps: Records of the steps.
        problems: Reasons why the model does not fit the profile; empty if it does or there is no profile.

    """

    model: Model
    steps: tuple[Step, ...]
    problems: tuple[str, ...] = ()


# Sizes.


def fix_shapes(model: Model, sizes: Sizes) -> Model:
    """Return the model with dynamic sizes fixed, and all sizes that follow from them.

    Args:
        model: The model, which is not changed.
        sizes: Shapes by the name of an input, or sizes by the name of a symbolic dimension, wherever it occurs.

    Raises:
        TargetError: There is no such input or symbolic dimension, or the model fixes it to another size.
    """
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed, make_input_shape_fixed

    fixed = model.copy()
    for name, wanted in sizes.items():
        inputs = {entry.name: entry for entry in inputs_of(fixed.proto)}
        symbols = {size for entry in inputs.values() for size in entry.shape or () if isinstance(size, str)}
        shape = (wanted,) if isinstance(wanted, int) else tuple(wanted)
        if min(shape, default=0) < 1:
            raise TargetError(f"sizes of {name} must be at least 1, got {', '.join(map(str, shape))}")
        if name in inputs and not (len(shape) == 1 and name in symbols):
            _require_shape(str(inputs[name]), name, inputs[name].shape, shape)
            make_input_shape_fixed(fixed.graph, name, list(shape))
        elif name in symbols and len(shape) == 1:
            make_dim_param_fixed(fixed.graph, name, shape[0])
        else:
            known = [*map(repr, inputs), *map(repr, sorted(symbols))]
            raise TargetError(f"the model has no input or symbolic size {name!r}: it has {', '.join(known)}")
    return _sized(fixed)


def _require_shape(declared: str, name: str, now: tuple[int | str | None, ...] | None, shape: Sequence[int]) -> None:
    """Raise TargetError if an input cannot have a shape."""
    if now is None:
        raise TargetError(f"input {name!r} has neither shape nor rank: export the model with a shape")
    sizes: dict[int | str | None, int] = {}
    fits = len(now) == len(shape)
    for size, wanted in zip(now, shape, strict=False):
        fits = fits and (wanted == size if isinstance(size, int) else sizes.get(size, wanted) == wanted)
        if isinstance(size, str):
            sizes[size] = wanted
    if not fits:
        raise TargetError(f"input {name!r} is {declared}: it cannot become {list(shape)}")


def fix_batch(model: Model, batch: int) -> Model:
    """Return the model with the first axis of all inputs fixed where it is dynamic.

    Raises:
        TargetError: No first axis is dynamic, and none has that size.
    """
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    if batch < 1:
        raise TargetError(f"batch must be at least 1, got {batch}")
    inputs = [entry for entry in inputs_of(model.proto) if entry.shape]
    first = {entry.name: entry.shape[0] for entry in inputs if entry.shape}
    if all(isinstance(size, int) for size in first.values()):
        if batch not in first.values():
            sizes = ", ".join(map(str, first.values())) or "none"
            raise TargetError(
                f"the model has a fixed batch size ({sizes}), which cannot become {batch}: export it again"
            )
        return model
    fixed = model.copy()
    for symbol in {size for size in first.values() if isinstance(size, str)}:
        make_dim_param_fixed(fixed.graph, symbol, batch)
    for info in fixed.graph.input:
        if first.get(info.name, 0) is None:
            info.type.tensor_type.shape.dim[0].dim_value = batch
    return _sized(fixed)


def _sized(model: Model) -> Model:
    """Write the sizes that are now known into the model's outputs and value descriptions, in place."""
    values = fold(model).scope.values
    for info in (*model.graph.output, *model.graph.value_info):
        value = values.get(info.name)
        if value is None or value.shapes is None or value.extents is not None:
            continue
        dims = info.type.tensor_type.shape.dim
        if len(dims) != len(value.shapes[0]) or not info.type.HasField("tensor_type"):
            continue
        for dim, size in zip(dims, value.shapes[0], strict=True):
            if not dim.dim_value:
                dim.dim_value = size
    return model


def shaped(model: Model, request: Deployment) -> Model:
    """Return the model with the requested sizes, and the batch size of the profile if the batch is dynamic.

    Raises TargetError if the model does not have them.
    """
    return _shaped(model, request)[0]


def _shaped(model: Model, request: Deployment) -> tuple[Model, int | None]:
    """Return the result of `shaped` and the batch size that was fixed."""
    if request.sizes:
        model = fix_shapes(model, request.sizes)
    batch = request.batch
    first = next((entry.shape[0] for entry in inputs_of(model.proto) if entry.shape), 1)
    if batch is None and request.profile is not None and not isinstance(first, int):
        batch = request.profile.batch
    return (model if batch is None else fix_batch(model, batch)), batch


# Versions.


def convert_opset(model: Model, opset: int) -> Model:
    """Return the model converted to another version of the default operator set, by onnx's version converter.

    Raises:
        UnsupportedError: The converter fails, or its result is not valid.
    """
    if opset == model.opset:
        return model
    require_one_message(model, "converted")
    with translate_tool_errors(f"onnx cannot convert opset {model.opset} to {opset}"):
        proto = version_converter.convert_version(embedded(model), opset)
    described = {info.name for info in model.graph.value_info}
    keep_described(proto, described)
    return valid(proto, model, f"the conversion to opset {opset}")


def lower_ir(model: Model, newest: int) -> Model:
    """Return the model with an older IR version.

    Raises:
        UnsupportedError: Its operator sets or its functions need a newer one.
    """
    if model.proto.ir_version <= newest:
        return model
    needed = helper.find_min_ir_version_for(list(model.proto.opset_import), ignore_unknown=True)
    needed = max(needed, 8 if model.proto.functions else 4)
    needed = max(needed, 10 if any(function.overload for function in model.proto.functions) else 4)
    if needed > newest:
        raise UnsupportedError(f"the model needs IR version {needed}, which cannot become {newest}: lower its opset")
    lower = model.copy()
    lower.proto.ir_version = newest
    return lower


def fold_constants(model: Model, *, affine: bool = True) -> Model:
    """Return the model with all constants computed, and batch normalisation as part of linear operators.

    onnxruntime computes constants and does that for convolutions; `affine` says whether what scales and shifts the
    channels of other linear operators becomes part of these too. What depends on sizes only is a constant once these
    are fixed, such as the pads of a convolution that an exporter computes. Names of the remaining nodes and of inputs
    and outputs stay.

    Raises:
        UnsupportedError: onnxruntime cannot load the model, or its result is not valid.
    """
    require_one_message(model, "folded")
    folded = _folded(model)
    once_more = absorbed(folded) if affine else folded
    return folded if once_more is folded else _folded(once_more)  # a MatMul may now be one operator with its addition


def _folded(model: Model) -> Model:
    """Return what onnxruntime folds."""
    with tempfile.TemporaryDirectory(prefix="cpd-onnx.") as folder:
        proto = optimised(model, Path(folder) / "folded.onnx", "onnxruntime cannot fold constants")
    _order_as(model, proto)
    return valid(tidied(proto, model.proto), model, "folding constants")


def _order_as(model: Model, proto: ModelProto) -> None:
    """Sort nodes as in the original where it has their outputs, and new ones after what they read.

    The order decides how long tensors occupy memory in a program.
    """
    place = {name: float(number) for number, node in enumerate(model.graph.node) for name in node.output if name}
    nodes = list(proto.graph.node)
    for node in nodes:
        latest = max((place.get(name, -1.0) for name in node.input), default=-1.0)
        for name in node.output:
            place.setdefault(name, latest)
    del proto.graph.node[:]
    proto.graph.node.extend(sorted(nodes, key=lambda node: max((place[name] for name in node.output), default=0.0)))


# The format of onnxruntime.


def save_ort(
    model: Model,
    path: Path,
    *,
    overwrite: bool = False,
    level: str = "extended",
    provider: str = "CPUExecutionProvider",
) -> int:
    """Write a model atomically in the .ort format of onnxruntime, and prove that it computes the same.

    onnxruntime lists the operator sets in an order that differs between processes, so that about a hundred bytes at the
    start of the file are not reproducible.

    Args:
        model: The model.
        path: Path of the file.
        overwrite: Whether an existing file may be replaced.
        level: Level of graph optimisation, one of `LEVELS`.
        provider: Execution provider for which the graph is optimised.

    Returns:
        Size of the file in bytes.

    Raises:
        UnsupportedError: onnxruntime cannot load the model, or has no such provider.
        ModelError: The file exists or cannot be written.
        ProofError: The file does not compute the same as the model.
    """
    require_free(path, overwrite=overwrite)
    content = ort_bytes(model, level, provider)
    write_atomically(path, content)
    return len(content)


def ort_bytes(model: Model, level: str = "extended", provider: str = "CPUExecutionProvider") -> bytes:
    """Return a model in the .ort format; arguments and errors are those of `save_ort`."""
    return ort_measured(model, level, provider)[0]


def ort_measured(
    model: Model, level: str = "extended", provider: str = "CPUExecutionProvider"
) -> tuple[bytes, OutputDifference]:
    """Return the result of `ort_bytes`, and the difference of its outputs from the model's."""
    if level not in LEVELS:
        raise TargetError(f"optimisation level must be one of {', '.join(LEVELS)}, got {level!r}")
    require_one_message(model, "written as .ort")
    open_model(model, provider=provider)  # raises a one-line error for a model that cannot be loaded
    with tempfile.TemporaryDirectory(prefix="cpd-onnx.") as folder:
        path, pairs = Path(folder) / "model.ort", provider_pairs(provider)
        precisely(
            partial(_writing_options, path, level),
            lambda options: ort.InferenceSession(model.serialize(), options, providers=pairs),
        )
        return path.read_bytes(), ort_difference(model, path, _random_feeds(model))


def _writing_options(path: Path, level: str) -> ort.SessionOptions:
    """Return the options of a session that writes the optimised model to a path in the .ort format."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    register_custom_operators(options)
    options.graph_optimization_level = getattr(
        ort.GraphOptimizationLevel, "ORT_DISABLE_ALL" if level == "disable" else f"ORT_ENABLE_{level.upper()}"
    )
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.optimized_model_filepath = str(path)
    return options


def ort_difference(model: Model, path: Path, feeds: Sequence[Feed]) -> OutputDifference:
    """Return the difference between an .ort file and its model; raises ProofError if it exceeds that of rounding."""
    first, second = open_model(model), open_model(path)
    found = output_difference(execute_all(first, feeds), execute_all(second, feeds))
    return replace(found, allowed=_judged(first, second, feeds, _tolerance(model), "the .ort file"))


# C source.


def c_measured(model: Model, name: str, source: Source | None = None) -> tuple[CSource, OutputDifference | None]:
    """Return the C source of a model, and the difference of its outputs; None if there is no C compiler.

    Raises:
        TargetError, UnsupportedError: As `c_source`, or the compiler rejects the source.
        ProofError: The program does not compute the same as the model.
    """
    written = c_source(model, name)
    return written, c_difference(model, written, feeds_for("c", model, model, source))


def c_difference(model: Model, source: CSource, feeds: Sequence[Feed]) -> OutputDifference | None:
    """Return the difference between a program and its model; None if there is no C compiler.

    Raises ProofError if it exceeds that of rounding.
    """
    if not compiler():
        return None
    with tempfile.TemporaryDirectory(prefix="cpd-onnx.") as folder:
        single = [one for feed in feeds for one in _samples(feed, source)][:_COMPARED_IN_C]
        # Without optimisation, the 8-bit products of some processors saturate, see `precisely`.
        first = open_model(model, optimise=quantised_node(model) is not None)
        expected = execute_all(first, single)  # before the program runs: it checks indices, which that does not
        second = CompiledModel(source, Path(folder))
        found = output_difference(expected, execute_all(second, single))
        allowed = _judged(first, second, single, _tolerance(model), "the C source")
    return replace(found, allowed=allowed)


def _samples(feed: Feed, source: CSource) -> Iterator[Feed]:
    """Yield the inputs of a program from those of several samples, which calibration may have put together."""
    size = {port.name: port.shape[0] if port.shape else 1 for port in source.inputs}
    count = min((len(array) // size[name] for name, array in feed.items() if array.ndim), default=1)
    for place in range(count):
        yield {name: a[place * size[name] : (place + 1) * size[name]] if a.ndim else a for name, a in feed.items()}


# Steps.


def deploy(model: Model, request: Deployment, source: Source | None = None, observer: Notify | None = None) -> Deployed:
    """Run the requested steps, and compare the model after each step with the one before it.

    Args:
        model: The model, which is not changed.
        request: The requested steps and their options.
        source: Samples for calibration and comparison; without them, models are compared on random inputs.
        observer: Called with the name of each step as it starts.

    Raises:
        TargetError, UnsupportedError: A step cannot be done; there is no partial result.
        DataError: Quantisation was requested without data, or the data does not fit the model.
        ProofError: A step that may change the outputs by rounding only changes them by more.
    """
    if source is None and (request.int8 is not None or request.weights is not None):
        raise DataError("quantisation needs calibration samples: give data")
    observer = observer or ignore
    done: list[Step] = []
    feeds: list[Feed] = []
    planned = list(_planned(model, request, source))
    announce(*(todo.name for todo in planned))
    for todo in planned:
        name = todo.name
        observer(name)
        notes: list[str] = []
        started = time.perf_counter()
        after, options = todo.function(model, notes.append)
        seconds = time.perf_counter() - started
        difference = None
        if after is not model:
            feeds = feeds or feeds_for(name, model, after, source)
            difference = compared(model, after, feeds, name, notes.append)
            if name == "half" and not _is_storage_only(request):
                notes += _overflow(model, feeds)
        if after is not model or notes:
            recorded = options if after is not model else None
            done.append(Step(name, todo.what, difference, after.size_bytes(), seconds, tuple(notes), recorded))
        model = after
    remaining = problems(model, request.profile) if request.profile is not None else []
    return Deployed(model, tuple(done), tuple(remaining))


@dataclass(frozen=True)
class _Todo:
    """A requested step; its function returns the new model and the arguments with which `redo` repeats the step."""

    name: str
    what: str
    function: Callable[[Model, Notify], tuple[Model, Mapping[str, Any]]]


def _planned(model: Model, request: Deployment, source: Source | None) -> Iterator[_Todo]:
    """Yield the requested steps in order."""
    if request.sizes or request.batch is not None or request.profile is not None:
        fixed, batch = _shaped(model, request)
        sizes = {name: size if isinstance(size, int) else list(size) for name, size in request.sizes.items()}
        what = ", ".join(f"{entry.name} {entry}" for entry in inputs_of(fixed.proto))
        yield _Todo("fix", what, lambda *_: (fixed, {"sizes": sizes, "batch": batch}))
    yield from _versions(model, request)
    if request.fold:
        yield _Todo(
            "fold",
            "constants, batch normalisation",
            lambda now, _: (fold_constants(now, affine=request.affine), {"affine": request.affine}),
        )
    if request.merge is not None:
        yield _merging(request.merge, request.merges)
    if request.int8 is not None and source is not None:
        data, how = source, request.int8
        what = f"{how.calibration}, {how.samples} samples, {'a scale each channel' if how.per_channel else 'one scale'}"
        what += "" if how.form == "qdq" else ", integer operators"
        yield _Todo("int8", what, lambda now, notify: _quantised(now, data, how, notify))
    if request.integer_io:
        yield _Todo("integer-io", "integers as inputs and outputs", integer_io)
    if request.half is not None:
        kind, options = request.half, {"keep_io": request.keep_io, "storage_only": request.storage_only}
        what = f"{kind}, storage only" if _is_storage_only(request) else kind
        yield _Todo(
            "half", what, lambda now, notify: (to_half(now, kind, notify=notify, **options), {"kind": kind} | options)
        )
    if request.weights is not None and source is not None:
        given, bits = source, request.weights
        count = min(samples_to_fit(model, source, bits), source.count or bits.samples)
        what = f"stored in {bits.bits} bits, fitted to {count} samples"
        yield _Todo(_WEIGHTS, what, lambda now, notify: in_few_bits(now, given, bits, notify))


def _merging(measure: str, recorded: Rounds | None) -> _Todo:
    """Return the step that merges linear operators, those that are recorded if there is a record."""

    def merge(now: Model, notify: Notify) -> tuple[Model, Mapping[str, Any]]:
        if recorded is None:
            return merged(now, measure, notify)
        options = {"measure": measure, "rounds": recorded}
        return redo(now, "merge", options), options

    return _Todo("merge", f"linear operators, by {measure}", merge)


def _quantised(model: Model, source: Source, options: Quantization, notify: Notify) -> tuple[Model, Mapping[str, Any]]:
    """Return the quantised model, and its options and ranges, with which `redo` needs no samples."""
    quantised, ranges = quantize_recorded(model, source, options, notify)
    plain = asdict(options) | {name: list(getattr(options, name)) for name in _LISTS}
    return quantised, {"quantization": plain, "ranges": dict(ranges)}


def _versions(model: Model, request: Deployment) -> Iterator[_Todo]:
    """Yield the conversions of the operator set and of the IR version."""
    needed, why = _opset_needed(request)
    newest = request.profile.opset if request.profile is not None else None
    if request.opset is not None:
        yield _converted(f"{model.opset} -> {request.opset}", request.opset, convert_opset)
    elif model.opset < needed:
        yield _converted(f"{model.opset} -> {needed}: {why}", needed, convert_opset)
    elif newest is not None and newest < model.opset:
        yield _converted(f"{model.opset} -> {newest}", newest, convert_opset, is_must=False)
    if request.profile is not None and request.profile.ir is not None and request.profile.ir < model.proto.ir_version:
        what = f"{model.proto.ir_version} -> {request.profile.ir}"
        yield _converted(what, request.profile.ir, lower_ir, name="IR version", is_must=False)


def _opset_needed(request: Deployment) -> tuple[int, str]:
    """Return the first opset in which the requested number formats can be written, and why."""
    if request.int8 is not None:
        return integers.OPSET, "per-channel scales need it"
    if request.weights is not None:
        return request.weights.opset, "4-bit integers need it"
    return (halves.OPSET if request.half == "bfloat16" else 0), "Cast to bfloat16 needs it"


def _converted(
    what: str, version: int, function: Callable[[Model, int], Model], *, name: str = "opset", is_must: bool = True
) -> _Todo:
    """Return a conversion; unless it is a must, it is skipped if it fails, and remains a problem of the profile."""

    def convert(now: Model, notify: Notify) -> tuple[Model, Mapping[str, Any]]:
        after = function(now, version) if is_must else _attempted(function, now, version, notify)
        return after, {"version": version}

    return _Todo(name, what, convert)


def redo(model: Model, name: str, options: Mapping[str, Any], written: Model | None = None) -> Model:
    """Repeat a step of `deploy` from its name and recorded options, and return the new model.

    Args:
        model: The model before the step.
        name: Name of the step.
        options: Its recorded options.
        written: The model after the last step, from which a step in `FITTED` takes what it fitted to samples.

    Raises:
        TargetError: There is no such step, or the options are not those of the step.
        UnsupportedError: The step cannot be done with this model.
    """
    if name not in _AGAIN:
        raise TargetError(f"a step that can be repeated must be one of {', '.join(_AGAIN)}, got {name!r}")
    more = {"written": written} if name in FITTED else {}
    try:
        return _AGAIN[name](model, **more, **options)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TargetError(f"the recorded options of the step {name!r} are not valid: {first_line(error)}") from error


def _fix_again(model: Model, sizes: Sizes, batch: int | None) -> Model:
    return shaped(model, Deployment(sizes=sizes, batch=batch))


def _int8_again(model: Model, quantization: Mapping[str, Any], ranges: Ranges) -> Model:
    lists = {name: tuple(quantization.get(name, ())) for name in _LISTS}
    first = dict.fromkeys(HABITS["int8"], False)  # in versions that recorded nothing of it
    return quantize_recorded(model, ranges, Quantization(**{**first, **quantization, **lists}))[0]


def _half_again(model: Model, kind: str, *, keep_io: bool, storage_only: bool) -> Model:
    return to_half(model, kind, keep_io=keep_io, storage_only=storage_only)


_AGAIN: dict[str, Callable[..., Model]] = {
    "fix": _fix_again,
    "opset": lambda model, version: convert_opset(model, version),
    "IR version": lambda model, version: lower_ir(model, version),
    "fold": lambda model, affine=False: fold_constants(model, affine=affine),  # versions that record nothing did not
    "merge": merged_again,
    "int8": _int8_again,
    "integer-io": integer_io_again,
    "half": _half_again,
    _WEIGHTS: in_few_bits_again,
}
"""Functions that repeat the steps, by their names."""


def _attempted(function: Callable[[Model, int], Model], model: Model, version: int, notify: Notify) -> Model:
    """Return the converted model, or the unchanged one, with a message, if the conversion is not supported."""
    try:
        return function(model, version)
    except UnsupportedError as error:
        notify(f"skipped: {error}")
        return model


def _is_storage_only(request: Deployment) -> bool:
    """Return whether 16-bit floats are only stored."""
    return request.storage_only or request.half == "bfloat16"


# Comparing.


def feeds_for(name: str, model: Model, after: Model, source: Source | None) -> list[Feed]:
    """Return inputs to compare a step on: samples, or random inputs that the model before or after it accepts.

    They are real numbers where integers of the model stand for these.
    """
    first = after if name == "fix" else model
    if source is not None:
        return _real(first, calibration(first, source, _COMPARED, batch=samples_at_once(source)))
    try:
        return _random_feeds(first)
    except UnsupportedError:
        return _random_feeds(after)


def _real(model: Model, feeds: Iterable[Feed]) -> list[Feed]:
    """Return inputs of a model as the real numbers that they stand for, which models with other integers take too."""
    interface = interface_of(model)
    return [{name: interface.real(name, array) for name, array in feed.items()} for feed in feeds]


def _random_feeds(model: Model) -> list[Feed]:
    session = open_model(model, optimise=False)
    try:
        return _real(model, working_feeds(fold(model), session, runs_needed(_tolerance(model))))
    except UnsupportedError as error:
        raise UnsupportedError(error.problem, "give data, or fix sizes that the model accepts") from error


def _tolerance(model: Model) -> float:
    """Return the difference that rounding may cause, by the number formats in the model."""
    if quantised_node(model) is not None:
        return QUANTIZED
    kinds = {tensor.data_type for tensor in tensors_of(model.proto)}
    if TensorProto.BFLOAT16 in kinds:
        return TOLERANCES["bfloat16"]
    return TOLERANCES["float16" if TensorProto.FLOAT16 in kinds else "float32"]


def compared(before: Model, after: Model, feeds: Sequence[Feed], name: str, notify: Notify) -> OutputDifference | None:
    """Return the difference between two models; None, with a message, if onnxruntime runs the second one only.

    Raises UnsupportedError if it runs neither, and ProofError if it runs the first one only.
    """
    is_judged = name in _ROUNDS
    first, plain, reason = _run(before, feeds, optimise=not is_judged)
    second, found, failure = _run(after, feeds, optimise=not is_judged)
    if failure is not None and reason is not None:
        raise UnsupportedError(f"the model runs neither before nor after the step {name!r}: {failure}") from failure
    if failure is not None:
        raise ProofError(f"the model runs before the step {name!r} but not after it: {failure}") from failure
    if first is None or second is None:
        notify(f"not compared with the model before it: {reason}")
        return None
    difference = output_difference(plain, found)
    if not is_judged:
        return difference
    if name in _EXACT and difference.largest != 0:
        raise ProofError(f"the step {name!r} changes the outputs by {difference.largest:.2g}; nothing is written")
    return replace(difference, allowed=_judged(first, second, feeds, _tolerance(before), f"the step {name!r}"))


def _overflow(model: Model, feeds: Sequence[Feed]) -> Iterator[str]:
    """Yield what the comparison cannot show, since onnxruntime computes most of float16 in float32 on the CPU."""
    yield "the processor computes most of float16 in float32: the difference is that of the weights, a GPU's is larger"
    try:
        beyond = sorted(name for name, most in extremes(model, feeds).items() if not most <= _LARGEST_HALF)
    except UnsupportedError as error:
        yield f"whether tensors exceed what float16 holds was not seen: {error}"
        return
    if beyond:
        count = len(beyond)
        yield f"{count} tensors exceed {_LARGEST_HALF:g}, the largest float16, like {beyond[0]!r}: infinite on a GPU"


def _run(
    model: Model, feeds: Sequence[Feed], *, optimise: bool
) -> tuple[Runner | None, list[list[Array]], UnsupportedError | None]:
    """Return a session and its outputs, or the reason why onnxruntime cannot run the model."""
    try:
        session = open_model(model, optimise=optimise)
        return session, [execute(session, _cast(model, feed)) for feed in feeds], None
    except UnsupportedError as error:
        return None, [], error


def _judged(first: Runner, second: Runner, feeds: Sequence[Feed], tolerance: float, what: str) -> float:
    """Return the allowed difference between two models that must compute the same; raises ProofError if exceeded."""
    found = compare(execute_all(first, feeds), first, second, feeds, tolerance)
    if not found.passed:
        raise ProofError(
            f"{what} changes the outputs by {found.difference:.2g}, allowed is {found.allowed:.0e}; nothing is written"
        )
    return found.allowed


def _cast(model: Model, feed: Feed) -> Feed:
    """Return the inputs in the float types of the model."""
    kinds = {entry.name: entry.sampled_as for entry in inputs_of(model.proto)}
    return {name: array.astype(kinds[name], copy=False) for name, array in feed.items()}
