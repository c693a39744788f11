"""Half and a third of the latency, with whole branches removed and with narrower layers alone: measured time and MACs left.

    python benchmarks/speed/branches.py --models ZOO/full [--data-folder DATA] [--model NAME=FILE] [--names NAME ...] [--target F]
    python benchmarks/speed/branches.py --table

The models are the eleven architectures of latency.py at their published size (random weights), three trained ones in DATA/onnx,
and those given with --model. Channels are scored by the error of the reconstruction on generated samples, and one cost table
serves both ways, whose candidates are measured. Each result is then timed interleaved with the original, for longer than during
the allocation. "gain" is the speed-up in latency divided by that in MACs. onnxruntime on the CPU, one thread, one sample. What
is left of the accuracy is not shown here, but by benchmarks/accuracy/depth.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime as ort

from cpd_onnx.budget.allocation import Allocation, LossCurves, depth_curves
from cpd_onnx.budget.choosing import Chooser
from cpd_onnx.budget.targets import fraction
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.errors import CpdError
from cpd_onnx.ir.model import load
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.passes.refine import Refined
from cpd_onnx.scores.registry import score

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.accuracy.accuracy import commit
from benchmarks.speed.latency import ARCHITECTURES

TRAINED = ("fastestdet", "person_reid_0248", "road_segmentation_adas_0001")
"""Files in DATA/onnx."""
TARGETS = (0.5, 0.33)
SAMPLES = 16
"""Number of generated samples that channels are scored on."""
GONE, NARROW = "branches may go", "widths alone"
NEAR = 0.03
"""Relative deviation from the target that counts as met."""


def chooser_of(combed: Combed) -> Chooser:
    """Return the allocator of a latency target, with a cost table that is measured now."""
    try:
        return Allocate(latency=0.5, latency_batch=1, nearest=True).chooser(combed)
    except CpdError:  # the model has a fixed batch size
        return Allocate(latency=0.5, nearest=True).chooser(combed)


def measure(path: Path, targets: list[float], seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each target and way."""
    combed = comb(load(path))
    scores = score(combed, "reconstruction", samples=SAMPLES, data=Synthetic(combed.folded, SAMPLES))
    started = time.perf_counter()
    chooser = chooser_of(combed)
    tabled = time.perf_counter() - started
    probe, table = chooser.probe, chooser.table
    assert probe is not None
    assert table is not None
    deep = depth_curves(combed, scores, is_loss=True)
    for target in targets:
        aiming = chooser.aiming(fraction("latency", target))

        def choose(*, curves: LossCurves | None, aiming: Chooser = aiming) -> Allocation:
            return aiming(combed, scores, is_loss=True, curves=curves)

        for way, by in ((GONE, Refined(deep, fallback=deep.widths_alone)), (NARROW, Refined(deep.widths_alone))):
            started = time.perf_counter()
            chosen = by.chosen(choose)
            took = time.perf_counter() - started
            probe.reopen()
            latency = probe.ratio(chosen.channels(combed), seconds)
            macs = chosen.after.macs / chosen.before.macs
            gone = sum(len(lost) == len(group) for lost, group in zip(chosen.removed, combed.groups, strict=True))
            yield {
                "asked": target, "way": way, "ms": table.ms, "predicted": chosen.latency["predicted"],
                "in the loop": chosen.latency["measured"], "measured": latency, "macs": macs, "gain": macs / latency,
                "branches": gone, "table seconds": tabled, "loop seconds": took, "notes": list(chosen.notes),
            }  # fmt: skip  # a row


def show(content: dict[str, Any]) -> None:
    """Print the rows, and the median gain of each target and way."""
    print("| model | ms | asked | way | measured | MACs left | gain | branches gone | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in content["rows"]:
        if "error" in row:
            print(f"| {row['model']} | {row['error']} |")
            continue
        cells = (f"{row[key]:.3f}" for key in ("measured", "macs"))
        start = f"| {row['model']} | {row['ms']:.2f} | {row['asked']:g} | {row['way']} | {' | '.join(cells)}"
        print(
            f"{start} | {row['gain']:.2f} | {row['branches']} | {row['table seconds']:.0f} + {row['loop seconds']:.0f} |"
        )
    rows = [row for row in content["rows"] if "error" not in row]
    for target in sorted({row["asked"] for row in rows}, reverse=True):
        for way in (GONE, NARROW):
            found = [row for row in rows if (row["asked"], row["way"]) == (target, way)]
            near = sum(abs(row["measured"] / target - 1) <= NEAR for row in found)
            gain = statistics.median(row["gain"] for row in found)
            print(f"\n{target:g}, {way}: {near} of {len(found)} within {NEAR:.0%}; median gain {gain:.2f}", end="")
    print()


def main() -> None:
    """Measure, store and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder with the exported models")
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="a model that lies elsewhere")
    parser.add_argument("--names", nargs="*", help="of all models, those to measure")
    parser.add_argument("--target", type=float, action="append", help=f"instead of {TARGETS}")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds of timing at the end (default: 6)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "branches.json")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    options = parser.parse_args()
    if options.table:
        show(json.loads(options.out.read_text()))
        return
    files = {name: Path(options.data_folder or "", "onnx", f"{name}.onnx") for name in TRAINED}
    for name in ARCHITECTURES if options.models else ():
        files |= {name: next(iter(sorted(options.models.glob(f"{name}.*onnx"), key=lambda p: len(p.name))))}
    files |= {name: Path(file) for name, file in (entry.split("=", 1) for entry in options.model)}
    machine = {"cpus": os.cpu_count(), "system": platform.platform(), "onnxruntime": ort.__version__}
    content: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    content |= {"command": "python benchmarks/speed/branches.py", "machine": machine}
    version = commit()
    for name, path in files.items():
        if not path.is_file() or (options.names and name not in options.names):
            continue
        made: list[dict[str, Any]] = []
        try:
            for row in measure(path, options.target or list(TARGETS), options.seconds):
                made.append({"model": name, "commit": version, **row})
                print(json.dumps(made[-1]), file=sys.stderr, flush=True)
        except CpdError as error:
            made.append({"model": name, "error": str(error)})
        new = {(row["model"], row.get("asked"), row.get("way")) for row in made}
        rows = [row for row in content["rows"] if (row["model"], row.get("asked"), row.get("way")) not in new]
        content["rows"] = [*rows, *made]
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    show(content)


if __name__ == "__main__":
    main()
