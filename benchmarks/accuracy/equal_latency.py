"""Models of the same measured latency, trained alike: cpd-onnx, uniform widths, torch-pruning, random, from scratch.

    python benchmarks/accuracy/equal_latency.py students --data-folder DATA --work FOLDER [--peer-python PYTHON] [--only CASE]
    python benchmarks/accuracy/equal_latency.py train --work FOLDER [--device cuda] [--processes 1] [--seconds N]
    python benchmarks/accuracy/equal_latency.py score --data-folder DATA --work FOLDER [--out FILE]
    python benchmarks/accuracy/equal_latency.py --table

`students` makes the models on the machine whose latency counts, and `jobs.json` beside them. `train` needs FOLDER and this
project only, so that it can run on another machine; it trains each student with three seeds by `cpd-onnx distill`, with the
original as teacher and without labels. `score` times each model interleaved with its original (onnxruntime, one thread, one
image at a time) and measures its accuracy on all test images after the last step.

* control: the original itself;
* uniform: `prune --target latency=SHARE --data --policy uniform --score l2`, 512 unlabelled images: the same ratio of each
  group, by magnitude, with a repair;
* ours: `prune --target latency=L --data` with the same images, where L is what was measured of the uniform widths, which are
  coarse;
* random: the same as uniform with `--score random --policy uniform`, without a repair;
* torch-pruning: only for the ResNet of which its source is known (benchmarks/accuracy/torch_pruning_resnet.py); the widest
  result that is no slower than SHARE;
* from scratch: the model with uniform widths with new weights (He et al., ICCV 2015), other ones for each seed.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from accuracy import HERE, IMAGENET, Latency, commit, images, macs, prepared
from onnx import numpy_helper
from PIL import Image

from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.ir.model import load

SAMPLES = 512
"""Unlabelled images for the choice of channels and the repair."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """A model, a latency, and a recipe.

    Attributes:
        model: Stem of the original, in DATA/onnx or in the work folder.
        data: Name of the data set in `load.py`.
        share: Target latency as a ratio of the original's.
        steps: Updates of the training.
        recipe: Further options of `distill`.
        has_peer: Whether torch-pruning can prune it.
        has_scratch: Whether a network trained from scratch is part of the comparison.
        variants: Other options, each of which one more student of `ours` is trained with, by the first seed.
    """

    model: str
    data: str
    share: float
    steps: int
    recipe: tuple[str, ...]
    has_peer: bool = False
    has_scratch: bool = True
    variants: tuple[tuple[str, ...], ...] = ()


_IMAGES = ("--flip", "--shift", "4", "--batch-size", "128", "--compare", "outputs")
CASES = {
    "resnet56 0.6": Case(
        "resnet56_jpeg_cifar10", "cifar10", 0.6, 1600, ("--lr", "0.002", "--batch-norm", "train", *_IMAGES), has_peer=True,
        variants=(("--lr", "0.001"), ("--lr", "0.0005"), ("--hidden", "9")),
    ),
    "vit 0.5": Case(
        "vit_cifar10_smmk47", "cifar10", 0.5, 1000, ("--lr", "0.0005", *_IMAGES), has_scratch=False,
        variants=(("--lr", "0.001"),),
    ),
}  # fmt: skip  # a table


# The students.


def archive(folder: Path, name: str, split: str, path: Path, count: int | None = None) -> Path:
    """Write the images of a split, or that many of them in random order, as the models expect them; return the path."""
    if not path.exists():
        x, y = images(folder, name, split)
        rows = np.arange(len(x)) if count is None else np.random.default_rng(0).permutation(len(x))[:count]
        labels = {"labels": y[rows]} if split == "test" else {}
        np.savez(path, input=prepared(x[rows], name), **labels)
    return path


def raw(folder: Path, name: str, path: Path, count: int | None) -> None:
    """Copy the encoded training images of a data set, or that many of them in random order."""
    if path.exists():
        return
    with np.load(folder / f"{name}.npz") as stored:
        data, at = stored["x_train_bytes"], stored["x_train_offsets"]
    chosen = np.random.default_rng(0).permutation(len(at) - 1)[:count]
    parts = [data[at[i] : at[i + 1]] for i in chosen]
    np.savez(path, data=np.concatenate(parts), offsets=np.cumsum([0, *map(len, parts)]))


def reset(source: Path, out: Path, seed: int) -> None:
    """Write a model of convolutions and Gemms with new weights, of the variance of He et al."""
    model, rng = onnx.load(source), np.random.default_rng(seed)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}

    def put(name: str, values: Any) -> None:
        before = numpy_helper.to_array(stored[name])
        values = np.broadcast_to(np.asarray(values, before.dtype), before.shape)
        stored[name].CopyFrom(numpy_helper.from_array(values.copy(), name))

    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            shape = tuple(stored[node.input[1]].dims)
            put(node.input[1], rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape))
            for name in node.input[2:]:
                put(name, 0)
        elif node.op_type == "BatchNormalization":
            for name, value in zip(node.input[1:], (1, 0, 0, 1), strict=True):
                put(name, value)
    onnx.save(model, out)


def original_of(case: Case, options: argparse.Namespace) -> Path:
    """Return the original of a case."""
    stored = options.data_folder / "onnx" / f"{case.model}.onnx"
    return stored if stored.exists() else options.work / f"{case.model}.onnx"


def students(name: str, case: Case, options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Make the students of a case and yield their kinds and files."""
    work, original = options.work, original_of(case, options)
    samples = archive(options.data_folder, case.data, "train", work / f"{case.data}_{SAMPLES}.npz", SAMPLES)
    stem = name.replace(" ", "_")
    data = ("--data", samples)
    choices = {
        "uniform": ("--policy", "uniform", "--score", "l2", *data),
        "ours": data,
        "random": ("--policy", "uniform", "--score", "random", "--no-repair", "--blind"),
    }
    share = case.share
    yield "control", original
    for kind, chosen in choices.items():
        path = work / f"{stem}_{kind}.onnx"
        if not path.exists():
            line = [
                sys.executable, "-m", "cpd_onnx", "prune", original, "-o", path, "--target", f"latency={share}",
                "--latency-batch", 1, "--max-loss", "inf", "--keep-anyway", *chosen,
            ]  # fmt: skip  # one command
            done = subprocess.run([str(word) for word in line], capture_output=True, text=True, check=False)
            if not path.exists():  # a target that is missed is in the table
                raise RuntimeError(done.stderr)
        if kind == "uniform":
            share = json.loads(Path(f"{path}.plan.json").read_text())["budget"]["latency"]["measured"]
        yield kind, path
    if case.has_scratch:
        yield "from scratch", work / f"{stem}_uniform.onnx"
    if case.has_peer and options.peer_python:
        path = work / f"{stem}_torch-pruning.onnx"
        if not path.exists():
            shutil.copyfile(peer(original, case.share, options), path)
        yield "torch-pruning", path


