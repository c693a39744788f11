"""onnxruntime: sessions, inputs that fit a model, latency."""

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
"""Numbers for the symbols of a model's inputs."""

RUN_SECONDS = 600.0
"""How long one run may take."""

_CPU = "CPUExecutionProvider"
_OTHER_SIZES = (512, 576, 256, 224, 128, 64, 640, 16000, 1)
"""Sizes of open dimensions that models insist on, commonest first."""
_MOST_FED = 1 << 26
"""Elements of an input up to which another size is tried."""
_MOST_HELD = 1 << 26
"""Elements of any tensor up to which a size is tried."""


def open_model(
    model: Model | ModelProto | Path,
    *,
    optimise: bool = True,
    threads: int = 0,
    provider: str = _CPU,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """Load a model into onnxruntime, on the CPU unless another provider is named; `profile` is where a trace goes.

    Raises UnsupportedError if onnxruntime does not take the model, has no such provider, or cannot start it.
    """
    if provider not in ort.get_available_providers():
        known = ", ".join(ort.get_available_providers())
        raise UnsupportedError(f"onnxruntime has no provider {provider!r} here: choose one of {known}")
    providers = list(dict.fromkeys([provider, _CPU]))
    try:
        session = precisely(
            partial(_options, optimise, threads, profile), lambda said: _session(model, said, providers)
        )
    except Exception as error:  # onnxruntime raises classes of its own that share no base but Exception
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise UnsupportedError(f"onnxruntime cannot run the model: {_first_line(error)}") from error
    if provider not in session.get_providers():  # it falls back to the CPU in silence
        raise UnsupportedError(f"onnxruntime lists provider {provider!r} but cannot start it: are its libraries there?")
    return session


def precisely(
    options: Callable[[], ort.SessionOptions], make: Callable[[ort.SessionOptions], ort.InferenceSession]
) -> ort.InferenceSession:
    """A session in which sums of products of eight-bit numbers do not saturate, on x86 processors without VNNI either.

    onnxruntime cannot widen the weights of every model for that; those are opened as they are.
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
    # Threads of a session that has just run would spin on while the next one is measured.
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
    """What runs a model: a session of onnxruntime, or what takes its place."""

    def run(self, names: None, feed: Any, limits: Any = None, /) -> Sequence[Any]:
        """All outputs."""


def execute_all(session: Runner, feeds: Sequence[Mapping[str, Array]]) -> list[list[Array]]:
    """All outputs for each of some inputs."""
    at_once = getattr(session, "run_all", None)
    return at_once(feeds) if at_once is not None else [execute(session, feed) for feed in feeds]


def execute(session: Runner, feed: Mapping[str, Array]) -> list[Array]:
    """All outputs of one run.

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
    """Random inputs of the sizes that a binding of the symbols gives: normal floats, indices within their tables."""
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
    """The symbols of the inputs' sizes, and whether each is a batch."""
    found: dict[Term, bool] = {}
    for value in fed(folded):
        for axis, extent in enumerate(value.sizes or ()):
            for monomial in extent.coefficients if isinstance(extent, Size) else ():
                for term, _ in monomial:
                    found[term] = found.get(term, False) or axis == 0 or "batch" in str(term)
    return found


def fed(folded: Folded) -> Iterator[Value]:
    """The inputs of a model that have no default."""
    for info in folded.model.graph.input:
        value = folded.scope.values.get(info.name)
        if value is not None and value.weight is None:
            yield value


def is_feasible(folded: Folded, assignment: Assignment) -> bool:
    """Whether the model may be run at some sizes: no tensor is empty, and none takes memory without measure.

    onnxruntime ends the process at a Reshape of an empty tensor; attention over the pixels of a large image asks for
    terabytes.
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
    """Random inputs that the model accepts: where it fails at the usual sizes, others are tried.

    Raises UnsupportedError with onnxruntime's first complaint if it accepts none.
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
    """The shape of an input with its open sizes, the batch apart, set to another size."""
    value = folded.scope.values[name]
    is_free = [not value.has_fixed(axis) and usual != folded.batch for axis, usual in enumerate(value.shape or ())]
    return [size if free else old for free, old in zip(is_free, array.shape, strict=True)]


def _again(folded: Folded, name: str, array: Array, rng: np.random.Generator) -> Array:
    return random_array(folded, folded.scope.values[name], array.shape, rng)


def random_array(folded: Folded, value: Value, shape: Sequence[int], rng: np.random.Generator) -> Array:
    """An input at random: normal floats, indices within the table that they look up in, true.

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
    """One more than the largest index that the input may hold; 2 where it is no index (a mask)."""
    waiting, seen, limit = [value.name], {value.name}, 0
    while waiting:
        name = waiting.pop()
        for use in folded.scope.consumers.get(name, []):
            node = use.scope.nodes[use.node]
            limit = _smaller(limit, _table_size(folded, node, name))
            if traits_of(node).carries_indices and node.input[0] == name:
                waiting += [o for o in node.output if o not in seen]
                seen.update(node.output)
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
    """Median seconds of a run of each model, measured in interleaved rounds."""
    sessions = [open_model(model, threads=threads) for model in models]
    return [float(np.median(taken)) for taken in interleaved(sessions, feed, seconds)]


def interleaved(
    sessions: Sequence[ort.InferenceSession], feed: Mapping[str, Array], seconds: float
) -> list[list[float]]:
    """Seconds of each run of each session, in interleaved rounds of changing order, after three that do not count.

    At least ten rounds are run, and at most two thousand.

    In a fixed order, what else the machine does in a rhythm would always meet the same model.
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
