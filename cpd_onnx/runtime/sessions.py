"""onnxruntime: sessions, inputs that a model accepts, latency."""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto

from cpd_onnx.errors import EndlessError, UnsupportedError
from cpd_onnx.ir.interface import Interface, interface_in, interface_of
from cpd_onnx.ir.model import Array, Model, element_type
from cpd_onnx.ops.sizes import Bindings, Size, Term
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.runtime import providers
from cpd_onnx.runtime.watch import ended_after
from cpd_onnx.shapes.realistic import judged_inputs
from cpd_onnx.shapes.values import Folded, Value

Feed: TypeAlias = dict[str, Array]
Assignment: TypeAlias = dict[Term, int]
"""Values of the symbols in the sizes of a model's inputs."""

RUN_SECONDS = 600.0
"""Time limit of one run in seconds (heuristic)."""

_libraries: list[Path] = []
"""Libraries of custom operators for new sessions, see `custom_operators`."""
_SOURCE_PLACE = re.compile(r"/\S*onnxruntime\S*\.(?:h|cc|cpp):\d+ (?:[^()]*\([^()]*\)(?: const)? )?")
"""File, line and function of its own source in a message of onnxruntime."""
_UNREGISTERED = "is not a registered function/op"
"""Part of onnxruntime's message about an operator that it does not know."""
_WAY_OUT = "; give the library of the operator with --custom-ops, or prune with --no-verify, without a proof"

_OTHER_SIZES = (512, 576, 256, 224, 128, 64, 640, 16000, 1)
"""Sizes of dynamic axes that models require, commonest first (from the models that this package was tested on)."""
_MOST_FED = 1 << 26
"""Maximum number of elements of an input for which another size is tried (heuristic)."""
_MOST_HELD = 1 << 26
"""Maximum number of elements of any tensor for which a size is tried (heuristic)."""


def sample_count(feed: Mapping[str, Array]) -> int:
    """Return the number of samples in a feed: the size of the first axis of its first input that has axes, else 1."""
    return next((len(array) for array in feed.values() if array.ndim), 1)


