"""Half of the latency, asked of ten architectures: what is predicted, what is measured, what work is left.

    python benchmarks/latency.py --models ZOO/torchscript [--out benchmarks/results/latency.json] [--table]

For each model a cost table is measured, the channels are chosen by `l2` with the default spread for a latency target,
and the model that comes out is timed beside the original anew, for longer than the allocation did. "gain" is the
speed-up in latency over that in MACs: at 1, the multiply-accumulates that went are paid back in time. onnxruntime on the
CPU, one thread; the models have random weights and small inputs, and take --batch samples where they leave that open.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnxruntime as ort

from cpd_onnx.errors import CpdError
from cpd_onnx.graph import load
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.passes.comb import comb
from cpd_onnx.passes.score import score

ARCHITECTURES = (
    "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "vit_16", "swin_t",
    "segformer", "yolov8_like", "unet_transpose", "bert",
)  # fmt: skip  # a table


def measure(path: Path, target: float, batch: int | None, seconds: float) -> dict[str, Any]:
    """One row."""
    combed = comb(load(path))
    scores = score(combed)
    started = time.perf_counter()
    try:
        chooser = Allocate(latency=target, latency_batch=batch).chooser(combed)
    except CpdError:  # it takes a fixed number of samples
        chooser = Allocate(latency=target).chooser(combed)
    tabled = time.perf_counter()
    chosen = chooser(combed, scores)
    done = time.perf_counter()
    clock, table = chooser.clock, chooser.table
    assert clock is not None
    assert table is not None
    latency = clock.ratio(chosen.channels(combed), seconds)
    macs = chosen.after.macs / chosen.before.macs
    inputs = {name: list(array.shape) for name, array in clock.feed.items()}
    return {
        "inputs": inputs, "ms": table.ms, "asked": target, "predicted": chosen.latency["predicted"],
        "in the loop": chosen.latency["measured"], "measured": latency, "macs": macs, "gain": macs / latency,
        "table seconds": tabled - started, "loop seconds": done - tabled, "notes": list(chosen.notes),
    }  # fmt: skip  # a row


def show(content: dict[str, Any]) -> None:
    print("| model | ms | asked | predicted | measured | MACs left | gain | table + loop, s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in content["rows"].items():
        if "error" in row:
            print(f"| {name} | {row['error']} |")
            continue
        cells = (f"{row[key]:.3f}" for key in ("asked", "predicted", "measured", "macs"))
        seconds = f"{row['table seconds']:.0f} + {row['loop seconds']:.0f}"
        print(f"| {name} | {row['ms']:.2f} | {' | '.join(cells)} | {row['gain']:.2f} | {seconds} |")
    rows = [row for row in content["rows"].values() if "error" not in row]
    missed = [abs(row["measured"] / row["asked"] - 1) for row in rows]
    print(f"\nwithin 5 %: {sum(m <= 0.05 for m in missed)} of {len(content['rows'])}; ", end="")
    print(f"gain in the median: {statistics.median(row['gain'] for row in rows):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of exported models")
    parser.add_argument("--names", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=8, help="where the model leaves it open (default: 8)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing at the end (default: 6)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latency.json")
    parser.add_argument("--table", action="store_true", help="only print what is in the file")
    options = parser.parse_args()
    if options.table:
        show(json.loads(options.out.read_text()))
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    machine = {"cpus": os.cpu_count(), "system": platform.platform(), "onnxruntime": ort.__version__}
    content: dict[str, Any] = {
        "command": f"python benchmarks/latency.py {' '.join(sys.argv[1:])}", "machine": machine, "commit": commit,
        "rows": {},
    }  # fmt: skip  # a record
    for name in options.names:
        path = next(iter(sorted(options.models.glob(f"{name}.*onnx"), key=lambda p: len(p.name))))
        try:
            content["rows"][name] = measure(path, options.target, options.batch, options.seconds)
        except CpdError as error:
            content["rows"][name] = {"error": str(error)}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
        print(name, json.dumps(content["rows"][name]), file=sys.stderr)
    show(content)


if __name__ == "__main__":
    main()
