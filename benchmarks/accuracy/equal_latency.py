"""Models of the same measured latency, trained alike: cpd-onnx, uniform widths, torch-pruning, random, from scratch.

    python benchmarks/accuracy/equal_latency.py students --data-folder DATA --work FOLDER [--peer-python PYTHON] [--only CASE]
    python benchmarks/accuracy/equal_latency.py train --work FOLDER [--only CASE] [--device cuda] [--processes 1] [--seconds N]
    python benchmarks/accuracy/equal_latency.py score --data-folder DATA --work FOLDER [--only CASE] [--out FILE]
    python benchmarks/accuracy/equal_latency.py --table

`students` makes the models on the machine whose latency counts, and a list of jobs for each case. `train` needs FOLDER and this
project only, so that it can run on another machine; it trains each student with three seeds by `cpd-onnx distill`, with the
original as teacher and without labels, and measures its accuracy on all test images after the last step. `score` times each model
interleaved with its original (onnxruntime, one thread, one image at a time) and writes the results.

* control: the original itself, with one seed;
* uniform: `prune --target latency=SHARE --data --policy uniform --score l2`, 512 unlabelled images: the same ratio of each
  group, by magnitude, with a repair;
* ours: `prune --target latency=L --data` with the same images, where L is what was measured of the uniform widths, which are
  coarse;
* random: the same as uniform with `--score random --policy uniform`, without a repair, with one seed;
* torch-pruning: only for the ResNets of which the source is known (benchmarks/accuracy/torch_pruning_resnet.py and
  torch_resnet18.py); the widest result that is no slower than SHARE;
* from scratch: the model with uniform widths with new weights (He et al., ICCV 2015), other ones for each seed;
* from scratch, with labels: ResNet-18 with all widths reduced alike, the widest that is no slower than L, trained with labels by
  torch_resnet18.py for as many epochs as the original.

The original ResNet-18 is not in DATA: `torch_resnet18.py train` makes FOLDER/resnet18_gtsrb.onnx and .pt.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from accuracy import HERE, Latency, commit, images, macs, prepared
from onnx import numpy_helper
from PIL import Image

from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.ir.model import load

SAMPLES = 512
"""Unlabelled images for the choice of channels and the repair."""
SEEDS = (0, 1, 2)
EPOCHS = 10
"""Epochs of the training of ResNet-18 with labels, of the original as of the narrow ones."""
LABELLED = "from scratch, with labels"


@dataclass(frozen=True)
class Case:
    """A model, a target, and a recipe.

    Attributes:
        model: Stem of the original, in DATA/onnx or in the work folder.
        data: Name of the data set in `load.py`.
        share: Target as a ratio of the original's.
        steps: Updates of the training.
        recipe: Further options of `distill`.
        peer: How torch-pruning can prune it, one of PEERS; None if it cannot.
        has_scratch: Whether a network trained from scratch is part of the comparison.
        variants: Kinds of students and other options that one more of each is trained with, by the first seed.
        target: What `share` is of: latency or macs.
        metric: What is measured on the test images.
        input: Name of the input.
        images: Number of training images; None for all.
        pruning: Further options of `prune`.
    """

    model: str
    data: str
    share: float
    steps: int
    recipe: tuple[str, ...]
    peer: str | None = None
    has_scratch: bool = False
    variants: tuple[tuple[str, tuple[str, ...]], ...] = ()
    target: str = "latency"
    metric: str = "top1"
    input: str = "input"
    images: int | None = None
    pruning: tuple[str, ...] = ()


_IMAGES = ("--flip", "--shift", "4", "--batch-size", "128", "--compare", "outputs")
_RESNET = ("--lr", "0.002", "--batch-norm", "train", *_IMAGES)
_SIGNS = ("--lr", "0.002", "--batch-norm", "train", "--shift", "2", "--batch-size", "64", "--compare", "outputs")
CASES = {
    "resnet56 0.6": Case(
        "resnet56_jpeg_cifar10", "cifar10", 0.6, 1600, _RESNET, peer="blocks", has_scratch=True, images=36000,
        variants=(("ours", ("--lr", "0.001")), ("ours", ("--lr", "0.0005")), ("ours", ("--hidden", "9"))),
    ),
    "resnet56 0.6, 20 epochs": Case(
        "resnet56_jpeg_cifar10", "cifar10", 0.6, 2400, _RESNET, peer="blocks", images=15360
    ),
    "vit 0.5": Case(
        "vit_cifar10_smmk47", "cifar10", 0.5, 1000, ("--lr", "0.0005", *_IMAGES), images=36000,
        variants=(("ours", ("--lr", "0.001")),),
    ),
    "resnet18 0.232": Case("resnet18_gtsrb", "gtsrb", 0.232, 1630, _SIGNS, peer="widths"),
    "resnet18 0.12": Case(
        "resnet18_gtsrb", "gtsrb", 0.12, 1630, _SIGNS, peer="widths",
        variants=(
            ("ours", ("--lr", "0.004")), ("ours", ("--hidden", "9")),
            ("ours", ("--steps", "4890")), ("uniform", ("--steps", "4890")),
        ),
    ),
    "espnet 0.53": Case(
        "espnet_p2_q8_camvid", "camvid", 0.53, 700,
        ("--lr", "0.001", "--batch-norm", "train", "--flip", "--batch-size", "4", "--compare", "outputs"),
        target="macs", metric="miou", input="image", pruning=("--samples", "64", "--repair-samples", "64"),
    ),
}  # fmt: skip  # a table
PEERS = {"blocks": "torch_pruning_resnet.py", "widths": "torch_resnet18.py"}
"""Scripts that prune by torch-pruning: inside the blocks of a CIFAR-10 ResNet, or all widths of ResNet-18."""
FEW_SEEDS = ("control", "random")
"""Kinds of students that are trained with the first seed alone."""


# The students.


def archive(folder: Path, case: Case, split: str, path: Path, count: int | None = None) -> Path:
    """Write the images of a split, or that many of them in random order, as the model expects them; return the path."""
    if not path.exists():
        x, y = images(folder, case.data, split)
        rows = np.arange(len(x)) if count is None else np.random.default_rng(0).permutation(len(x))[:count]
        labels = {"labels": y[rows]} if split == "test" else {}
        np.savez(path, **{case.input: prepared(x[rows], case.data)}, **labels)
    return path


def raw(folder: Path, case: Case, split: str, path: Path) -> None:
    """Copy the encoded images of a split with their labels; of the training images as many as the case takes, in random order."""
    if path.exists():
        return
    with np.load(folder / f"{case.data}.npz") as stored:
        parts = {name: stored[name] for name in stored.files if name[2:].startswith(split)}
    count = len(parts[f"x_{split}_offsets"]) - 1
    rows = np.arange(count)
    if split == "train":
        rows = np.random.default_rng(0).permutation(count)[: case.images]
    chosen = {}
    for key in ("x", "y"):
        if f"{key}_{split}" in parts:
            chosen[key] = parts[f"{key}_{split}"][rows]
            continue
        data, at = parts[f"{key}_{split}_bytes"], parts[f"{key}_{split}_offsets"]
        files = [data[at[row] : at[row + 1]] for row in rows]
        chosen |= {f"{key}_bytes": np.concatenate(files), f"{key}_offsets": np.cumsum([0, *map(len, files)])}
    np.savez(path, **chosen)


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


def stem(name: str) -> str:
    """Return what the files of a case begin with."""
    return name.replace(",", "").replace(" ", "_")


def students(name: str, case: Case, options: argparse.Namespace) -> Iterator[tuple[str, Path, float | None]]:
    """Make the students of a case and yield their kinds, their files and, if labels train them, their ratio of widths."""
    work, original = options.work, original_of(case, options)
    samples = archive(options.data_folder, case, "train", work / f"{case.data}_{SAMPLES}.npz", SAMPLES)
    start = f"{case.model}_{case.target}_{case.share}"
    data = ("--data", samples)
    choices = {
        "uniform": ("--policy", "uniform", "--score", "l2", *data),
        "ours": data,
        "random": ("--policy", "uniform", "--score", "random", "--no-repair", "--blind"),
    }
    share = case.share
    yield "control", original, None
    for kind, chosen in choices.items():
        path = work / f"{start}_{kind}.onnx"
        if not path.exists():
            line = [
                sys.executable, "-m", "cpd_onnx", "prune", original, "-o", path, "--target", f"{case.target}={share}",
                *(("--latency-batch", 1) if case.target == "latency" else ()), "--max-loss", "inf", "--keep-anyway",
                *(case.pruning if "--data" in chosen else ()), *chosen,
            ]  # fmt: skip  # one command
            done = subprocess.run([str(word) for word in line], capture_output=True, text=True, check=False)
            if not path.exists():  # a target that is missed is in the table
                raise RuntimeError(done.stderr)
        if kind == "uniform" and case.target == "latency":
            share = json.loads(Path(f"{path}.plan.json").read_text())["budget"]["latency"]["measured"]
        yield kind, path, None
    if case.has_scratch:
        yield "from scratch", work / f"{start}_uniform.onnx", None
    if case.peer and options.peer_python:
        yield "torch-pruning", widest(lambda ratio: peer(case, ratio, options), case.share, case, options)[0], None
    if case.peer == "widths":
        path, ratio = widest(lambda ratio: narrow(case, ratio, options), share, case, options)
        yield LABELLED, path, ratio


def widest(make: Callable[[float], Path], share: float, case: Case, options: argparse.Namespace) -> tuple[Path, float]:
    """Return the widest model that is no slower than a share of the original, and its ratio (bisection in hundredths)."""
    with np.load(options.work / f"{case.data}_{SAMPLES}.npz") as stored:
        latency = Latency(original_of(case, options), {case.input: stored[case.input][:1]})
    low, high = 5, 100
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if latency(make(middle / 100), 2.0) <= share else (low, middle)
    return make(low / 100), low / 100


def peer(case: Case, ratio: float, options: argparse.Namespace) -> Path:
    """Return the original pruned by torch-pruning: to that ratio of the MACs, or of all widths."""
    original, path = original_of(case, options), options.work / f"{case.model}_torch-pruning_{ratio}.onnx"
    assert case.peer is not None
    script = HERE / "accuracy" / PEERS[case.peer]
    line = [options.peer_python, script, original, ratio, path]
    if case.peer == "widths":
        line = [
            options.peer_python,
            script,
            "prune",
            original.with_suffix(".pt"),
            path.with_suffix(""),
            "--share",
            ratio,
        ]
    if not path.exists():
        subprocess.run([str(word) for word in line], check=True, capture_output=True)
    return path


def narrow(case: Case, ratio: float, options: argparse.Namespace) -> Path:
    """Return ResNet-18 with new weights and that ratio of all widths."""
    path = options.work / f"{case.model}_narrow_{ratio}.onnx"
    if not path.exists():
        labelled(
            decoded(options.work / f"{case.data}_test_raw.npz", options.work / f"{case.data}_test.npz", case),
            path,
            ratio,
            0,
        )
    return path


def labelled(data: Path, out: Path, ratio: float, epochs: int, *more: Any) -> subprocess.CompletedProcess[str]:
    """Train ResNet-18 of that ratio of all widths with labels."""
    line = [
        sys.executable, HERE / "accuracy" / "torch_resnet18.py", "train", data, out.with_suffix(""),
        "--share", ratio, "--epochs", epochs, *more,
    ]  # fmt: skip  # one command
    return subprocess.run([str(word) for word in line], capture_output=True, text=True, check=False)


def make(options: argparse.Namespace) -> None:
    """Make the students and the lists of jobs."""
    for name in options.only or CASES:
        case, jobs = CASES[name], []
        for split in ("train", "test"):
            raw(options.data_folder, case, split, raw_of(case, split, options))
        original = original_of(case, options)
        teacher = options.work / original.name
        if not teacher.exists():
            shutil.copyfile(original, teacher)
        files = {}
        for kind, path, ratio in students(name, case, options):
            student = files[kind] = teacher if kind == "control" else path
            for seed in SEEDS[:1] if kind in FEW_SEEDS else SEEDS:
                file = student.name
                if kind == "from scratch":
                    file = f"{path.stem}_reset_{seed}.onnx"
                    reset(path, options.work / file, seed)
                jobs.append({"kind": kind, "seed": seed, "student": file, "ratio": ratio})
        jobs += [
            {
                "kind": f"{kind}, {' '.join(other)}",
                "seed": SEEDS[0],
                "student": files[kind].name,
                "options": other,
            }
            for kind, other in case.variants
        ]
        jobs.sort(key=lambda job: job["seed"])  # a run that stops early has trained all kinds with the first seeds
        jobs_of(name, options).write_text(json.dumps(jobs, indent=1))


def jobs_of(name: str, options: argparse.Namespace) -> Path:
    """Return the file with the jobs of a case."""
    return Path(options.work / f"{stem(name)}_jobs.json")


def raw_of(case: Case, split: str, options: argparse.Namespace) -> Path:
    """Return the file with the encoded images of a split."""
    count = f"_{case.images}" if split == "train" and case.images else ""
    return Path(options.work / f"{case.data}_{split}_raw{count}.npz")


# The training.


def decoded(path: Path, out: Path, case: Case) -> Path:
    """Decode the images of `raw`, prepare them for the model, and return the archive."""
    if not out.exists():
        with np.load(path) as stored:
            arrays = {key: stored[key] for key in stored.files}
        found = {}
        for key in ("x", "y"):
            if key in arrays:
                found[key] = arrays[key]
                continue
            data, at = arrays[f"{key}_bytes"].tobytes(), arrays[f"{key}_offsets"]
            files = [data[start:end] for start, end in pairwise(at)]
            with ThreadPoolExecutor() as pool:
                found[key] = np.stack(list(pool.map(lambda file: np.asarray(Image.open(io.BytesIO(file))), files)))
        np.savez(out, **{case.input: prepared(found["x"], case.data)}, labels=found["y"])
    return out


def train(options: argparse.Namespace) -> None:
    """Train and score all students that are not trained yet."""
    out = options.trained or options.work / "trained"
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    for name in options.only or CASES:
        case, jobs = CASES[name], json.loads(jobs_of(name, options).read_text())
        data, test = (
            decoded(raw_of(case, split, options), out / f"{raw_of(case, split, options).stem}_decoded.npz", case)
            for split in ("train", "test")
        )
        with ThreadPoolExecutor(options.processes) as pool:
            running = [pool.submit(trained, name, job, (data, test), end, options) for job in jobs]
        for future in running:
            future.result()  # raises what it raised


def trained(
    name: str, job: dict[str, Any], archives: tuple[Path, Path], end: float, options: argparse.Namespace
) -> None:
    """Train and score one student beside the archives of images, unless that is done or no time is left."""
    case, left, (data, test) = CASES[name], end - time.monotonic(), archives
    path = data.parent / file_of(name, job)
    scored = path.with_suffix(".json")
    if scored.exists() or left < 30:
        return
    started = time.monotonic()
    if job.get("ratio"):
        more = ("--device", options.device, "--seed", job["seed"])
        done = labelled(data, path, job["ratio"], EPOCHS, *more)
    else:
        line = [
            sys.executable, "-m", "cpd_onnx", "distill", options.work / f"{case.model}.onnx", options.work / job["student"],
            "-o", path, "--data", data, "--steps", options.steps or case.steps, "--seed", job["seed"], "--threads",
            options.threads, "--device", options.device, "--force", *case.recipe, *job.get("options", ()),
        ]  # fmt: skip  # one command
        done = subprocess.run([str(word) for word in line], capture_output=True, text=True, check=False)
    taken = time.monotonic() - started
    if done.returncode:
        print(f"{path.stem}: {done.stderr[-500:]}", flush=True)
        return
    with np.load(test) as stored:
        score = round(evaluate(load(path).complete_proto(), ArraySource(dict(stored)), case.metric), 4)
    scored.write_text(json.dumps(score))
    print(f"{path.stem}: {score}, trained in {taken:.0f} s", flush=True)


def file_of(name: str, job: dict[str, Any]) -> str:
    """Return the name of the trained model of a job."""
    kind = job["kind"].replace(", --", "_").replace(",", "").replace(" ", "_")
    return f"{stem(name)}_{kind}_{job['seed']}.onnx"


# The figures.


def score(options: argparse.Namespace) -> None:
    """Time all students, and write the results with the scores of the training."""
    content = json.loads(options.out.read_text()) if options.out.exists() else {"cases": {}}
    for name in options.only or CASES:
        case, jobs = CASES[name], json.loads(jobs_of(name, options).read_text())
        original = original_of(case, options)
        test = archive(options.data_folder, case, "test", options.work / f"{case.data}_test.npz")
        with np.load(test) as stored:
            tested = ArraySource(dict(stored))
            latency = Latency(original, {case.input: stored[case.input][:1]})

        def measured(path: Path, case: Case = case, tested: ArraySource = tested) -> float:
            return round(evaluate(load(path).complete_proto(), tested, case.metric), 4)

        if options.again:
            for row, student in {job["kind"]: job["student"] for job in jobs}.items():
                content["cases"][name]["rows"][row]["latency"] = round(latency(options.work / student), 3)
            options.out.write_text(json.dumps(content, indent=1) + "\n")
            continue
        rows: dict[str, Any] = {}
        for job in jobs:
            student = options.work / job["student"]
            found = (options.trained or options.work / "trained") / file_of(name, job)
            row = rows.setdefault(job["kind"], {"trained": {}})
            if "latency" not in row:
                row |= {"latency": round(latency(student), 3), "macs": round(macs(student) / macs(original), 3)}
                row |= {"untrained": measured(student)}
            if (path := found.with_suffix(".json")).exists():
                row["trained"][str(job["seed"])] = json.loads(path.read_text())
        content["cases"][name] = {
            "commit": commit(),
            "device": options.device,
            "original": measured(original),
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
