"""Latency as a cost: where the time of a model goes under onnxruntime, as a function of its widths.

The model is its own benchmark, so that fusions, layouts and threads count as they are, and nothing is known here about
operators. It is pruned to several dozen random widths, and each time onnxruntime's profiler tells what each kernel took
and what shapes it saw. A size in these shapes that changes as an axis of the model does is that axis, rounded up to
whole blocks of the kernel or not. So each kernel is known to depend on certain axes, and its time is fitted, with
factors that are not negative, by products of their sizes.

onnxruntime may run a node as another kernel where its widths are no whole blocks, and convert layouts in between.
Kernels whose names start as that of a node, or of what it makes, are therefore taken for one; the time of those that
still come and go is fitted as a whole, by the multiply-accumulates of the model and the elements of its tensors.

Kernels are fast at some widths only: a convolution may take twice as long at 63 channels as at 64. So the first of
these widths are, in turn, multiples of 1, 2, 4, … and of no more, at about the same shares: what a group's kernels take
in each turn, compared with their share of the original's work, says which multiple its widths should be of. Only such
widths are looked at further.

While a model runs, so does the original in between: what else the machine does then slows both, and is divided out.
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
from cpd_onnx.channels.costs import Floats, Term
from cpd_onnx.channels.groups import Combed, Group
from cpd_onnx.errors import DataError, TargetError, UnsupportedError
from cpd_onnx.io.files import read_json, write_atomically
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.runtime.sessions import execute, interleaved, open_model, working_feeds

FORMAT = "cpd-onnx/latency"
VERSION = 1
MULTIPLES = (1, 2, 4, 8, 16, 32)
"""Of which widths are tried."""

_BLOCKS = (1, 2, 4, 8, 16, 32, 64)
"""To whose multiples a kernel may round a width up."""
_TURNS = 3
"""Times that each multiple is tried."""
_SAMPLES = 20
"""Widths that the kernels' times are fitted to."""
_SHARES = (0.3, 0.95)
"""Of each group's channels that stay when multiples are compared."""
_LEAST_SHARE = 0.2
"""Of the widths that times are fitted to."""
_NEARLY = 1.06
"""A multiple this near to the fastest one is as good."""
_SLOW = 1.5
"""A group stays whole if its fastest smaller widths are that much slower, for their work, than where it was whole."""
_SHRINK = 0.05
"""Share of the whole time by which what a group says is mixed with what all groups say."""
_WATCHED_SECONDS, _LEAST_RUNS, _MOST_RUNS = 0.12, 5, 60
"""How long each model runs under the profiler, and again without it."""
_OTHERS = "others"
"""The name of all kernels that are not there in all models."""
_FITTED_AXES = 3
"""Axes of a kernel all products of which are fitted; of more, only the product of all."""

Observer: TypeAlias = Callable[[int, int], None]
"""Called with the number of models that have been measured, and how many it will be."""
_Times: TypeAlias = "dict[str, _Kernel]"
_Axis: TypeAlias = tuple[str, str, int]
"""Scope path, name of the tensor, number of the axis."""


@dataclass(frozen=True)
class KernelCost:
    """What one kernel takes.

    Attributes:
        name: as onnxruntime has it.
        operator: likewise.
        ms: in the original.
        error: root of the mean squared difference of fit and measurement, relative to the mean.
        terms: milliseconds, and the axes (scope path, tensor, number) whose sizes they are multiplied by.
    """

    name: str
    operator: str
    ms: float
    error: float
    terms: tuple[tuple[float, tuple[_Axis, ...]], ...]


@dataclass(frozen=True)
class GroupWidths:
    """Which multiples a group's widths should be of; `slowdown` is what each multiple costs, relative to its work."""

    name: str
    size: int
    multiple: int
    slowdown: Mapping[int, float]


