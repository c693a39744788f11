"""Benchmark: latency, memory and time by operator of models in onnxruntime, measured side by side.

Runs of the models are interleaved in rounds of varying order, so that other load on the machine affects all of them
equally.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from cpd_onnx.errors import DataError, UnsupportedError
from cpd_onnx.io.progress import advance, step
from cpd_onnx.ir.model import Array, Model, load
from cpd_onnx.runtime import providers
from cpd_onnx.runtime.sessions import Method, execute, interleaved, judged_feed, open_model, sample_count
from cpd_onnx.shapes.inference import fold
from cpd_onnx.summary import Summary, share

CSV_COLUMNS = (
    "model", "provider", "batch", "threads", "io_binding", "warmup", "runs", "p10_ms", "p50_ms", "p90_ms", "p99_ms",
    "samples_per_second", "of_the_first",
)  # fmt: skip  # a table
"""Columns of the CSV of a benchmark."""

_PROFILED = 10
"""Number of runs that a profile averages over, after one warm-up run (heuristic)."""
_KIBIBYTES = 1024.0
"""Kibibytes, the unit of /proc/self/status, in a mebibyte."""


@dataclass(frozen=True)
class Setting:
    """Conditions of a measurement.

    Attributes:
        batch: Samples at a time; None means the batch size of the model, or one sample if it leaves that open.
        threads: Number of intra-op threads of onnxruntime; 0 means its default.
        provider: Execution provider of onnxruntime, with options if wanted, see `runtime.providers`.
    """

    batch: int | None = None
    threads: int = 0
    provider: str = providers.CPU

    def words(self, without: Collection[str] = ()) -> str:
        """Return the setting as text, such as "CPU, batch 8, 2 threads", leaving out the named fields and defaults."""
        words = {
            "provider": providers.label(self.provider),
            "batch": f"batch {self.batch}" if self.batch else "",
            "threads": f"{self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else "",
        }
        return ", ".join(word for name, word in words.items() if word and name not in without)


@dataclass(frozen=True)
class Timing:
    """Latency of one model under one setting.

    Attributes:
        model: Name of the model.
        setting: Conditions of the measurement.
        p10: 10th percentile of the run times in milliseconds.
        p50: Median in milliseconds.
        p90: 90th percentile in milliseconds.
        p99: 99th percentile in milliseconds.
        per_second: Samples per second at the median.
        runs: Number of timed runs.
        ratio: Ratio of the median to that of the first model.
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
    """Results of a benchmark.

    Attributes:
        timings: Latencies by setting, in the order of the models.
        memory: Peak increase of main memory, in mebibytes, of a fresh process that loads and runs each model; 0 if the
            system does not report it.
        profiles: Milliseconds in one run by operator for each model, the longest first. Profiling adds about a
            microsecond a node. For providers other than the CPU it measures the launch of kernels only.
        profiled: Batch and provider of memory and profiles, which are measured on one thread.
        machine: Description of the machine.
        method: How the runs were timed.
    """

    timings: tuple[Timing, ...]
    memory: Mapping[str, float] = field(default_factory=dict)
    profiles: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    profiled: Setting = field(default_factory=lambda: Setting(threads=1))
    machine: Mapping[str, Any] = field(default_factory=dict)
    method: Method = field(default_factory=Method)

    def as_json(self) -> dict[str, Any]:
        """Return the results as plain values."""
        return asdict(self)

    def latency_summary(self) -> Summary:
        """Return the latencies as a table with one row a model and setting."""
        columns = ("model", "provider", "batch", "threads", "p50 ms", "p90 ms", "p99 ms", "samples/s", "of the first")
        rows = []
        for timing in self.timings:
            setting = timing.setting
            numbers = (f"{value:.2f}" for value in (timing.p50, timing.p90, timing.p99))
            rows.append((
                timing.model, providers.label(setting.provider), str(setting.batch or ""),
                str(setting.threads or ""), *numbers, f"{timing.per_second:.0f}", f"{100 * timing.ratio:.1f} %",
            ))  # fmt: skip  # a row
        return Summary(tuple(rows), columns, "Latency")

    def method_text(self) -> str:
        """Return how the runs were timed, such as "40 to 52 runs after 3 warm-up runs, inputs and outputs bound"."""
        counts = [timing.runs for timing in self.timings] or [0]
        least, most = min(counts), max(counts)
        runs = f"{least} runs" if least == most else f"{least} to {most} runs"
        warmup = self.method.warmup
        bound = ", inputs and outputs bound to the device" if self.method.io_binding else ""
        return f"{runs} of each model after {warmup} warm-up run{'' if warmup == 1 else 's'}{bound}"

    def csv(self) -> str:
        """Return the latencies as CSV: a row for each setting and model, in the order of `timings`; times in ms."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(CSV_COLUMNS)
        for timing in self.timings:
            setting, method = timing.setting, self.method
            where = (timing.model, setting.provider, setting.batch or "", setting.threads or "", int(method.io_binding))
            numbers = (timing.p10, timing.p50, timing.p90, timing.p99, timing.per_second, timing.ratio)
            table.writerow((*where, method.warmup, timing.runs, *(f"{number:.6g}" for number in numbers)))
        return text.getvalue()

    def memory_summary(self) -> Summary:
        """Return the peak memory as a table with one row a model."""
        first = next(iter(self.memory.values()), 0.0)
        rows = ((name, f"{mebibytes:.1f}", share(mebibytes, first)) for name, mebibytes in self.memory.items())
        return Summary(tuple(rows), ("model", "peak MiB", "of the first"), "Memory")

    def _repr_html_(self) -> str:
        """Return both tables as HTML, for notebooks."""
        return self.latency_summary().html() + self.memory_summary().html()


@step("latency")
def bench(
    paths: Sequence[Path],
    *,
    settings: Sequence[Setting] = (Setting(),),
    seconds: float = 4.0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    feed: Mapping[str, Array] | None = None,
    method: Method | None = None,
) -> Bench:
    """Measure models with the same inputs side by side; they are named after their files.

    Args:
        paths: Files of the models; the others are compared with the first.
        settings: Conditions to measure latency under; memory and profiles use the first one, on one thread.
        seconds: Duration of the measurement of each setting, within 10 to 2000 rounds, unless `method` gives the runs.
        input_shapes: Sizes of the dynamic axes of inputs, for the first model.
        feed: Inputs; by default random ones of the sizes under which the first model is judged, see `judged_inputs`.
        method: How the runs are timed; by default after three warm-up runs, and without IO binding.

    Raises:
        DataError: The models have different inputs.
        UnsupportedError: onnxruntime cannot run a model on these inputs, or has no such provider.
    """
    models = {name: load(path) for name, path in zip(_names(paths), paths, strict=True)}
    _require_same_inputs(models)
    first = next(iter(models.values()))
    folded = fold(first, dict(input_shapes or {}))
    inputs = dict(feed) if feed is not None else judged_feed(folded, open_model(first))
    free = {n for n, v in folded.scope.values.items() if n in inputs and v.shape and not v.has_fixed(0)}
    chosen = method or Method()
    timings = [
        timing
        for setting in settings
        for timing in _timings(models, _batched(inputs, free, setting.batch), setting, seconds, chosen)
    ]
    profiled = replace(settings[0], threads=1)
    fed = _batched(inputs, free, profiled.batch)
    return Bench(
        tuple(timings),
        {name: _memory(path, fed, profiled.provider) for name, path in zip(models, paths, strict=True)},
        {name: _profile(model, fed, profiled.provider) for name, model in models.items()},
        profiled,
        machine(),
        chosen,
    )


def _require_same_inputs(models: Mapping[str, Model]) -> None:
    inputs = {name: sorted(i.name for i in m.graph.input if not m.has(i.name)) for name, m in models.items()}
    (first, wanted), *others = inputs.items()
    for name, given in others:
        if given != wanted:
            raise DataError(
                f"{name} takes inputs {given}, but {first} takes {wanted}: give models with the same inputs"
            )


def _names(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the names of the files, as whole paths where names are not unique."""
    plain = [path.name for path in paths]
    for path in paths:
        yield path.name if plain.count(path.name) == 1 else str(path)


