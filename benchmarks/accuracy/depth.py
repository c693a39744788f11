"""What is left of the accuracy at equal measured latency, where whole branches may go and where they may not.

    python benchmarks/accuracy/depth.py --data-folder DATA [--model efficientnet_lite0=FILE] [--only MODEL] [--latency F]
    python benchmarks/accuracy/depth.py --table

DATA is a folder with `onnx/` and `load.py`; models and data that are missing are skipped. Each run of `prune` gets the same
unlabelled images, a latency target and `--effort 4`, and no bound of the loss; with --trained it is one of `compress`, which
distills on these images too. All runs of a model take the costs of its kernels from one table, measured by `latency` at the
start, so that they differ in what may go and not in what was measured. Both results of a target are timed beside the original
at the end, by onnxruntime alone, on one thread, in turns. All test images are scored, by onnxruntime and numpy only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from effort import RUNS, counted, score
from verdicts import CASES as PAIRS
from verdicts import ROOT, Data, kept, opened, resized

RESULT = ROOT / "benchmarks" / "results" / "depth.json"
SEED = 0
LATENCIES = (0.5, 0.33)
WAYS = {"branches may go": "--depth", "widths alone": "--no-depth"}
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


def rows_of(
    model: Path, name: str, images: int, latency: float, data: Data, command: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Return what both ways left of a model."""
    case = next(pair for pair in PAIRS if pair.model == name)
    given, tested, labels = data.decode(case.data)
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(given))[:images])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        entry = opened(model).get_inputs()[0].name
        np.savez(work / "data.npz", **{entry: case.pixels(resized(given[chosen], case.size))})
        made = {}
        for number, (how, flag) in enumerate(WAYS.items()):
            small = work / f"small{number}.onnx"
            words = [command[0], str(model), "-o", str(small), "--data", str(work / "data.npz"), "--hold-out", "0"]
            words += ["--target", f"latency={latency}", "--max-loss", "inf", "--effort", "4", flag]
            words += ["--nearest", "--no-check-speed"]
            code, figures = counted([*words, *command[1:]])
            row: dict[str, Any] = {"model": name, "asked": latency, "how": how, "code": code} | figures
            rows.append(row)
            if not small.exists():
                continue
            made[number] = small
            plan = json.loads(Path(f"{small}.plan.json").read_text())
            row["macs"] = plan["after"]["macs"] / plan["before"]["macs"]
            row["branches"] = sum(len(group["removed"]) == group["size"] for group in plan["groups"])
            row["nodes"] = [len(onnx.load(path, load_external_data=False).graph.node) for path in (model, small)]
        times = milliseconds([model, *made.values()])
        images_of = resized(tested, case.size)
        for place, (number, small) in enumerate(made.items(), start=1):
            scores = {"score": score(case, small, images_of, labels), "original": score(case, model, images_of, labels)}
            rows[number] |= scores | {"latency": times[place] / times[0], "original_ms": times[0]}
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print("| model | latency asked | how | latency | MACs left | branches gone | nodes | original | score | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        start = f"| {row['model']} | {row['asked']:g} | {row['how']} |"
        if "score" not in row:
            print(f"{start} | | | | | exit code {row['code']} | {row['seconds']:.0f} |")
            continue
        nodes = f"{row['nodes'][0]} -> {row['nodes'][1]}"
        scores = f"{100 * row['original']:.2f} | {100 * row['score']:.2f}"
        print(
            f"{start} {row['latency']:.3f} | {row['macs']:.3f} | {row['branches']} | {nodes} | {scores} | {row['seconds']:.0f} |"
        )


def main() -> None:
    """Run, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="a model that lies elsewhere")
    parser.add_argument("--only", choices=sorted({run.model for run in RUNS}), action="append")
    parser.add_argument("--latency", type=float, action="append", help=f"instead of {LATENCIES}")
    parser.add_argument("--trained", action="store_true", help="run compress, which distills, instead of prune")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    elsewhere = dict(entry.split("=", 1) for entry in options.model)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    command = ("compress", "--no-report") if options.trained else ("prune",)
    data = Data(options.data_folder)
    for name, images in () if options.table else {run.model: run.images for run in RUNS}.items():
        model = Path(elsewhere.get(name, (options.data_folder or Path()) / "onnx" / f"{name}.onnx"))
        if not model.is_file() or (options.only and name not in options.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "costs.json"
            code, _ = counted(["latency", str(model), "-o", str(table)])
            if code:
                raise RuntimeError(f"{model} could not be timed: exit code {code}")
            for latency in options.latency or LATENCIES:
                for row in rows_of(model, name, images, latency, data, (*command, "--cost-table", str(table))):
                    row["how"] += ", distilled" if options.trained else ""
                    rows = kept(options.out, rows, row, ("model", "asked", "how"))
                    figures = (row.get("latency"), row.get("score"), round(row["seconds"]), "s")
                    print(name, latency, row["how"], *figures, flush=True)
    show(rows)


if __name__ == "__main__":
    main()
