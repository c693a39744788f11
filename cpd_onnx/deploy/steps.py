"""Deploy: what happens to a model between the pruner and the target.

Sizes are fixed, the operator set is converted, weights and activations become 8-bit integers or 16-bit floats, and the
result is written in the format of onnxruntime. Each step takes a model and gives another one; `deploy` does what is
asked for in that order, runs the model after each step beside the one before it, and puts the difference on record. The
steps are those of onnx and onnxruntime; what is added here is the proof, the same bytes each time, and one line for
what cannot be done.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import onnxruntime as ort
from onnx import TensorProto, helper, version_converter

from cpd_onnx.data.sources import Source, calibration, inputs_of
from cpd_onnx.deploy import float16 as halves
from cpd_onnx.deploy import quantize as integers
from cpd_onnx.deploy.converting import (
    Notify,
    first_line,
    ignore,
    keep_described,
    quantised_node,
    require_one_message,
    tensors_of,
    translate_tool_errors,
    valid,
)
from cpd_onnx.deploy.float16 import HALVES, to_half
from cpd_onnx.deploy.profiles import Profile, problems
from cpd_onnx.deploy.quantize import Quantization, Ranges, extremes, quantize_recorded, samples_at_once
from cpd_onnx.errors import DataError, ProofError, TargetError, UnsupportedError
from cpd_onnx.io.files import require_free, write_atomically
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.proof.comparison import QUANTIZED, TOLERANCES, Difference, compare, output_difference, runs_needed
from cpd_onnx.runtime.sessions import Feed, Runner, execute, execute_all, open_model, precisely, working_feeds
from cpd_onnx.shapes.inference import fold

Sizes: TypeAlias = Mapping[str, "int | Sequence[int]"]
"""Shapes by the name of an input, or sizes by the name of a symbolic one."""

LEVELS = ("disable", "basic", "extended", "all")
"""How far onnxruntime optimises what it writes; "all" ties the file to the kind of processor that it is made on."""

_CPU = "CPUExecutionProvider"
_COMPARED = 64
"""Samples that the models before and after a step are compared on, where there is data."""
_LARGEST_HALF = 65504.0
_ROUNDS = ("fix", "opset", "IR version")
"""Steps that change nothing but the order of roundings."""


@dataclass(frozen=True)
class Deployment:
    """What is asked for; steps that are not are left out.

    Attributes:
        sizes: shapes of inputs by name, or sizes by the name of a symbolic one, that are fixed.
        batch: samples at a time that are fixed.
        opset: version of the default operator set to convert to.
        int8: how to quantise; None does not.
        half: one of `HALVES`; None keeps float32.
        storage_only: whether half floats are only stored, and computed with in float32.
        keep_io: whether inputs and outputs stay float32 where half floats are computed with.
        profile: of the target, whose batch, opset and IR version are taken where none is given here.

    """

    sizes: Sizes = field(default_factory=dict)
    batch: int | None = None
    opset: int | None = None
    int8: Quantization | None = None
    half: str | None = None
    storage_only: bool = False
    keep_io: bool = True
    profile: Profile | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.half is not None and self.half not in HALVES:
            raise TargetError(f"no half float is called {self.half!r}: choose {', '.join(HALVES)}")
        if self.int8 is not None and self.half is not None:
            raise TargetError("weights become 8-bit integers or 16-bit floats, not both: choose one")


@dataclass(frozen=True)
class Step:
    """What one step did.

    Attributes:
        name: of the step.
        what: it did, in words.
        difference: from the model before it; None where onnxruntime does not run that one.
        bytes: of the model after it.
        seconds: that it took, the comparison left out.
        notes: what else should be known.
        options: what `redo` takes to do the step again; None where it was left out.

    """

    name: str
    what: str
    difference: Difference | None
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Deployed:
    """A model that is ready for its target.

    Attributes:
        model: it.
        steps: what was done.
        problems: what the profile still objects to; nothing if there is none.

    """

    model: Model
    steps: tuple[Step, ...]
    problems: tuple[str, ...] = ()


# Sizes.


def fix_shapes(model: Model, sizes: Sizes) -> Model:
    """Fix sizes that the model leaves open, and what follows of them.

    Args:
        model: it is not changed.
        sizes: a shape by the name of an input, or a size by the name of a symbolic one, which counts wherever that
            stands.

    Raises:
        TargetError: there is no such input or size, or the model fixes it to something else.
    """
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed, make_input_shape_fixed

    fixed = model.copy()
    for name, wanted in sizes.items():
        inputs = {entry.name: entry for entry in inputs_of(fixed.proto)}
        symbols = {size for entry in inputs.values() for size in entry.shape or () if isinstance(size, str)}
        shape = (wanted,) if isinstance(wanted, int) else tuple(wanted)
        if min(shape, default=0) < 1:
            raise TargetError(f"{name} cannot have size {', '.join(map(str, shape))}: give sizes from 1 on")
        if name in inputs and not (len(shape) == 1 and name in symbols):
            _require_shape(str(inputs[name]), name, inputs[name].shape, shape)
            make_input_shape_fixed(fixed.graph, name, list(shape))
        elif name in symbols and len(shape) == 1:
            make_dim_param_fixed(fixed.graph, name, shape[0])
        else:
            known = [*map(repr, inputs), *map(repr, sorted(symbols))]
            raise TargetError(f"the model has no input or open size {name!r}: it has {', '.join(known)}")
    return _sized(fixed)


def _require_shape(said: str, name: str, now: tuple[int | str | None, ...] | None, shape: Sequence[int]) -> None:
    """Raise TargetError where an input cannot have a shape."""
    if now is None:
        raise TargetError(f"input {name!r} has no shape, not even a rank: export the model with one")
    sizes: dict[int | str | None, int] = {}
    fits = len(now) == len(shape)
    for size, wanted in zip(now, shape, strict=False):
        fits = fits and (wanted == size if isinstance(size, int) else sizes.get(size, wanted) == wanted)
        if isinstance(size, str):
            sizes[size] = wanted
    if not fits:
        raise TargetError(f"input {name!r} is {said}: it cannot become {list(shape)}")


def fix_batch(model: Model, batch: int) -> Model:
    """Fix the first axis of all inputs that leave it open.

    Raises:
        TargetError: there is none, and no input has that many samples.
    """
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    if batch < 1:
        raise TargetError(f"a batch of {batch} makes no sense: give 1 or more")
    inputs = [entry for entry in inputs_of(model.proto) if entry.shape]
    first = {entry.name: entry.shape[0] for entry in inputs if entry.shape}
    if all(isinstance(size, int) for size in first.values()):
        if batch not in first.values():
            said = ", ".join(map(str, first.values())) or "no"
            raise TargetError(f"the model takes {said} samples at a time, which cannot become {batch}: export it again")
        return model
    fixed = model.copy()
    for symbol in {size for size in first.values() if isinstance(size, str)}:
        make_dim_param_fixed(fixed.graph, symbol, batch)
    for info in fixed.graph.input:
        if first.get(info.name, 0) is None:
            info.type.tensor_type.shape.dim[0].dim_value = batch
    return _sized(fixed)


def _sized(model: Model) -> Model:
    """The model with those sizes written into its outputs and described tensors that are now known; in place."""
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


def shaped(model: Model, wish: Deployment) -> Model:
    """The model with the sizes that are asked for, or that the profile asks for where they are open.

    Raises TargetError where the model does not have them.
    """
    return _shaped(model, wish)[0]


def _shaped(model: Model, wish: Deployment) -> tuple[Model, int | None]:
    """The same, and the batch that was fixed."""
    if wish.sizes:
        model = fix_shapes(model, wish.sizes)
    batch = wish.batch
    first = next((entry.shape[0] for entry in inputs_of(model.proto) if entry.shape), 1)
    if batch is None and wish.profile is not None and not isinstance(first, int):
        batch = wish.profile.batch
    return (model if batch is None else fix_batch(model, batch)), batch


# Versions.


def convert_opset(model: Model, opset: int) -> Model:
    """Convert to another version of the default operator set, with onnx's version converter.

    Raises:
        UnsupportedError: it cannot convert the model, or what it makes is not valid.
    """
    if opset == model.opset:
        return model
    require_one_message(model, "converted")
    with translate_tool_errors(f"onnx cannot convert opset {model.opset} to {opset}"):
        proto = version_converter.convert_version(model.complete_proto(), opset)
    described = {info.name for info in model.graph.value_info}
    keep_described(proto, described)
    return valid(proto, model, f"the conversion to opset {opset}")


def lower_ir(model: Model, newest: int) -> Model:
    """The same model with an older IR version, where nothing in it needs a newer one.

    Raises:
        UnsupportedError: its operator sets or its functions need a newer one.
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


