"""ESPNet, trained on CamVid, whose source code is not available: compressed to half of its latency, and the unpruned control.

    python benchmarks/accuracy/segmentation.py --data DATA [--work FOLDER] [--out FILE]
    python benchmarks/accuracy/segmentation.py --table

DATA is a folder with `load.py`, which decodes CamVid. `cpd-onnx compress --target latency=0.5` trains without labels, and so is
the original trained by `cpd-onnx distill`. The models are timed interleaved, twice: with onnxruntime's defaults, and with
denormal numbers, which occur in two of its convolutions, flushed to zero. The score is that of all test images after the last step.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import HERE, SECONDS, Case, Run, command, commit, macs

from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.ir.model import load

RECIPE = (
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
SHARE, STEPS, SAMPLES = 0.5, 700, 64
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
LABELS = {"dense": "original", "ours": "cpd-onnx", "control": "unpruned control"}
"""Printed names of kinds of models that the results name differently."""


def measured(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Return the results for ESPNet on CamVid: compressed by cpd-onnx, and the unpruned control trained alike."""
    original = options.data / "onnx" / "espnet_p2_q8_camvid.onnx"
    case = Run(
        Case(original.stem, "camvid", "miou", (), STEPS, RECIPE),
        options.data,
        work,
        (),
        None,
        re.compile(""),
    )
    train, test = case.archives()
    files = {"dense": original, "ours": work / "espnet.onnx", "control": work / "control.onnx"}
    training = ("--data", train, "--steps", STEPS, "--threads", options.threads, *RECIPE)
    samples = ("--samples", SAMPLES, "--repair-samples", SAMPLES)
    if not files["ours"].exists():
        command("compress", original, "-o", files["ours"], "--target", f"latency={SHARE}", *samples, *training)
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
        "asked": SHARE,
        "recipe": [f"{STEPS} steps", *RECIPE],
        "rows": rows,
    }


def show(content: dict[str, Any]) -> None:
    """Print the results."""
    for name, row in content["rows"].items():
        figures = f"{row['speedup']:.2f}x, {row['speedup, no denormals']:.2f}x with denormals flushed to zero"
        print(f"{LABELS[name]}: {100 * row['miou']:.1f} mIoU, {figures}, {row['macs']:.3f} of the MACs")


def main() -> None:
    """Run the measurements and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, help="folder for intermediate files, which later runs reuse")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--no-control", dest="control", action="store_false", help="skip the unpruned control")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "segmentation.json")
    options = parser.parse_args()
    if options.table:
        show(json.loads(options.out.read_text()))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        content = measured(options, work)
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    show(content)


if __name__ == "__main__":
    main()
