"""Accuracy of real trained models that are pruned without training, from unlabelled images alone.

    python benchmarks/accuracy/without_training.py --data DATA [--only resnet56] [--peer-python TORCH] [--onnxsim-python ONNXSIM]
    python benchmarks/accuracy/without_training.py --data DATA --scores [--only resnet56]
    python benchmarks/accuracy/without_training.py --table

DATA is a folder with `onnx/` and `load.py`, which decodes CIFAR-10, GTSRB and CamVid; all test images count.

The first command prunes each model through the command line (`cpd-onnx prune --data IMAGES`: reconstruction scores, the
widths with the least loss, repair), and by magnitude and at random with and without repair. TORCH is a Python with torch
and torch-pruning, which prunes the ResNet (benchmarks/accuracy/torch_pruning_resnet.py). ONNXSIM is one with onnxsim:
structured pruning by Wanda on the same images at the lowest sparsity that reaches the target, then its own recovery.

The second compares all scores at 1.5, 2 and 4 times fewer MACs, all with the allocation policy "optimal", before and
after the repair, on 256 unlabelled images and 2,000 test images, both drawn with a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from accuracy import HERE, command, commit, images, macs, prepared

from cpd_onnx.budget.allocation import Budget, allocate
from cpd_onnx.channels.combing import comb
from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import ArraySource, Source
from cpd_onnx.errors import CpdError
from cpd_onnx.ir.model import Model, load
from cpd_onnx.passes.prune import prune
from cpd_onnx.passes.repair import RepairOptions, repair
from cpd_onnx.scores.registry import SCORE_FUNCTIONS, score


@dataclass(frozen=True)
class Case:
    """A model, its data, the target MACs as a ratio, and the number of unlabelled images used."""

    model: str
    data: str
    metric: str
    target: float
    samples: int


CASES = {
    "resnet56": Case("resnet56_jpeg_cifar10", "cifar10", "top1", 0.5, 512),
    "vit": Case("vit_cifar10_smmk47", "cifar10", "top1", 0.5, 512),
    "gtsrb": Case("resnet20_gtsrb", "gtsrb", "top1", 0.5, 512),
    "espnet": Case("espnet_p2_q8_camvid", "camvid", "miou", 0.53, 64),
}
WITH_SCORES = ("resnet56", "vit", "gtsrb")
"""Cases for which all scores are compared."""
TARGETS = (1 / 1.5, 1 / 2, 1 / 4)
"""Target MACs of the comparison of scores, as ratios of the original's."""
WAYS = {
    "ours": (),
    "l2, repaired": ("--score", "l2"),
    "random, repaired": ("--score", "random"),
    "l2": ("--score", "l2", "--no-repair"),
    "random": ("--score", "random", "--no-repair"),
}
"""Additional options of `prune` by name."""
LABELS = {
    "dense": "original",
    "ours": "cpd-onnx",
    "l2, repaired": "L2, uniform, repaired",
    "random, repaired": "random, uniform, repaired",
    "l2": "L2, uniform",
    "random": "random, uniform",
}
"""Printed names of rows that the results name differently."""
PEER_SECONDS = 180
"""Seconds after which onnxsim is stopped."""
ONNXSIM = """
import sys, numpy as np, onnx, onnxsim
model, data, out, sparsity = onnx.load(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3], float(sys.argv[4])
name = model.graph.input[0].name
size = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 64
batches = [{name: data[name][i : i + size]} for i in range(0, len(data[name]) - size + 1, size)]
pruned = onnxsim.apply_structured_wanda_pruning(model, batches, sparsity=sparsity)
onnx.save(onnxsim.apply_pruning_finetune(model, pruned, batches), out)
"""


def calibration(case: Case, folder: Path, name: str) -> np.ndarray:
    """Return unlabelled images of the training set, drawn with a fixed seed."""
    x, _ = images(folder, case.data, "train")
    chosen = np.random.default_rng(0).permutation(len(x))[: case.samples]
    return prepared(x[chosen], case.data)


def tested(case: Case, folder: Path, name: str, count: int | None) -> Source:
    """Return `count` test images drawn with a fixed seed; all if None."""
    x, y = images(folder, case.data, "test")
    chosen = np.random.default_rng(0).permutation(len(x))[:count]
    return ArraySource({name: prepared(x[chosen], case.data), "labels": y[chosen]})