# The format of onnxruntime.


def save_ort(
    model: Model,
    path: Path,
    *,
    overwrite: bool = False,
    level: str = "extended",
    provider: str = "CPUExecutionProvider",
) -> int:
    """Write a model in the .ort format of onnxruntime, whole or not at all, and prove that it computes the same.

    onnxruntime lists the operator sets in an order that changes from process to process: some hundred bytes at the
    start of the file are not the same each time.

    Args:
        model: in memory.
        path: where to.
        overwrite: whether a file that is there may go.
        level: one of `LEVELS`.
        provider: of onnxruntime, whose optimisations are written down.

    Returns:
        Bytes of the file.

    Raises:
        UnsupportedError: onnxruntime does not take the model, or has no such provider.
        ModelError: the file is there or cannot be written.
        ProofError: what was written computes something else.
    """
    require_free(path, overwrite=overwrite)
    content = ort_bytes(model, level, provider)
    write_atomically(path, content)
    return len(content)


def ort_bytes(model: Model, level: str = "extended", provider: str = "CPUExecutionProvider") -> bytes:
    """A model in the .ort format; arguments and errors are those of `save_ort`."""
    return ort_measured(model, level, provider)[0]


def ort_measured(
    model: Model, level: str = "extended", provider: str = "CPUExecutionProvider"
) -> tuple[bytes, Difference]:
    """The same, and how far the outputs are from the model's."""
    if level not in LEVELS:
        raise TargetError(f"no level is called {level!r}: choose {', '.join(LEVELS)}")
    require_one_message(model, "written as .ort")
    open_model(model, provider=provider)  # says in one line what is wrong with it
    with tempfile.TemporaryDirectory(prefix="cpd-onnx.") as folder:
        place, providers = Path(folder) / "model.ort", list(dict.fromkeys([provider, _CPU]))
        precisely(
            partial(_writing, place, level),
            lambda options: ort.InferenceSession(model.serialize(), options, providers=providers),
        )
        content = place.read_bytes()
        return content, ort_difference(model, place, _random_feeds(model))


