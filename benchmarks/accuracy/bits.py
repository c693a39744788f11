"""The smallest file within a loss: channels and weights in few bits together, beside pruning followed by int8, and int8.

    python benchmarks/accuracy/bits.py --data-folder DATA [--model efficientnet_lite0=FILE] [--only MODEL] [--seed N]
    python benchmarks/accuracy/bits.py --table [--loss 0.005]

DATA is a folder with `onnx/` and `load.py`; models and data that are missing are skipped. Each way gets the same unlabelled images,
and makes files of several sizes: `compress --target bytes=F`, followed by `deploy --int8`, or with `--precision auto` and
smaller F, and random channels in its place; nothing is trained. All are scored on all test images. `--table` prints, for
each way, the smallest file that loses at most `--loss` on one half of the test images, with its score on the other half.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import commit
from effort import counted
from verdicts import CASES as PAIRS
from verdicts import ROOT, Data, answered, kept, opened, resized

from cpd_onnx.runtime.bench import bench, machine

RESULT = ROOT / "benchmarks" / "results" / "bits.json"


@dataclass(frozen=True)
class Run:
    """A model, the number of images, and parts of its file that remain before `deploy --int8` and in few bits.

    Without the latter, four bits alone are measured.
    """

    model: str
    images: int
    float_sizes: tuple[float, ...]
    bit_sizes: tuple[float, ...]


RUNS = (
    Run("resnet20_gtsrb", 512, (0.8, 0.7, 0.6), (0.138, 0.128)),
    Run("vit_cifar10_smmk47", 512, (0.8, 0.7), (0.165, 0.15)),
    Run("resnet56_jpeg_cifar10", 512, (0.8, 0.7), (0.135, 0.125)),
    Run("efficientnet_lite0", 500, (0.9,), ()),
)
SECONDS = 6.0
"""Seconds of interleaved timing of all files of a model."""
QUIETLY = ("--no-distill", "--no-report", "--keep-anyway", "--no-check-speed")


def made(words: list[str]) -> float:
    """Run the program and return its seconds; a verdict that is no success is none of an error here."""
    code, figures = counted(words)
    if code not in (0, 3, 4, 6):
        raise RuntimeError(f"{' '.join(words)}: exit code {code}")
    return float(figures["seconds"])


def files_of(run: Run, model: Path, work: Path, data: Path, seed: int) -> Iterator[tuple[str, Path, float]]:
    """Yield the name of each way, a file that it makes, and the seconds that it took."""
    on = ["--data", str(data), "--seed", str(seed)]
    path = work / "int8.onnx"
    yield "int8", path, made(["deploy", str(model), "-o", str(path), "--int8", *on])
    path = work / "bits.onnx"
    yield "4 bits", path, made(["deploy", str(model), "-o", str(path), "--weight-bits", "4", "--fold", *on])
    for size in run.float_sizes:
        small, path = work / f"pruned{size}.onnx", work / f"pruned{size}_int8.onnx"
        seconds = made(["compress", str(model), "-o", str(small), "--target", f"bytes={size}", *on, *QUIETLY])
        yield "pruned, then int8", path, seconds + made(["deploy", str(small), "-o", str(path), "--int8", *on])
    random = "random channels, and bits", ["--score", "random"], run.bit_sizes[:1]
    for name, more, sizes in (("channels and bits", [], run.bit_sizes), random):
        for size in sizes:
            path = work / f"{name[:6]}{size}.onnx"
            words = ["compress", str(model), "-o", str(path), "--target", f"bytes={size}", "--precision", "auto"]
            yield name, path, made([*words, *on, *more, *QUIETLY])


def rows_of(run: Run, model: Path, data: Data, seed: int) -> list[dict[str, Any]]:
    """Return a row for each file of a model: its size, its latency, and its answers on both halves of the test images."""
    case = next(pair for pair in PAIRS if pair.model == run.model)
    given, images, labels = data.decode(case.data)
    rng = np.random.default_rng(0)
    chosen, order = np.sort(rng.permutation(len(given))[: run.images]), rng.permutation(len(images))
    halves = [np.sort(half) for half in np.array_split(order, 2)]
    tested = resized(images, case.size)

    def scores(path: Path) -> list[float]:
        is_right = np.concatenate([*answered(path, case, tested)]) == labels
        return [float(is_right[half].mean()) for half in halves]

    original, size = scores(model), model.stat().st_size
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        samples = work / "data.npz"
        np.savez(samples, **{opened(model).get_inputs()[0].name: case.pixels(resized(given[chosen], case.size))})
        rows, paths = [], []
        for name, path, seconds in files_of(run, model, work, samples, seed):
            paths.append(path)
            rows.append(
                {
                    "model": run.model, "how": name, "seed": seed, "original": original, "score": scores(path),
                    "bytes": path.stat().st_size / size, "seconds": round(seconds, 1),
                }
            )  # fmt: skip  # a table
            print(rows[-1], flush=True)
        timings = bench([model, *paths], seconds=SECONDS).as_json()["timings"][1:]
        return [row | {"latency": round(timing["ratio"], 3)} for row, timing in zip(rows, timings, strict=True)]


def show(rows: list[dict[str, Any]], loss: float) -> None:
    """Print the smallest file of each way within a loss on the first half, with its score on the second half."""
    print("| model | how | original | score | file | latency |\n|---|---|---|---|---|---|")
    for model, how in dict.fromkeys((row["model"], row["how"]) for row in rows):
        found = [row for row in rows if row["model"] == model and row["how"] == how]
        within = [row for row in found if row["original"][0] - row["score"][0] <= loss + 1e-9]
        if not within:
            print(f"| {model} | {how} | {100 * found[0]['original'][1]:.2f} | none | | |")
            continue
        best = min(within, key=lambda row: row["bytes"])
        scores = f"{100 * best['original'][1]:.2f} | {100 * best['score'][1]:.2f}"
        print(f"| {model} | {how} | {scores} | {best['bytes']:.3f} | {best['latency']:.2f} |")


def main() -> None:
    """Run the cases, or print the stored results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="a model that lies elsewhere")
    parser.add_argument("--only", choices=[run.model for run in RUNS], action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loss", type=float, default=0.005, help="allowed loss of the accuracy in the table (0.005)")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    if given.table:
        show(rows, given.loss)
        return
    if given.data_folder is None:
        parser.error("give --data-folder")
    elsewhere = dict(text.split("=", 1) for text in given.model)
    data = Data(given.data_folder)
    for run in RUNS:
        path = Path(elsewhere.get(run.model, given.data_folder / "onnx" / f"{run.model}.onnx"))
        if path.exists() and (not given.only or run.model in given.only):
            rows = [row for row in rows if (row["model"], row["seed"]) != (run.model, given.seed)]
            for row in rows_of(run, path, data, given.seed):
                more = {"commit": commit(), "machine": machine()}
                rows = kept(given.out, rows, row, ("model", "how", "seed", "bytes"), **more)
    show(rows, given.loss)


if __name__ == "__main__":
    main()