def rows(case: Case, folder: Path, work: Path, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a case with their names, the original first."""
    original = folder / "onnx" / f"{case.model}.onnx"
    model = load(original)
    name = model.graph.input[0].name
    test = tested(case, folder, name, None)
    archive = work / f"{case.model}_calibration.npz"
    np.savez(archive, **{name: calibration(case, folder, name)})

    def row(path: Path, seconds: float) -> dict[str, Any]:
        scored = evaluate(load(path).complete_proto(), test, case.metric)
        return {
            case.metric: round(scored, 4),
            "macs": round(macs(path) / macs(original), 4),
            "seconds": round(seconds, 1),
        }

    yield "dense", row(original, 0.0)
    for way, chosen in WAYS.items():
        out = work / f"{case.model}_{way.replace(', ', '_')}.onnx"
        started = time.perf_counter()
        arguments = ("--target", f"macs={case.target}", "--data", archive, "--samples", case.samples)
        command("prune", original, "-o", out, *arguments, "--repair-samples", case.samples, *chosen, "--force")
        yield way, row(out, time.perf_counter() - started)
    if options.peer_python and case.model.startswith("resnet56"):
        out, started = work / "torch_pruning.onnx", time.perf_counter()
        script = [options.peer_python, HERE / "accuracy" / "torch_pruning_resnet.py", original, str(case.target), out]
        subprocess.run(script, check=True, capture_output=True)
        yield "torch-pruning", row(out, time.perf_counter() - started)
    if options.onnxsim_python:
        yield "onnxsim, recovered", onnxsim(case, original, archive, work, options.onnxsim_python, row)


def onnxsim(case: Case, original: Path, archive: Path, work: Path, python: str, row: Any) -> dict[str, Any]:
    """Return the row of the first sparsity, in steps of 0.05, that reaches the target; an error if 0.5 has no effect."""

    def at(step: int) -> dict[str, Any]:
        out, started = work / f"onnxsim_{step}.onnx", time.perf_counter()
        line = [python, "-c", ONNXSIM, str(original), str(archive), str(out), str(step / 20)]
        try:
            done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=PEER_SECONDS)
            if done.returncode:
                return {"error": (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]}
            if macs(out) > 0.9999 * macs(original):
                return {"error": "removes nothing"}
        except subprocess.TimeoutExpired:
            return {"error": f"no file within {PEER_SECONDS} s"}
        except CpdError as error:
            return {"error": str(error)[:200]}
        return row(out, time.perf_counter() - started) | {"sparsity": step / 20}

    found = at(10)
    if "error" in found:
        return found
    return next((found for found in map(at, range(1, 20)) if found.get("macs", 1.0) <= case.target), found)


def compared(case: Case, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the results of all scores at all targets."""
    model = load(folder / "onnx" / f"{case.model}.onnx")
    name = model.graph.input[0].name
    data = ArraySource({name: calibration(replace(case, samples=256), folder, name)})
    test, fitting = tested(case, folder, name, 2000), RepairOptions(samples=256, rows=1 << 14)

    def value(small: Model) -> float:
        return round(evaluate(small.complete_proto(), test, case.metric), 4)

    combed = comb(model)
    yield {"score": "dense", "raw": value(model)}
    for kind, scorer in SCORE_FUNCTIONS.items():
        started = time.perf_counter()
        scores = score(combed, kind, data=data)
        seconds = time.perf_counter() - started
        for target in TARGETS:
            entry: dict[str, Any] = {"score": kind, "fewer": round(1 / target, 2), "seconds": round(seconds, 1)}
            try:
                chosen = allocate(combed, scores, Budget("macs", target, "optimal"), is_loss=scorer.is_loss)
            except CpdError as error:
                yield entry | {"error": str(error)[:200]}
                continue
            kept = chosen.keep_mask(combed)
            small = prune(combed, chosen).model
            entry["raw"] = value(small)
            yield entry | {"repaired": value(repair(combed, kept, small, data, fitting).model)}


def show(content: dict[str, Any]) -> None:
    print("| model | how | MACs left | accuracy | change | seconds |\n|---|---|---|---|---|---|")
    for name, case in content["cases"].items():
        metric = CASES[name].metric
        original = case["dense"][metric]
        for way, row in case.items():
            if "error" in row:
                print(f"| {name} | {LABELS.get(way, way)} | {row['error']} |")
                continue
            change = "" if way == "dense" else f"{100 * (row[metric] - original):+.1f}"
            print(
                f"| {name} | {LABELS.get(way, way)} | {row['macs']:.3f} | {100 * row[metric]:.1f} | {change} | {row['seconds']:.0f} |"
            )
    for name, entries in content["scores"].items():
        print(f"\n{name}, original {100 * entries[0]['raw']:.1f}: before -> after the repair, at fewer MACs\n")
        fewer = sorted({entry["fewer"] for entry in entries if "fewer" in entry})
        print("| score |", " | ".join(f"{x:g}x" for x in fewer), "| s |\n|---|" + "---|" * (len(fewer) + 1))
        for kind in dict.fromkeys(entry["score"] for entry in entries[1:]):
            mine = {entry["fewer"]: entry for entry in entries[1:] if entry["score"] == kind}
            cells = (
                f"{100 * e['raw']:.1f} -> {100 * e['repaired']:.1f}" if "raw" in e else "-"
                for e in map(mine.get, fewer)
                if e
            )
            print(f"| {kind} |", " | ".join(cells), f"| {next(iter(mine.values()))['seconds']:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--scores", action="store_true", help="compare all scores")
    parser.add_argument("--peer-python", help="Python interpreter with torch-pruning")
    parser.add_argument("--onnxsim-python", help="Python interpreter with onnxsim")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "without_training.json")
    options = parser.parse_args()
    content = json.loads(options.out.read_text()) if options.out.exists() else {"cases": {}, "scores": {}}
    if options.table:
        show(content)
        return
    content |= {
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "onnxruntime": ort.__version__},
        "commit": commit(), "command": f"python benchmarks/accuracy/without_training.py {' '.join(Path(word).name for word in sys.argv[1:])}",
    }  # fmt: skip  # a record
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or (WITH_SCORES if options.scores else CASES):
            if options.scores:
                content["scores"][name] = []
                for entry in compared(CASES[name], options.data):
                    content["scores"][name].append(entry)
                    options.out.write_text(json.dumps(content, indent=1) + "\n")
                    print(name, entry, file=sys.stderr, flush=True)
                continue
            content["cases"][name] = {}
            for way, row in rows(CASES[name], options.data, Path(folder), options):
                content["cases"][name][way] = row
                options.out.write_text(json.dumps(content, indent=1) + "\n")
                print(name, way, row, file=sys.stderr, flush=True)
    show(content)


if __name__ == "__main__":
    main()
