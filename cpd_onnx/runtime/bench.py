"""Bench: how long onnxruntime takes for some models, side by side.

Rounds are interleaved and in changing order, so that what else the machine does meets all models alike.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from cpd_onnx.errors import DataError, UnsupportedError
from cpd_onnx.ir.model import Array, Model, load
from cpd_onnx.runtime.sessions import execute, interleaved, open_model, working_feeds
from cpd_onnx.shapes.inference import fold
from cpd_onnx.summary import Summary, share

_PROFILED = 10
"""Runs that a profile adds up."""
_KILO = 1024.0


@dataclass(frozen=True)
class Setting:
    """Under what conditions is measured.

    Attributes:
        batch: samples at a time; None leaves the size that the model or its random inputs have.
        threads: that onnxruntime may use for one operator; 0 leaves its choice.
        provider: onnxruntime's execution provider.
    """

    batch: int | None = None
    threads: int = 0
    provider: str = "CPUExecutionProvider"


@dataclass(frozen=True)
class Timing:
    """What one model took under one setting; times in milliseconds.

    Attributes:
        p10: a tenth of the runs took less.
        per_second: samples per second at the median.
        runs: how many runs were timed.
        ratio: of its median to that of the first model.
    """

    model: str
    setting: Setting
    p10: float
    p50: float
    p90: float
    p99: float
    per_second: float
    runs: int
    ratio: float


@dataclass(frozen=True)
class Bench:
    """Everything that was measured.

    Attributes:
        timings: by setting, and in the order of the models.
        memory: model -> mebibytes of main memory that a fresh process takes more at most while it loads and runs it;
            0 where the system does not say.
        profiles: model -> operator -> milliseconds in one run, the longest first. Taking a profile takes time too, a
            microsecond or so a node. Of a provider beside the processor, it sees how long starting its kernels takes.
        profiled: batch and provider of memory and profiles, which are taken on one thread.
        machine: what it was measured on.
    """

    timings: tuple[Timing, ...]
    memory: Mapping[str, float] = field(default_factory=dict)
    profiles: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    profiled: Setting = field(default_factory=lambda: Setting(threads=1))
    machine: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)

    def latency_summary(self) -> Summary:
        """One row a model and setting."""
        columns = ("model", "provider", "batch", "threads", "p50 ms", "p90 ms", "p99 ms", "samples/s", "of the first")
        rows = []
        for timing in self.timings:
            place = timing.setting
            numbers = (f"{value:.2f}" for value in (timing.p50, timing.p90, timing.p99))
            rows.append((
                timing.model, place.provider.removesuffix("ExecutionProvider"), str(place.batch or ""),
                str(place.threads or ""), *numbers, f"{timing.per_second:.0f}", f"{100 * timing.ratio:.1f} %",
            ))  # fmt: skip  # a row
        return Summary(tuple(rows), columns, "Latency")

    def memory_summary(self) -> Summary:
        """One row a model."""
        first = next(iter(self.memory.values()), 0.0)
        rows = ((name, f"{mebibytes:.1f}", share(mebibytes, first)) for name, mebibytes in self.memory.items())
        return Summary(tuple(rows), ("model", "peak MiB", "of the first"), "Memory")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.latency_summary().html() + self.memory_summary().html()


def bench(
    paths: Sequence[Path],
    *,
    settings: Sequence[Setting] = (Setting(),),
    seconds: float = 4.0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    feed: Mapping[str, Array] | None = None,
) -> Bench:
    """Measure models of the same inputs side by side; names are those of the files.

    Args:
        paths: the files; the first one is what the others are compared with.
        settings: each is measured for `seconds`; memory and profiles under the first one, on one thread.
        seconds: of measuring; at least ten rounds, and at most two thousand.
        input_shapes: sizes of inputs that the first file leaves open.
        feed: inputs; random ones that the first model accepts if there are none.

    Raises:
        DataError: the models take other inputs.
        UnsupportedError: onnxruntime does not run a model on these inputs, or has no such provider.
    """
    models = {name: load(path) for name, path in zip(_names(paths), paths, strict=True)}
    _require_same_inputs(models)
    first = next(iter(models.values()))
    folded = fold(first, dict(input_shapes or {}))
    inputs = dict(feed) if feed is not None else next(working_feeds(folded, open_model(first), 1))
    free = {n for n, v in folded.scope.values.items() if n in inputs and v.shape and not v.has_fixed(0)}
    timings = [
        t for setting in settings for t in _timings(models, _batched(inputs, free, setting.batch), setting, seconds)
    ]
    profiled = replace(settings[0], threads=1)
    fed = _batched(inputs, free, profiled.batch)
    return Bench(
        tuple(timings),
        {name: _memory(path, fed, profiled.provider) for name, path in zip(models, paths, strict=True)},
        {name: _profile(model, fed, profiled.provider) for name, model in models.items()},
        profiled,
        machine(),
    )


def _require_same_inputs(models: Mapping[str, Model]) -> None:
    inputs = {name: sorted(i.name for i in m.graph.input if not m.has(i.name)) for name, m in models.items()}
    (first, wanted), *others = inputs.items()
    for name, given in others:
        if given != wanted:
            raise DataError(
                f"{name} takes inputs {given}, but {first} takes {wanted}: only like can be compared with like"
            )


def _names(paths: Sequence[Path]) -> Iterator[str]:
    """File names, with folders where these alone tell files apart."""
    plain = [path.name for path in paths]
    for path in paths:
        yield path.name if plain.count(path.name) == 1 else str(path)


def _batched(feed: Mapping[str, Array], free: set[str], batch: int | None) -> dict[str, Array]:
    """The inputs with so many samples, repeated as often as needed."""
    if batch is None:
        return dict(feed)
    if not free:
        fixed = next((len(array) for array in feed.values() if array.ndim), 1)
        if batch != fixed:
            raise UnsupportedError(f"the model takes {fixed} samples at a time: leave out --batch {batch}")
    return {name: np.resize(x, (batch, *x.shape[1:])) if name in free else x for name, x in feed.items()}


def _timings(
    models: Mapping[str, Model], feed: Mapping[str, Array], setting: Setting, seconds: float
) -> Iterator[Timing]:
    sessions = [open_model(model, threads=setting.threads, provider=setting.provider) for model in models.values()]
    times = [np.array(taken) * 1e3 for taken in interleaved(sessions, feed, seconds)]
    samples = next((len(array) for array in feed.values() if array.ndim), 1)
    for name, taken in zip(models, times, strict=True):
        p10, p50, p90, p99 = (float(p) for p in np.percentile(taken, (10, 50, 90, 99)))
        ratio = p50 / float(np.median(times[0]))
        yield Timing(name, setting, p10, p50, p90, p99, samples / p50 * 1e3, len(taken), ratio)


def _memory(path: Path, feed: Mapping[str, Array], provider: str) -> float:
    """Mebibytes that a process of its own takes more for a model."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_weigh, args=(path, dict(feed), provider, theirs))
    child.start()
    theirs.close()
    try:
        return float(ours.recv())
    except EOFError as error:
        raise UnsupportedError(f"the process that ran {path} to see its memory has died") from error
    finally:
        child.join()


