"""Times of whole models that the runner measured on a target without Python, and the source of the runner."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from cpd_onnx.errors import DataError
from cpd_onnx.io.csv_rows import Row, read_rows
from cpd_onnx.runtime import providers
from cpd_onnx.runtime.bench import Bench, Setting, timing_of
from cpd_onnx.runtime.sessions import Method

_COLUMNS = ("model", "batch", "threads", "provider", "warmup", "ms")
"""Columns of the runner's output that are read; it has a row for each run."""


def runner_source() -> str:
    """Return the C++ source of the runner."""
    return resources.files("cpd_onnx.runtime").joinpath("runner.cpp").read_text(encoding="utf-8")


def read_times(paths: Sequence[Path]) -> Bench:
    """Return the benchmark that CSV files of the runner contain; the other models are compared with the first.

    Raises DataError if a file cannot be read or is not one of the runner's.
    """
    taken: dict[tuple[Setting, str], list[float]] = {}
    warmup: set[int] = set()
    for path in paths:
        for row in read_rows(path, _COLUMNS)[1]:
            ms = row.number("ms")
            if not ms:
                raise DataError(f"{row.where}: a run cannot take 0 ms")
            taken.setdefault((_setting(row), row.cells["model"]), []).append(ms)
            warmup.add(int(row.number("warmup")))
    firsts: dict[Setting, float] = {}
    timings = []
    for setting in dict.fromkeys(setting for setting, _ in taken):
        for (other, model), times in taken.items():
            if other == setting:
                first = firsts.setdefault(setting, float(np.median(times)))
                timings.append(timing_of(model, setting, times, setting.batch or 1, first))
    machine = {"source": ", ".join(map(str, paths))}
    return Bench(tuple(timings), machine=machine, method=Method(warmup=min(warmup)))


def _setting(row: Row) -> Setting:
    provider = row.cells["provider"]
    if not provider:
        raise DataError(f"{row.where}: provider is empty")
    try:
        name = providers.read(provider)
    except ValueError as error:
        raise DataError(f"{row.where}: {error}") from error
    return Setting(row.count("batch"), int(row.number("threads")), name)
