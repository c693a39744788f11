"""Evaluate an original and a compressed model with onnxruntime and numpy only, independently of cpd-onnx.

    python benchmarks/accuracy/independent.py ORIGINAL SMALL [--data TEST.npz --metric top1|miou] [--seconds 6]

Prints JSON: for both files the size, the metric on the test data (labels in `labels`; 255 is ignored) and the median
milliseconds of a run (interleaved, one thread). Both files must pass onnx's checker, in full if the original does, and
load in onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
FREE = 64
"""A fifth of the size of an open image axis, in pixels; a multiple of the total stride of detectors."""


def is_valid(path: Path) -> bool:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def opened(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def batches(session: ort.InferenceSession, arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    names = [entry.name for entry in session.get_inputs()]
    first = session.get_inputs()[0].shape[0]
    size = first if isinstance(first, int) else 50
    count = len(arrays[names[0]])
    return [{name: arrays[name][i : i + size] for name in (*names, "labels")} for i in range(0, count - size + 1, size)]


def scored(session: ort.InferenceSession, arrays: dict[str, np.ndarray], metric: str) -> float:
    right = seen = 0
    pairs = np.zeros((0, 0), np.int64)
    for batch in batches(session, arrays):
        labels = batch.pop("labels")
        scores = session.run(None, batch)[0]
        predicted, counts = scores.argmax(1), labels != 255
        right += int((predicted == labels)[counts].sum())
        seen += int(counts.sum())
        if metric == "miou":
            n = scores.shape[1]
            pairs = pairs if len(pairs) else np.zeros((n, n), np.int64)
            pairs += np.bincount(n * labels[counts].astype(np.int64) + predicted[counts], minlength=n * n).reshape(n, n)
    if metric == "top1":
        return right / seen
    union = pairs.sum(0) + pairs.sum(1) - pairs.diagonal()
    return float((pairs.diagonal()[union > 0] / union[union > 0]).mean())


def random_inputs(session: ort.InferenceSession) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feed = {}
    for entry in session.get_inputs():
        shape = [n if isinstance(n, int) else 1 if axis == 0 else 5 * FREE for axis, n in enumerate(entry.shape)]
        feed[entry.name] = rng.standard_normal(shape).astype(TYPES[entry.type])
    return feed


def timed(sessions: list[ort.InferenceSession], feed: dict[str, np.ndarray], seconds: float) -> list[float]:
    times: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        session.run(None, feed)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 11:
        for place in np.random.permutation(len(sessions)):
            start = time.perf_counter()
            sessions[place].run(None, feed)
            times[place].append(time.perf_counter() - start)
    return [1e3 * float(np.median(taken)) for taken in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs=2)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--metric", choices=("top1", "miou"), default="top1")
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    is_full = is_valid(options.files[0])  # the compressed model must pass only what the original passes
    for path in options.files:
        onnx.checker.check_model(str(path), full_check=is_full)
    sessions = [opened(path) for path in options.files]
    arrays = dict(np.load(options.data)) if options.data else {}
    names = [entry.name for entry in sessions[0].get_inputs()]
    feed = {name: arrays[name][:1] for name in names} if arrays else random_inputs(sessions[0])
    found = [{"file": path.name, "bytes": path.stat().st_size, "ms": ms}
             for path, ms in zip(options.files, timed(sessions, feed, options.seconds), strict=True)]  # fmt: skip
    for entry, session in zip(found, sessions, strict=True):
        entry["quality"] = scored(session, arrays, options.metric) if arrays else None
        entry["finite"] = all(np.isfinite(out).all() for out in session.run(None, feed) if out.dtype.kind == "f")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
