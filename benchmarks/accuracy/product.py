"""End-to-end check of `cpd-onnx compress` on real files, through the command line and an independent evaluation.

    python benchmarks/accuracy/product.py --data DATA [--only NAME] [--keep FOLDER]
    python benchmarks/accuracy/product.py --table

A classifier and a segmentation model with data, a detector and a text detector without. For each, the report's accuracy,
size and speed are listed beside those that `independent.py` measures on the same files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import HERE, images, prepared

from cpd_onnx.ir.model import load
from cpd_onnx.runtime.bench import machine

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.runs import plain


@dataclass(frozen=True)
class Case:
    """A model, its data set and metric (None and "" for none), and the options of `compress`."""

    model: str
    data: str | None
    metric: str
    target: tuple[str, ...]


CASES = {
    "classifier": Case("resnet56_jpeg_cifar10", "cifar10", "top1", (
        "--target", "macs=0.5", "--steps", "400", "--lr", "0.003", "--flip", "--threads", "1",
    )),
    "segmentation": Case("espnet_p2_q8_camvid", "camvid", "miou", (
        "--target", "macs=0.77", "--steps", "60", "--batch-size", "4", "--flip", "--batch-norm", "train",
        "--mixed-precision", "--samples", "48", "--repair-samples", "48", "--threads", "1",
    )),
    "detector": Case("yolox_nano", None, "", ("--target", "latency=0.7")),
    "text detector": Case("ppocr_v2_det", None, "", ("--target", "latency=0.7", "--input-shape", "x:1,3,320,320")),
}  # fmt: skip  # a table


def data_of(case: Case, folder: Path, work: Path) -> list[str]:
    """Return options with the training inputs, without labels, and all test images."""
    if case.data is None:
        return []
    name = load(folder / "onnx" / f"{case.model}.onnx").graph.input[0].name
    options = []
    for part, option in (("train", "--data"), ("test", "--eval")):
        x, y = images(folder, case.data, part)
        arrays = {name: prepared(x, case.data)} | ({"labels": y} if part == "test" else {})
        np.savez(work / f"{part}.npz", **arrays)
        options += [option, str(work / f"{part}.npz")]
    return [*options, "--metric", case.metric]


def row(case: Case, folder: Path, work: Path) -> dict[str, Any]:
    original, small = folder / "onnx" / f"{case.model}.onnx", work / f"{case.model}_small.onnx"
    words = plain(["compress", original, "-o", small, *case.target, *data_of(case, folder, work)])
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cpd_onnx", *words], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    judge = [sys.executable, str(HERE / "accuracy" / "independent.py"), str(original), str(small)]
    judge += ["--data", str(work / "test.npz"), "--metric", case.metric] if case.data else []
    found = json.loads(subprocess.run(judge, check=True, capture_output=True, text=True).stdout)
    report = json.loads(small.with_name(f"{small.name}.report.json").read_text())
    timings = [entry["p50"] for entry in report["bench"]["timings"]]
    values = list((report["accuracy"] or {"values": {}})["values"].values())
    pages = [small.with_name(f"{small.name}.{kind}") for kind in ("report.html", "report.md", "manifest.json")]
    return {
        "model": case.model, "asked": " ".join(case.target), "seconds": round(seconds, 1),
        "report": {
            "ms": timings, "faster": timings[0] / timings[1], "quality": [values[0], values[-1]] if case.data else None,
            "untrained": values[1] if len(values) > 2 else None, "bytes": report["bytes"],
            "macs": report["after"]["macs"] / report["before"]["macs"], "verified": report["verification"]["passed"],
        },
        "independent": {
            "ms": [entry["ms"] for entry in found], "faster": found[0]["ms"] / found[1]["ms"],
            "quality": [entry["quality"] for entry in found] if case.data else None,
            "bytes": {"before": found[0]["bytes"], "after": found[1]["bytes"]},
            "finite": all(entry["finite"] for entry in found),
        },
        "pages": {page.name: page.stat().st_size for page in pages},
    }  # fmt: skip  # a table


def show(content: dict[str, Any]) -> None:
    print(
        "| | target | MACs left | times faster: report, independent | score: original, compressed, independent | file | s |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, entry in content["rows"].items():
        reported, measured = entry["report"], entry["independent"]
        quality = "not known"
        if reported["quality"]:
            quality = ", ".join(f"{100 * value:.1f}" for value in (*reported["quality"], measured["quality"][1]))
        size = f"{reported['bytes']['before'] / 1e6:.2f} -> {reported['bytes']['after'] / 1e6:.2f} MB"
        faster = f"{reported['faster']:.2f}, {measured['faster']:.2f}"
        target = entry["asked"].split()[1]
        print(
            f"| {name} ({entry['model']}) | {target} | {reported['macs']:.2f} | {faster} | {quality} | {size} | {entry['seconds']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument(
        "--keep", type=Path, help="folder in which the produced files are kept (default: they are deleted)"
    )
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "product.json")
    options = parser.parse_args()
    content = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    for name in [] if options.table else options.only or CASES:
        with tempfile.TemporaryDirectory() as work:
            content["rows"][name] = row(CASES[name], options.data, Path(work))
            if options.keep:
                shutil.copytree(work, options.keep / name.replace(" ", "_"), dirs_exist_ok=True)
        content |= {"command": "python benchmarks/accuracy/product.py --data DATA", "machine": machine()}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    show(content)


if __name__ == "__main__":
    main()
