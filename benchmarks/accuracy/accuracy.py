"""Accuracy of real trained models after pruning and distilling through the command line, labels unused.

    python benchmarks/accuracy/accuracy.py --data DATA [--only resnet56] [--peer-python PYTHON] [--steps N] [--out FILE]

DATA is a folder with `onnx/` and `load.py`, which decodes CIFAR-10, GTSRB and CamVid. For each model and target, channels
are chosen by reconstruction and repaired, as `prune --data` does, and without repair by the Fisher score, by magnitude
and at random; the unpruned control is added once. All are trained by the same recipe with the original as teacher.
Accuracy is measured after the last step, on test images that were not used for training.

With PYTHON, an interpreter with torch and torch-pruning, the CIFAR-10 ResNet-56 is also rebuilt in torch, pruned by
torch-pruning to the same MACs and exported (`benchmarks/accuracy/torch_pruning_resnet.py`); the result is trained by the
same recipe, and so is the file that torch-pruning's author published for 2.55 times fewer MACs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.costs import CostModel
from cpd_onnx.ir.model import load
from cpd_onnx.runtime.sessions import interleaved, open_model

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.runs import plain

HERE = Path(__file__).parents[1]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's channels, red first, on a scale of 1."""
CAMVID = ((110.33139, 108.40919, 105.03353), (72.125206, 72.68849, 69.902596))


SECONDS = 4.0
"""Seconds of interleaved timing for one ratio."""


@dataclass(frozen=True)
class Case:
    """A model, its data, and its training recipe.

    Attributes:
        model: Stem of the file in DATA/onnx.
        data: Name of the data set in `load.py`.
        metric: Name of the metric.
        targets: Target MACs as ratios of the original's.
        steps: Updates of distillation.
        recipe: Further options of `distill`.
        published: Stem of a pruned file published by torch-pruning's author, trained in the same way; None for none.
    """

    model: str
    data: str
    metric: str
    targets: tuple[float, ...]
    steps: int
    recipe: tuple[str, ...]
    published: str | None = None


_SMALL_IMAGES = ("--batch-size", "64", "--lr", "0.002", "--shift", "2", "--mixed-precision")
CASES = {
    "resnet56": Case(
        "resnet56_jpeg_cifar10", "cifar10", "top1", (0.476, 0.392), 1200,
        (*_SMALL_IMAGES, "--batch-norm", "train", "--flip"), "resnet56_vainf_groupsl_pruned2.55x_cifar10",
    ),
    "gtsrb": Case(
        "resnet20_gtsrb", "gtsrb", "top1", (0.5, 0.25), 1000, (*_SMALL_IMAGES, "--batch-norm", "train")
    ),
    "gtsrb_bnfold": Case("resnet20_gtsrb_bnfold", "gtsrb", "top1", (0.5, 0.25), 1000, _SMALL_IMAGES),
    "vit": Case(
        "vit_cifar10_smmk47", "cifar10", "top1", (0.5,), 1000,
        ("--batch-size", "64", "--lr", "0.0005", "--shift", "2", "--flip", "--mixed-precision"),
    ),
    "espnet": Case(
        "espnet_p2_q8_camvid", "camvid", "miou", (0.53,), 300,
        ("--batch-size", "4", "--lr", "0.001", "--flip", "--batch-norm", "train", "--mixed-precision"),
    ),
}  # fmt: skip  # a table


CHOICES = {
    "reconstruction, repaired": ("--data",),
    "fisher": ("--score", "fisher", "--policy", "global", "--samples", "512", "--no-repair", "--data"),
    "l2": ("--score", "l2"),
    "random": ("--score", "random"),
}
"""Options of `prune` that choose the channels, by name; a final `--data` is followed by the training images."""


