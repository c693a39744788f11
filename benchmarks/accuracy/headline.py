"""Accuracy against measured latency: cpd-onnx, random channels, torch-pruning, and a narrower network from scratch.

    python benchmarks/accuracy/headline.py --data DATA [--peer-python TORCH] [--work FOLDER] [--out FILE] [--plot FILE]
    python benchmarks/accuracy/headline.py --segmentation --data DATA [--work FOLDER] [--out FILE]
    python benchmarks/accuracy/headline.py --table

DATA is a folder with `load.py`, which decodes GTSRB (43 classes of traffic signs). ResNet-18 with its published widths is
trained there on all labels (benchmarks/accuracy/torch_resnet18.py) and exported. For each share of its latency (onnxruntime, one
thread, one image at a time):

* cpd-onnx: `cpd-onnx prune --target latency=SHARE --data IMAGES`, 512 images without labels, repaired;
* random: the same target with `--score random --policy uniform`, without images; for the first share only;
* torch-pruning: by L2 over coupled channels, the same ratio for all layers, in multiples of 8, exported; the widest
  model that is no slower than that of cpd-onnx;
* from scratch: ResNet-18 with all widths reduced alike, in multiples of 8, the widest model that is no slower than that
  of cpd-onnx, trained with labels for as many epochs as the original.

All but the last are then trained by the same `cpd-onnx distill` with the original as teacher and without labels; so is
the original itself, the unpruned control. Finally each model is timed interleaved with the original. Accuracy is
measured after the last step, on all test images.

--segmentation measures the trained ESPNet of DATA on CamVid instead, whose source code is not available: `cpd-onnx
compress --target latency=0.5`, and the unpruned control. It is timed twice: with onnxruntime's defaults, and with denormal
numbers, which occur in two of its convolutions, flushed to zero.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import HERE, SECONDS, Case, Latency, command, commit, images, macs, prepared
from accuracy import Run as SegmentationRun

from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.ir.model import load

SHARES = (0.232, 0.12)
"""Target latencies as ratios of the original's; the first is the speed-up of 4.31 that the paper reports."""
EPOCHS, STEPS = 10, 500
"""Epochs of training with labels, and updates of distillation."""
RECIPE = (
    "--batch-size",
    "64",
    "--lr",
    "0.002",
    "--shift",
    "2",
    "--mixed-precision",
    "--batch-norm",
    "train",
    "--teacher-runtime",
    "torch",
)
SEGMENTATION = (
    "--batch-size",
    "4",
    "--lr",
    "0.001",
    "--flip",
    "--batch-norm",
    "train",
    "--mixed-precision",
    "--compare",
    "outputs",
)
SEGMENTATION_SHARE, SEGMENTATION_STEPS, SEGMENTATION_SAMPLES = 0.5, 700, 64
IN_TURNS = """
import json, sys
import numpy as np, onnxruntime as ort
from cpd_onnx.runtime.sessions import interleaved
feed, seconds, flag, *paths = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.add_session_config_entry("session.set_denormal_as_zero", flag)
sessions = [ort.InferenceSession(path, options) for path in paths]
print(json.dumps([float(np.median(taken)) for taken in interleaved(sessions, dict(np.load(feed)), float(seconds))]))
"""
"""Script that times models interleaved, run in a separate process since flushing denormals applies to a whole thread."""
COLOURS = {"ours": "C0", "chance": "0.6", "torch-pruning": "C1", "from scratch": "C2", "control": "0.2"}
"""Colours of the plot by kind of model, as the results name it."""
LABELS = {"dense": "original", "ours": "cpd-onnx", "chance": "random", "control": "unpruned control"}
"""Printed names of kinds of models that the results name differently."""


