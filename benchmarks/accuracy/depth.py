"""What is left of the accuracy at equal measured latency, where whole branches may go and where they may not.

    python benchmarks/accuracy/depth.py --data-folder DATA [--model efficientnet_lite0=FILE] [--only MODEL] [--latency F] [--updates N]
    python benchmarks/accuracy/depth.py --table

DATA is a folder with `onnx/` and `load.py`; models and data that are missing are skipped. Each run of `prune` gets the same
unlabelled images, a latency target and `--effort 4`, and no bound of the loss. Each measures the costs of the kernels itself, and
its candidates, since a target is missed where a table is all that is known. Both results of a target are timed beside the
original at the end, by onnxruntime alone, on one thread, in turns. With --updates, both are then distilled alike on all training
images, without labels, by `distill` with its defaults, and so is the original, as the control. All test images are scored, after
the last update, by onnxruntime and numpy only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from effort import RUNS, Run, counted, score
from verdicts import CASES as PAIRS
from verdicts import ROOT, Case, Data, kept, opened, resized

RESULT = ROOT / "benchmarks" / "results" / "depth.json"
SEED = 0
LATENCIES = (0.5, 0.33)
WAYS = {"branches may go": "--depth", "widths alone": "--no-depth"}
KEYS = ("model", "asked", "how", "updates")
"""What tells rows apart."""
ROUNDS = 100
"""Number of rounds in which all models are timed once."""


def milliseconds(paths: Sequence[Path]) -> list[float]:
    """Return the median time of a run of each model with a random input of batch size one."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in map(str, paths)]
    entry = sessions[0].get_inputs()[0]
    shape = [size if isinstance(size, int) else 1 for size in entry.shape]
    feed = {entry.name: np.random.default_rng(SEED).standard_normal(shape).astype(np.float32)}
    taken = np.zeros((ROUNDS, len(paths)))
    for turn in range(-3, ROUNDS):
        for place, session in enumerate(sessions):
            started = time.perf_counter()
            session.run(None, feed)
            taken[max(turn, 0), place] = time.perf_counter() - started
    return (1e3 * np.median(taken, axis=0)).tolist()


@dataclass(frozen=True)
class Subject:
    """A model, its data as files, and what each run gets.

    Attributes:
        name: Name of the model.
        file: The original.
        case: Its data set, preprocessing and score.
        images: Test images at the size of the model.
        labels: Their labels.
        work: Folder with the training images, `few.npz` for the pruning and `all.npz` for the training.
        updates: Updates of the training; 0 for none.
        seeds: Seeds of the training.
    """

    name: str
    file: Path
    case: Case
    images: Any
    labels: Any
    work: Path
    updates: int
    seeds: Sequence[int]

    def score(self, path: Path) -> float:
        """Return the score of a file on all test images."""
        return score(self.case, path, self.images, self.labels)

    def trained(self, path: Path) -> list[float]:
        """Return the scores of a file after a training with each seed."""
        found = []
        for seed in self.seeds:
            out = path.with_suffix(f".{seed}.onnx")
            words = ["distill", str(self.file), str(path), "-o", str(out), "--data", str(self.work / "all.npz")]
            words += ["--steps", str(self.updates), "--threads", "1", "--seed", str(seed), "--force"]
            code, _ = counted(words)
            if code:
                raise RuntimeError(f"{path} could not be trained: exit code {code}")
            found.append(self.score(out))
        return found


def subject(run: Run, file: Path, data: Data, work: Path, updates: int, seeds: Sequence[int]) -> Subject:
    """Return a model with its data written to files."""
    case = next(pair for pair in PAIRS if pair.model == run.model)
    given, tested, labels = data.decode(case.data)
    entry = opened(file).get_inputs()[0].name
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(given))[: run.images])
    np.savez(work / "few.npz", **{entry: case.pixels(resized(given[chosen], case.size))})
    if updates:
        np.savez(work / "all.npz", **{entry: case.pixels(resized(given, case.size))})
    return Subject(run.model, file, case, resized(tested, case.size), labels, work, updates, seeds)