@dataclass(frozen=True)
class CostTable:
    """What a model takes on one machine for any widths.

    Attributes:
        sha256: of the model.
        setting: under what conditions it was measured.
        ms: a run of the original, without the profiler.
        rest: milliseconds between kernels, and in those that are not there at all widths.
        unattributed: share of the kernels' time that no axis accounts for.
        groups: which widths are worth looking at.
        kernels: what each kernel takes.
        machine: what it was measured on.
    """

    sha256: str
    setting: Setting
    ms: float
    rest: float
    unattributed: float
    groups: tuple[GroupWidths, ...]
    kernels: tuple[KernelCost, ...]
    machine: Mapping[str, Any] = field(default_factory=dict)

    def multiples(self, combed: Combed) -> dict[int, int]:
        """For each group the multiple of its widths, by id; ValueError if the groups are not those of the table."""
        known = {(g.name, g.size): g.multiple for g in self.groups}
        if set(known) != {(g.name, len(g)) for g in combed.groups}:
            raise ValueError("the cost table has other groups than the model")
        return {g.id: known[(g.name, len(g))] for g in combed.groups}

    def finer(self, halvings: int) -> CostTable:
        """The same with multiples halved so many times, for targets that need narrower widths than the fast ones.

        Groups that should stay whole then have the fastest of their smaller widths.
        """
        return replace(self, groups=tuple(_halved(group, halvings) for group in self.groups)) if halvings else self

    def loosened(self, combed: Combed) -> CostTable:
        """The same with what no width seems to change shrinking with the multiply-accumulates of the model."""
        fixed = self.rest + sum(ms for kernel in self.kernels for ms, axes in kernel.terms if not axes)
        kernels = tuple(replace(k, terms=tuple(term for term in k.terms if term[1])) for k in self.kernels)
        work = _terms_of(combed, [(cost.factor, cost.axes) for cost in combed.recorder.costs])
        whole = sum(factor * math.prod(len(_axis_of(combed, axis)) for axis in axes) for factor, axes in work)
        shrinking = tuple((fixed * factor / whole, axes) for factor, axes in work) if whole else ()
        return replace(self, rest=0.0, kernels=(*kernels, KernelCost(_OTHERS, "", fixed, 0.0, shrinking)))

    def terms(self, combed: Combed) -> list[Term]:
        """Milliseconds as a sum over products of axes."""
        kernels = (
            (ms, tuple(_axis_of(combed, axis) for axis in axes)) for kernel in self.kernels for ms, axes in kernel.terms
        )
        return [(self.rest, ()), *kernels]

    def require(self, model: Model) -> None:
        """Raise DataError if the table is of another model."""
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
                "the cost table has other groups or axes than the model: measure it anew with 'cpd-onnx latency'"
            ) from error

    def as_json(self) -> dict[str, Any]:
        """The same as plain values, with format and version."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        write_atomically(path, (json.dumps(self.as_json(), indent=1) + "\n").encode())


def _text(name: str | bytes) -> str:
    """A name as a trace has it; one that is no text comes as bytes."""
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
    """The table of a JSON document; ValueError, KeyError, TypeError or AttributeError where it is not one."""
    if not isinstance(content, dict) or (content["format"], content["version"]) != (FORMAT, VERSION):
        raise ValueError(f"'format' should be {FORMAT!r} and 'version' {VERSION}")
    setting = Setting(**content["setting"])
    batch, threads = setting.batch, setting.threads
    if not (batch is None or _whole(batch, 1)) or not _whole(threads, 0) or not isinstance(setting.provider, str):
        raise ValueError("'setting' has values of a wrong type")
    machine = content["machine"]
    if not isinstance(content["sha256"], str) or not isinstance(machine, dict):
        raise ValueError("'sha256' or 'machine' is of a wrong type")
    ms, rest, unattributed = (_amount(content[name]) for name in ("ms", "rest", "unattributed"))
    groups, kernels = map(_group_of, content["groups"]), map(_kernel_of, content["kernels"])
    return CostTable(content["sha256"], setting, ms, rest, unattributed, tuple(groups), tuple(kernels), machine)


def _kernel_of(entry: Mapping[str, Any]) -> KernelCost:
    terms = tuple((_amount(ms), tuple(map(_axis_in, axes))) for ms, axes in entry["terms"])
    name, operator = entry["name"], entry["operator"]
    if not isinstance(name, str) or not isinstance(operator, str):
        raise ValueError("a kernel has a name of a wrong type")
    return KernelCost(name, operator, _amount(entry["ms"]), _amount(entry["error"]), terms)


def _axis_in(entry: Any) -> _Axis:
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
    """A finite number from zero on."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{reprlib.repr(value)} is not a number of at least 0")
    return value


