"""Latency as a cost: the time of each kernel in onnxruntime as a function of the model's widths.

The model is its own benchmark, so that fusions, layouts and threads are included, and no knowledge of operators is
needed. It is pruned to several dozen random widths, and each time onnxruntime's profiler reports the time and the
shapes of each kernel. A size in these shapes that varies like an axis of the model is identified with that axis,
possibly rounded up to whole blocks of the kernel. The time of a kernel is then fitted by products of the sizes of its
axes, with coefficients that are not negative.

onnxruntime may run a node as another kernel where its widths are not whole blocks, and convert layouts in between.
Kernels whose names start with that of a node or of its outputs are therefore merged; the time of kernels that are still
not present at all widths is fitted as a whole, by the MACs of the model and the elements of its tensors.

Kernels are fast at some widths only: a convolution may take twice as long at 63 channels as at 64. So the first widths
are multiples of 1, 2, 4, … but not of the next power, at about the same ratios. The time of a group's kernels at each
multiple, relative to their work, determines the multiple that its widths should have. Only such widths are used
afterwards.

If models are deployed in another form, such as with 8-bit integers, the kernels are those of this form.

Runs of a model alternate with runs of the original: other load on the machine slows both, and is divided out.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import reprlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from scipy.optimize import nnls

from cpd_onnx.algebra.atoms import Axis, Fingerprint, fingerprint
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.widths import is_width
from cpd_onnx.channels.branches import Vanishing
from cpd_onnx.channels.costs import Floats, Term
from cpd_onnx.channels.groups import Combed, Group
from cpd_onnx.channels.judged import terms_of_work
from cpd_onnx.errors import DataError, TargetError, UnsupportedError
from cpd_onnx.io.files import read_json, write_atomically
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.runtime.sessions import execute, interleaved, judged_feed, open_model, working_feeds
from cpd_onnx.runtime.shards import agreed

FORMAT = "cpd-onnx/latency"
VERSION = 1
MULTIPLES = (1, 2, 4, 8, 16, 32)
"""Multiples that are tried for widths."""

_BLOCKS = (1, 2, 4, 8, 16, 32, 64)
"""Block sizes to multiples of which kernels may round widths up."""
_TURNS = 3
"""Number of models that are measured for each multiple (heuristic)."""
_SAMPLES = 20
"""Number of models that the times of kernels are fitted to (heuristic)."""
_RATIOS = (0.3, 0.95)
"""Range of the ratios of surviving channels when multiples are compared (heuristic)."""
_LEAST_RATIO = 0.2
"""Minimum ratio of the widths that times are fitted to (heuristic)."""
_NEARLY = 1.06
"""Slowdown, relative to the fastest multiple, up to which a smaller multiple is preferred (heuristic)."""
_SLOW = 1.5
"""Slowdown of the fastest smaller widths, relative to their work, above which a group is not pruned (heuristic)."""
_SHRINK = 0.05
"""Weight of the measurements of all groups in that of one group, as a fraction of the total time (heuristic)."""
_WATCHED_SECONDS, _LEAST_RUNS, _MOST_RUNS = 0.12, 3, 60
"""Duration in seconds, and minimum and maximum number, of a model's runs with and without the profiler (heuristic)."""
_SLOW_MS = 30.0
"""Milliseconds of a run from which the overhead of the profiler, microseconds a kernel, does not count (heuristic)."""
_LEAST_ROUNDS, _FEWEST_ROUNDS = 10, 4
"""Minimum number of rounds of a measurement of at least a second, and of a shorter one (heuristic)."""
_OTHERS = "others"
"""Name for all kernels that are not present in all models."""
_FITTED_AXES = 3
"""Maximum number of axes for which all products are fitted; with more, only single axes and the product of all."""

Observer: TypeAlias = Callable[[int, int], None]
"""Called with the number of models measured so far, and their total number."""
Convert: TypeAlias = Callable[[Model], Model]
"""Returns the form in which a model is deployed."""
_Times: TypeAlias = "Mapping[str, KernelTime]"
NamedAxis: TypeAlias = tuple[str, str, int]
"""Scope path, name of the tensor, number of the axis."""