class Run:
    """The original model with its data, and the models derived from it in one folder."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.train, self.test = (self._archive(split) for split in ("train", "test"))
        with np.load(self.test) as archive:
            self.tested = ArraySource(dict(archive))
            self.feed = {"input": archive["input"][:1]}
        self.original = self.network("dense", sys.executable, "train", self.train, "--epochs", options.epochs)
        self.latency = Latency(self.original, self.feed)

    def _archive(self, split: str) -> Path:
        path = self.work / f"gtsrb_{split}.npz"
        if not path.exists():
            x, y = images(self.options.data, "gtsrb", split)
            np.savez(path, input=prepared(x, "gtsrb"), labels=y)
        return path

    def network(self, name: str, python: Any, *arguments: Any) -> Path:
        """Return the model that benchmarks/accuracy/torch_resnet18.py writes under a name, unless it exists."""
        path = self.work / f"{name}.onnx"
        if not path.exists():
            job, source, *rest = arguments
            script = [python, HERE / "accuracy" / "torch_resnet18.py", job, source, path.with_suffix(""), *rest]
            script += ["--threads", self.options.threads]
            done = subprocess.run([str(word) for word in script], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
        return path

    def widest(self, kind: str, make: Callable[[float], Path], target: float, reference: Path) -> float:
        """Return the largest width ratio, in steps of 1/64, at which a model is no slower than `reference` (bisection)."""
        notes = self.work / "widest.json"
        known = json.loads(notes.read_text()) if notes.exists() else {}
        key = f"{kind} {target}"
        if key not in known:
            latency, low, high = self.latency(reference), 1, 64
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self.latency(make(middle / 64), 1.0) <= latency else (low, middle)
            notes.write_text(json.dumps(known | {key: low / 64}))
            return low / 64
        return float(known[key])

    def students(self) -> Iterator[tuple[str, float, Path]]:
        """Yield the models to distil: kind, target latency as a ratio, file."""
        for share in self.options.shares:
            reference = self.pruned("ours", share, "--samples", 512, "--data", self.train)
            yield "ours", share, reference
            if self.options.peer_python:
                yield "torch-pruning", share, self.peer(self.widest("torch-pruning", self.peer, share, reference))
            if share == self.options.shares[0]:
                yield "chance", share, self.pruned("chance", share, "--score", "random", "--policy", "uniform")
                yield "control", 1.0, self.original

    def pruned(self, kind: str, share: float, *chosen: Any) -> Path:
        """Return a model pruned by the command line to a latency ratio at batch size 1."""
        path = self.work / f"{kind}_{share}.onnx"
        if not path.exists():
            target = ("--target", f"latency={share}", "--latency-batch", 1)
            command("prune", self.original, "-o", path, *target, *chosen)
        return path

    def peer(self, share: float) -> Path:
        """Return the original pruned by torch-pruning to a width ratio."""
        python, weights = self.options.peer_python, self.original.with_suffix(".pt")
        return self.network(f"torch-pruning_{share}", python, "prune", weights, "--share", share)

    def narrow(self, share: float, epochs: int = 0) -> Path:
        """Return ResNet-18 at a width ratio, trained for some epochs."""
        chosen = ("--share", share, "--epochs", epochs)
        return self.network(f"scratch_{share}_{epochs}", sys.executable, "train", self.train, *chosen)

    def scored(self, path: Path) -> float:
        """Return the accuracy of a file on all test images."""
        return round(evaluate(load(path).complete_proto(), self.tested, "top1"), 4)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the results, without latencies."""
        distilling = ("--data", self.train, "--steps", self.options.steps, "--threads", self.options.threads, *RECIPE)
        for kind, share, student in self.students():
            out = self.work / f"{kind}_{share}_distilled.onnx"
            if not out.exists():
                command("distill", self.original, student, "-o", out, *distilling)
            yield {"kind": kind, "asked": share, "before": self.scored(student), **self.trained(out)}
            if kind == "ours" and self.options.scratch:
                path = self.narrow(self.widest("from scratch", self.narrow, share, student), self.options.epochs)
                yield {"kind": "from scratch", "asked": share, **self.trained(path)}

    def trained(self, path: Path) -> dict[str, Any]:
        """Return accuracy, MACs and size of a trained file."""
        left = round(macs(path) / macs(self.original), 4)
        return {"file": path.name, "top1": self.scored(path), "macs": left, "bytes": path.stat().st_size}

    def timed(self, rows: list[dict[str, Any]]) -> None:
        """Time each model interleaved with the original and add latency ratio and speed-up to its row."""
        for row in rows:
            latency = self.latency(self.work / row["file"])
            row |= {"latency": round(latency, 4), "speedup": round(1 / latency, 3)}