def _writing(place: Path, level: str) -> ort.SessionOptions:
    """Options of a session that writes what onnxruntime makes of a model."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(
        ort.GraphOptimizationLevel, "ORT_DISABLE_ALL" if level == "disable" else f"ORT_ENABLE_{level.upper()}"
    )
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.optimized_model_filepath = str(place)
    return options


def ort_difference(model: Model, place: Path, feeds: Sequence[Feed]) -> Difference:
    """How far an .ort file is from the model that it was made of; ProofError where that is more than rounding does."""
    first, second = open_model(model), open_model(place)
    found = output_difference(execute_all(first, feeds), execute_all(second, feeds))
    return replace(found, allowed=_judged(first, second, feeds, _tolerance(model), "the .ort file"))


# Steps.


def deploy(model: Model, wish: Deployment, source: Source | None = None, observer: Notify | None = None) -> Deployed:
    """Do what is asked for, and compare the model after each step with the one before it.

    Args:
        model: it is not changed.
        wish: what is asked for.
        source: samples for quantising and for the comparisons; random inputs are compared on without.
        observer: called with the name of each step as it starts.

    Raises:
        TargetError, UnsupportedError: a step cannot be done, and nothing of it is.
        DataError: quantising is asked for without data, or the data does not fit the model.
        ProofError: a step that should only round does more.
    """
    if wish.int8 is not None and source is None:
        raise DataError("quantising looks at samples: give data")
    observer = observer or ignore
    done: list[Step] = []
    feeds: list[Feed] = []
    for todo in _planned(model, wish, source):
        name = todo.name
        observer(name)
        notes: list[str] = []
        started = time.perf_counter()
        made, options = todo.function(model, notes.append)
        seconds = time.perf_counter() - started
        difference = None
        if made is not model:
            feeds = feeds or feeds_for(name, model, made, source)
            difference = compared(model, made, feeds, name, notes.append)
            if name == "half" and not _is_stored(wish):
                notes += _overflow(model, feeds)
        if made is not model or notes:
            recorded = options if made is not model else None
            done.append(Step(name, todo.what, difference, _size(made), seconds, tuple(notes), recorded))
        model = made
    left = problems(model, wish.profile) if wish.profile is not None else []
    return Deployed(model, tuple(done), tuple(left))


@dataclass(frozen=True)
class _Todo:
    """A step that is asked for; its function gives the model and what `redo` takes to do the same again."""

    name: str
    what: str
    function: Callable[[Model, Notify], tuple[Model, Mapping[str, Any]]]


def _planned(model: Model, wish: Deployment, source: Source | None) -> Iterator[_Todo]:
    """The steps that are asked for."""
    if wish.sizes or wish.batch is not None or wish.profile is not None:
        fixed, batch = _shaped(model, wish)
        sizes = {name: size if isinstance(size, int) else list(size) for name, size in wish.sizes.items()}
        what = ", ".join(f"{entry.name} {entry}" for entry in inputs_of(fixed.proto))
        yield _Todo("fix", what, lambda *_: (fixed, {"sizes": sizes, "batch": batch}))
    yield from _versions(model, wish)
    if wish.int8 is not None and source is not None:
        data, how = source, wish.int8
        what = f"{how.calibration}, {how.samples} samples, {'a scale each channel' if how.per_channel else 'one scale'}"
        yield _Todo("int8", what, lambda now, notify: _quantised(now, data, how, notify))
    if wish.half is not None:
        kind, options = wish.half, {"keep_io": wish.keep_io, "storage_only": wish.storage_only}
        what = f"{kind}, stored only" if _is_stored(wish) else kind
        yield _Todo(
            "half", what, lambda now, notify: (to_half(now, kind, notify=notify, **options), {"kind": kind} | options)
        )


def _quantised(model: Model, source: Source, options: Quantization, notify: Notify) -> tuple[Model, Mapping[str, Any]]:
    """The quantised model; on record are the options and the ranges that were seen, so that no samples are needed."""
    made, ranges = quantize_recorded(model, source, options, notify)
    plain = asdict(options) | {name: list(getattr(options, name)) for name in ("exclude", "keep_float")}
    return made, {"quantization": plain, "ranges": dict(ranges)}


def _versions(model: Model, wish: Deployment) -> Iterator[_Todo]:
    """Conversions of the operator set and of the IR version."""
    needed = integers.OPSET if wish.int8 is not None else halves.OPSET if wish.half == "bfloat16" else 0
    newest = wish.profile.opset if wish.profile is not None else None
    if wish.opset is not None:
        yield _converted(f"{model.opset} -> {wish.opset}", wish.opset, convert_opset)
    elif model.opset < needed:
        what = "scales for each channel need it" if wish.int8 is not None else "Cast takes bfloat16 from there on"
        yield _converted(f"{model.opset} -> {needed}: {what}", needed, convert_opset)
    elif newest is not None and newest < model.opset:
        yield _converted(f"{model.opset} -> {newest}", newest, convert_opset, is_must=False)
    if wish.profile is not None and wish.profile.ir is not None and wish.profile.ir < model.proto.ir_version:
        what = f"{model.proto.ir_version} -> {wish.profile.ir}"
        yield _converted(what, wish.profile.ir, lower_ir, name="IR version", is_must=False)


def _converted(
    what: str, version: int, function: Callable[[Model, int], Model], *, name: str = "opset", is_must: bool = True
) -> _Todo:
    """A conversion; one that a profile asks for is left out where it cannot be done: it stays a problem of that."""

    def convert(now: Model, notify: Notify) -> tuple[Model, Mapping[str, Any]]:
        made = function(now, version) if is_must else _attempted(function, now, version, notify)
        return made, {"version": version}

    return _Todo(name, what, convert)


def redo(model: Model, name: str, options: Mapping[str, Any]) -> Model:
    """Do a step of a `deploy` again, by its name and the options on record.

    Raises:
        TargetError: there is no such step, or the options are not those of it.
        UnsupportedError: it cannot be done with this model.
    """
    if name not in _AGAIN:
        raise TargetError(f"{name!r} is not a step that can be done again: {', '.join(_AGAIN)} are")
    try:
        return _AGAIN[name](model, **options)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TargetError(f"the step {name!r} does not take the options on record: {first_line(error)}") from error


def _fix_again(model: Model, sizes: Sizes, batch: int | None) -> Model:
    return shaped(model, Deployment(sizes=sizes, batch=batch))


def _int8_again(model: Model, quantization: Mapping[str, Any], ranges: Ranges) -> Model:
    lists = {name: tuple(quantization[name]) for name in ("exclude", "keep_float")}
    return quantize_recorded(model, ranges, Quantization(**{**quantization, **lists}))[0]


def _half_again(model: Model, kind: str, *, keep_io: bool, storage_only: bool) -> Model:
    return to_half(model, kind, keep_io=keep_io, storage_only=storage_only)


_AGAIN: dict[str, Callable[..., Model]] = {
    "fix": _fix_again,
    "opset": lambda model, version: convert_opset(model, version),
    "IR version": lambda model, version: lower_ir(model, version),
    "int8": _int8_again,
    "half": _half_again,
}
"""How the steps are done again."""


def _attempted(function: Callable[[Model, int], Model], model: Model, version: int, notify: Notify) -> Model:
    """What a profile asks for is left out where it cannot be done: it stays a problem of that profile."""
    try:
        return function(model, version)
    except UnsupportedError as error:
        notify(f"left out: {error}")
        return model


def _size(model: Model) -> int:
    """Bytes of the model in one file."""
    return model.data_bytes() + int(model.proto.ByteSize())


def _is_stored(wish: Deployment) -> bool:
    """Whether half floats are not computed with."""
    return wish.storage_only or wish.half == "bfloat16"


# Comparing.


def feeds_for(name: str, model: Model, after: Model, source: Source | None) -> list[Feed]:
    """Inputs to compare a step on: samples, or random ones that the model, or else what was made of it, accepts."""
    first = after if name == "fix" else model
    if source is not None:
        return list(calibration(first.proto, source, _COMPARED, batch=samples_at_once(source)))
    try:
        return _random_feeds(first)
    except UnsupportedError:
        return _random_feeds(after)


def _random_feeds(model: Model) -> list[Feed]:
    session = open_model(model, optimise=False)
    try:
        return list(working_feeds(fold(model), session, runs_needed(_tolerance(model))))
    except UnsupportedError as error:
        reason = str(error).partition("; give sizes")[0]
        raise UnsupportedError(f"{reason}; give data, or fix sizes that the model accepts") from error


def _tolerance(model: Model) -> float:
    """What a step that only rounds may change, by the number formats in the model."""
    if quantised_node(model) is not None:
        return QUANTIZED
    kinds = {tensor.data_type for tensor in tensors_of(model.proto)}
    if TensorProto.BFLOAT16 in kinds:
        return TOLERANCES["bfloat16"]
    return TOLERANCES["float16" if TensorProto.FLOAT16 in kinds else "float32"]


def compared(before: Model, after: Model, feeds: Sequence[Feed], name: str, notify: Notify) -> Difference | None:
    """How far two models are apart; None, and a note, where onnxruntime runs the second one only.

    Raises UnsupportedError if it does not run that either, ProofError if it runs the first one only.
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
    return replace(difference, allowed=_judged(first, second, feeds, _tolerance(before), f"the step {name!r}"))


def _overflow(model: Model, feeds: Sequence[Feed]) -> Iterator[str]:
    """What the comparison does not show, as onnxruntime computes most of float16 in float32 on the processor."""
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
    """A session and what it gives, or why there is none."""
    try:
        session = open_model(model, optimise=optimise)
        return session, [execute(session, _cast(model, feed)) for feed in feeds], None
    except UnsupportedError as error:
        return None, [], error


def _judged(first: Runner, second: Runner, feeds: Sequence[Feed], tolerance: float, what: str) -> float:
    """What is allowed between two models that should compute the same; ProofError where they are further apart."""
    found = compare(execute_all(first, feeds), first, second, feeds, tolerance)
    if not found.passed:
        raise ProofError(
            f"{what} changes the outputs by {found.difference:.2g}, allowed are {found.allowed:.0e}; nothing is written"
        )
    return found.allowed


def _cast(model: Model, feed: Feed) -> Feed:
    """Inputs in the float type that the model takes."""
    kinds = {entry.name: entry.dtype for entry in inputs_of(model.proto)}
    return {name: array.astype(kinds[name], copy=False) for name, array in feed.items()}
