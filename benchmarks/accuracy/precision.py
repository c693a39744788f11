"""Structure and number format in one run, beside pruning followed by int8, and int8 alone, at the same allowed loss.

    python benchmarks/accuracy/precision.py --data-folder DATA [--model efficientnet_lite0=FILE] [--only MODEL] [--loss 0.02]
    python benchmarks/accuracy/precision.py --table

DATA is a folder with `onnx/` and `load.py`; models and data that are missing are skipped. Each run gets the same unlabelled
images and, as --eval, half of the labelled test images, on which the search for the fastest model within the loss is made. The
other half is scored here, by onnxruntime and numpy. At the end all files of a model are timed together, interleaved with the
original, on one thread. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import commit
from effort import Run, counted, score
from verdicts import CASES as PAIRS
from verdicts import ROOT, Data, kept, opened, resized

from cpd_onnx.runtime.bench import bench, machine

RESULT = ROOT / "benchmarks" / "results" / "precision.json"
RUNS = (
    Run("resnet20_gtsrb", 0, 512),
    Run("resnet56_jpeg_cifar10", 0, 512),
    Run("vit_cifar10_smmk47", 0, 512),
    Run("efficientnet_lite0", 0, 500),
)
SEED = 0
SECONDS = 6.0
"""Seconds of interleaved timing of all files of a model."""
SEARCH = ("--no-distill", "--no-report", "--keep-anyway")


def made(words: list[str]) -> float:
    """Run the program and return its seconds; a verdict that is no success is none of an error here."""
    code, figures = counted(words)
    if code not in (0, 3, 4, 6):
        raise RuntimeError(f"{' '.join(words)}: exit code {code}")
    return float(figures["seconds"])


def rows_of(run: Run, model: Path, data: Data, loss: float) -> list[dict[str, Any]]:
    """Return what each way left of a model."""
    case = next(pair for pair in PAIRS if pair.model == run.model)
    given, images, labels = data.decode(case.data)
    rng = np.random.default_rng(SEED)
    chosen, order = np.sort(rng.permutation(len(given))[: run.images]), rng.permutation(len(images))
    searched, tested = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    entry = opened(model).get_inputs()[0].name
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        np.savez(work / "data.npz", **{entry: case.pixels(resized(given[chosen], case.size))})
        pixels = case.pixels(resized(images[searched], case.size))
        np.savez(work / "eval.npz", **{entry: pixels, "labels": labels[searched]})
        on = ["--data", str(work / "data.npz")]
        within = [*on, "--eval", str(work / "eval.npz"), "--max-loss", str(loss), *SEARCH]
        files = {name: work / f"{name}.onnx" for name in ("int8", "pruned", "pruned, int8", "auto")}
        seconds = {"int8": made(["deploy", str(model), "-o", str(files["int8"]), "--int8", *on])}
        seconds["pruned"] = made(["compress", str(model), "-o", str(files["pruned"]), *within])
        seconds["pruned, int8"] = made(
            ["deploy", str(files["pruned"]), "-o", str(files["pruned, int8"]), "--int8", *on]
        )
        seconds["auto"] = made(["compress", str(model), "-o", str(files["auto"]), *within, "--precision", "auto"])
        timings = bench([model, *files.values()], seconds=SECONDS).as_json()["timings"]
        ratios = {Path(timing["model"]).stem: timing["ratio"] for timing in timings[1:]}
        size, rows = model.stat().st_size, []
        original = score(case, model, resized(images[tested], case.size), labels[tested])
        for name, path in files.items():
            found = score(case, path, resized(images[tested], case.size), labels[tested])
            is_float = not path.with_name(f"{path.stem}.float32.onnx").exists() and "int8" not in name
            rows.append(
                {
                    "model": run.model, "how": name, "original": original, "score": found, "latency": ratios[name],
                    "bytes": path.stat().st_size / size, "seconds": seconds[name],
                    "format": "float32" if is_float else "int8",
                }
            )  # fmt: skip  # a table
            print(rows[-1], flush=True)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the results as a table."""
    print("| model | how | numbers | original | score | latency | file | seconds |\n|---|---|---|---|---|---|---|---|")
    for row in rows:
        scores = f"{100 * row['original']:.2f} | {100 * row['score']:.2f}"
        print(
            f"| {row['model']} | {row['how']} | {row['format']} | {scores} | {row['latency']:.3f} | {row['bytes']:.2f} "
            f"| {row['seconds']:.0f} |"
        )


def main() -> None:
    """Run the cases, or print the stored results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="a model that lies elsewhere")
    parser.add_argument("--only", choices=[run.model for run in RUNS], action="append")
    parser.add_argument("--loss", type=float, default=0.02, help="allowed loss of the accuracy (0.02)")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    if given.table:
        show(json.loads(given.out.read_text())["rows"])
        return
    if given.data_folder is None:
        parser.error("give --data-folder")
    elsewhere = dict(text.split("=", 1) for text in given.model)
    data = Data(given.data_folder)
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    for run in RUNS:
        path = Path(elsewhere.get(run.model, given.data_folder / "onnx" / f"{run.model}.onnx"))
        if path.exists() and (not given.only or run.model in given.only):
            for row in rows_of(run, path, data, given.loss):
                more = {"commit": commit(), "machine": machine(), "loss": given.loss}
                rows = kept(given.out, rows, row, ("model", "how"), **more)
    show(rows)


if __name__ == "__main__":
    main()
