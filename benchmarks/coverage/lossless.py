"""What can be removed from each file without a change of its outputs: what `prune` does without data.

    python benchmarks/coverage/lossless.py FILE...
    python benchmarks/coverage/lossless.py --table

Channels are counted that are dead, and those that a rewrite of other weights could spare: constant channels and
duplicates. Files with dead channels are pruned by the program and compared with the original by onnxruntime, one thread: the
largest difference of the outputs over the largest output or over one if that is smaller, on generated inputs, and the
median times of both in turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.free import free_channels
from cpd_onnx.data.sources import calibration
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.errors import CpdError
from cpd_onnx.ir.model import load
from cpd_onnx.shapes.inference import fold

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.accuracy.accuracy import HERE, commit

RESULT = HERE / "results" / "lossless.json"
SAMPLES, SECONDS = 8, 4.0
"""Number of generated inputs that are compared, and time for which a file and its original are timed."""


def compared(original: Path, small: Path) -> dict[str, float]:
    """Return how far the outputs of two files are apart, and the ratio of their times."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    sessions = [
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]) for path in (original, small)
    ]
    model = load(original)
    feeds = list(calibration(model, Synthetic(fold(model), SAMPLES), SAMPLES, batch=1))
    apart = 0.0
    for feed in feeds:
        for first, second in zip(*(session.run(None, feed) for session in sessions), strict=True):
            difference = np.abs(first.astype(np.float64) - second.astype(np.float64)).max(initial=0.0)
            apart = max(apart, float(difference / np.abs(first).max(initial=1.0)))
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for place, session in enumerate(sessions):
            started = time.perf_counter()
            session.run(None, feeds[0])
            times[place].append(time.perf_counter() - started)
    return {"apart": apart, "time": float(np.median(times[1]) / np.median(times[0]))}


def row(path: Path) -> dict[str, Any]:
    """Return what is free in a file and, if anything is, what is left without it."""
    found: dict[str, Any] = {"file": path.name, "commit": commit()}
    try:
        combed = comb(load(path))
    except CpdError as error:
        return found | {"refused": str(error).splitlines()[0]}
    free = free_channels(combed)
    found["channels"] = sum(map(len, combed.groups))
    for kind in ("dead", "constant", "duplicate"):
        found[kind] = sum(len(getattr(each, kind)) for each in free)
    if not found["dead"]:
        return found
    with tempfile.TemporaryDirectory() as folder:
        small, result = Path(folder) / "small.onnx", Path(folder) / "result.json"
        words = ["prune", str(path), "-o", str(small), "--json", str(result), "--keep-anyway", "--log-level", "quiet"]
        made = subprocess.run([sys.executable, "-m", "cpd_onnx", *words], capture_output=True, check=False, text=True)
        if not small.exists():
            return found | {"refused": made.stderr.strip().splitlines()[-1]}
        content = json.loads(result.read_text())
        for kind in ("macs", "params"):
            found[kind] = content["after"][kind] / content["before"][kind]
        found["bytes"] = content["bytes"]["after"] / content["bytes"]["before"]
        return found | compared(path, small)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the results as a table."""
    print("| file | channels | dead | constant | duplicate | MACs left | parameters | bytes | time | outputs apart |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for entry in rows:
        counts = [str(entry.get(name, "")) for name in ("channels", "dead", "constant", "duplicate")]
        left = [f"{entry[name]:.3f}" if name in entry else "" for name in ("macs", "params", "bytes", "time")]
        last = f"{entry['apart']:.1e}" if "apart" in entry else entry.get("refused", "")
        print("| " + " | ".join([entry["file"], *counts, *left, last]) + " |")


def main() -> None:
    """Run the files, or print the stored results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    rows = {entry["file"]: entry for entry in json.loads(given.out.read_text())} if given.out.exists() else {}
    for path in () if given.table else given.files:
        rows[path.name] = row(path)
        print(rows[path.name], flush=True)
        given.out.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    show(list(rows.values()))


if __name__ == "__main__":
    main()