def segmentation(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Return the results for ESPNet on CamVid: compressed by cpd-onnx, and the unpruned control trained alike."""
    original = options.data / "onnx" / "espnet_p2_q8_camvid.onnx"
    case = SegmentationRun(
        Case(original.stem, "camvid", "miou", (), SEGMENTATION_STEPS, SEGMENTATION),
        options.data,
        work,
        (),
        None,
        re.compile(""),
    )
    train, test = case.archives()
    files = {"dense": original, "ours": work / "espnet.onnx", "control": work / "control.onnx"}
    training = ("--data", train, "--steps", SEGMENTATION_STEPS, "--threads", options.threads, *SEGMENTATION)
    samples = ("--samples", SEGMENTATION_SAMPLES, "--repair-samples", SEGMENTATION_SAMPLES)
    if not files["ours"].exists():
        command(
            "compress", original, "-o", files["ours"], "--target", f"latency={SEGMENTATION_SHARE}", *samples, *training
        )
    if not options.control:
        del files["control"]
    elif not files["control"].exists():
        command("distill", original, original, "-o", files["control"], *training)
    with np.load(test) as archive:
        tested = ArraySource(dict(archive))
        feed = {name: archive[name][:1] for name in archive.files if name != "labels"}
    np.savez(work / "feed.npz", **feed)
    line = [sys.executable, "-c", IN_TURNS, work / "feed.npz", 3 * SECONDS * len(files)]
    usual, flushed = (
        json.loads(subprocess.check_output([*map(str, line), flag, *map(str, files.values())])) for flag in "01"
    )
    rows = {}
    for place, (name, path) in enumerate(files.items()):
        scored = evaluate(load(path).complete_proto(), tested, "miou")
        rows[name] = {"miou": round(scored, 4), "macs": macs(path) / macs(original)}
        for kind, times in (("", usual), (", no denormals", flushed)):
            rows[name] |= {f"ms{kind}": round(1e3 * times[place], 2)}
            rows[name] |= {f"speedup{kind}": round(times[0] / times[place], 3)}
    return {
        "commit": commit(),
        "asked": SEGMENTATION_SHARE,
        "recipe": [f"{SEGMENTATION_STEPS} steps", *SEGMENTATION],
        "rows": rows,
    }


def show(content: dict[str, Any]) -> None:
    for name, row in content.get("segmentation", {}).get("rows", {}).items():
        figures = f"{row['speedup']:.2f}x, {row['speedup, no denormals']:.2f}x with denormals flushed to zero"
        print(
            f"ESPNet, {LABELS.get(name, name)}: {100 * row['miou']:.1f} mIoU, {figures}, {row['macs']:.3f} of the MACs"
        )
    original = content["dense"]
    print(
        f"original: {100 * original:.2f}\n\n| | target | times faster | MACs left | without training | trained | change |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in content["rows"]:
        before = f"{100 * row['before']:.1f}" if "before" in row else ""
        figures = f"{row['speedup']:.2f}x | {row['macs']:.3f} | {before} | {100 * row['top1']:.2f}"
        print(
            f"| {LABELS.get(row['kind'], row['kind'])} | {row['asked']:g} | {figures} | {100 * (row['top1'] - original):+.2f} |"
        )


def draw(content: dict[str, Any], path: Path) -> None:
    """Plot accuracy against speed-up, with a line for each kind of model."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "cpd-onnx", "font.size": 9, "axes.grid": True, "grid.color": "0.9"}):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.axhline(100 * content["dense"], color="0.2", linewidth=0.8, linestyle=":", label="original")
        for kind, colour in COLOURS.items():
            points = sorted((row["speedup"], 100 * row["top1"]) for row in content["rows"] if row["kind"] == kind)
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker="o", markersize=4, color=colour, label=LABELS.get(kind, kind)
                )
        axes.set_xlabel("times faster in onnxruntime (one thread, one image at a time)")
        axes.set_ylabel("top-1 on GTSRB, percent")
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


def main() -> None:
    """Run the requested measurements and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--peer-python", help="Python interpreter with torch and torch-pruning")
    parser.add_argument("--work", type=Path, help="folder for intermediate files, which later runs reuse")
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of training of the original")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of distillation of each student")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--no-scratch", dest="scratch", action="store_false")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--segmentation", action="store_true", help="measure ESPNet on CamVid instead")
    parser.add_argument(
        "--no-control", dest="control", action="store_false", help="skip the unpruned control of --segmentation"
    )
    parser.add_argument("--again", action="store_true", help="only repeat the timing of the models in --work and --out")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "headline.json")
    options = parser.parse_args()
    if options.table:
        content = json.loads(options.out.read_text())
        show(content)
        if options.plot:
            draw(content, options.plot)
        return
    content = {
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()}, "commit": commit(),
        "command": f"python benchmarks/accuracy/headline.py {' '.join(Path(word).name for word in sys.argv[1:])}",
        "versions": {name: metadata.version(name) for name in ("onnx", "onnxruntime", "torch", "numpy")},
    }  # fmt: skip  # a record
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        if options.segmentation:
            content = (
                json.loads(options.out.read_text()) if options.out.exists() else content | {"rows": [], "dense": 0}
            )
            content["segmentation"] = segmentation(options, work)
            options.out.write_text(json.dumps(content, indent=1) + "\n")
            show(content)
            return
        run = Run(options, work)
        if options.again:
            content = json.loads(options.out.read_text())
        else:
            content |= {"recipe": [f"{options.steps} steps", *RECIPE], "dense": run.scored(run.original), "rows": []}
            for row in run.rows():
                content["rows"].append(row)
                options.out.write_text(json.dumps(content, indent=1) + "\n")
                print(row, file=sys.stderr, flush=True)
        run.timed(content["rows"])
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    show(content)
    if options.plot:
        draw(content, options.plot)


if __name__ == "__main__":
    main()
