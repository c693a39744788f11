"""Pruning with scores, comparison and repair, divided among processes: time, memory of a process, and whether the bytes are the same.

    python benchmarks/speed/processes.py --data-folder DATA [--model NAME=FILE] [--only CASE] [--effort N]
    python benchmarks/speed/processes.py --table

The cases are those of `benchmarks/accuracy/effort.py`. Each is pruned by one process on one core, then by as many processes as
there are cores, each on one of its own, connected as a launcher such as torchrun connects them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "accuracy"))
from accuracy import commit
from effort import RUNS, SEED, Run
from verdicts import CASES as PAIRS
from verdicts import ROOT, Data, kept, opened, resized

RESULT = ROOT / "benchmarks" / "results" / "processes.json"
ONE, EACH = "one process, one core", "a process on each core"


def measured(words: list[str], cores: list[int]) -> dict[str, Any]:
    """Run the program in a process on each core; returns the seconds, and the peak memory of the largest process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(cores))}
    started = time.perf_counter()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "cpd_onnx", *words],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | (shared | {"RANK": str(rank)} if len(cores) > 1 else {}),
            preexec_fn=functools.partial(os.sched_setaffinity, 0, {core}),
        )
        for rank, core in enumerate(cores)
    ]  # fmt: skip  # a process
    peaks, codes = [], []
    for process in processes:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        codes.append(process.returncode)
        peaks.append(used.ru_maxrss * 1024 / 1e9)
    if any(codes):
        raise RuntimeError(f"exit codes {codes}")
    return {"processes": len(cores), "seconds": time.perf_counter() - started, "peak_gb": max(peaks)}


def rows_of(run: Run, model: Path, data: Data, effort: int) -> list[dict[str, Any]]:
    """Return the row of each way."""
    case = next(pair for pair in PAIRS if pair.model == run.model)
    given, _, _ = data.decode(case.data)
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(given))[: run.images])
    cores = sorted(os.sched_getaffinity(0))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        np.savez(
            work / "data.npz", **{opened(model).get_inputs()[0].name: case.pixels(resized(given[chosen], case.size))}
        )
        words = [
            "prune",
            str(model),
            "--data",
            str(work / "data.npz"),
            "--hold-out",
            "0",
            "--target",
            f"macs={run.macs}",
        ]
        words += ["--max-loss", "inf", "--round-to", "1", "--no-check-speed", "--effort", str(effort)]
        files = {ONE: work / "one.onnx", EACH: work / "each.onnx"}
        for how, own in ((ONE, cores[:1]), (EACH, cores)):
            row = {"case": run.name, "effort": effort, "how": how}
            row |= measured([*words, "-o", str(files[how])], own)
            row["same"] = files[how].read_bytes() == files[ONE].read_bytes()
            print(row, flush=True)
            found.append(row)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Print the results as a table."""
    print("| case | effort | | processes | s | times faster | memory of a process, GB | same bytes |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        first = next(r for r in rows if (r["case"], r["effort"], r["how"]) == (row["case"], row["effort"], ONE))
        print(
            f"| {row['case']} | {row['effort']} | {row['how']} | {row['processes']} | {row['seconds']:.0f} | "
            f"{first['seconds'] / row['seconds']:.2f} | {row['peak_gb']:.2f} | {'yes' if row['same'] else 'no'} |"
        )


def main() -> None:
    """Run the cases, or print the stored results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="a model that lies elsewhere")
    parser.add_argument("--only", choices=[run.name for run in RUNS], action="append")
    parser.add_argument("--effort", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    files = dict(entry.split("=", 1) for entry in options.model)
    for run in RUNS if not options.table else ():
        model = Path(files.get(run.model, options.data_folder / "onnx" / f"{run.model}.onnx"))
        if not model.is_file() or (options.only and run.name not in options.only):
            continue
        for row in rows_of(run, model, Data(options.data_folder), options.effort):
            rows = kept(options.out, rows, row, ("case", "effort", "how"), commit=commit())
    show(rows)


if __name__ == "__main__":
    main()