class LatencyProbe:
    """Measures models pruned to any channels beside the original."""

    def __init__(self, combed: Combed, setting: Setting) -> None:
        """Open the original; raises UnsupportedError if onnxruntime does not run it so."""
        self.combed, self.setting = combed, setting
        self.feed = _feed(combed, setting.batch)
        named = [node for node in combed.folded.scope.nodes if node.name and node.output]
        self._nodes = {_text(name): _text(node.name) for node in named for name in (node.name, *node.output) if name}
        self._original = self.session(combed.folded.model)

    def pruned(self, channels: npt.NDArray[np.int64]) -> Model:
        """The model without some primitive atoms."""
        return rewrite(self.combed, KeepMask(self.combed.atoms, channels)).model

    def session(self, model: Model, profile: Path | None = None) -> ort.InferenceSession:
        """Open a model under the setting."""
        return open_model(model, threads=self.setting.threads, provider=self.setting.provider, profile=profile)

    def ratio(self, channels: npt.NDArray[np.int64], seconds: float = 2.0) -> float:
        """Median time of the model without some primitive atoms over that of the original, in interleaved rounds."""
        return self.ratio_of(self.pruned(channels), seconds)

    def ratio_of(self, model: Model, seconds: float = 2.0) -> float:
        """The same of any model that takes the original's inputs."""
        times = interleaved([self._original, self.session(model)], self.feed, seconds)
        return float(np.median(times[1]) / np.median(times[0]))

    def profile(self, model: Model) -> tuple[_Times, float, float]:
        """What each kernel of a model takes with the shapes that it sees; milliseconds of the model and the original.

        The profiler slows each kernel by about as much: by so much that without it they take what the model takes when
        nobody looks.
        """
        with tempfile.TemporaryDirectory() as folder:
            session = self.session(model, Path(folder) / "trace")
            _, first = self._in_turns(session)
            events = json.loads(Path(session.end_profiling()).read_text("utf-8", "replace"))
        taken, meanwhile = self._in_turns(session)
        speed = _typical(meanwhile, len(meanwhile)) / _typical(first, len(first))
        kernels = _kernels(events, len(first), self._nodes)
        ms = _typical(taken, len(taken))
        watching = _watching([speed * kernel.ms for kernel in kernels.values()], ms)
        times = {name: replace(k, ms=max(0.0, speed * k.ms - watching)) for name, k in kernels.items()}
        return times, ms, _typical(meanwhile, len(meanwhile))

    def _in_turns(self, session: ort.InferenceSession) -> tuple[list[float], list[float]]:
        """Milliseconds of some runs of a model, and of the original in between; the first one warms up."""
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
    """Measure what a model takes as a function of its widths.

    Raises TargetError if it has no groups, UnsupportedError if onnxruntime does not run it.
    """
    combed = probe.combed
    if not combed.groups:
        raise TargetError("nothing can be pruned in this model, so its time cannot be less")
    made = _Samples(probe, observer)
    rng = np.random.default_rng(seed)
    made.add(np.asarray([len(g) for g in combed.groups]))
    turns: dict[int, list[int]] = defaultdict(list)
    for _ in range(_TURNS):
        shares = rng.uniform(*_SHARES, len(combed.groups))
        for multiple in MULTIPLES:
            turns[multiple].append(made.add(np.asarray(list(_strict(combed, multiple, shares)))))
    groups = _fast_widths(made, turns)
    least = [_nearest(g.size, g.multiple, 0.0) for g in groups]
    fitted = [0, made.add(np.asarray(least))]
    for _ in range(_SAMPLES):
        share = rng.uniform(_LEAST_SHARE, 1.0)
        shares = np.clip(share + rng.uniform(-0.4, 0.4, len(groups)), _LEAST_SHARE, 1.0)
        widths = [_nearest(g.size, g.multiple, s) for g, s in zip(groups, shares, strict=True)]
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
    )


def _machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "system": platform.platform(), "onnxruntime": ort.__version__}


def _feed(combed: Combed, batch: int | None) -> dict[str, Array]:
    """Inputs that the model accepts, with so many samples if it leaves their number open."""
    folded = combed.folded
    feed = next(working_feeds(folded, open_model(folded.model, threads=1), 1))
    if batch is None:
        return feed
    values = {name: folded.scope.values[name] for name in feed}
    free = [name for name, value in values.items() if value.shape and not value.has_fixed(0)]
    if not free:
        raise UnsupportedError(f"the model takes a fixed number of samples at a time: leave out the batch of {batch}")
    return {name: np.resize(x, (batch, *x.shape[1:])) if name in free else x for name, x in feed.items()}


# What the profiler says.


@dataclass(frozen=True)
class _Kernel:
    """One kernel in one model: its operator, milliseconds in a run, and all sizes in its shapes."""

    operator: str
    ms: float
    sizes: tuple[int, ...]


