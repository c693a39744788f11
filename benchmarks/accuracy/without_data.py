"""Accuracy of real trained models that are pruned without any data, beside what 512 unlabelled images give.

    python benchmarks/accuracy/without_data.py --data DATA [--only gtsrb] [--images 1500] [--lite EFFICIENTNET_LITE0]
    python benchmarks/accuracy/without_data.py --table

DATA is a folder with `onnx/` and `load.py`, which decodes CIFAR-10, GTSRB, CamVid and ImageNet; a model whose file is
missing is skipped. Each is pruned to 0.8 and 0.6 of its MACs through the Python interface, as `prune` does, and scored on
test images drawn with a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from accuracy import HERE, commit, images, macs, prepared

from cpd_onnx.budget.allocation import Allocation, Budget, allocate
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.errors import CpdError
from cpd_onnx.fitting.units import Unit, units_of
from cpd_onnx.ir.model import Model, load
from cpd_onnx.passes.prune import prune
from cpd_onnx.passes.repair import RepairOptions, repair
from cpd_onnx.scores.registry import score
from cpd_onnx.workflow.api import run
from cpd_onnx.workflow.requests import Prune


@dataclass(frozen=True)
class Case:
    """A model, its data set, and the numbers of test images and of unlabelled images."""

    model: str
    data: str
    images: int
    samples: int = 512


LITE = "efficientnet_lite0"
CASES = {
    "gtsrb": Case("resnet20_gtsrb", "gtsrb", 1500),
    "gtsrb, folded": Case("resnet20_gtsrb_bnfold", "gtsrb", 1500),
    "resnet56": Case("resnet56_jpeg_cifar10", "cifar10", 1500),
    "resnet56, folded": Case("resnet56_jpeg_cifar10_bnfold", "cifar10", 1500),
    "resnet20": Case("resnet20_jpeg_cifar10", "cifar10", 1500),
    "vit": Case("vit_cifar10_smmk47", "cifar10", 1500),
    "espnet": Case("espnet_p2_q8_camvid", "camvid", 40, 32),
    "lite0": Case(LITE, "imagenet", 300, 128),
}
TARGETS = (0.8, 0.6)
BY_WEIGHTS = {"score": "l2", "repair": False}
WAYS: dict[str, dict[str, Any]] = {
    "random": {"score": "random", "repair": False},
    "L2, as before": BY_WEIGHTS,
    "choice alone": {"score": "reconstruction", "repair": False},
    "repair alone": {"score": "l2"},
    "both": {"score": "reconstruction"},
    "with images": {},
}
"""Options of each way to prune by its name; all but the last are given no data. Without options for the score, `--blind`
does "both" where the model stores the statistics of batch normalizations, and else "repair alone"."""
MERGED, MERGED_AND_REPAIRED = "merging alone", "merging, repaired"
"""Ways outside the product: channels chosen by L2 are added to those that they resemble, see `merged`."""


def pixels(folder: Path, data: str, split: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return images as the models of a data set take them, and their labels."""
    split = "calibration" if data == "imagenet" and split == "train" else split
    return images(folder, data, split)


def as_input(x: np.ndarray, data: str) -> np.ndarray:
    """Return pixels in the preprocessing of a data set."""
    if data != "imagenet":
        return prepared(x, data)
    return np.ascontiguousarray(((x[:, 1:225, 1:225].astype(np.float32) - 127) / 128).transpose(0, 3, 1, 2))


