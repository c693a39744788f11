"""What is left of the accuracy without labels and training, by how many allocations are compared at the outputs.

    python benchmarks/accuracy/effort.py --data-folder DATA [--model efficientnet_lite0=FILE] [--only CASE] [--effort N]
    python benchmarks/accuracy/effort.py --table

DATA is a folder with `onnx/` and `load.py`; models and data that are missing are skipped. Each run of `prune` gets the same
unlabelled images and a target, no bound of the loss, and is not timed; with --trained it is one of `compress`, which
distills on these images too, by the outputs and by the features. Beside it, uniform widths by L2 and at random are repaired
alike. All test images are scored, by onnxruntime and numpy only. Peak memory and disk writes are those of the whole command, as the system counts them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from verdicts import CASES as PAIRS
from verdicts import ROOT, Case, Data, answered, iou, kept, opened, resized

RESULT = ROOT / "benchmarks" / "results" / "effort.json"
SEED = 0
BASELINES = {
    "L2, uniform, repaired": ("prune", "--score", "l2", "--policy", "uniform", "--repair", "--effort", "0"),
    "random, uniform, repaired": ("prune", "--score", "random", "--policy", "uniform", "--repair", "--effort", "0"),
}
EFFORTS = (0, 4, 16)
KINDS = ("outputs", "features")
OUTPUT_BLOCK = 512
"""Bytes in a block of the system's count of writes."""


@dataclass(frozen=True)
class Run:
    """A model, the fraction of the MACs that remains, and the number of unlabelled images."""

    model: str
    macs: float
    images: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.macs:g}"


RUNS = (
    Run("resnet20_gtsrb", 0.5, 512),
    Run("resnet56_jpeg_cifar10", 0.5, 512),
    Run("vit_cifar10_smmk47", 0.5, 512),
    Run("espnet_p2_q8_camvid", 0.53, 64),
    Run("efficientnet_lite0", 0.75, 500),
    Run("efficientnet_lite0", 0.5, 500),
)


def score(case: Case, path: Path, images: Any, labels: Any) -> float:
    """Return the accuracy, or the mean intersection over union."""
    found = np.concatenate([*answered(path, case, images)])
    if case.score == "top1":
        return float((found == labels).mean())
    return iou(case, found, resized(labels, found.shape[1:], is_label=True))


def counted(words: list[str]) -> tuple[int, dict[str, float]]:
    """Run the program; returns its exit code, seconds, and the peak memory and disk writes of its processes."""
    started = time.perf_counter()
    made = subprocess.Popen(
        [sys.executable, "-m", "cpd_onnx", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(made.pid, 0)
    made.returncode = os.waitstatus_to_exitcode(status)
    figures = {
        "seconds": time.perf_counter() - started,
        "peak_gb": used.ru_maxrss * 1024 / 1e9,
        "written_gb": used.ru_oublock * OUTPUT_BLOCK / 1e9,
    }
    return made.returncode, figures


def row(run: Run, name: str, more: tuple[str, ...], model: Path, data: Data, seed: int = SEED) -> dict[str, Any]:
    """Return what one run left."""
    case = next(pair for pair in PAIRS if pair.model == run.model)
    given, images, labels = data.decode(case.data)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(given))[: run.images])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        entry = opened(model).get_inputs()[0].name
        np.savez(work / "data.npz", **{entry: case.pixels(resized(given[chosen], case.size))})
        words = [
            more[0],
            str(model),
            "-o",
            str(work / "small.onnx"),
            "--data",
            str(work / "data.npz"),
            "--hold-out",
            "0",
        ]
        words += ["--target", f"macs={run.macs}", "--max-loss", "inf", "--round-to", "1", "--no-check-speed"]
        code, figures = counted([*words, *more[1:], "--json", str(work / "result.json")])
        found: dict[str, Any] = {"case": run.name, "how": name, "code": code} | figures
        if not (work / "small.onnx").exists():
            return found
        content = json.loads((work / "result.json").read_text())
        tested = resized(images, case.size)
        scores = {
            "score": score(case, work / "small.onnx", tested, labels),
            "original": score(case, model, tested, labels),
        }
    return found | scores | {"macs": content["after"]["macs"] / content["before"]["macs"]}


def show(rows: list[dict[str, Any]]) -> None:
    print("| case | how | MACs left | original | score | seconds | peak, GB | written, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for entry in rows:
        used = f"{entry['seconds']:.0f} | {entry['peak_gb']:.2f} | {entry['written_gb']:.2f} |"
        if "score" not in entry:
            print(f"| {entry['case']} | {entry['how']} | | | exit code {entry['code']} | {used}")
            continue
        scores = f"{100 * entry['original']:.2f} | {100 * entry['score']:.2f}"
        print(f"| {entry['case']} | {entry['how']} | {entry['macs']:.3f} | {scores} | {used}")


def main() -> None:
    """Run, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="a model that lies elsewhere")
    parser.add_argument("--only", choices=[run.name for run in RUNS], action="append")
    parser.add_argument("--effort", type=int, action="append", help=f"instead of {EFFORTS}")
    parser.add_argument("--trained", action="store_true", help="run compress, which distills, instead of prune")
    parser.add_argument("--compare", choices=KINDS, help="with --trained, what the training compares (both)")
    parser.add_argument("--score", help="instead of the default")
    parser.add_argument("--images", type=int, help="number of unlabelled images, instead of the usual one")
    parser.add_argument("--seed", type=int, action="append", help=f"of the choice of images (default: {SEED})")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    elsewhere = dict(entry.split("=", 1) for entry in options.model)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    commands: dict[str, tuple[str, ...]] = {"": ("prune",)}
    if options.trained:
        commands = {f", distilled by {kind}": ("compress", "--no-report", "--compare", kind) for kind in KINDS}
    ways = {
        f"effort {effort}{suffix}": (*command, "--effort", str(effort))
        for effort in options.effort or EFFORTS
        for suffix, command in commands.items()
        if not options.compare or suffix.endswith(options.compare)
    }
    seeds = options.seed or [SEED]
    if options.score:
        ways = {f"{name}, score {options.score}": (*more, "--score", options.score) for name, more in ways.items()}
    ways |= {} if options.no_baselines else BASELINES
    data = Data(options.data_folder)
    for run in () if options.table else RUNS:
        model = Path(elsewhere.get(run.model, options.data_folder / "onnx" / f"{run.model}.onnx"))
        if not model.is_file() or (options.only and run.name not in options.only):
            continue
        given = run if options.images is None else replace(run, images=options.images)
        for (name, more), seed in itertools.product(ways.items(), seeds):
            how = name + ("" if given == run else f", {given.images} images") + (f", seed {seed}" if seed else "")
            made = row(given, how, more, model, data, seed)
            rows = kept(options.out, rows, made, ("case", "how"))
            print(run.name, how, made.get("score"), round(made["seconds"]), "s", flush=True)
    show(rows)


if __name__ == "__main__":
    main()