@dataclass(frozen=True)
class KernelCost:
    """The time of one kernel as a function of widths.

    Attributes:
        name: Name in onnxruntime, or that of the node.
        operator: Operator in onnxruntime.
        ms: Milliseconds in a run of the original.
        error: Root mean square error of the fit, relative to the mean time.
        terms: Coefficients in milliseconds, each with the axes (scope path, tensor, number) whose sizes multiply it.
    """

    name: str
    operator: str
    ms: float
    error: float
    terms: tuple[tuple[float, tuple[NamedAxis, ...]], ...]


@dataclass(frozen=True)
class GroupWidths:
    """Widths of a group at which kernels are fast.

    Attributes:
        name: Name of the group.
        size: Number of its channels.
        multiple: Number of which its widths should be multiples.
        slowdown: Time at each multiple, relative to the work.
    """

    name: str
    size: int
    multiple: int
    slowdown: Mapping[int, float]


@dataclass(frozen=True)
class CostTable:
    """The latency of a model on one machine as a function of its widths.

    Attributes:
        sha256: SHA-256 of the model.
        setting: Conditions of the measurement.
        ms: Milliseconds in a run of the original, without the profiler.
        rest: Milliseconds between kernels, and in kernels that are not present at all widths.
        unattributed: Fraction of the kernels' time that no axis accounts for.
        groups: Fast widths of each group.
        kernels: Fitted time of each kernel.
        machine: Description of the machine.
        is_converted: Whether the kernels are those of the form in which models are deployed; `ms` is that of the
            original as it is, in any case.
    """

    sha256: str
    setting: Setting
    ms: float
    rest: float
    unattributed: float
    groups: tuple[GroupWidths, ...]
    kernels: tuple[KernelCost, ...]
    machine: Mapping[str, Any] = field(default_factory=dict)
    is_converted: bool = False

    def multiples(self, combed: Combed) -> dict[int, int]:
        """Return the multiple of each group's widths, by id; raises ValueError if the model has other groups."""
        found = {(g.name, g.size): g.multiple for g in self.groups}
        if set(found) != {(g.name, len(g)) for g in combed.groups}:
            raise ValueError("the cost table has other groups than the model")
        return {g.id: found[(g.name, len(g))] for g in combed.groups}

    def finer(self, halvings: int) -> CostTable:
        """Return the table with multiples halved that many times, for targets out of reach at the fast widths.

        Groups that should not be pruned then get the fastest of their smaller widths.
        """
        return replace(self, groups=tuple(_halved(group, halvings) for group in self.groups)) if halvings else self

    def loosened(self, combed: Combed) -> CostTable:
        """Return the table with the time that is constant in it made proportional to the MACs of the model."""
        fixed = self.rest + sum(ms for kernel in self.kernels for ms, axes in kernel.terms if not axes)
        kernels = tuple(replace(k, terms=tuple(term for term in k.terms if term[1])) for k in self.kernels)
        work = _terms_of(combed, terms_of_work(combed))
        whole = sum(factor * math.prod(len(_axis_of(combed, axis)) for axis in axes) for factor, axes in work)
        shrinking = tuple((fixed * factor / whole, axes) for factor, axes in work) if whole else ()
        return replace(self, rest=0.0, kernels=(*kernels, KernelCost(_OTHERS, "", fixed, 0.0, shrinking)))

    def terms(self, combed: Combed) -> list[Term]:
        """Return the milliseconds of a run as a sum over products of axes."""
        nodes = combed.folded.scope.nodes
        places = {name: place for place, node in enumerate(nodes) for name in (node.name, *node.output) if name}
        vanishing = Vanishing(combed)
        found: list[Term] = [(self.rest, ())]
        for kernel in self.kernels:
            place = places.get(kernel.name, -1)
            for ms, named in kernel.terms:
                axes = tuple(_axis_of(combed, axis) for axis in named)
                found.append((ms, axes, vanishing.of_node(place, axes)))
        return found

    def require(self, model: Model) -> None:
        """Raise DataError if the table belongs to another model."""
        if self.sha256 != model.sha256():
            raise DataError(
                f"the cost table belongs to another file: it names sha256 {self.sha256[:12]}…, "
                f"this one has {model.sha256()[:12]}…"
            )

    def require_parts(self, combed: Combed) -> None:
        """Raise DataError if the table names groups or axes that the model does not have."""
        try:
            self.multiples(combed)
            self.terms(combed)
        except (ValueError, LookupError) as error:
            raise DataError(
                "the cost table has other groups or axes than the model: measure it again with 'cpd-onnx latency'"
            ) from error

    def as_json(self) -> dict[str, Any]:
        """Return the table as plain values, with format and version."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        write_atomically(path, (json.dumps(self.as_json(), indent=1) + "\n").encode())


def _text(name: str | bytes) -> str:
    """Return a name as it is in a trace; names that are not text are given as bytes."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name