def open_model(
    model: Model | ModelProto | Path,
    *,
    optimise: bool = True,
    threads: int = 0,
    provider: str = providers.CPU,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """Return a session of onnxruntime.

    Args:
        model: The model, or the path of its file.
        optimise: Whether onnxruntime optimises the graph.
        threads: Number of intra-op threads; 0 means the default of onnxruntime.
        provider: Execution provider, with options if wanted, see `runtime.providers`.
        profile: Path prefix of a trace.

    Raises:
        UnsupportedError: onnxruntime rejects the model, has no such provider, or cannot start it.
    """
    pairs = provider_pairs(provider, threads)
    try:
        session = precisely(
            partial(_options, optimise, threads, profile), lambda options: _session(model, options, pairs)
        )
    except Exception as error:  # onnxruntime raises classes of its own that share no base but Exception
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        hint = _WAY_OUT if _UNREGISTERED in str(error) else ""
        raise UnsupportedError(f"onnxruntime cannot run the model: {_first_line(error)}{hint}") from error
    name = pairs[0][0]
    if name not in session.get_providers():  # onnxruntime silently falls back to the CPU
        raise UnsupportedError(f"onnxruntime cannot start provider {name!r}: are its libraries installed?")
    return session


def provider_pairs(provider: str, threads: int = 0) -> list[providers.Pair]:
    """Return a provider and its fallbacks as onnxruntime takes them.

    Raises UnsupportedError if onnxruntime has no such provider here, or the provider no such options.
    """
    available = ort.get_available_providers()
    try:
        pairs = providers.with_fallbacks(provider, threads, available)
    except ValueError as error:
        raise UnsupportedError(str(error)) from error
    if pairs[0][0] not in available:
        raise UnsupportedError(
            f"onnxruntime has no provider {pairs[0][0]!r} here: choose one of {', '.join(available)}"
        )
    return pairs


def precisely(
    options: Callable[[], ort.SessionOptions], make: Callable[[ort.SessionOptions], ort.InferenceSession]
) -> ort.InferenceSession:
    """Return a session in which 8-bit dot products do not saturate, also on x86 processors without VNNI.

    onnxruntime cannot widen the weights of every model for that; other models are opened without it.
    """
    raised = ort.capi.onnxruntime_pybind11_state
    precise = options()
    precise.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return make(precise)
    except (raised.Fail, raised.NotImplemented):
        return make(options())


@contextlib.contextmanager
def custom_operators(libraries: Sequence[Path]) -> Iterator[None]:
    """Give libraries of custom operators, which are loaded and run, to all sessions that are opened in the block."""
    before = list(_libraries)
    _libraries[:] = [*before, *(library for library in libraries if library not in before)]
    try:
        yield
    finally:
        _libraries[:] = before


def register_custom_operators(options: ort.SessionOptions) -> None:
    """Add the libraries of the enclosing `custom_operators` to the options of a session."""
    for library in _libraries:
        options.register_custom_ops_library(str(library))


def _options(optimise: bool, threads: int, profile: Path | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    # Otherwise, threads of one session would still be spinning while the next one is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    register_custom_operators(options)
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return options


def _session(
    model: Model | ModelProto | Path, options: ort.SessionOptions, pairs: list[providers.Pair]
) -> ort.InferenceSession:
    if isinstance(model, Path):
        return ort.InferenceSession(str(model), options, providers=pairs)
    if isinstance(model, ModelProto):
        return ort.InferenceSession(model.SerializeToString(), options, providers=pairs)
    if not model.is_over_limit:
        return ort.InferenceSession(model.serialize(), options, providers=pairs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.save(path)
        return ort.InferenceSession(str(path), options, providers=pairs)


def opened_interface(session: Any) -> Interface:
    """Return how the inputs and outputs of an open model differ from those of the original."""
    own: Interface | None = getattr(session, "interface", None)  # of a runner that is no session of onnxruntime
    if own is not None:
        return own
    metadata = getattr(session, "get_modelmeta", None)
    return Interface() if metadata is None else interface_in(metadata().custom_metadata_map)


class Runner(Protocol):
    """A session of onnxruntime, or an object with the same method."""

    def run(self, names: None, feed: Any, limits: Any = None, /) -> Sequence[Any]:
        """All outputs."""


def execute_all(session: Runner, feeds: Sequence[Mapping[str, Array]]) -> list[list[Array]]:
    """Return all outputs for each of several inputs."""
    at_once = getattr(session, "run_all", None)
    return at_once(feeds) if at_once is not None else [execute(session, feed) for feed in feeds]


def execute(session: Runner, feed: Mapping[str, Array]) -> list[Array]:
    """Return all outputs of one run, as the real numbers that they stand for.

    Inputs may have the original's sizes, and be the real numbers that the integers of a quantised model stand for.

    Raises UnsupportedError if the run fails, EndlessError if it takes longer than `RUN_SECONDS`.
    """
    interface = opened_interface(session)
    with ended_after(RUN_SECONDS) as limits:
        try:
            outputs = [_array(output) for output in session.run(None, interface.taken(feed), limits)]
        except Exception as error:  # as above, but for bound inputs
            is_bound = isinstance(session, Bound) and type(error) is RuntimeError
            if not is_bound and not type(error).__module__.startswith("onnxruntime"):
                raise
            if limits.terminate:
                raise EndlessError(f"a run of the model did not end within {RUN_SECONDS:g} s") from error
            raise UnsupportedError(f"onnxruntime failed to run the model: {_first_line(error)}") from error
    if not interface.integers or not outputs:
        return outputs
    names = [port.name for port in session.get_outputs()]  # type: ignore[attr-defined]  # it has metadata as well
    return [interface.real(name, output) for name, output in zip(names, outputs, strict=True)]


def _array(output: Any) -> Array:
    """Return an output as an array; tensors of a sequence whose shapes differ are filled up with zeros and stacked."""
    is_sequence = isinstance(output, list) and all(isinstance(each, np.ndarray) for each in output)
    if not is_sequence or len({each.shape for each in output}) < 2:
        return np.asarray(output)
    rank = max(each.ndim for each in output)
    arrays = [each.reshape((1,) * (rank - each.ndim) + each.shape) for each in output]
    most = [max(sizes) for sizes in zip(*(each.shape for each in arrays), strict=True)]
    return np.stack([np.pad(each, [(0, m - n) for m, n in zip(most, each.shape, strict=True)]) for each in arrays])


def _first_line(error: Exception) -> str:
    """Return what onnxruntime reports, without the place in its source, which would leave no room for the sizes."""
    return _SOURCE_PLACE.sub("", str(error).splitlines()[0])[:300]


def random_feed(folded: Folded, seed: int = 0, binding: int = 0) -> Feed:
    """Return random inputs at one binding of the symbolic sizes: normal floats, and indices within their tables."""
    rng = np.random.default_rng(seed)
    feed: Feed = {}
    for info in folded.model.graph.input:
        value = folded.scope.values.get(info.name)
        if value is None or value.weight is not None:
            continue
        if value.shapes is None:
            raise UnsupportedError(f"the shape of input {info.name!r} is not known: give it with --input-shape")
        feed[info.name] = random_array(folded, value, value.shapes[binding], rng)
    return feed


def symbols_of(folded: Folded) -> dict[Term, bool]:
    """Return the symbols in the sizes of the inputs, and whether each is a batch size."""
    found: dict[Term, bool] = {}
    for value in fed(folded):
        for axis, extent in enumerate(value.sizes or ()):
            for monomial in extent.coefficients if isinstance(extent, Size) else ():
                for term, _ in monomial:
                    found[term] = found.get(term, False) or axis == 0 or "batch" in str(term)
    return found


def fed(folded: Folded) -> Iterator[Value]:
    """Yield the inputs of a model without a default."""
    for info in folded.model.graph.input:
        value = folded.scope.values.get(info.name)
        if value is not None and value.weight is None:
            yield value


def is_feasible(folded: Folded, assignment: Assignment) -> bool:
    """Return whether a model can be run safely at some sizes: no tensor is empty or too large.

    onnxruntime terminates the process at a Reshape of an empty tensor, and attention over the pixels of a large image
    allocates terabytes.
    """
    bindings = Bindings({term: (n,) for term, n in assignment.items()})
    values = [v for scope in folded.scope.walk() for v in scope.values.values()]
    for extents in {v.extents for v in values if v.extents is not None}:
        sizes = [bindings.at(extent, 0) for extent in extents]
        known = [size for size in sizes if size is not None]
        if min(known, default=1) < 1 or math.prod(known) > _MOST_HELD:
            return False
    return True


def working_feeds(folded: Folded, session: Runner, count: int = 2) -> Iterator[Feed]:
    """Yield random inputs that the model accepts: if it fails at the usual sizes, others are tried.

    Raises UnsupportedError with the first error of onnxruntime if the model accepts none.
    """
    feed = random_feed(folded)
    try:
        execute(session, feed)
    except EndlessError:
        raise
    except UnsupportedError as first:
        for size in _OTHER_SIZES:
            shapes = {name: _resized(folded, name, array, size) for name, array in feed.items()}
            numbers = {term: folded.batch if is_batch else size for term, is_batch in symbols_of(folded).items()}
            if max(map(math.prod, shapes.values()), default=0) > _MOST_FED or not is_feasible(folded, numbers):
                continue
            feed = {name: np.resize(array, shapes[name]) for name, array in feed.items()}
            with contextlib.suppress(UnsupportedError):
                execute(session, feed)
                break
        else:
            raise UnsupportedError(str(first), "give sizes of the inputs that it accepts with --input-shape") from first
    rng = np.random.default_rng(1)
    for _ in range(count):
        yield feed
        feed = {name: _again(folded, name, array, rng) for name, array in feed.items()}


def judged_feed(folded: Folded, session: Runner) -> Feed:
    """Return random inputs of the sizes under which a model is judged, see `judged_inputs`.

    If the model fails at these, sizes that it accepts are tried. Raises UnsupportedError if it accepts none.
    """
    rng = np.random.default_rng(0)
    shapes = {entry["name"]: entry["shape"] for entry in judged_inputs(folded)}
    with contextlib.suppress(UnsupportedError):
        feed = {value.name: random_array(folded, value, shapes[value.name], rng) for value in fed(folded)}
        execute(session, feed)
        return feed
    return next(working_feeds(folded, session, 1))


def _resized(folded: Folded, name: str, array: Array, size: int) -> list[int]:
    """Return the shape of an input with its dynamic sizes, except the batch size, set to another size."""
    value = folded.scope.values[name]
    is_free = [not value.has_fixed(axis) and usual != folded.batch for axis, usual in enumerate(value.shape or ())]
    return [size if free else old for free, old in zip(is_free, array.shape, strict=True)]


def _again(folded: Folded, name: str, array: Array, rng: np.random.Generator) -> Array:
    return random_array(folded, folded.scope.values[name], array.shape, rng)


def random_array(folded: Folded, value: Value, shape: Sequence[int], rng: np.random.Generator) -> Array:
    """Return a random input: normal floats, indices within the table that they index, or True and False.

    Integers that stand for real numbers are uniform.

    In a mask, whichever of the two values hides, each row along the last axis keeps something; a single flag is True.

    Raises UnsupportedError for strings.
    """
    dtype, integers = element_type(value.dtype), interface_of(folded.model).integers
    if value.name in integers:
        each = integers[value.name]
        return rng.integers(each.low, each.high, shape, each.dtype, endpoint=True)
    if value.dtype == TensorProto.STRING:
        raise UnsupportedError(f"input {value.name!r} takes strings: give data")
    if value.dtype == TensorProto.BOOL:
        return _mask(shape, rng)
    if np.issubdtype(dtype, np.integer):
        limit = _index_limit(folded, value)
        return _mask(shape, rng).astype(dtype) if not limit else rng.integers(0, limit, shape).astype(dtype)
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def _mask(shape: Sequence[int], rng: np.random.Generator) -> Array:
    """Return random True and False, of which each row along the last axis has both; True for rows of one."""
    if not shape or shape[-1] < 2:
        return np.ones(shape, np.bool_)
    made = rng.random(shape) < 0.5
    made[..., 0], made[..., 1] = True, False
    return made


def _index_limit(folded: Folded, value: Value) -> int:
    """Return the exclusive upper bound of an input's indices; 0 if it is not an index, such as a mask.

    Where the indices themselves reach no table, integers that are computed from them may: exporters add the length of
    the table to negative ones. A mask that is counted along an axis gives positions, and stays a mask.
    """
    return _limit_behind(folded, value, is_computed=False) or _limit_behind(folded, value, is_computed=True)


def _limit_behind(folded: Folded, value: Value, *, is_computed: bool) -> int:
    waiting, visited, limit = [value.name], {value.name}, 0
    while waiting:
        name = waiting.pop()
        for use in folded.scope.consumers.get(name, []):
            node = use.scope.nodes[use.node]
            limit = _smaller(limit, _table_size(folded, node, name))
            if is_computed and node.op_type == "CumSum":
                return 0
            own = traits_of(node)
            is_carried = own.carries_indices and node.input[0] == name
            if is_carried or (is_computed and (own.moves_elements or own.is_additive or own.is_bilinear)):
                further = {o for o in node.output if o and _is_integer(folded.scope.lookup(o))} - visited
                waiting += sorted(further)
                visited |= further
    return limit


def equal_constants(folded: Folded, value: Value) -> list[int]:
    """Return the integers that the graph and its branches ask an input to equal, in order; not those of flags."""
    waiting, visited, found = [value.name], {value.name}, set[int]()
    while waiting:
        name = waiting.pop()
        for use in folded.scope.consumers.get(name, []):
            node = use.scope.nodes[use.node]
            if traits_of(node).is_equality:
                other = use.scope.lookup(node.input[1 - use.slot])
                if other is not None and other.value is not None and other.value.size == 1:
                    found.add(int(other.value.item()))
            if traits_of(node).carries_indices and node.input[0] == name:
                waiting += [output for output in node.output if output not in visited]
                visited.update(node.output)
    return sorted(found - {0, 1})


def _is_integer(value: Value | None) -> bool:
    return value is not None and value.dtype != 0 and np.issubdtype(element_type(value.dtype), np.integer)


def _smaller(limit: int, size: int) -> int:
    return min(limit, size) if limit and size else limit or size


def _table_size(folded: Folded, node: NodeProto, name: str) -> int:
    """Return the length of what an operator looks up by the indices in an input; 0 if it looks up nothing."""
    kind, others = node.op_type, [folded.scope.lookup(other) for other in node.input if other != name]
    if kind == "Gather" and node.input[1] == name:
        table = folded.scope.lookup(node.input[0])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        return table.shape[axis] if table is not None and table.shape else 0
    first = others[0].value if others and others[0] is not None else None
    if first is None or node.input[0] != name:
        return 0
    if kind == "OneHot":
        return int(first.flat[0]) if first.size else 0
    is_range = traits_of(node).compares and first.size > 1 and np.array_equal(first.ravel(), np.arange(first.size))
    return first.size if is_range else 0  # one-hot vectors are also made by comparing with all indices


def latency_ratio(
    models: Sequence[Model], feed: Mapping[str, Array], *, seconds: float = 4.0, threads: int = 0
) -> list[float]:
    """Return the median duration in seconds of a run of each model, measured in interleaved rounds."""
    sessions = [open_model(model, threads=threads) for model in models]
    return [float(np.median(taken)) for taken in interleaved(sessions, feed, seconds)]


@dataclass(frozen=True)
class Method:
    """How the runs of models are timed.

    Attributes:
        warmup: Number of runs of each model that are not timed, before the others.
        runs: Exact number of timed runs of each model; None means as many as a duration allows.
        io_binding: Whether inputs and outputs lie in the memory of the provider's device, so that no run copies them.
    """

    warmup: int = 3
    runs: int | None = None
    io_binding: bool = False


class Bound:
    """A session whose inputs and outputs lie in the memory of its provider's device; runs return nothing."""

    def __init__(self, session: ort.InferenceSession, feed: Mapping[str, Array]) -> None:
        """Copy the inputs to the device, and run once to learn the shapes of the outputs, which then keep their place.

        Raises UnsupportedError if onnxruntime cannot bind an input or an output.
        """
        name = session.get_providers()[0]
        device = providers.memory_of(name, session.get_provider_options().get(name, {}))
        self._session, self._binding = session, session.io_binding()
        fed = opened_interface(session).taken(feed)
        self._inputs = {name: self._bind(name, array, device) for name, array in fed.items()}
        names = [output.name for output in session.get_outputs()]
        for name in names:
            self._binding.bind_output(name, *device)
        execute(self, feed)
        self._outputs = dict(zip(names, self._binding.get_outputs(), strict=True))
        if all(value.is_tensor() for value in self._outputs.values()):
            self._binding.clear_binding_outputs()
            for name, value in self._outputs.items():
                self._binding.bind_ortvalue_output(name, value)

    def _bind(self, name: str, array: Array, device: tuple[str, int]) -> ort.OrtValue:
        """Bind a copy of an input in the memory of the device, and return it."""
        try:
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *device)
            self._binding.bind_ortvalue_input(name, value)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UnsupportedError(f"onnxruntime cannot bind input {name!r}: {_first_line(error)}") from error
        return value

    def run(self, names: None, feed: Any, limits: Any = None, /) -> Sequence[Any]:
        """Run on the bound inputs, and wait for the device."""
        self._session.run_with_iobinding(self._binding, limits)
        self._binding.synchronize_outputs()
        return []


def interleaved(
    sessions: Sequence[ort.InferenceSession],
    feed: Mapping[str, Array],
    seconds: float,
    *,
    least: int = 10,
    method: Method | None = None,
    observer: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Return the seconds of each run of each session, in interleaved rounds of random order after warm-up runs.

    The number of rounds is `least` to 2000, that of warm-up runs three at most, unless `method` gives them. In a fixed
    order, periodic load on the machine could always affect the same session. The observer is called after each round
    with the passed and the planned milliseconds or rounds.
    """
    rng = np.random.default_rng(0)
    chosen = method or Method(warmup=min(3, least - 1))
    runners: list[Runner] = [Bound(s, feed) for s in sessions] if chosen.io_binding else list(sessions)
    for runner in runners:
        for _ in range(chosen.warmup):
            execute(runner, feed)
    times: list[list[float]] = [[] for _ in runners]
    end = time.perf_counter() + seconds
    fewest, most = (least, 2000) if chosen.runs is None else (chosen.runs, chosen.runs)
    fed = [feed if isinstance(runner, Bound) else opened_interface(runner).taken(feed) for runner in runners]
    while len(times[0]) < most and (len(times[0]) < fewest or time.perf_counter() < end):
        for place in rng.permutation(len(runners)):
            start = time.perf_counter()
            runners[place].run(None, dict(fed[place]))
            times[place].append(time.perf_counter() - start)
        if observer is not None and chosen.runs is not None:
            observer(len(times[0]), chosen.runs)
        elif observer is not None:
            passed = seconds + time.perf_counter() - end
            observer(round(1000 * min(passed, seconds)), round(1000 * seconds))
    return times