def _batched(feed: Mapping[str, Array], free: set[str], batch: int | None) -> dict[str, Array]:
    """Return the inputs with that many samples, repeated as needed."""
    if batch is None:
        return dict(feed)
    if not free:
        fixed = sample_count(feed)
        if batch != fixed:
            raise UnsupportedError(f"the model has a fixed batch size of {fixed}: leave out --batch {batch}")
    return {name: np.resize(x, (batch, *x.shape[1:])) if name in free else x for name, x in feed.items()}


def _timings(
    models: Mapping[str, Model], feed: Mapping[str, Array], setting: Setting, seconds: float, method: Method
) -> Iterator[Timing]:
    sessions = [open_model(model, threads=setting.threads, provider=setting.provider) for model in models.values()]
    times = [np.array(taken) * 1e3 for taken in interleaved(sessions, feed, seconds, method=method, observer=advance)]
    samples = sample_count(feed)
    for name, taken in zip(models, times, strict=True):
        yield timing_of(name, setting, taken, samples, float(np.median(times[0])))


def timing_of(model: str, setting: Setting, ms: npt.ArrayLike, samples: int, first: float) -> Timing:
    """Return the percentiles of the milliseconds of a model's runs; `first` is the median of the first model."""
    taken = np.asarray(ms)
    p10, p50, p90, p99 = (float(p) for p in np.percentile(taken, (10, 50, 90, 99)))
    return Timing(model, setting, p10, p50, p90, p99, samples / p50 * 1e3, len(taken), p50 / first)


def _memory(path: Path, feed: Mapping[str, Array], provider: str) -> float:
    """Return the peak memory of a model, in mebibytes, measured in a process of its own."""
    # Not by multiprocessing, whose children run the script of the caller again, up to this call.
    words = pickle.dumps(sys.path) + pickle.dumps((path, dict(feed), provider))
    done = subprocess.run([sys.executable, "-P", "-c", _WEIGHING], input=words, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise UnsupportedError(f"the process that measured the memory of {path} failed or was killed")
    return float(done.stdout)


_WEIGHING = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from cpd_onnx.runtime.bench import weigh
print(weigh(*pickle.load(sys.stdin.buffer)))
"""
"""Program of the process in which the memory of a model is measured; it finds modules where its caller does."""


def weigh(path: Path, feed: dict[str, Array], provider: str) -> float:
    """Load and run a model, and return the increase of this process's memory to its peak, in mebibytes."""
    before = _kibibytes("VmRSS")
    execute(open_model(path, threads=1, provider=provider), feed)
    return (_kibibytes("VmHWM") - before) / _KIBIBYTES


def _kibibytes(name: str) -> int:
    """Return the current (VmRSS) or peak (VmHWM) memory of this process in kibibytes; 0 if it is not reported.

    The peak of getrusage is not used, since a child process starts with that of its parent.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _profile(model: Model, feed: Mapping[str, Array], provider: str) -> dict[str, float]:
    """Return milliseconds by operator in one run on one thread, the longest first, after a warm-up run."""
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
    """Return a description of this machine: processor, number of cores, operating system, version of onnxruntime."""
    return {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "system": platform.platform(),
        "onnxruntime": ort.__version__,
    }


def _processor() -> str:
    """Return the model name of the processor, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