def _halved(group: GroupWidths, halvings: int) -> GroupWidths:
    multiple = group.multiple
    if multiple == group.size and group.slowdown:
        multiple, halvings = min(group.slowdown, key=group.slowdown.__getitem__), halvings - 1
    return replace(group, multiple=max(1, multiple >> halvings))


def load_table(path: Path) -> CostTable:
    """Read a cost table; raises DataError if the file is not one."""
    try:
        content = read_json(path)
        return _table_of(content)
    except OSError as error:
        raise DataError(f"cannot read cost table {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is not a cost table: {reason}") from error


def _table_of(content: Any) -> CostTable:
    """Return the table of a JSON document; raises ValueError, KeyError, TypeError or AttributeError for another one."""
    if not isinstance(content, dict) or (content["format"], content["version"]) != (FORMAT, VERSION):
        raise ValueError(f"'format' must be {FORMAT!r} and 'version' {VERSION}")
    setting = Setting(**content["setting"])
    batch, threads = setting.batch, setting.threads
    if not (batch is None or _whole(batch, 1)) or not _whole(threads, 0) or not isinstance(setting.provider, str):
        raise ValueError("'setting' has values of a wrong type")
    machine = content["machine"]
    if not isinstance(content["sha256"], str) or not isinstance(machine, dict):
        raise ValueError("'sha256' or 'machine' is of a wrong type")
    ms, rest, unattributed = (_amount(content[name]) for name in ("ms", "rest", "unattributed"))
    groups, kernels = map(_group_of, content["groups"]), map(_kernel_of, content["kernels"])
    is_converted = content.get("is_converted", False) is True
    return CostTable(
        content["sha256"], setting, ms, rest, unattributed, tuple(groups), tuple(kernels), machine, is_converted
    )


def _kernel_of(entry: Mapping[str, Any]) -> KernelCost:
    terms = tuple((_amount(ms), tuple(map(_axis_in, axes))) for ms, axes in entry["terms"])
    name, operator = entry["name"], entry["operator"]
    if not isinstance(name, str) or not isinstance(operator, str):
        raise ValueError("a kernel has a name of a wrong type")
    return KernelCost(name, operator, _amount(entry["ms"]), _amount(entry["error"]), terms)


def _axis_in(entry: Any) -> NamedAxis:
    path, name, number = entry
    if not isinstance(path, str) or not isinstance(name, str) or not _whole(number, 0):
        raise ValueError(f"{reprlib.repr(entry)} is not an axis")
    return path, name, number


