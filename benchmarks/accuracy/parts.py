"""What each part of a default run brings without labels and training: the same run, each time without one of them.

    python benchmarks/accuracy/parts.py --data-folder DATA [--model NAME=FILE] [--only CASE] [--images N] [--seed S]
    python benchmarks/accuracy/parts.py --table

DATA is a folder with `onnx/` and `load.py`; models and data that are missing are skipped. The cases are those of `effort.py`.
With --images, only the whole run is made, of that many images. All test images are scored, by onnxruntime and numpy only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from accuracy import commit, macs
from effort import RUNS, Run, score
from verdicts import CASES as PAIRS
from verdicts import ROOT, Data, kept, opened, resized

from cpd_onnx.budget.targets import fraction
from cpd_onnx.workflow import prune
from cpd_onnx.workflow.api import run as carried_out
from cpd_onnx.workflow.requests import Prune

RESULT = ROOT / "benchmarks" / "results" / "parts.json"
WHOLE = "all parts"
OPTIONS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "no comparison at the outputs": {"effort": 0},
    "the same ratio of each group": {"policy": "uniform"},
    "channels by L2": {"score": "l2"},
    "no repair": {"repair": False},
}
"""Options of `prune` that leave out one part."""
REPAIRS: dict[str, dict[str, Any]] = {
    "no combinations of channels": {"mixes": False},
    "no targets beyond rectifiers": {"rounds": 0},
}
"""Options of the repair, which no option of the program sets, that leave out one part of it."""


def row(run: Run, how: str, model: Path, data: Data, seed: int) -> dict[str, Any]:
    """Return what one run left."""
    case = next(pair for pair in PAIRS if pair.model == run.model)
    given, images, labels = data.decode(case.data)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(given))[: run.images])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "small.onnx"
        entry = opened(model).get_inputs()[0].name
        np.savez(Path(folder) / "data.npz", **{entry: case.pixels(resized(given[chosen], case.size))})
        request = Prune(
            model=model, output=place, data=str(Path(folder) / "data.npz"), target=fraction("macs", run.macs),
            max_loss=float("inf"), hold_out=0.0, round_to=1, check_speed=False, log_level="quiet",
            **OPTIONS.get(how, {}),
        )  # fmt: skip  # a list
        started = time.perf_counter()
        with patch.object(prune, "Repair", partial(prune.Repair, **REPAIRS.get(how, {}))):
            carried_out(request)
        seconds = time.perf_counter() - started
        tested = resized(images, case.size)
        found = {name: score(case, path, tested, labels) for name, path in (("score", place), ("original", model))}
        left = macs(place) / macs(model)
    return {"case": run.name, "images": run.images, "seed": seed, "how": how, "macs": left, "seconds": seconds} | found


def show(rows: list[dict[str, Any]]) -> None:
    """Print the results as tables: by what was left out, and by the number of images."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    usual = {run.name: run.images for run in RUNS}

    def of(how: str, case: str, images: int) -> list[float]:
        return [
            100 * row["score"]
            for row in sorted(rows, key=lambda row: int(row["seed"]))
            if (row["how"], row["case"], row["images"]) == (how, case, images)
        ]

    print("| left out | " + " | ".join(cases) + " |\n|---|" + "---|" * len(cases))
    for how in (*OPTIONS, *REPAIRS):
        cells = [of(how, case, usual[case])[:1] for case in cases]
        print(f"| {how} | " + " | ".join(f"{cell[0]:.2f}" if cell else "" for cell in cells) + " |")
    print("\n| images | " + " | ".join(cases) + " |\n|---|" + "---|" * len(cases))
    for images in sorted({row["images"] for row in rows}):
        cells = [of(WHOLE, case, images) for case in cases]
        print(f"| {images} | " + " | ".join(", ".join(f"{value:.2f}" for value in cell) for cell in cells) + " |")


def main() -> None:
    """Run the cases, or print the stored results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="a model that lies elsewhere")
    parser.add_argument("--only", choices=[run.name for run in RUNS], action="append")
    parser.add_argument("--images", type=int, action="append", help="number of unlabelled images, of whole runs")
    parser.add_argument("--seed", type=int, action="append", help="of the choice of images (default: 0)")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    if given.table:
        show(rows)
        return
    if given.data_folder is None:
        parser.error("give --data-folder")
    elsewhere = dict(entry.split("=", 1) for entry in given.model)
    data = Data(given.data_folder)
    for run in RUNS:
        model = Path(elsewhere.get(run.model, given.data_folder / "onnx" / f"{run.model}.onnx"))
        if not model.is_file() or (given.only and run.name not in given.only):
            continue
        runs = [replace(run, images=images) for images in given.images or [run.images]]
        hows = (WHOLE,) if given.images else (*OPTIONS, *REPAIRS)
        wanted = [
            partial(row, one, how, model, data, seed) for one in runs for seed in given.seed or [0] for how in hows
        ]
        for make in wanted:
            found = make()
            print(found, flush=True)
            rows = kept(given.out, rows, found, ("case", "how", "images", "seed"), commit=commit())
    show(rows)


if __name__ == "__main__":
    main()
