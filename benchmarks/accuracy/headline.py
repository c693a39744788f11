"""Accuracy against measured latency: ours, chance, torch-pruning, and a narrower network trained from scratch.

    python benchmarks/accuracy/headline.py --data DATA [--peer-python TORCH] [--work FOLDER] [--out FILE] [--plot FILE]
    python benchmarks/accuracy/headline.py --segmentation --data DATA [--work FOLDER] [--out FILE]
    python benchmarks/accuracy/headline.py --table

DATA is a folder with `load.py`, which decodes GTSRB (43 classes of traffic signs). ResNet-18 with its published widths is
trained there on all labels (benchmarks/accuracy/torch_resnet18.py) and exported. For each share of its latency (onnxruntime, one
thread, one image at a time):

* ours: `cpd-onnx prune --target latency=SHARE --data IMAGES`, 512 images without labels, repaired;
* chance: the same target with `--score random --spread uniform`, without images; for the first share;
* torch-pruning: by L2 over coupled channels, the same share of all layers, in multiples of 8, exported; the widest one
  that is no slower than ours;
* from scratch: ResNet-18 with all widths cut alike, in multiples of 8, the widest one that is no slower than ours,
  trained with labels like the dense model and as long.

All but the last are then trained by the same `cpd-onnx distill`, the dense model as teacher, no labels; so is the dense
model itself, the control. In the end each of them is timed in turns with the dense model. Accuracy is that after the
last step, on all test images.

--segmentation takes the trained ESPNet of DATA on CamVid instead, whose source code is not there: ours by `cpd-onnx compress
--target latency=0.5`, and the control. Its times are taken twice: as onnxruntime does by itself, and with denormal numbers,
which two of its convolutions meet, taken for zeros.
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
from accuracy import HERE, Case, command, commit, images, macs, prepared
from accuracy import Run as SegmentationRun

from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.ir.model import load
from cpd_onnx.runtime.sessions import interleaved, open_model

SHARES = (0.232, 0.12)
"""Of the latency; the first is the paper's 4.31 times faster."""
EPOCHS, STEPS = 10, 500
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
SEGMENTATION = ("--batch-size", "4", "--lr", "0.001", "--flip", "--batch-norm", "train", "--mixed-precision")
SEGMENTATION_SHARE, SEGMENTATION_STEPS, SEGMENTATION_SAMPLES = 0.5, 700, 64
SECONDS = 4.0
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
"""In a process of its own, since the switch for denormal numbers is that of the thread, not of the session."""
COLOURS = {"ours": "C0", "chance": "0.6", "torch-pruning": "C1", "from scratch": "C2", "control": "0.2"}


class Run:
    """The dense model with its data, and what is made of it in one folder."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.train, self.test = (self._archive(split) for split in ("train", "test"))
        with np.load(self.test) as archive:
            self.tested = ArraySource(dict(archive))
            self.feed = {"input": archive["input"][:1]}
        self.dense = self.network("dense", sys.executable, "train", self.train, "--epochs", options.epochs)
        self.session = open_model(load(self.dense), threads=1)

    def _archive(self, split: str) -> Path:
        path = self.work / f"gtsrb_{split}.npz"
        if not path.exists():
            x, y = images(self.options.data, "gtsrb", split)
            np.savez(path, input=prepared(x, "gtsrb"), labels=y)
        return path

    def network(self, name: str, python: Any, *arguments: Any) -> Path:
        """What benchmarks/accuracy/torch_resnet18.py makes under a name, once."""
        path = self.work / f"{name}.onnx"
        if not path.exists():
            job, source, *rest = arguments
            script = [python, HERE / "accuracy" / "torch_resnet18.py", job, source, path.with_suffix(""), *rest]
            script += ["--threads", self.options.threads]
            done = subprocess.run([str(word) for word in script], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
        return path

    def seconds(self, path: Path, seconds: float = SECONDS) -> float:
        """Share of the dense model's time that a file takes."""
        times = interleaved([self.session, open_model(load(path), threads=1)], self.feed, seconds)
        return float(np.median(times[1]) / np.median(times[0]))

    def widest(self, kind: str, make: Callable[[float], Path], asked: float, ours: Path) -> float:
        """Of models cut by a share of their widths, in sixty-fourths, the widest no slower than ours; by halving, once."""
        notes = self.work / "widest.json"
        known = json.loads(notes.read_text()) if notes.exists() else {}
        key = f"{kind} {asked}"
        if key not in known:
            latency, low, high = self.seconds(ours), 1, 64
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self.seconds(make(middle / 64), 1.0) <= latency else (low, middle)
            notes.write_text(json.dumps(known | {key: low / 64}))
            return low / 64
        return float(known[key])

    def students(self) -> Iterator[tuple[str, float, Path]]:
        """Models that the dense one teaches: kind, share of the latency that was asked for, file."""
        for share in self.options.shares:
            ours = self.pruned("ours", share, "--samples", 512, "--data", self.train)
            yield "ours", share, ours
            if self.options.peer_python:
                yield "torch-pruning", share, self.peer(self.widest("torch-pruning", self.peer, share, ours))
            if share == self.options.shares[0]:
                yield "chance", share, self.pruned("chance", share, "--score", "random", "--spread", "uniform")
                yield "control", 1.0, self.dense

    def pruned(self, kind: str, share: float, *chosen: Any) -> Path:
        """A model pruned by the command line to a share of the latency, at one image a time."""
        path = self.work / f"{kind}_{share}.onnx"
        if not path.exists():
            target = ("--target", f"latency={share}", "--latency-batch", 1)
            command("prune", self.dense, "-o", path, *target, *chosen)
        return path

    def peer(self, share: float) -> Path:
        """The dense model pruned by torch-pruning."""
        python, weights = self.options.peer_python, self.dense.with_suffix(".pt")
        return self.network(f"torch-pruning_{share}", python, "prune", weights, "--share", share)

    def narrow(self, share: float, epochs: int = 0) -> Path:
        """ResNet-18 with a share of its widths, trained for some epochs."""
        chosen = ("--share", share, "--epochs", epochs)
        return self.network(f"scratch_{share}_{epochs}", sys.executable, "train", self.train, *chosen)

    def scored(self, path: Path) -> float:
        """Accuracy on all test images."""
        return round(evaluate(load(path).complete_proto(), self.tested, "top1"), 4)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row after the other."""
        distilling = ("--data", self.train, "--steps", self.options.steps, "--threads", self.options.threads, *RECIPE)
        for kind, share, student in self.students():
            out = self.work / f"{kind}_{share}_distilled.onnx"
            if not out.exists():
                command("distill", self.dense, student, "-o", out, *distilling)
            yield {"kind": kind, "asked": share, "before": self.scored(student), **self.trained(out)}
            if kind == "ours" and self.options.scratch:
                path = self.narrow(self.widest("from scratch", self.narrow, share, student), self.options.epochs)
                yield {"kind": "from scratch", "asked": share, **self.trained(path)}

    def trained(self, path: Path) -> dict[str, Any]:
        """What a trained file is worth."""
        left = round(macs(path) / macs(self.dense), 4)
        return {"file": path.name, "top1": self.scored(path), "macs": left, "bytes": path.stat().st_size}

    def timed(self, rows: list[dict[str, Any]]) -> None:
        """Time each model in turns with the dense one, and put its share of that one's time into its row."""
        for row in rows:
            latency = self.seconds(self.work / row["file"])
            row |= {"latency": round(latency, 4), "speedup": round(1 / latency, 3)}