def _group_of(entry: Mapping[str, Any]) -> GroupWidths:
    name, size, multiple = entry["name"], entry["size"], entry["multiple"]
    if not isinstance(name, str) or not _whole(size, 1) or not _whole(multiple, 1):
        raise ValueError("a group has values of a wrong type")
    return GroupWidths(name, size, multiple, {int(m): _amount(s) for m, s in entry["slowdown"].items()})


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _amount(value: Any) -> float:
    """Return a number; raises ValueError unless it is finite and not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{reprlib.repr(value)} is not a number of at least 0")
    return value


class LatencyProbe:
    """Measures the latency of pruned models beside the original.

    Attributes:
        combed: The original and its groups.
        setting: Conditions of the measurement.
        converted: Returns the form in which a pruned model is deployed, such as that with 8-bit integers, whose latency
            is measured; None for the pruned model itself.
        feed: Inputs.
        ms: Milliseconds of a fast run of the original (10th percentile) in the last measurement; 0 before the first.
        scatter: Largest interquartile range of the original's run times so far, relative to their median.
    """

    def __init__(self, combed: Combed, setting: Setting, converted: Convert | None = None) -> None:
        """Open the original; raises UnsupportedError if onnxruntime cannot run it under the setting."""
        self.combed, self.setting, self.converted = combed, setting, converted
        self.ms, self.scatter = 0.0, 0.0
        self.feed = _feed(combed, setting.batch)
        named = [node for node in combed.folded.scope.nodes if node.name and node.output]
        self._nodes = {_text(name): _text(node.name) for node in named for name in (node.name, *node.output) if name}
        self._original = self.session(combed.folded.model)

    def reopen(self) -> None:
        """Open the original again: where its memory lies affects its speed for as long as it is open."""
        self._original = self.session(self.combed.folded.model)

    def pruned(self, channels: npt.NDArray[np.int64]) -> Model:
        """Return the model without some primitive atoms, as it is deployed."""
        whole = self.combed.folded.model
        model = rewrite(self.combed, KeepMask(self.combed.atoms, channels)).model if len(channels) else whole
        return model if self.converted is None else self.converted(model)

    def session(self, model: Model, profile: Path | None = None) -> ort.InferenceSession:
        """Open a model under the setting."""
        return open_model(model, threads=self.setting.threads, provider=self.setting.provider, profile=profile)

    def ratio(self, channels: npt.NDArray[np.int64], seconds: float = 2.0) -> float:
        """Return the ratio of the median latencies of the model without some primitive atoms and of the original."""
        return self.ratio_of(self.pruned(channels), seconds)

    def ratio_of(self, model: Model, seconds: float = 2.0) -> float:
        """Return the median ratio of the latencies of a model with the original's inputs and of the original.

        Runs that follow each other are compared, since other load on the machine affects both.
        """
        ratio, self.ms, scatter = agreed(lambda: self._timed(model, seconds))
        self.scatter = max(self.scatter, scatter)
        return ratio

    def _timed(self, model: Model, seconds: float) -> tuple[float, float, float]:
        """Return the ratio, milliseconds of a fast run of the original, and how far its times scatter."""
        least = _LEAST_ROUNDS if seconds >= 1 else _FEWEST_ROUNDS
        times = interleaved([self._original, self.session(model)], self.feed, seconds, least=least)
        fast, low, middle, high = np.percentile(times[0], (10, 25, 50, 75))
        ratio = float(np.median(np.asarray(times[1]) / np.asarray(times[0])))
        return ratio, 1e3 * float(fast), float((high - low) / middle)

    def profile(
        self, model: Model, nodes: Mapping[str, str] | None = None
    ) -> tuple[Mapping[str, KernelTime], float, float]:
        """Return the time and shapes of each kernel of a model, and milliseconds of the model and of the original.

        Kernels have the names of `nodes`, by the start of their own names; by default, those of the original's nodes.
        The overhead of the profiler is about the same for each kernel. It is estimated such that the times of kernels
        without it add up to that of the model without the profiler.
        """
        return agreed(lambda: self._profile(model, self._nodes if nodes is None else nodes))

    def _profile(self, model: Model, nodes: Mapping[str, str]) -> tuple[Mapping[str, KernelTime], float, float]:
        with tempfile.TemporaryDirectory() as folder:
            session = self.session(model, Path(folder) / "trace")
            profiled, first = self._in_turns(session)
            events = json.loads(Path(session.end_profiling()).read_text("utf-8", "replace"))
        is_slow = _typical(first, len(first)) > _SLOW_MS
        taken, meanwhile = (profiled, first) if is_slow else self._in_turns(session)
        speed = _typical(meanwhile, len(meanwhile)) / _typical(first, len(first))
        kernels = _kernels(events, len(first), nodes)
        ms = _typical(taken, len(taken))
        overhead = _overhead([speed * kernel.ms for kernel in kernels.values()], ms)
        times = {name: replace(k, ms=max(0.0, speed * k.ms - overhead)) for name, k in kernels.items()}
        return times, ms, _typical(meanwhile, len(meanwhile))

    def _in_turns(self, session: ort.InferenceSession) -> tuple[list[float], list[float]]:
        """Return the milliseconds of alternating runs of a model and of the original, after a warm-up run."""
        execute(session, self.feed)
        taken: list[list[float]] = [[], []]
        until = time.perf_counter() + _WATCHED_SECONDS
        while len(taken[0]) < _LEAST_RUNS or (len(taken[0]) < _MOST_RUNS and time.perf_counter() < until):
            for each, ms in zip((session, self._original), taken, strict=True):
                start = time.perf_counter()
                each.run(None, self.feed)
                ms.append(1e3 * (time.perf_counter() - start))
        return taken[0], taken[1]


def measure_table(probe: LatencyProbe, *, seed: int = 0, observer: Observer | None = None) -> CostTable:
    """Measure the latency of a model as a function of its widths.

    Raises TargetError if it has no groups, UnsupportedError if onnxruntime cannot run it.
    """
    combed = probe.combed
    if not combed.groups:
        raise TargetError("the model has no prunable channels, so its latency cannot be reduced")
    made = _Samples(probe, observer)
    rng = np.random.default_rng(seed)
    made.add(np.asarray([len(g) for g in combed.groups]))
    turns: dict[int, list[int]] = defaultdict(list)
    for _ in range(_TURNS):
        ratios = rng.uniform(*_RATIOS, len(combed.groups))
        for multiple in MULTIPLES:
            turns[multiple].append(made.add(np.asarray(list(_strict(combed, multiple, ratios)))))
    groups = _fast_widths(made, turns)
    least = [_nearest(g.size, g.multiple, 0.0) for g in groups]
    fitted = [0, made.add(np.asarray(least))]
    for _ in range(_SAMPLES):
        mean = rng.uniform(_LEAST_RATIO, 1.0)
        ratios = np.clip(mean + rng.uniform(-0.4, 0.4, len(groups)), _LEAST_RATIO, 1.0)
        widths = [_nearest(g.size, g.multiple, r) for g, r in zip(groups, ratios, strict=True)]
        fitted.append(made.add(np.asarray(widths)))
    kernels, unknown = _fitted(made, fitted)
    names = {kernel.name for kernel in kernels}
    known = [sum(k.ms for name, k in made.times[s].items() if {name, _OTHERS} & names) for s in fitted]
    rest = max(0.0, float(np.median([made.ms[s] - accounted for s, accounted in zip(fitted, known, strict=True)])))
    return CostTable(
        combed.folded.original.sha256(),
        probe.setting,
        made.original,
        rest,
        unknown,
        tuple(groups),
        tuple(kernels),
        _machine(),
        probe.converted is not None,
    )


def _machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "system": platform.platform(), "onnxruntime": ort.__version__}


def _feed(combed: Combed, batch: int | None) -> dict[str, Array]:
    """Return inputs that the model accepts, with that many samples (default: one) if its batch size is dynamic."""
    folded = combed.folded
    session = open_model(folded.model, threads=1)
    if batch is None:
        return judged_feed(folded, session)
    feed = next(working_feeds(folded, session, 1))
    values = {name: folded.scope.values[name] for name in feed}
    free = [name for name, value in values.items() if value.shape and not value.has_fixed(0)]
    if not free:
        raise UnsupportedError(f"the model has a fixed batch size: leave out the batch size of {batch}")
    return {name: np.resize(x, (batch, *x.shape[1:])) if name in free else x for name, x in feed.items()}


# Traces of the profiler.


@dataclass(frozen=True)
class KernelTime:
    """One kernel in one model: operator, milliseconds in a run, and all sizes in its shapes."""

    operator: str
    ms: float
    sizes: tuple[int, ...]


def _kernels(events: Sequence[Mapping[str, Any]], runs: int, nodes: Mapping[str, str]) -> _Times:
    """Return the kernels of a trace of that many runs, by the name of their node or else their own."""
    taken: dict[str, list[float]] = defaultdict(list)
    about: dict[str, tuple[str, tuple[int, ...]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name, facts = event["name"].removesuffix("_kernel_time"), event["args"]
            taken[name].append(event["dur"] / 1e3)
            shapes = [*facts.get("input_type_shape", []), *facts.get("output_type_shape", [])]
            about[name] = (facts["op_name"], tuple(n for typed in shapes for dims in typed.values() for n in dims))
    found: dict[str, KernelTime] = {}
    for name, ms in taken.items():
        operator, sizes = about[name]
        node = _node_of(name, nodes)
        before = found.get(node, KernelTime(operator, 0.0, ()))
        found[node] = KernelTime(before.operator, before.ms + _typical(ms, runs), (*before.sizes, *sizes))
    return found


def _node_of(kernel: str, nodes: Mapping[str, str]) -> str:
    """Return the node whose name or output is the longest prefix of a kernel's name; that name if there is none."""
    start = kernel
    while start and start not in nodes:
        start = start.rpartition("_")[0]
    return nodes.get(start, kernel)


