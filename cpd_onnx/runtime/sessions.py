"""onnxruntime: sessions, inputs that a model accepts, latency."""

from __future__ import annotations

import contextlib
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto

from cpd_onnx.errors import EndlessError, UnsupportedError
from cpd_onnx.ir.model import Array, Model, element_type
from cpd_onnx.ops.sizes import Bindings, Size, Term
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.values import Folded, Value

Feed: TypeAlias = dict[str, Array]
Assignment: TypeAlias = dict[Term, int]
"""Values of the symbols in the sizes of a model's inputs."""

RUN_SECONDS = 600.0
"""Time limit of one run in seconds (heuristic)."""

_CPU = "CPUExecutionProvider"
_OTHER_SIZES = (512, 576, 256, 224, 128, 64, 640, 16000, 1)
"""Sizes of dynamic axes that models require, commonest first (from the models that this package was tested on)."""
_MOST_FED = 1 << 26
"""Maximum number of elements of an input for which another size is tried (heuristic)."""
_MOST_HELD = 1 << 26
"""Maximum number of elements of any tensor for which a size is tried (heuristic)."""


def open_model(
    model: Model | ModelProto | Path,
    *,
    optimise: bool = True,
    threads: int = 0,
    provider: str = _CPU,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """Return a session of onnxruntime; `profile` is the path prefix of a trace.

    Raises UnsupportedError if onnxruntime rejects the model, has no such provider, or cannot start it.
    """
    if provider not in ort.get_available_providers():
        known = ", ".join(ort.get_available_providers())
        raise UnsupportedError(f"onnxruntime has no provider {provider!r} here: choose one of {known}")
    providers = list(dict.fromkeys([provider, _CPU]))
    try:
        session = precisely(
            partial(_options, optimise, threads, profile), lambda options: _session(model, options, providers)
        )
    except Exception as error:  # onnxruntime raises classes of its own that share no base but Exception
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise UnsupportedError(f"onnxruntime cannot run the model: {_first_line(error)}") from error
    if provider not in session.get_providers():  # onnxruntime silently falls back to the CPU
        raise UnsupportedError(f"onnxruntime cannot start provider {provider!r}: are its libraries installed?")
    return session


def precisely(
    options: Callable[[], ort.SessionOptions], make: Callable[[ort.SessionOptions], ort.InferenceSession]
) -> ort.InferenceSession:
    """Return a session in which 8-bit dot products do not saturate, also on x86 processors without VNNI.

    onnxruntime cannot widen the weights of every model for that; other models are opened without it.
    """
    precise = options()
    precise.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return make(precise)
    except ort.capi.onnxruntime_pybind11_state.Fail:
        return make(options())


def _options(optimise: bool, threads: int, profile: Path | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    # Otherwise, threads of one session would still be spinning while the next one is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return options


def _session(
    model: Model | ModelProto | Path, options: ort.SessionOptions, providers: list[str]
) -> ort.InferenceSession:
    if isinstance(model, Path):
        return ort.InferenceSession(str(model), options, providers=providers)
    if isinstance(model, ModelProto):
        return ort.InferenceSession(model.SerializeToString(), options, providers=providers)
    if not model.is_over_limit:
        return ort.InferenceSession(model.serialize(), options, providers=providers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.save(path)
        return ort.InferenceSession(str(path), options, providers=providers)


class Runner(Protocol):
    """A session of onnxruntime, or an object with the same method."""

    def run(self, names: None, feed: Any, limits: Any = None, /) -> Sequence[Any]:
        """All outputs."""


def execute_all(session: Runner, feeds: Sequence[Mapping[str, Array]]) -> list[list[Array]]:
    """Return all outputs for each of several inputs."""
    at_once = getattr(session, "run_all", None)
    return at_once(feeds) if at_once is not None else [execute(session, feed) for feed in feeds]


def execute(session: Runner, feed: Mapping[str, Array]) -> list[Array]:
    """Return all outputs of one run.

    Raises UnsupportedError if the run fails, EndlessError if it takes longer than `RUN_SECONDS`.
    """
    limits = ort.RunOptions()
    timer = threading.Timer(RUN_SECONDS, setattr, (limits, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        return [np.asarray(output) for output in session.run(None, dict(feed), limits)]
    except Exception as error:  # as above
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        if limits.terminate:
            raise EndlessError(f"a run of the model did not end within {RUN_SECONDS:g} s") from error
        raise UnsupportedError(f"onnxruntime failed to run the model: {_first_line(error)}") from error
    finally:
        timer.cancel()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300]


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


def _resized(folded: Folded, name: str, array: Array, size: int) -> list[int]:
    """Return the shape of an input with its dynamic sizes, except the batch size, set to another size."""
    value = folded.scope.values[name]
    is_free = [not value.has_fixed(axis) and usual != folded.batch for axis, usual in enumerate(value.shape or ())]
    return [size if free else old for free, old in zip(is_free, array.shape, strict=True)]


def _again(folded: Folded, name: str, array: Array, rng: np.random.Generator) -> Array:
    return random_array(folded, folded.scope.values[name], array.shape, rng)


def random_array(folded: Folded, value: Value, shape: Sequence[int], rng: np.random.Generator) -> Array:
    """Return a random input: normal floats, indices within the table that they index, or True.

    Raises UnsupportedError for strings.
    """
    dtype = element_type(value.dtype)
    if value.dtype == TensorProto.STRING:
        raise UnsupportedError(f"input {value.name!r} takes strings: give data")
    if value.dtype == TensorProto.BOOL:
        return np.ones(shape, np.bool_)
    if np.issubdtype(dtype, np.integer):
        return np.asarray(rng.integers(0, _index_limit(folded, value), shape)).astype(dtype)
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def _index_limit(folded: Folded, value: Value) -> int:
    """Return the exclusive upper bound of an input's indices; 2 if it is not an index, such as a mask."""
    waiting, visited, limit = [value.name], {value.name}, 0
    while waiting:
        name = waiting.pop()
        for use in folded.scope.consumers.get(name, []):
            node = use.scope.nodes[use.node]
            limit = _smaller(limit, _table_size(folded, node, name))
            if traits_of(node).carries_indices and node.input[0] == name:
                waiting += [o for o in node.output if o not in visited]
                visited.update(node.output)
    return limit or 2


def _smaller(limit: int, size: int) -> int:
    return min(limit, size) if limit and size else limit or size


def _table_size(folded: Folded, node: NodeProto, name: str) -> int:
    if node.op_type != "Gather" or node.input[1] != name:
        return 0
    table = folded.scope.lookup(node.input[0])
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    return table.shape[axis] if table is not None and table.shape else 0


def latency_ratio(
    models: Sequence[Model], feed: Mapping[str, Array], *, seconds: float = 4.0, threads: int = 0
) -> list[float]:
    """Return the median duration in seconds of a run of each model, measured in interleaved rounds."""
    sessions = [open_model(model, threads=threads) for model in models]
    return [float(np.median(taken)) for taken in interleaved(sessions, feed, seconds)]


def interleaved(
    sessions: Sequence[ort.InferenceSession], feed: Mapping[str, Array], seconds: float
) -> list[list[float]]:
    """Return the seconds of each run of each session, in interleaved rounds of random order after three warm-up runs.

    The number of rounds is 10 to 2000. In a fixed order, periodic load on the machine could always affect the same
    session.
    """
    rng = np.random.default_rng(0)
    for session in sessions:
        for _ in range(3):
            execute(session, feed)
    times: list[list[float]] = [[] for _ in sessions]
    end = time.perf_counter() + seconds
    while len(times[0]) < 10 or time.perf_counter() < end:
        for place in rng.permutation(len(sessions)):
            start = time.perf_counter()
            sessions[place].run(None, dict(feed))
            times[place].append(time.perf_counter() - start)
        if len(times[0]) >= 2000:
            break
    return times
