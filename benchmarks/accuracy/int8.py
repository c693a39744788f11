"""Pruning and quantising together: accuracy, file size and latency of four trained models.

    python benchmarks/accuracy/int8.py --data DATA [--only gtsrb] [--work FOLDER] [--distill]
    python benchmarks/accuracy/int8.py --data DATA --work FOLDER --time
    python benchmarks/accuracy/int8.py --table

DATA is a folder with `onnx/` and `load.py`, as `without_training.py` takes it, whose cases these are: half of the MACs
(ESPNet 0.53), no training, 512 unlabelled images (ESPNet 64) for pruning, repair and calibration; all test images count.

Each model is measured unchanged, pruned (`cpd-onnx prune --data`), quantised (`cpd-onnx deploy --int8 --data`), pruned,
then quantised, and quantised, then pruned; the latter also with integer operators (`--int8-form qoperator`). One is also
quantised and then pruned by L2 without a repair, and pruned to widths that are multiples of 8 (`--profile avx2`;
multiples of 16 cannot reach half of its MACs).
With --distill that model is also trained for a few updates: pruned, trained, quantised; and pruned, quantised, trained.

Latency: one thread, batch size 1 (or the model's fixed one), all files of a model interleaved in random order; medians
of the thread's CPU time, which other jobs do not affect, and of wall time. --time repeats the timing of the files in
FOLDER and keeps all other results. An interrupted run continues with the files in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import HERE, command, commit, images, macs, prepared
from without_training import CASES, Case, calibration, tested

from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import fixed_batch, inputs_of
from cpd_onnx.ir.model import load
from cpd_onnx.runtime.bench import machine
from cpd_onnx.runtime.sessions import execute, open_model

BOTH_ORDERS = "gtsrb"
"""Case that is also pruned without a repair after quantisation, to multiples of 8, and trained."""
SECONDS = 20.0
"""Seconds of interleaved timing for each model."""
RECIPE = ("--steps", 300, "--batch-size", 64, "--lr", 0.001, "--shift", 2, "--threads", 1, "--compare", "outputs")
WAYS = {
    "pruned": ("dense", "prune", ()),
    "int8": ("dense", "deploy", ()),
    "pruned, int8": ("pruned", "deploy", ()),
    "int8, pruned": ("int8", "prune", ()),
    "int8 operators": ("dense", "deploy", ("--int8-form", "qoperator")),
    "int8 operators, pruned": ("int8 operators", "prune", ()),
    "int8, pruned by L2": ("int8", "prune", ("--score", "l2", "--no-repair")),
    "pruned in eights": ("dense", "prune", ("--profile", "avx2")),
    "pruned in eights, int8": ("pruned in eights", "deploy", ()),
    "pruned, distilled": ("pruned", "distill", ()),
    "pruned, distilled, int8": ("pruned, distilled", "deploy", ()),
    "pruned, int8, distilled": ("pruned, int8", "distill", ()),
}
"""How each file is produced: from which file, by which command, with which additional options."""
USUAL = ("pruned", "int8", "pruned, int8", "int8, pruned", "int8 operators", "int8 operators, pruned")
"""Files that are produced for every model."""
LABELS = {
    "dense": "original",
    "int8, pruned by L2": "int8, pruned by L2 without a repair",
    "pruned in eights": "pruned in multiples of 8",
    "pruned in eights, int8": "pruned in multiples of 8, int8",
}
"""Printed names of files that the results name differently."""


def ways(name: str, *, distill: bool) -> list[str]:
    more = [way for way in WAYS if way not in USUAL and (distill or "distilled" not in way)]
    return [*USUAL, *(more if name == BOTH_ORDERS else [])]


def made(way: str, files: dict[str, Path], case: Case, archive: Path, training: Path | None) -> float:
    """Produce one file through the command line and return the seconds that it took."""
    source, verb, options = WAYS[way]
    out, started = file_of(case, files["dense"].parent, way), time.perf_counter()
    arguments: tuple[Any, ...] = ("--data", archive, "--samples", case.samples)
    if verb == "prune":
        arguments = (*arguments, "--target", f"macs={case.target}", "--repair-samples", case.samples)
    if verb == "deploy":
        arguments = (*arguments, "--int8")
    if verb == "distill":
        arguments = ("--data", training, *RECIPE)
        command(verb, files["dense"], files[source], "-o", out, *arguments, "--force")
    else:
        command(verb, files[source], "-o", out, *arguments, *options, "--force")
    files[way] = out
    return time.perf_counter() - started


def rows(
    name: str, folder: Path, work: Path, known: dict[str, Any], *, distill: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield one row for each file, reusing known rows whose files exist; timing follows once all files are produced."""
    case = CASES[name]
    original = folder / "onnx" / f"{case.model}.onnx"
    (entry,) = inputs_of(load(original).proto)
    test = tested(case, folder, entry.name, None)
    archive, training = work / f"{case.model}_calibration.npz", None
    np.savez(archive, **{entry.name: calibration(case, folder, entry.name)})
    if distill and name == BOTH_ORDERS:
        training = work / f"{case.model}_train.npz"
        np.savez(training, **{entry.name: prepared(images(folder, case.data, "train")[0], case.data)})
    files = {"dense": file_of(case, work, "dense")}
    files["dense"].write_bytes(original.read_bytes())
    found: dict[str, dict[str, Any]] = {}
    for way in ["dense", *ways(name, distill=distill)]:
        if way in known and file_of(case, work, way).exists():
            files[way], found[way] = file_of(case, work, way), known[way]
            continue
        seconds = 0.0 if way == "dense" else made(way, files, case, archive, training)
        scored = evaluate(load(files[way]).complete_proto(), test, case.metric)
        found[way] = {
            case.metric: round(scored, 4),
            "macs": round(macs(files[way]) / macs(original), 4),
            "bytes": files[way].stat().st_size,
            "seconds": round(seconds, 1),
        }
        print(name, way, found[way], file=sys.stderr, flush=True)
    times = timed(files, {entry.name: next(test.batches(fixed_batch([entry]) or 1))[entry.name]})
    for way, row in found.items():
        yield way, row | times[way]