def _weigh(path: Path, feed: dict[str, Array], provider: str, pipe: Any) -> None:
    """In a child: load and run, and send by how much the peak is above what was there before, in mebibytes."""
    before = _kilobytes("VmRSS")
    execute(open_model(path, threads=1, provider=provider), feed)
    pipe.send((_kilobytes("VmHWM") - before) / _KILO)


def _kilobytes(name: str) -> int:
    """An entry of the memory of this process: what it has now (VmRSS) or had at most (VmHWM); 0 where none is told.

    The peak that getrusage gives is the parent's before it is one's own.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _profile(model: Model, feed: Mapping[str, Array], provider: str) -> dict[str, float]:
    """Milliseconds by operator in one run, on one thread, the longest first; a first run does not count."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_model(model, threads=1, provider=provider, profile=Path(folder) / "trace")
        for _ in range(1 + _PROFILED):
            execute(session, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e3)
    total: dict[str, float] = defaultdict(float)
    for (operator, _), times in spent.items():
        total[operator] += sum(times[len(times) // (1 + _PROFILED) :]) / _PROFILED
    return dict(sorted(total.items(), key=lambda pair: -pair[1]))


def machine() -> dict[str, Any]:
    """What something is measured on."""
    return {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "system": platform.platform(),
        "onnxruntime": ort.__version__,
    }


def _processor() -> str:
    """What the processor calls itself, where the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
