"""Code shared by the examples: export from torch, compress a model and its controls, print the table.

`compare` shows how to call cpd-onnx; everything else provides a model to compress and a score to judge it by.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from rich.console import Console

import cpd_onnx as cpd
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.costs import CostModel
from cpd_onnx.data.sources import LABELS, ArraySource
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.passes.comb import Comb
from cpd_onnx.passes.distill import DistillOptions, distill, trained
from cpd_onnx.passes.prune import Prune
from cpd_onnx.passes.repair import Repair
from cpd_onnx.passes.score import Score
from cpd_onnx.passes.verify import Verify
from cpd_onnx.proof.files import verify_files
from cpd_onnx.report import tables as report
from cpd_onnx.runtime.sessions import latency_ratio
from cpd_onnx.summary import count

Arrays = dict[str, npt.NDArray[Any]]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Task:
    """Model evaluation, data and budget of an example.

    Attributes:
        name: Title of the table.
        metric: Name of the metric that `judge` returns, for the column heading.
        judge: Function that scores a model on held-out data.
        data: Unlabelled inputs by name, used for scoring, repair and training.
        recipe: Training options, the same for all students.
        macs: Fraction of the multiply-accumulates that may remain.
        samples: Number of samples used for scoring and repair.
    """

    name: str
    metric: str
    judge: Callable[[onnx.ModelProto], float]
    data: Arrays
    recipe: Mapping[str, Any] = field(default_factory=dict)
    macs: float = 0.5
    samples: int = 256


def arguments(description: str | None, *files: str) -> argparse.Namespace:
    """Return the options common to all examples, and the user's own files."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    for name in files:
        parser.add_argument(name, type=Path, nargs="?", help=f"your own {name} (default: that of the example)")
    parser.add_argument("--quick", action="store_true", help="train for a few steps only, as a smoke test")
    parser.add_argument("--out", type=Path, help="new folder for the model, the compressed model and its plan")
    given = parser.parse_args()
    if given.out is not None and given.out.exists():
        parser.error(f"{given.out} exists: name a new folder")
    torch.set_num_threads(1)  # the layers are small, and sums must not depend on the number of cores
    torch.manual_seed(0)
    return given


def export(model: torch.nn.Module, sample: torch.Tensor, names: Sequence[str]) -> onnx.ModelProto:
    """Return the model as ONNX with a free batch size; `names` are those of the input and then of the outputs."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # deprecated exporter, which needs only onnx
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model.eval(),
            (sample,),
            str(path),
            input_names=names[:1],
            output_names=names[1:],
            dynamic_axes={name: {0: "batch"} for name in names},
            opset_version=17,
            dynamo=False,
        )
        return onnx.load(path)


def compare(original: onnx.ModelProto, task: Task, out: Path | None = None) -> None:
    """Compress a model, train its controls, and print the results.

    The controls show the value of the choice of channels and the effect of the training alone: random channels, trained
    in the same way, and the original, trained further in the same way.
    """
    started = time.perf_counter()
    model, source = cpd.load(original), ArraySource(task.data)
    options = DistillOptions(threads=1, **task.recipe)

    def student(small: cpd.Model) -> cpd.Model:
        return trained(small, distill(original, small.complete_proto(), source, options))

    # With data: score by the error that a repair cannot compensate, choose the widths with the least loss, repair.
    pruned = cpd.run(
        [
            Comb(),
            Score("reconstruction", samples=task.samples),
            Allocate(macs=task.macs, policy="optimal"),
            Prune(),
            Verify(),
            Repair(samples=task.samples),
        ],
        model,
        data=source,
    )
    by_lot = cpd.run(f"comb, score{{kind='random'}}, allocate{{macs={task.macs}}}, prune", model)
    ours = student(pruned.model)
    found = {
        "the original": model,
        "the original, trained on": student(model),
        "random channels, distilled": student(by_lot.model),
        "pruned and repaired": pruned.model,
        "pruned, repaired, distilled": ours,
    }
    _print(found, task)
    plan = pruned.plan.with_values(pruned.model, ours)  # names the trained weights
    proof = verify_files(model, ours, plan)
    print(report.proof_line(report.comparison(proof.comparison)))
    if out is not None:
        out.mkdir(parents=True)
        model.save(out / "original.onnx")
        ours.save(out / "compressed.onnx")
        plan.save(out / "compressed.onnx.plan.json")
    print(f"{time.perf_counter() - started:.0f} s")


def _print(found: Mapping[str, cpd.Model], task: Task) -> None:
    feed = {name: array[:16] for name, array in task.data.items()}
    seconds = latency_ratio(list(found.values()), feed, seconds=0.5, threads=1)
    table = report.table_of(task.name, "", task.metric, "MACs", "parameters", "file", "ms, batch of 16")
    for (name, model), taken in zip(found.items(), seconds, strict=True):
        combed = comb(model)
        costs = CostModel(combed).total(KeepMask(combed.atoms))
        sizes = (count(costs.macs), count(costs.params), f"{count(len(model.serialize()))}B")
        table.add_row(name, f"{task.judge(model.complete_proto()):.3f}", *sizes, f"{1e3 * taken:.2f}")
    Console(width=120, highlight=False).print(table)


KINDS = ("circle", "square", "triangle")


def shapes(rng: np.random.Generator, count: int, size: int = 32) -> tuple[Arrays, list[list[tuple[int, Box]]]]:
    """Return noisy images with one to three shapes, and the shapes of each image.

    The arrays are `image` [N, 3, size, size] and `labels` [N, size, size], 0 for the background. A shape is its class,
    counted from 1, and its box (left, top, right, bottom).
    """
    images = rng.normal(0, 0.3, (count, 3, size, size)).astype(np.float32)
    labels, objects = np.zeros((count, size, size), np.int64), []
    rows, columns = np.mgrid[:size, :size]
    for image, label in zip(images, labels, strict=True):
        objects.append([])
        for _ in range(rng.integers(1, 4)):
            kind, radius = int(rng.integers(len(KINDS))), int(rng.integers(4, 7))
            y, x = rng.integers(radius, size - radius, 2)
            down, across = rows - y, np.abs(columns - x)
            inside = (
                down**2 + across**2 <= radius**2,
                np.maximum(np.abs(down), across) <= radius - 1,
                (across * 2 <= down + radius) & (down <= radius),
            )[kind]
            if label[inside].any():
                continue  # shapes must not overlap
            image[:, inside] += rng.uniform(-1.5, 1.5, 3).astype(np.float32)[:, None]
            label[inside] = kind + 1
            where = np.argwhere(inside)
            (top, left), (bottom, right) = where.min(0), where.max(0) + 1
            objects[-1].append((kind + 1, (float(left), float(top), float(right), float(bottom))))
    return {"image": images, LABELS: labels}, objects


def shuffled(rng: np.random.Generator, count: int, size: int, steps: int) -> list[npt.NDArray[np.int64]]:
    """Return the row indices of `steps` batches; each pass over the data has a new order."""
    passes = -(-steps * size // count)
    order = np.concatenate([rng.permutation(count) for _ in range(passes)])
    return [order[step * size : (step + 1) * size] for step in range(steps)]