def images(folder: Path, name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels and labels of a split of a data set."""
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x, y = getattr(module, name)(split)
    return x, y


def prepared(x: np.ndarray, name: str) -> np.ndarray:
    """Return images as the models expect them: channels first, normalised."""
    if name == "camvid":
        mean, std = (np.float32(v) for v in CAMVID)
        values = (x[..., ::-1].astype(np.float32) - mean) / std / 255
    else:
        mean, std = (np.float32(v) for v in IMAGENET)
        values = (x.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def command(*arguments: Any) -> Any:
    """Run `cpd-onnx` and return the JSON that it prints; None without `--json`.

    Channels are chosen for the given target alone: nothing is held out, rounded, timed or bounded.
    """
    line = [sys.executable, "-m", "cpd_onnx", *plain(arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line[2:])}: {done.stderr}")
    return json.loads(done.stdout) if "--json" in line else None


def commit() -> str:
    """Return the commit of the measured code."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=HERE)
    return done.stdout.strip()


class Latency:
    """Latencies of files as ratios of an original's."""

    def __init__(self, original: Path, feed: dict[str, np.ndarray]) -> None:
        """Open the original."""
        self.session, self.feed = open_model(load(original), threads=1), feed

    def __call__(self, path: Path, seconds: float = SECONDS) -> float:
        """Return the latency of a file."""
        times = interleaved([self.session, open_model(load(path), threads=1)], self.feed, seconds)
        return float(np.median(times[1]) / np.median(times[0]))


def macs(path: Path) -> int:
    """Return the multiply-accumulates of one sample."""
    combed = comb(load(path))
    return int(CostModel(combed).total(KeepMask(combed.atoms)).macs)


@dataclass(frozen=True)
class Run:
    """One case with its files and options."""

    case: Case
    folder: Path
    work: Path
    training: tuple[Any, ...]
    peer: Path | None
    wanted: re.Pattern[str]

    @property
    def train(self) -> Path:
        """The training images."""
        return self.archives()[0]

    def archives(self) -> tuple[Path, Path]:
        """Archives of all training images, without labels, and of all test images with labels."""
        name = onnx.load(self.original, load_external_data=False).graph.input[0].name
        train, test = (self.work / f"{self.case.data}_{split}_{name}.npz" for split in ("train", "test"))
        for path, split in ((train, "train"), (test, "test")):
            if not path.exists():
                x, y = images(self.folder, self.case.data, split)
                labels = {"labels": y} if path == test else {}
                np.savez(path, **{name: prepared(x, self.case.data)}, **labels)
        return train, test

    @property
    def original(self) -> Path:
        """The original model."""
        return self.folder / "onnx" / f"{self.case.model}.onnx"

    def students(self) -> Iterator[tuple[str, Path]]:
        """Yield the models to train with their names, the unpruned control first."""
        yield "control", self.original
        for target in self.case.targets:
            for name, choice in CHOICES.items():
                path = self.work / f"{self.case.model}_{name.replace(', ', '_').replace(' ', '_')}_{target}.onnx"
                data = [self.train] if choice[-1] == "--data" else []
                command("prune", self.original, "-o", path, "--target", f"macs={target}", *choice, *data, "--force")
                yield f"{name} {target}", path
            if self.peer is not None and self.case.published:
                path = self.work / f"{self.case.model}_torch-pruning_{target}.onnx"
                script = HERE / "accuracy" / "torch_pruning_resnet.py"
                done = subprocess.run(
                    [self.peer, script, self.original, str(target), path], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    raise RuntimeError(done.stderr[-2000:])
                yield f"torch-pruning {target}", path
        if self.peer is not None and self.case.published:
            yield "torch-pruning, published", self.folder / "onnx" / f"{self.case.published}.onnx"

    def measure(self, known: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Train each student; yield all results so far, including the known ones, after each."""
        train, test = self.archives()
        original = macs(self.original)
        result: dict[str, Any] = {"model": self.case.model, "data": self.case.data, "metric": self.case.metric}
        result |= {"recipe": [*map(str, self.training)], "students": known.get("students", {})}
        for key, student in self.students():
            if not self.wanted.search(key):
                continue
            trained = command(
                "distill", self.original, student, "-o", self.work / f"{student.stem}_distilled.onnx", "--data", train,
                *self.training, "--compare", "outputs", "--eval", test, "--metric", self.case.metric, "--force", "--json", "-",
            )  # fmt: skip  # one command
            result["dense"] = trained["teacher"]
            result["students"][key] = {
                "fewer_macs": round(original / macs(student), 3),
                "before": trained["student"], "after": trained["distilled"], "seconds": trained["seconds"],
            }  # fmt: skip  # a table
            print(key, result["students"][key], flush=True)
            yield result


def table(results: dict[str, Any]) -> Iterator[str]:
    """Yield the results as lines of Markdown."""
    yield "| model | chosen by | fewer MACs | before training | distilled | change |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for entry in results.values():
        for key, student in entry["students"].items():
            label = "unpruned control" if key == "control" else key
            name = f"{entry['model']}, {entry['metric']} {100 * entry['dense']:.1f}" if key == "control" else ""
            yield (
                f"| {name} | {label} | {student['fewer_macs']:.2f}x | {100 * student['before']:.1f} "
                f"| {100 * student['after']:.1f} | {100 * (student['after'] - entry['dense']):+.1f} |"
            )


def main() -> None:
    """Run the requested measurements and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("CPD_DATA"), required="CPD_DATA" not in os.environ)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument(
        "--students", type=re.compile, default=re.compile(""), help="regular expression: names of the students to train"
    )
    parser.add_argument("--steps", type=int, help="updates of distillation (default: that of the case)")
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of torch (default 0: its own choice); use 1 on a busy machine"
    )
    parser.add_argument("--peer-python", type=Path, help="Python interpreter with torch and torch-pruning")
    parser.add_argument("--work", type=Path, help="folder for intermediate files (default: a temporary one)")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "accuracy.json")
    options = parser.parse_args()
    content = json.loads(options.out.read_text()) if options.out.exists() else {"results": {}}
    if options.table:
        print("\n".join(table(content["results"])))
        return
    work = options.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    content["machine"] = {"cpus": os.cpu_count(), "machine": platform.machine(), "date": time.strftime("%Y-%m-%d")}
    content["versions"] = {name: metadata.version(name) for name in ("onnx", "onnxruntime", "torch", "numpy")}
    for key in options.only or CASES:
        case = CASES[key]
        training = ("--steps", options.steps or case.steps, "--threads", options.threads, *case.recipe)
        run = Run(case, Path(options.data), work, training, options.peer_python, options.students)
        for result in run.measure(content["results"].get(key, {})):
            content["results"][key] = result
            options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
