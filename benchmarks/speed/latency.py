"""Pruning of eleven architectures to half of their latency: predicted latency, measured latency, and MACs left.

    python benchmarks/speed/latency.py --models ZOO/full [--peer-python TORCH] [--out FILE] [--table]

For each model a cost table is measured, channels are chosen by `l2` with the default allocation policy of a latency
target, and the pruned model is timed interleaved with the original, for longer than during the allocation. "gain" is
the speed-up in latency divided by that in MACs: at 1, time falls in proportion to the MACs. onnxruntime on the CPU, one
thread; the models have random weights, inputs of their published size and --batch samples.

TORCH is a Python with the libraries of benchmarks/zoo and torch-pruning: it prunes each model by the same ratio of all
layers, at several ratios, with its default round_to and with 8, and exports them; they are timed in the same way.
"torch-pruning keeps" is the ratio of MACs that it keeps at the measured latency of cpd-onnx's result, interpolated
linearly between two ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.latency import LatencyProbe
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.costs import CostModel
from cpd_onnx.errors import CpdError
from cpd_onnx.ir.model import load
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.scores.registry import score

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.accuracy.accuracy import commit

ARCHITECTURES = (
    "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "vit_s_16", "swin_t",
    "segformer_b0", "yolov8_like", "unet_transpose", "bert_base",
)  # fmt: skip  # a table


def measure(path: Path, target: float, batch: int | None, seconds: float, python: str | None) -> dict[str, Any]:
    """Return the row of one model."""
    combed = comb(load(path))
    scores = score(combed)
    started = time.perf_counter()
    try:
        chooser = Allocate(latency=target, latency_batch=batch).chooser(combed)
    except CpdError:  # the model has a fixed batch size
        chooser = Allocate(latency=target).chooser(combed)
    tabled = time.perf_counter()
    chosen = chooser(combed, scores)
    done = time.perf_counter()
    probe, table = chooser.probe, chooser.table
    assert probe is not None
    assert table is not None
    latency = probe.ratio(chosen.channels(combed), seconds)
    macs = chosen.after.macs / chosen.before.macs
    inputs = {name: list(array.shape) for name, array in probe.feed.items()}
    row = {
        "inputs": inputs, "ms": table.ms, "asked": target, "predicted": chosen.latency["predicted"],
        "in the loop": chosen.latency["measured"], "measured": latency, "macs": macs, "gain": macs / latency,
        "table seconds": tabled - started, "loop seconds": done - tabled, "notes": list(chosen.notes),
    }  # fmt: skip  # a row
    if python is not None:
        row["peer"] = peer(python, path.name.split(".")[0], probe, latency, chosen.before.macs)
    return row


PEER_SECONDS = 240
"""Seconds after which torch-pruning is stopped."""
PEER = """
import json, sys, warnings
sys.path.insert(0, sys.argv[1])
import torch, torch_pruning as tp
from torch import nn
from torch_models import full_size_nets
warnings.simplefilter("ignore")
torch.set_num_threads(1)
name, folder, batch = sys.argv[2], sys.argv[3], int(sys.argv[4])
net = next(n for n in full_size_nets() if n.name == name)
for round_to in (None, 8):
    for ratio in (0.15, 0.3, 0.45, 0.6):
        torch.manual_seed(0)
        module, inputs = net.make().eval(), net.args(batch=batch)
        with torch.no_grad():
            found = module(*inputs)
        ends = {s for o in (found if isinstance(found, (tuple, list)) else [found]) for s in (o.shape[1], o.shape[-1])}
        heads = [m for m in module.modules() if (isinstance(m, nn.Linear) and m.out_features in ends)
                 or (isinstance(m, nn.Conv2d) and m.out_channels in ends)]
        importance = tp.importance.MagnitudeImportance(p=2)
        try:
            tp.pruner.MagnitudePruner(module, inputs, importance=importance, pruning_ratio=ratio, round_to=round_to,
                                      ignored_layers=heads).step()
            path = f"{folder}/{round_to}-{ratio}.onnx"
            torch.onnx.export(module, inputs, path, dynamo=False, opset_version=17, input_names=list(net.inputs))
            print(json.dumps([round_to, ratio, path]), flush=True)
        except Exception as error:
            print(json.dumps([round_to, ratio, {"error": f"{type(error).__name__}: {str(error)[:100]}"}]), flush=True)
            break