def timed(files: dict[str, Path], feed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the median times of each file, interleaved in random order after three warm-up runs."""
    rng = np.random.default_rng(0)
    sessions = {way: open_model(load(path), threads=1) for way, path in files.items()}
    for session in [*sessions.values()] * 3:
        execute(session, feed)
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in files}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(taken["dense"]) < 10:
        for way in rng.permutation(list(sessions)):
            start = time.thread_time(), time.perf_counter()
            sessions[way].run(None, feed)
            taken[way].append((time.thread_time() - start[0], time.perf_counter() - start[1]))
    middle = {way: np.median(np.array(times), axis=0) for way, times in taken.items()}
    return {
        way: {
            "cpu_ms": round(1e3 * float(cpu), 3), "of_dense": round(float(cpu / middle["dense"][0]), 3),
            "clock_ms": round(1e3 * float(clock), 3), "runs": len(taken[way]),
        }
        for way, (cpu, clock) in middle.items()
    }  # fmt: skip  # a table


def again(name: str, folder: Path, work: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Return the rows with new times."""
    files = {way: file_of(CASES[name], work, way) for way in case}
    (entry,) = inputs_of(load(files["dense"]).proto)
    test = tested(CASES[name], folder, entry.name, 64)
    times = timed(files, {entry.name: next(test.batches(fixed_batch([entry]) or 1))[entry.name]})
    return {way: row | times[way] for way, row in case.items()}


def file_of(case: Case, work: Path, way: str) -> Path:
    return work / f"{case.model}_{way.replace(', ', '_').replace(' ', '-')}.onnx"


def show(content: dict[str, Any]) -> None:
    print("| | | score | change | file, kB | of original | CPU ms | of original |\n|---|---|---|---|---|---|---|---|")
    for name, case in content["cases"].items():
        metric = CASES[name].metric
        original = case["dense"]
        for way, row in case.items():
            change = "" if way == "dense" else f"{100 * (row[metric] - original[metric]):+.1f}"
            cells = (
                name, LABELS.get(way, way), f"{100 * row[metric]:.1f}", change, f"{row['bytes'] / 1e3:.0f}",
                f"{row['bytes'] / original['bytes']:.2f}",
                *(f"{row[key]:.2f}" if key in row else "" for key in ("cpu_ms", "of_dense")),
            )  # fmt: skip  # a row
            print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--work", type=Path, help="folder for the produced files (default: they are deleted)")
    parser.add_argument("--distill", action="store_true", help=f"also train {BOTH_ORDERS}")
    parser.add_argument("--time", action="store_true", help="only repeat the timing of the files in --work")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8.json")
    options = parser.parse_args()
    content = json.loads(options.out.read_text()) if options.out.exists() else {"cases": {}}
    if options.table:
        show(content)
        return
    if options.data is None:
        parser.error("--data is required unless --table is given")
    if options.time and options.work is None:
        parser.error("--time requires --work with the files of an earlier run")
    line = f"python benchmarks/accuracy/int8.py {' '.join(Path(word).name for word in sys.argv[1:])}"
    content |= {"machine": machine(), "commit": commit(), "timed_by" if options.time else "command": line}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or (content["cases"] if options.time else CASES):
            work = options.work or Path(folder)
            content["cases"][name] = (
                again(name, options.data, work, content["cases"][name])
                if options.time
                else dict(rows(name, options.data, work, content["cases"].get(name, {}), distill=options.distill))
            )
            content.setdefault("load_average_while_timed", {})[name] = round(os.getloadavg()[0], 1)
            options.out.write_text(json.dumps(content, indent=1) + "\n")
    show(content)


if __name__ == "__main__":
    main()