def drawn(folder: Path, data: str, split: str, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    x, y = pixels(folder, data, split)
    chosen = np.random.default_rng(0).permutation(len(x))[:count]
    return as_input(x[chosen], data), None if y is None else y[chosen]


def rows(case: Case, path: Path, options: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a model, the original first."""
    name = load(path).graph.input[0].name
    metric = "miou" if case.data == "camvid" else "top1"
    x, y = drawn(options.data, case.data, "test", options.images or case.images)
    test = ArraySource({name: x, "labels": y})
    archive = work / "images.npz"
    np.savez(archive, **{name: drawn(options.data, case.data, "train", case.samples)[0]})

    def scored(file: Path) -> float:
        return round(evaluate(load(file).complete_proto(), test, metric), 4)

    yield {"way": "original", metric: scored(path), "images": len(x)}
    for target in options.targets:
        if not options.way or MERGED in options.way:
            for way, small in merged_rows(path, target, min(options.samples, case.samples)):
                yield {"way": way, "target": target, metric: round(evaluate(small.complete_proto(), test, metric), 4)}
        for way, how in WAYS.items():
            if options.way and way not in options.way:
                continue
            more = {"data": str(archive), "hold_out": 0.0, "max_loss": float("inf")} if way == "with images" else {}
            samples = case.samples if more else min(options.samples, case.samples)
            number = {"samples": samples, "repair_samples": samples}
            started, out = time.perf_counter(), work / "pruned.onnx"
            request = Prune(
                model=path, output=out, target=f"macs={target}", blind=not more, check_speed=False, force=True,
                no_verify=True, **{"round_to": 1} | more | how | number,
            )  # fmt: skip  # what and how
            row = {"way": way, "target": target}
            try:
                run(request)
            except CpdError as error:
                yield row | {"error": str(error)[:200]}
                continue
            seconds = round(time.perf_counter() - started, 1)
            yield row | {metric: scored(out), "macs": round(macs(out) / macs(path), 4), "seconds": seconds}


def merged(path: Path, target: float) -> tuple[Combed, Allocation, Model]:
    """Return a model, the channels that L2 chooses, and the model without them, after each was merged.

    A removed channel is replaced by the one whose producing weights, with batch normalization and bias, resemble its own
    best, times a positive factor, which is moved to the consuming weights as rectifiers allow (Wang et al., Forget the
    Data and Fine-Tuning! Just Fold the Network to Compress, ICLR 2025, for pairs). Producers and consumers are all
    linear units that have the group's channels on their outputs and inputs.
    """
    combed = comb(path)
    chosen = allocate(combed, score(combed, "l2"), Budget("macs", target, "uniform"))
    model, (owner, rank) = combed.folded.model.copy(), combed.owners
    made: dict[int, list[np.ndarray]] = {}
    users: dict[int, list[tuple[Unit, np.ndarray]]] = {}

    def places(name: str, axis: int) -> Iterator[tuple[int, np.ndarray]]:
        tensor = combed.tensors.get(("", name))
        parts = combed.atoms.parts(tensor.axes[axis]) if tensor is not None and tensor.axes else np.zeros((0, 1), int)
        for group in sorted(set(owner[parts].ravel().tolist()) - {-1}):
            rows, columns = np.nonzero(owner[parts] == group)
            if len(rows) == len(combed.groups[group]):
                yield group, rows[np.argsort(rank[parts[rows, columns]])]

    for unit in units_of(combed.folded).found:
        matrix = unit.matrix(model)
        for group, rows in places(unit.end, unit.linear.out_axis):
            vectors = matrix.transpose(0, 2, 1).reshape(-1, matrix.shape[1]) * unit.gain.reshape(-1, 1)
            made.setdefault(group, []).append(np.hstack([vectors, unit.shift.reshape(-1, 1)])[rows])
        for group, rows in places(unit.data, unit.linear.in_axis) if len(matrix) == 1 else ():
            users.setdefault(group, []).append((unit, rows[:, None] * unit.linear.taps + np.arange(unit.linear.taps)))
    for group, removed in enumerate(chosen.removed):
        if not removed or group not in made:
            continue
        vectors = np.hstack(made[group])
        kept = np.setdiff1d(np.arange(len(vectors)), removed)
        factors = vectors @ vectors[kept].T / np.maximum(np.square(vectors[kept]).sum(axis=1), 1e-12)
        alike = np.argmax(np.where(factors > 0, factors * (vectors @ vectors[kept].T), 0), axis=1)
        for unit, features in users.get(group, ()):
            before = unit.matrix(model)
            after = before.copy()
            for channel in removed:
                factor = max(0.0, factors[channel, alike[channel]])
                after[:, features[kept[alike[channel]]]] += factor * before[:, features[channel]]
            unit.store(model, after)
    small = prune(replace(combed, folded=replace(combed.folded, model=model)), chosen).model
    return combed, chosen, small


def merged_rows(path: Path, target: float, samples: int) -> Iterator[tuple[str, Model]]:
    """Yield the model with merged channels, and the same repaired on generated inputs, with the names of these ways."""
    combed, chosen, small = merged(path, target)
    yield MERGED, small
    fitting = RepairOptions(samples=samples)
    yield MERGED_AND_REPAIRED, repair(combed, chosen.keep_mask(combed), small, Synthetic(combed.folded), fitting).model


def show(content: dict[str, Any]) -> None:
    for target in TARGETS:
        names = [*WAYS, MERGED, MERGED_AND_REPAIRED]
        print(f"\n{target:g} of the MACs\n\n| model | original | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
        for name, found in content["cases"].items():
            mine = {row["way"]: row for row in found if row.get("target") in (None, target)}
            cells = [mine.get(way, {}) for way in ("original", *names)]
            values = [row.get("top1", row.get("miou")) for row in cells]
            print(f"| {name} |", " | ".join("-" if v is None else f"{100 * v:.1f}" for v in values), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--way", choices=(*WAYS, MERGED), action="append", help="only these")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--samples", type=int, default=512, help="number of generated inputs (default: %(default)s)")
    parser.add_argument("--images", type=int, help="number of test images (default: that of the case)")
    parser.add_argument("--lite", type=Path, help="EfficientNet-Lite0 as .onnx, which is not in the folder")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "without_data.json")
    options = parser.parse_args()
    content = json.loads(options.out.read_text()) if options.out.exists() else {"cases": {}}
    if options.table:
        show(content)
        return
    content |= {
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "onnxruntime": ort.__version__},
        "commit": commit(), "command": f"python benchmarks/accuracy/without_data.py {' '.join(Path(word).name for word in sys.argv[1:])}",
    }  # fmt: skip  # a record
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or CASES:
            case = CASES[name]
            path = options.lite if case.model == LITE else options.data / "onnx" / f"{case.model}.onnx"
            if path is None or not path.is_file():
                continue
            known = content["cases"].setdefault(name, [])
            for row in rows(case, path, options, Path(folder)):
                key = (row["way"], row.get("target"))
                known[:] = [*(old for old in known if (old["way"], old.get("target")) != key), row]
                options.out.write_text(json.dumps(content, indent=1) + "\n")
                print(name, row, file=sys.stderr, flush=True)
    show(content)


if __name__ == "__main__":
    main()