"""


def peer(python: str, name: str, probe: LatencyProbe, latency: float, before: float) -> dict[str, Any]:
    """Return the ratio of MACs that torch-pruning keeps at a latency, by its rounding of widths."""
    found: dict[str, list[tuple[float, float]]] = {"None": [(1.0, 1.0)], "8": [(1.0, 1.0)]}
    result: dict[str, Any] = {}
    batch = next(len(array) for array in probe.feed.values())
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-c", PEER, str(Path(__file__).parents[1] / "zoo"), name, folder, str(batch)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=PEER_SECONDS, check=False).stdout
        except subprocess.TimeoutExpired as late:
            done = late.stdout or b""
        lines = done.decode().splitlines()
        for round_to, _, path in (json.loads(line) for line in lines if line.startswith("[")):
            if isinstance(path, dict):
                result[f"round_to={round_to}"] = path
                continue
            combed = comb(load(path))
            samples = batch / combed.folded.batch if probe.setting.batch is not None else 1  # its batch is fixed
            macs = CostModel(combed).total(KeepMask(combed.atoms)).macs / samples / before
            try:
                found[str(round_to)].append((probe.ratio_of(load(path), 1.0), macs))
            except CpdError as error:
                result[f"round_to={round_to}"] = {"error": str(error)[:100]}
    for round_to, points in found.items():
        points.sort()
        if len(points) > 1:
            macs = float(np.interp(latency, *zip(*points, strict=True))) if points[0][0] <= latency else None
            result[f"round_to={round_to}"] = {"macs": macs, "points": points}
    return result


def show(content: dict[str, Any]) -> None:
    print(
        "| model | ms | target | predicted | measured | MACs kept | gain | torch-pruning keeps, in multiples of 8 | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in content["rows"].items():
        if "error" in row:
            print(f"| {name} | {row['error']} |")
            continue
        cells = (f"{row[key]:.3f}" for key in ("asked", "predicted", "measured", "macs"))
        seconds = f"{row['table seconds']:.0f} + {row['loop seconds']:.0f}"
        peers = (row.get("peer", {}).get(f"round_to={n}", {}).get("macs") for n in (None, 8))
        kept = ", ".join("-" if macs is None else f"{macs:.3f}" for macs in peers)
        print(f"| {name} | {row['ms']:.2f} | {' | '.join(cells)} | {row['gain']:.2f} | {kept} | {seconds} |")
    rows = [row for row in content["rows"].values() if "error" not in row]
    missed = [abs(row["measured"] / row["asked"] - 1) for row in rows]
    print(f"\nwithin 5 %: {sum(m <= 0.05 for m in missed)} of {len(content['rows'])}; ", end="")
    print(f"gain in the median: {statistics.median(row['gain'] for row in rows):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder with the exported models")
    parser.add_argument("--peer-python", help="Python interpreter with torch-pruning")
    parser.add_argument("--names", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=1, help="batch size (default: 1)")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds of timing at the end (default: 6)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "latency.json")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    options = parser.parse_args()
    if options.table:
        show(json.loads(options.out.read_text()))
        return
    machine = {"cpus": os.cpu_count(), "system": platform.platform(), "onnxruntime": ort.__version__}
    content: dict[str, Any] = {
        "command": f"python benchmarks/speed/latency.py {' '.join(Path(word).name for word in sys.argv[1:])}", "machine": machine, "commit": commit(),
        "rows": {},
    }  # fmt: skip  # a record
    for name in options.names:
        path = next(iter(sorted(options.models.glob(f"{name}.*onnx"), key=lambda p: len(p.name))))
        try:
            content["rows"][name] = measure(path, options.target, options.batch, options.seconds, options.peer_python)
        except CpdError as error:
            content["rows"][name] = {"error": str(error)}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
        print(name, json.dumps(content["rows"][name]), file=sys.stderr)
    show(content)


if __name__ == "__main__":
    main()