def peer(original: Path, share: float, options: argparse.Namespace) -> Path:
    """Return the widest result of torch-pruning that is no slower than a share of the original (bisection over MACs)."""
    with np.load(options.work / f"cifar10_{SAMPLES}.npz") as stored:
        latency = Latency(original, {"input": stored["input"][:1]})
    script = HERE / "accuracy" / "torch_pruning_resnet.py"
    low, high = 5, 100  # percent of the MACs
    while high - low > 1:
        middle = (low + high) // 2
        path = options.work / f"{original.stem}_torch-pruning_{middle}.onnx"
        if not path.exists():
            line = [options.peer_python, script, original, str(middle / 100), path]
            subprocess.run([str(word) for word in line], check=True, capture_output=True)
        low, high = (middle, high) if latency(path, 2.0) <= share else (low, middle)
    return options.work / f"{original.stem}_torch-pruning_{low}.onnx"


def ours_of(name: str) -> str:
    """Return the file name of the student of a case that is pruned by cpd-onnx."""
    return f"{name.replace(' ', '_')}_ours.onnx"


def make(options: argparse.Namespace) -> None:
    """Make the students and the list of jobs."""
    jobs = []
    for name in options.only or CASES:
        case = CASES[name]
        raw(options.data_folder, case.data, options.work / f"{case.data}_raw.npz", options.images)
        original = original_of(case, options)
        teacher = options.work / original.name
        if not teacher.exists():
            shutil.copyfile(original, teacher)
        for kind, path in students(name, case, options):
            student = teacher if kind == "control" else path
            for seed in SEEDS[:1] if kind == "control" else SEEDS:
                file = student.name
                if kind == "from scratch":
                    file = f"{path.stem}_reset_{seed}.onnx"
                    reset(path, options.work / file, seed)
                jobs.append({"case": name, "kind": kind, "seed": seed, "student": file})
        jobs += [
            {
                "case": name,
                "kind": f"ours, {' '.join(other)}",
                "seed": SEEDS[0],
                "student": ours_of(name),
                "options": other,
            }
            for other in case.variants
        ]
    jobs.sort(key=lambda job: job["seed"])  # a run that stops early has trained all kinds with the first seeds
    (options.work / "jobs.json").write_text(json.dumps(jobs, indent=1))


# The training.


