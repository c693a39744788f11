"""Runs with samples over a zoo, as a user would make them: do they end well, and are the repair and the training a gain?

    python benchmarks/coverage/with_samples.py --models FOLDER [--models FOLDER …] [--trained] [--only REGEX] [--again]
    python benchmarks/coverage/with_samples.py --table [--trained]

Samples are generated, as models of a zoo have random weights: 64 to prune with, and 32 others on which the outputs of the
pruned model are compared with the original's by onnxruntime and numpy only. The same channels are removed once more with
`apply` and not repaired, for comparison. Errors are relative to the variance of the original's outputs; the largest
output counts. Each run is a process of its own with a time limit. Runs are those of `prune` or, with `--trained`, of
`compress`, which also distills, with the widths by the layers' own errors and a few updates.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.accuracy.accuracy import HERE, commit
from benchmarks.coverage.breadth import models
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.errors import CpdError
from cpd_onnx.ir.model import load
from cpd_onnx.runtime.sessions import Feed
from cpd_onnx.shapes.inference import fold

RESULT, TRAINED = (HERE / "results" / f"with_samples{kind}.json" for kind in ("", "_trained"))
SAMPLES, UNSEEN = 64, 32
TARGET = "macs=0.6"
UPDATES = 10
"""Number of updates with `--trained`."""


def drawn(path: Path) -> tuple[Feed, Feed] | None:
    """Return samples and unseen ones for a model; None if an input has no axis of samples."""
    made = list(Synthetic(fold(load(path)), SAMPLES + UNSEEN).batches(1, seed=0))
    if any(not array.ndim for array in made[0].values()):
        return None
    whole = {name: np.concatenate([each[name] for each in made]) for name in made[0]}
    return {n: a[:SAMPLES] for n, a in whole.items()}, {n: a[SAMPLES:] for n, a in whole.items()}


def outputs(path: Path, feed: Feed) -> dict[str, np.ndarray[Any, Any]]:
    """Return the float outputs of a model for samples, one at a time or as many as it takes."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [
        output.name
        for output in session.get_outputs()
        if output.type in ("tensor(float)", "tensor(double)", "tensor(float16)")
    ]
    sizes = [each.shape[0] for each in session.get_inputs() if each.shape]
    size = next((size for size in sizes if isinstance(size, int)), 1)
    starts = range(0, UNSEEN - size + 1, size)
    found = [session.run(names, {n: a[start : start + size] for n, a in feed.items()}) for start in starts]
    return {name: np.stack(each).astype(np.float64) for name, each in zip(names, zip(*found, strict=True), strict=True)}


def error(found: Mapping[str, Any], original: Mapping[str, Any]) -> float:
    """Return the largest error of an output, relative to the variance over the samples."""
    worst = 0.0
    for name, expected in original.items():
        variance = ((expected - expected.mean(0)) ** 2).mean()
        if variance > 0:
            worst = max(worst, float(((found[name] - expected) ** 2).mean() / variance))
    return worst


def called(*arguments: object, seconds: float) -> tuple[int | str, str]:
    """Run the command line; return its exit code and the end of what it wrote on standard error."""
    command = [sys.executable, "-m", "cpd_onnx", *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return "out of time", ""
    return done.returncode, done.stderr.strip()[-400:]


def row(path: Path, seconds: float, *, trained: bool) -> dict[str, Any]:
    """Return what becomes of one model."""
    started = time.perf_counter()
    entry: dict[str, Any] = {"model": f"{path.parent.name}/{path.name}", "commit": commit()}
    with tempfile.TemporaryDirectory(prefix="cpd-onnx.") as folder:
        work = Path(folder)
        small, plain, result, data = (work / name for name in ("s.onnx", "p.onnx", "r.json", "d.npz"))
        try:
            feeds = drawn(path)
        except CpdError as refusal:
            return entry | {"code": "no samples", "why": str(refusal)[:300]}
        if feeds is None:
            return entry | {"code": "no samples", "why": "an input without samples"}
        np.savez(data, **feeds[0])
        how = ["--data", data, "--target", TARGET, "--no-check-speed", "--json", result]
        command, more = ("compress", ["--no-report", "--effort", 0, "--steps", UPDATES]) if trained else ("prune", [])
        code, said = called(command, path, "-o", small, *how, *more, seconds=seconds)
        entry |= {"code": code, "s": round(time.perf_counter() - started, 1)}
        if not small.exists():
            return entry | {"why": said}
        content = json.loads(result.read_text())
        repaired = content.get("repaired") or {}
        entry |= {
            "proved": content["verification"]["verdict"],
            "macs": content["after"]["macs"] / content["before"]["macs"],
            "fits": len(repaired.get("fitted", ())),
            "left": Counter(str(reason) for reason in repaired.get("left", {}).values()),
            "notes": repaired.get("notes", ()),
            "training": (content.get("training") or {}).get("held_out"),
        }
        code, said = called("apply", path, f"{small}.plan.json", "-o", plain, seconds=seconds)
        if code != 0:
            return entry | {"apply": code, "why": said}
        try:
            original = outputs(path, feeds[1])
            entry |= {"error": error(outputs(small, feeds[1]), original)}
            entry |= {"unrepaired": error(outputs(plain, feeds[1]), original)}
        except Exception as failure:  # of onnxruntime: a model that takes no single sample
            entry |= {"why": str(failure)[:300]}
    return entry


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print how runs end, and what the repair leaves of the error."""
    print("| ended with | models |")
    print("|---|---|")
    for code, count in Counter(f"{r['code']} {r.get('proved', '')}".strip() for r in rows).most_common():
        print(f"| {code} | {count} |")
    both = [r for r in rows if r.get("unrepaired", 0) > 0 and "error" in r]
    fitted = [r for r in both if r["fits"]]
    ratios = np.sort([r["error"] / r["unrepaired"] for r in fitted])
    print(
        f"\nrepaired: {len(fitted)} of {len(both)}; error left of that without repair: median {np.median(ratios):.2f}"
    )
    for bound in (0.5, 0.9, 1.0):
        print(f"below {bound}: {(ratios < bound).sum()}")
    for r in sorted(fitted, key=lambda r: -r["error"] / r["unrepaired"])[:12]:
        print(f"{r['model']}: {r['unrepaired']:.3g} -> {r['error']:.3g}, {r['fits']} fits")


def main() -> None:
    """Run the models without stored rows and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, action="append", default=[])
    parser.add_argument("--only", type=re.compile, default=re.compile(""))
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--again", action="store_true", help="repeat the runs whose outputs were not compared")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--trained", action="store_true", help="distill too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.out = options.out or (TRAINED if options.trained else RESULT)
    known = json.loads(options.out.read_text()) if options.out.exists() else []
    rows = {r["model"]: r for r in known if not (options.again and "error" not in r)}
    for path in [] if options.table else models(options.models):
        name = f"{path.parent.name}/{path.name}"
        if name in rows or not options.only.search(name):
            continue
        rows[name] = row(path, options.timeout, trained=options.trained)
        print(json.dumps(rows[name])[:600], flush=True)
        options.out.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    show(list(rows.values()))


if __name__ == "__main__":
    main()
