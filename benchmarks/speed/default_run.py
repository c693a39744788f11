"""Default runs on real files, timed by another clock than the program's own: is what they write ever slower?

    python benchmarks/speed/default_run.py FILES... [--before CHECKOUT] [--out benchmarks/results/default_run.json]

Each file is pruned with the default options and `--blind`, since most files come without data, and with `--target macs=0.5`.
With `--before`, the same runs are made by an earlier checkout, which is started as `prune FILE -o OUT`, with the same targets.
The written model is then timed beside its original in a process of its own: runs in turns, on one thread, medians. A model that
takes more than 1.00 of the time without having been called NOT FASTER counts as a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TARGETS: dict[str, list[str]] = {"default": [], "macs=0.5": ["--target", "macs=0.5"]}
NOT_FASTER = 3

TIMER = """
import sys, time, json, numpy as np, onnxruntime as ort
from cpd_onnx.ir.model import load
from cpd_onnx.runtime.sessions import open_model, working_feeds
from cpd_onnx.shapes.inference import fold
model = load(sys.argv[1])
feed = next(working_feeds(fold(model), open_model(model), 1))
def session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
both = [session(path) for path in sys.argv[1:3]]
times, end = ([], []), time.monotonic() + float(sys.argv[3])
while len(times[0]) < 10 or time.monotonic() < end:
    for each, taken in zip(both, times):
        start = time.monotonic_ns()
        each.run(None, feed)
        taken.append(time.monotonic_ns() - start)
print(json.dumps([float(np.median(taken)) / 1e6 for taken in times]))
"""


def run(checkout: Path, arguments: list[str], seconds: int) -> tuple[int, float, str]:
    """Run the program of a checkout; returns exit code, seconds and the last lines of its output."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cpd_onnx", *arguments], capture_output=True, text=True, check=False,
            env=environment, timeout=seconds, cwd=checkout,
        )  # fmt: skip  # what and how
    except subprocess.TimeoutExpired:
        return -1, float(seconds), "timed out"
    return done.returncode, time.monotonic() - start, (done.stdout + done.stderr).strip()[-600:]


def timed(original: Path, made: Path, seconds: float) -> tuple[float, float] | None:
    """Return the median milliseconds of both models."""
    done = subprocess.run(
        [sys.executable, "-c", TIMER, str(original), str(made), str(seconds)], capture_output=True, text=True,
        check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip  # what and how
    return None if done.returncode else tuple(json.loads(done.stdout.splitlines()[-1]))


def row(checkout: Path, path: Path, name: str, more: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Return what one run of one checkout made of a file."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.onnx"
        code, seconds, said = run(checkout, ["prune", str(path.resolve()), "-o", str(made), *more], options.limit)
        found: dict[str, Any] = {"target": name, "code": code, "seconds": round(seconds, 2), "speedup": None}
        if not made.exists():
            return found | {"said": said.splitlines()[-1:] or [""]}
        pair = timed(path, made, options.seconds)
        return found | {"speedup": None if pair is None else round(pair[0] / pair[1], 3), "ms": pair}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--before", type=Path, help="an earlier checkout")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each file")
    parser.add_argument("--limit", type=int, default=600, help="seconds for one run")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "default_run.json")
    parser.add_argument("--only", choices=TARGETS, help="one of the two runs")
    options = parser.parse_args()
    targets = {name: more for name, more in TARGETS.items() if options.only in (None, name)}
    rows = []
    for path in options.files:
        for name, more in targets.items():
            entry = {"file": path.name, **row(ROOT, path, name, [*more, "--blind"], options)}
            if options.before:
                entry["before"] = row(options.before, path, name, more, options)
            rows.append(entry)
            before = entry.get("before") or {}
            print(
                f"{path.name[:40]:40} {name:9} code {entry['code']} {entry['speedup'] or '-':>6} {entry['seconds']:6.1f} s"
                f"   before: code {before.get('code', '-')} {before.get('speedup') or '-':>6}",
                flush=True,
            )
            options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    for name in targets:
        made = [entry for entry in rows if entry["target"] == name and entry["speedup"]]
        slower = [entry["file"] for entry in made if entry["speedup"] < 1 and entry["code"] != NOT_FASTER]
        speedups = [entry["speedup"] for entry in made]
        refused = sum(entry["code"] == NOT_FASTER for entry in rows if entry["target"] == name)
        print(
            f"{name}: {len(made)} written, median speed-up {statistics.median(speedups) if speedups else 0:.2f}, "
            f"{refused} NOT FASTER, slower without a word: {slower or 'none'}"
        )


if __name__ == "__main__":
    main()