def decoded(path: Path, out: Path, count: int | None = None) -> Path:
    """Decode the training images of `raw`, normalise them, and return the archive."""
    if not out.exists():
        with np.load(path) as stored:
            data, at = stored["data"].tobytes(), stored["offsets"]
        at = at[: None if count is None else count + 1]
        with ThreadPoolExecutor() as pool:
            pixels = list(
                pool.map(lambda i: np.asarray(Image.open(io.BytesIO(data[at[i] : at[i + 1]]))), range(len(at) - 1))
            )
        mean, std = (np.float32(v) for v in IMAGENET)
        x = (np.stack(pixels).astype(np.float32) / 255 - mean) / std
        np.savez(out, input=np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    return out


def train(options: argparse.Namespace) -> None:
    """Train all students that are not trained yet."""
    jobs = json.loads((options.work / "jobs.json").read_text())
    out = options.trained or options.work / "trained"
    out.mkdir(parents=True, exist_ok=True)
    data = {
        name: decoded(options.work / f"{name}_raw.npz", out / f"{name}.npz", options.images)
        for name in {CASES[job["case"]].data for job in jobs}
    }
    end = time.monotonic() + options.seconds

    def run(job: dict[str, Any]) -> None:
        case, path, left = CASES[job["case"]], out / file_of(job), end - time.monotonic()
        if path.exists() or left < 30:
            return
        line = [
            sys.executable, "-m", "cpd_onnx", "distill", options.work / f"{case.model}.onnx", options.work / job["student"],
            "-o", path, "--data", data[case.data], "--steps", options.steps or case.steps, "--seed", job["seed"], "--threads", options.threads,
            "--device", options.device, "--force", *case.recipe, *job.get("options", ()),
        ]  # fmt: skip  # one command
        started = time.monotonic()
        try:
            done = subprocess.run(
                [str(word) for word in line], capture_output=True, text=True, check=False, timeout=left
            )
            outcome = done.stderr[-500:] if done.returncode else "trained"
        except subprocess.TimeoutExpired:
            outcome = "out of time"
        print(f"{path.stem}: {outcome}, {time.monotonic() - started:.0f} s", flush=True)

    with ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(run, jobs))


def file_of(job: dict[str, Any]) -> str:
    """Return the name of the trained model of a job."""
    return f"{job['case']}_{job['kind']}_{job['seed']}.onnx".replace(", --", "_").replace(" ", "_")


# The figures.


def score(options: argparse.Namespace) -> None:
    """Score and time all students, and write the results."""
    jobs = json.loads((options.work / "jobs.json").read_text())
    content = json.loads(options.out.read_text()) if options.out.exists() else {"cases": {}}
    content |= {"commit": commit(), "images": options.images, "device": options.device}
    for name in dict.fromkeys(job["case"] for job in jobs):
        case = CASES[name]
        original = original_of(case, options)
        test = archive(options.data_folder, case.data, "test", options.work / f"{case.data}_test.npz")
        with np.load(test) as stored:
            tested = ArraySource(dict(stored))
            latency = Latency(original, {"input": stored["input"][:1]})

        def top1(path: Path, tested: ArraySource = tested) -> float:
            return round(evaluate(load(path).complete_proto(), tested, "top1"), 4)

        if options.again:
            for row, student in {job["kind"]: job["student"] for job in jobs if job["case"] == name}.items():
                content["cases"][name]["rows"][row]["latency"] = round(latency(options.work / student), 3)
            options.out.write_text(json.dumps(content, indent=1) + "\n")
            continue
        rows: dict[str, Any] = {}
        for job in (job for job in jobs if job["case"] == name):
            student = options.work / job["student"]
            path = (options.trained or options.work / "trained") / file_of(job)
            row = rows.setdefault(job["kind"], {"trained": {}})
            if "latency" not in row:
                row |= {"latency": round(latency(student), 3), "macs": round(macs(student) / macs(original), 3)}
                row |= {"untrained": top1(student)}
            if path.exists():
                row["trained"][str(job["seed"])] = top1(path)
        content["cases"][name] = {
            "original": top1(original),
            "steps": options.steps or case.steps,
            "recipe": case.recipe,
            "rows": rows,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    show(content)


def show(content: dict[str, Any]) -> None:
    """Print the results as a table."""
    print("| model | asked | kind | latency | MACs left | untrained | trained, by seed | mean | change |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, case in content["cases"].items():
        for kind, row in case["rows"].items():
            values = [100 * value for value in row["trained"].values()]
            mean = f"{np.mean(values):.2f} | {np.mean(values) - 100 * case['original']:+.2f}" if values else " | "
            print(
                f"| {CASES[name].model} | {CASES[name].share} | {kind} | {row['latency']:.3f} | {row['macs']:.3f} | "
                f"{100 * row['untrained']:.2f} | {', '.join(f'{value:.2f}' for value in values)} | {mean} |"
            )


def main() -> None:
    """Run one part of the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("students", "train", "score"))
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--trained", type=Path, help="folder of trained models (default: WORK/trained)")
    parser.add_argument("--peer-python", help="Python interpreter with torch and torch-pruning")
    parser.add_argument("--only", action="append", choices=CASES)
    parser.add_argument("--images", type=int, help="number of training images (default: all)")
    parser.add_argument("--steps", type=int, help="updates of the training (default: those of the case)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="students trained at the same time")
    parser.add_argument("--seconds", type=float, default=1e9, help="time limit of the training")
    parser.add_argument("--again", action="store_true", help="only repeat the timing of the models in --work and --out")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "equal_latency.json")
    options = parser.parse_args()
    if options.table:
        show(json.loads(options.out.read_text()))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    {"students": make, "train": train, "score": score}[options.part](options)


if __name__ == "__main__":
    main()