def _typical(ms: Sequence[float], runs: int) -> float:
    """Return the milliseconds in a run of a kernel, which a loop may call several times: the mean of the faster half.

    The slower half contains warm-up runs and runs disturbed by other load.
    """
    each = (
        np.sort(np.asarray(ms[len(ms) % runs :]).reshape(runs, -1).sum(axis=1)) if len(ms) >= runs else np.asarray(ms)
    )
    return float(each[: max(1, len(each) // 2)].mean())


def _overhead(kernels: Sequence[float], ms: float) -> float:
    """Return the milliseconds that the profiler adds to each kernel, such that the rest adds up to the model's time."""
    low, high = 0.0, max(kernels, default=0.0)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(0.0, each - middle) for each in kernels) > ms else (low, middle)
    return low


class _Samples:
    """The measured models: widths of the groups, times of kernels, and sizes of all axes, one row each."""

    def __init__(self, probe: LatencyProbe, observer: Observer | None) -> None:
        self.probe, self.combed, self.observer = probe, probe.combed, observer
        self.order = [np.random.default_rng(g.id).permutation(g.channels) for g in self.combed.groups]
        self.axes = list(variable_axes(self.combed))
        self.widths: list[npt.NDArray[np.int64]] = []
        self.times: list[_Times] = []
        self.rows: list[list[int]] = []
        self.ms: list[float] = []
        self.original = 0.0
        self._known: dict[Any, tuple[int, ...]] = {}
        self._places: dict[str, tuple[int, ...]] = {}

    def add(self, widths: npt.NDArray[np.int64]) -> int:
        """Measure one choice of widths; returns its row."""
        gone = np.concatenate([order[width:] for order, width in zip(self.order, widths.tolist(), strict=True)])
        times, ms, meanwhile = self.probe.profile(self.probe.pruned(gone))
        self.original = self.original or meanwhile
        speed = self.original / meanwhile
        self.times.append({name: replace(kernel, ms=speed * kernel.ms) for name, kernel in times.items()})
        self.ms.append(speed * ms)
        kept = KeepMask(self.combed.atoms, gone)
        self.rows.append([kept.count(axis) for _, axis in self.axes])
        self.widths.append(widths)
        self._places.clear()
        if self.observer is not None:
            self.observer(len(self.times), 2 + _TURNS * len(MULTIPLES) + _SAMPLES)
        return len(self.times) - 1

    def sum(self, terms: Sequence[tuple[float, tuple[NamedAxis, ...]]]) -> Floats:
        """Return the value of a sum of products of axes in each model."""
        place = {name: number for number, (name, _) in enumerate(self.axes)}
        rows = np.asarray(self.rows, float)
        return np.asarray(sum(factor * rows[:, [place[a] for a in axes]].prod(axis=1) for factor, axes in terms))

    def places(self, name: str) -> tuple[int, ...]:
        """Return the positions of the axes that a kernel's sizes follow, each once, from all models with the kernel."""
        if name not in self._places:
            self._places[name] = self._places_of(name)
        return self._places[name]

    def _places_of(self, name: str) -> tuple[int, ...]:
        forms: dict[int, list[int]] = defaultdict(list)  # the kernel may have more tensors in one model than in another
        for sample, times in enumerate(self.times):
            if name in times:
                forms[len(times[name].sizes)].append(sample)
        found: dict[int | None, None] = {}
        for having in forms.values():
            sizes = np.asarray([self.times[s][name].sizes for s in having]).reshape(len(having), -1)
            varying = np.unique(sizes[:, (sizes != sizes[:1]).any(axis=0)], axis=1)
            rows = np.asarray(self.rows)[having]
            found |= dict.fromkeys(self._place(rows, column, tuple(having)) for column in varying.T)
        return tuple(place for place in found if place is not None)

    def _place(self, rows: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], having: tuple[int, ...]) -> int | None:
        """Return the first axis with these sizes in all models, rounded up to blocks or not."""
        key = (having, tuple(sizes.tolist()))
        if key not in self._known:
            column = sizes[:, None]
            rounded = (((-(-rows // b) * b == column) | (rows == column)).all(axis=0) for b in _BLOCKS)
            matches = map(np.flatnonzero, rounded)
            self._known[key] = next((tuple(m[:1].tolist()) for m in matches if len(m)), ())
        return next(iter(self._known[key]), None)


def _axis_of(combed: Combed, axis: NamedAxis) -> Axis:
    path, name, number = axis
    return (combed.tensors[(path, name)].axes or [])[number]


def _terms_of(
    combed: Combed, products: Sequence[tuple[float, Sequence[Axis]]]
) -> list[tuple[float, tuple[NamedAxis, ...]]]:
    """Return a sum of products of axes with prunable axes by name and equal products merged."""
    names = {fingerprint(axis): name for name, axis in variable_axes(combed)}
    terms: dict[tuple[NamedAxis, ...], float] = defaultdict(float)
    for factor, axes in products:
        found = [(len(axis), names.get(fingerprint(axis))) for axis in axes]
        fixed = math.prod(size for size, name in found if name is None)
        terms[tuple(name for _, name in found if name is not None)] += factor * fixed
    return [(factor, axes) for axes, factor in terms.items() if factor]


def variable_axes(combed: Combed) -> Iterator[tuple[NamedAxis, npt.NDArray[np.int64]]]:
    """Yield all prunable axes of tensors, each once."""
    seen: set[Fingerprint] = set()
    for (path, name), tensor in combed.tensors.items():
        for number, axis in enumerate(tensor.axes or []):
            if fingerprint(axis) not in seen and not combed.atoms.all_frozen(axis):
                seen.add(fingerprint(axis))
                yield (path, name, number), axis


# Fast widths.


def _strict(combed: Combed, multiple: int, ratios: Floats) -> Iterator[int]:
    """Yield a width near each ratio that is a multiple of one number but not of the next higher one in `MULTIPLES`."""
    for group, ratio in zip(combed.groups, ratios, strict=True):
        step = multiple if multiple == MULTIPLES[-1] else 2 * multiple
        widths = [*range(multiple, len(group), step)] or [len(group)]
        yield _closest(widths, ratio * len(group))


def _nearest(size: int, multiple: int, ratio: float) -> int:
    widths = [*range(multiple, size, multiple), size]
    return _closest(widths, ratio * size)


def _closest(widths: Sequence[int], number: float) -> int:
    return widths[int(np.argmin(np.abs(np.asarray(widths) - number)))]


def _fast_widths(made: _Samples, turns: Mapping[int, Sequence[int]]) -> list[GroupWidths]:
    """Return for each group the smallest multiple at which its kernels are about as fast, per work, as at any."""
    count = len(made.combed.groups)
    owners = _owners(made)
    took, work = np.zeros((len(MULTIPLES), count + 1)), np.zeros((len(MULTIPLES), count + 1))
    original = made.times[0]
    for row, multiple in enumerate(MULTIPLES):
        for sample in turns[multiple]:
            for name, kernel in made.times[sample].items():
                took[row, [*_groups(made, owners, name), count]] += kernel.ms
            for name, kernel in original.items():
                places = list(made.places(name))
                left = np.prod(np.asarray(made.rows[sample])[places] / np.asarray(made.rows[0])[places])
                work[row, [*_groups(made, owners, name), count]] += kernel.ms * left
    mixed = _SHRINK * work[:, count]
    slowdown = (took[:, :count] + (mixed * took[:, count] / work[:, count])[:, None]) / (
        work[:, :count] + mixed[:, None]
    )
    return [_group_widths(made.combed, group, slowdown[:, group.id]) for group in made.combed.groups]


def _group_widths(combed: Combed, group: Group, slowdown: Floats) -> GroupWidths:
    """Return the multiple for one group; its size if all smaller widths are slow."""
    size = len(group)
    possible = {m: round(float(s), 3) for m, s in zip(MULTIPLES, slowdown, strict=True) if m < size}
    if not possible or not is_width(combed, group):
        return GroupWidths(group.name, size, 1, possible)
    least = min(possible.values())
    if least > _SLOW * float(slowdown.min()):
        return GroupWidths(group.name, size, size, possible)
    good = [multiple for multiple, slow in possible.items() if slow <= _NEARLY * least]
    return GroupWidths(group.name, size, good[0], possible)


def _owners(made: _Samples) -> list[tuple[int, ...]]:
    """Return the groups that each axis depends on."""
    owner, _ = made.combed.owners
    parts = (owner[made.combed.atoms.parts(axis)].ravel().tolist() for _, axis in made.axes)
    return [tuple(sorted(set(found) - {-1})) for found in parts]


def _groups(made: _Samples, owners: Sequence[tuple[int, ...]], name: str) -> list[int]:
    return sorted({group for place in made.places(name) for group in owners[place]})


# Times of kernels.


def _fitted(made: _Samples, samples: Sequence[int]) -> tuple[list[KernelCost], float]:
    """Return the fitted time of each kernel, with those not present in all models as one; the constant part of that."""
    costs = []
    others = np.asarray([sum(kernel.ms for kernel in made.times[sample].values()) for sample in samples])
    total = float(others.sum())
    for name, kernel in made.times[0].items():
        if not all(name in made.times[sample] for sample in samples):
            continue
        places = made.places(name)
        taken = np.asarray([made.times[sample][name].ms for sample in samples])
        terms, error = fit_terms(np.asarray(made.rows)[list(samples)][:, list(places)], taken)
        axes = [made.axes[place][0] for place in places]
        named = tuple((ms, tuple(axes[k] for k in chosen)) for ms, chosen in terms)
        costs.append(KernelCost(name, kernel.operator, kernel.ms, error, named))
        others = others - taken
    if others.sum() <= _SHRINK * total:
        return costs, max(0.0, float(others.sum()) / total)
    work = _terms_of(made.combed, terms_of_work(made.combed))
    moved = _terms_of(made.combed, [(1.0, tensor.axes) for tensor in made.combed.tensors.values() if tensor.axes])
    sums = [(terms, made.sum(terms)[list(samples)]) for terms in (work, moved) if terms]
    columns = np.column_stack([np.ones(len(samples)), *(counts / counts[0] for _, counts in sums)])
    (fixed, *factors), _ = nnls(columns, others)
    error = float(np.sqrt(np.mean((columns @ [fixed, *factors] - others) ** 2)) / others.mean())
    shares = [
        (ms * f / counts[0], axes) for f, (terms, counts) in zip(factors, sums, strict=True) if f for ms, axes in terms
    ]
    costs.append(KernelCost(_OTHERS, "", float(others[0]), round(error, 4), ((float(fixed), ()), *shares)))
    return costs, float(fixed) * len(samples) / total


def fit_terms(sizes: npt.NDArray[np.int64], ms: Floats) -> tuple[list[tuple[float, tuple[int, ...]]], float]:
    """Return times as a sum of products of sizes with coefficients that are not negative, and the relative error."""
    count = sizes.shape[1]
    chosen: list[tuple[int, ...]] = [()]
    ranks = range(1, count + 1) if count <= _FITTED_AXES else (1, count)
    chosen += [combination for rank in ranks for combination in itertools.combinations(range(count), rank)]
    columns = np.column_stack([sizes[:, list(c)].astype(float).prod(axis=1) for c in chosen])
    scale = columns.max(axis=0)
    factors, _ = nnls(columns / scale, ms)
    error = float(np.sqrt(np.mean((columns / scale @ factors - ms) ** 2)) / max(float(ms.mean()), 1e-9))
    return [(float(f), c) for f, c in zip(factors / scale, chosen, strict=True) if f > 0], round(error, 4)