def _kernels(events: Sequence[Mapping[str, Any]], runs: int, nodes: Mapping[str, str]) -> _Times:
    """Kernels by name, or by that of the node that they are made of, of so many runs."""
    taken: dict[str, list[float]] = defaultdict(list)
    about: dict[str, tuple[str, tuple[int, ...]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name, facts = event["name"].removesuffix("_kernel_time"), event["args"]
            taken[name].append(event["dur"] / 1e3)
            shapes = [*facts.get("input_type_shape", []), *facts.get("output_type_shape", [])]
            about[name] = (facts["op_name"], tuple(n for typed in shapes for dims in typed.values() for n in dims))
    found: _Times = {}
    for name, ms in taken.items():
        operator, sizes = about[name]
        node = _node_of(name, nodes)
        before = found.get(node, _Kernel(operator, 0.0, ()))
        found[node] = _Kernel(before.operator, before.ms + _typical(ms, runs), (*before.sizes, *sizes))
    return found


def _node_of(kernel: str, nodes: Mapping[str, str]) -> str:
    """The node whose name, or that of whose output, is the longest start of a kernel's name; else that name."""
    start = kernel
    while start and start not in nodes:
        start = start.rpartition("_")[0]
    return nodes.get(start, kernel)


def _typical(ms: Sequence[float], runs: int) -> float:
    """Milliseconds in a run of what runs once or, in a loop, several times in each; the faster half counts.

    The other runs warm up or meet with something else that the machine does.
    """
    each = (
        np.sort(np.asarray(ms[len(ms) % runs :]).reshape(runs, -1).sum(axis=1)) if len(ms) >= runs else np.asarray(ms)
    )
    return float(each[: max(1, len(each) // 2)].mean())


def _watching(kernels: Sequence[float], ms: float) -> float:
    """Milliseconds that the profiler adds to each kernel: without them the kernels take what the whole model takes."""
    low, high = 0.0, max(kernels, default=0.0)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(0.0, each - middle) for each in kernels) > ms else (low, middle)
    return low


class _Samples:
    """The models that were measured: widths of the groups, kernels, and sizes of all axes, one row each."""

    def __init__(self, probe: LatencyProbe, observer: Observer | None) -> None:
        self.probe, self.combed, self.observer = probe, probe.combed, observer
        self.order = [np.random.default_rng(g.id).permutation(g.channels) for g in self.combed.groups]
        self.axes = list(_variable_axes(self.combed))
        self.widths: list[npt.NDArray[np.int64]] = []
        self.times: list[_Times] = []
        self.rows: list[list[int]] = []
        self.ms: list[float] = []
        self.original = 0.0
        self._known: dict[Any, tuple[int, ...]] = {}

    def add(self, widths: npt.NDArray[np.int64]) -> int:
        """Measure one choice of widths; its number."""
        gone = np.concatenate([order[width:] for order, width in zip(self.order, widths.tolist(), strict=True)])
        model = self.probe.pruned(gone) if len(gone) else self.combed.folded.model
        times, ms, meanwhile = self.probe.profile(model)
        self.original = self.original or meanwhile
        speed = self.original / meanwhile
        self.times.append({name: replace(kernel, ms=speed * kernel.ms) for name, kernel in times.items()})
        self.ms.append(speed * ms)
        kept = KeepMask(self.combed.atoms, gone)
        self.rows.append([kept.count(axis) for _, axis in self.axes])
        self.widths.append(widths)
        if self.observer is not None:
            self.observer(len(self.times), 2 + _TURNS * len(MULTIPLES) + _SAMPLES)
        return len(self.times) - 1

    def sum(self, terms: Sequence[tuple[float, tuple[_Axis, ...]]]) -> Floats:
        """What a sum of products of axes comes to in each model."""
        place = {name: number for number, (name, _) in enumerate(self.axes)}
        rows = np.asarray(self.rows, float)
        return np.asarray(sum(factor * rows[:, [place[a] for a in axes]].prod(axis=1) for factor, axes in terms))

    def places(self, name: str) -> tuple[int, ...]:
        """Places of the axes that a kernel's sizes follow, each once; from all models that have the kernel."""
        forms: dict[int, list[int]] = defaultdict(list)  # it may see more tensors in one model than in another
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
        """The first axis that is as long as the sizes say in all models, rounded up to blocks or not."""
        key = (having, tuple(sizes.tolist()))
        if key not in self._known:
            column = sizes[:, None]
            rounded = (((-(-rows // b) * b == column) | (rows == column)).all(axis=0) for b in _BLOCKS)
            matches = map(np.flatnonzero, rounded)
            self._known[key] = next((tuple(m[:1].tolist()) for m in matches if len(m)), ())
        return next(iter(self._known[key]), None)


def _axis_of(combed: Combed, axis: _Axis) -> Axis:
    path, name, number = axis
    return (combed.tensors[(path, name)].axes or [])[number]


def _terms_of(
    combed: Combed, products: Sequence[tuple[float, Sequence[Axis]]]
) -> list[tuple[float, tuple[_Axis, ...]]]:
    """A sum of products of axes, those that channels can go from by name, alike ones as one."""
    names = {fingerprint(axis): name for name, axis in _variable_axes(combed)}
    terms: dict[tuple[_Axis, ...], float] = defaultdict(float)
    for factor, axes in products:
        found = [(len(axis), names.get(fingerprint(axis))) for axis in axes]
        fixed = math.prod(size for size, name in found if name is None)
        terms[tuple(name for _, name in found if name is not None)] += factor * fixed
    return [(factor, axes) for axes, factor in terms.items() if factor]


def _variable_axes(combed: Combed) -> Iterator[tuple[_Axis, npt.NDArray[np.int64]]]:
    """All axes of tensors that channels can go from, each once."""
    seen: set[Fingerprint] = set()
    for (path, name), tensor in combed.tensors.items():
        for number, axis in enumerate(tensor.axes or []):
            if fingerprint(axis) not in seen and not combed.atoms.all_frozen(axis):
                seen.add(fingerprint(axis))
                yield (path, name, number), axis


# Which widths are fast.


def _strict(combed: Combed, multiple: int, shares: Floats) -> Iterator[int]:
    """Widths near shares of the groups that are multiples of one number and of no higher one that is tried."""
    for group, share in zip(combed.groups, shares, strict=True):
        step = multiple if multiple == MULTIPLES[-1] else 2 * multiple
        widths = [*range(multiple, len(group), step)] or [len(group)]
        yield _closest(widths, share * len(group))


def _nearest(size: int, multiple: int, share: float) -> int:
    widths = [*range(multiple, size, multiple), size]
    return _closest(widths, share * size)


def _closest(widths: Sequence[int], wish: float) -> int:
    return widths[int(np.argmin(np.abs(np.asarray(widths) - wish)))]


def _fast_widths(made: _Samples, turns: Mapping[int, Sequence[int]]) -> list[GroupWidths]:
    """For each group the smallest multiple at which its kernels are about as fast as at any, for the work they do."""
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
    """The multiple for one group; where all smaller widths are slow, its size."""
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
    """The groups that each axis hangs on."""
    owner, _ = made.combed.owners
    parts = (owner[made.combed.atoms.parts(axis)].ravel().tolist() for _, axis in made.axes)
    return [tuple(sorted(set(found) - {-1})) for found in parts]


def _groups(made: _Samples, owners: Sequence[tuple[int, ...]], name: str) -> list[int]:
    return sorted({group for place in made.places(name) for group in owners[place]})


# How long kernels take.


def _fitted(made: _Samples, samples: Sequence[int]) -> tuple[list[KernelCost], float]:
    """What each kernel takes, those that are not there in all models as one; the share of their time that is fixed."""
    costs = []
    others = np.asarray([sum(kernel.ms for kernel in made.times[sample].values()) for sample in samples])
    total = float(others.sum())
    for name, kernel in made.times[0].items():
        if not all(name in made.times[sample] for sample in samples):
            continue
        places = made.places(name)
        taken = np.asarray([made.times[sample][name].ms for sample in samples])
        terms, error = _terms(np.asarray(made.rows)[list(samples)][:, list(places)], taken)
        axes = [made.axes[place][0] for place in places]
        named = tuple((ms, tuple(axes[k] for k in chosen)) for ms, chosen in terms)
        costs.append(KernelCost(name, kernel.operator, kernel.ms, error, named))
        others = others - taken
    if others.sum() <= _SHRINK * total:
        return costs, max(0.0, float(others.sum()) / total)
    work = _terms_of(made.combed, [(cost.factor, cost.axes) for cost in made.combed.recorder.costs])
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


def _terms(sizes: npt.NDArray[np.int64], ms: Floats) -> tuple[list[tuple[float, tuple[int, ...]]], float]:
    """Milliseconds as a sum of products of sizes, with factors that are not negative, and the relative error."""
    count = sizes.shape[1]
    chosen: list[tuple[int, ...]] = [()]
    ranks = range(1, count + 1) if count <= _FITTED_AXES else (1, count)
    chosen += [combination for rank in ranks for combination in itertools.combinations(range(count), rank)]
    columns = np.column_stack([sizes[:, list(c)].astype(float).prod(axis=1) for c in chosen])
    scale = columns.max(axis=0)
    factors, _ = nnls(columns / scale, ms)
    error = float(np.sqrt(np.mean((columns / scale @ factors - ms) ** 2)) / max(float(ms.mean()), 1e-9))
    return [(float(f), c) for f, c in zip(factors / scale, chosen, strict=True) if f > 0], round(error, 4)