def rows_of(given: Subject, latency: float) -> list[dict[str, Any]]:
    """Return what both ways left of a model."""
    model, rows = given.file, list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        work, made = Path(folder), dict[int, Path]()
        for number, (how, flag) in enumerate(WAYS.items()):
            small = work / f"small{number}.onnx"
            words = ["prune", str(model), "-o", str(small), "--data", str(given.work / "few.npz"), "--hold-out", "0"]
            words += ["--target", f"latency={latency}", "--max-loss", "inf", "--effort", "4", flag]
            words += ["--nearest", "--no-check-speed"]
            code, figures = counted(words)
            row: dict[str, Any] = {"model": given.name, "asked": latency, "how": how, "updates": given.updates}
            row |= {"code": code} | figures
            rows.append(row)
            if not small.exists():
                continue
            made[number] = small
            plan = json.loads(Path(f"{small}.plan.json").read_text())
            row["macs"] = plan["after"]["macs"] / plan["before"]["macs"]
            row["branches"] = sum(len(group["removed"]) == group["size"] for group in plan["groups"])
            row["nodes"] = [len(onnx.load(path, load_external_data=False).graph.node) for path in (model, small)]
        times = milliseconds([model, *made.values()])
        for place, (number, small) in enumerate(made.items(), start=1):
            scores = {"score": given.score(small), "original": given.score(model)}
            rows[number] |= scores | {"latency": times[place] / times[0], "original_ms": times[0]}
            if given.updates:
                rows[number] |= {"trained": given.trained(small)}
    return rows


def control(given: Subject) -> dict[str, Any]:
    """Return what the same training makes of the original, with the first seed."""
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        copy = Path(shutil.copy(given.file, folder))
        trained = replace(given, seeds=given.seeds[:1]).trained(copy)
    row = {"model": given.name, "asked": 1.0, "how": "unpruned control", "updates": given.updates, "code": 0}
    row |= {"seconds": 0.0, "macs": 1.0}
    count = len(onnx.load(given.file, load_external_data=False).graph.node)
    original = given.score(given.file)
    row |= {"branches": 0, "nodes": [count, count], "latency": 1.0, "score": original, "original": original}
    return row | {"trained": trained}


def show(rows: list[dict[str, Any]]) -> None:
    print(
        "| model | latency asked | how | latency | MACs left | branches gone | nodes | original | score | trained | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        start = f"| {row['model']} | {row['asked']:g} | {row['how']} |"
        if "score" not in row:
            print(f"{start} | | | | | exit code {row['code']} | | {row['seconds']:.0f} |")
            continue
        nodes = f"{row['nodes'][0]} -> {row['nodes'][1]}"
        scores = f"{100 * row['original']:.2f} | {100 * row['score']:.2f}"
        trained = ", ".join(f"{100 * value:.2f}" for value in row.get("trained", ()))
        sizes = f"{row['latency']:.3f} | {row['macs']:.3f} | {row['branches']} | {nodes}"
        print(f"{start} {sizes} | {scores} | {trained} | {row['seconds']:.0f} |")


def main() -> None:
    """Run, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="a model that lies elsewhere")
    parser.add_argument("--only", choices=sorted({run.model for run in RUNS}), action="append")
    parser.add_argument("--latency", type=float, action="append", help=f"instead of {LATENCIES}")
    parser.add_argument("--updates", type=int, default=0, help="updates of 64 images to train the results with (none)")
    parser.add_argument("--seed", type=int, action="append", help="of the training (0)")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    elsewhere = dict(entry.split("=", 1) for entry in options.model)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    data = Data(options.data_folder)
    for name, run in () if options.table else {run.model: run for run in RUNS}.items():
        model = Path(elsewhere.get(name, (options.data_folder or Path()) / "onnx" / f"{name}.onnx"))
        if not model.is_file() or (options.only and name not in options.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            given = subject(run, model, data, Path(folder), options.updates, options.seed or [SEED])
            for latency in options.latency or LATENCIES:
                for row in rows_of(given, latency):
                    rows = kept(options.out, rows, row, KEYS)
                    figures = (row.get("latency"), row.get("score"), row.get("trained"), round(row["seconds"]), "s")
                    print(name, latency, row["how"], *figures, flush=True)
            if given.updates:
                rows = kept(options.out, rows, control(given), KEYS)
    show(rows)


if __name__ == "__main__":
    main()