def segmentation(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """ESPNet on CamVid: ours and the control, trained alike."""
    dense = options.data / "onnx" / "espnet_p2_q8_camvid.onnx"
    case = SegmentationRun(
        Case(dense.stem, "camvid", "miou", (), SEGMENTATION_STEPS, SEGMENTATION),
        options.data,
        work,
        (),
        None,
        re.compile(""),
    )
    train, test = case.archives()
    files = {"dense": dense, "ours": work / "espnet.onnx", "control": work / "control.onnx"}
    training = ("--data", train, "--steps", SEGMENTATION_STEPS, "--threads", options.threads, *SEGMENTATION)
    looks = ("--samples", SEGMENTATION_SAMPLES, "--repair-samples", SEGMENTATION_SAMPLES)
    if not files["ours"].exists():
        command("compress", dense, "-o", files["ours"], "--target", f"latency={SEGMENTATION_SHARE}", *looks, *training)
    if not options.control:
        del files["control"]
    elif not files["control"].exists():
        command("distill", dense, dense, "-o", files["control"], *training)
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
        rows[name] = {"miou": round(scored, 4), "macs": macs(path) / macs(dense)}
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
        figures = f"{row['speedup']:.2f}x, {row['speedup, no denormals']:.2f}x without denormal numbers"
        print(f"ESPNet, {name}: {100 * row['miou']:.1f} mIoU, {figures}, {row['macs']:.3f} of the MACs")
    dense = content["dense"]
    print(f"dense: {100 * dense:.2f}\n\n| | asked | speed-up | MACs left | before training | top-1 | change |")
    print("|---|---|---|---|---|---|---|")
    for row in content["rows"]:
        before = f"{100 * row['before']:.1f}" if "before" in row else ""
        figures = f"{row['speedup']:.2f}x | {row['macs']:.3f} | {before} | {100 * row['top1']:.2f}"
        print(f"| {row['kind']} | {row['asked']:g} | {figures} | {100 * (row['top1'] - dense):+.2f} |")


def draw(content: dict[str, Any], path: Path) -> None:
    """Accuracy against speed-up, a line for each kind."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "cpd-onnx", "font.size": 9, "axes.grid": True, "grid.color": "0.9"}):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.axhline(100 * content["dense"], color="0.2", linewidth=0.8, linestyle=":", label="dense")
        for kind, colour in COLOURS.items():
            points = sorted((row["speedup"], 100 * row["top1"]) for row in content["rows"] if row["kind"] == kind)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=kind)
        axes.set_xlabel("times faster in onnxruntime (one thread, one image at a time)")
        axes.set_ylabel("top-1 on GTSRB, percent")
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


def main() -> None:
    """Run what was asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--peer-python", help="one with torch and torch-pruning")
    parser.add_argument("--work", type=Path, help="folder for intermediate files, which are not made again")
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the dense model")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each student")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--no-scratch", dest="scratch", action="store_false")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--segmentation", action="store_true", help="ESPNet on CamVid instead")
    parser.add_argument("--no-control", dest="control", action="store_false", help="with --segmentation")
    parser.add_argument("--again", action="store_true", help="only time the models of --work and --out again")
    parser.add_argument("--table", action="store_true", help="print what was measured before, and run nothing")
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
            content |= {"recipe": [f"{options.steps} steps", *RECIPE], "dense": run.scored(run.dense), "rows": []}
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
