"""Does it matter how a file stores its weights? The same network and run, with each way that exporters and converters use.

    python benchmarks/accuracy/stored_forms.py --data-folder DATA [--only CASE]
    python benchmarks/accuracy/stored_forms.py --table

DATA is a folder with `onnx/` and `load.py`. `prune` gets unlabelled images and half of the multiply-accumulates, and no bound of the
loss; nothing is trained. All test images are scored by onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from accuracy import commit
from effort import RUNS, Run, counted, score
from onnx import ModelProto, helper
from verdicts import CASES as PAIRS
from verdicts import ROOT, Data, kept, opened, resized

from cpd_onnx.deploy.float16 import to_half
from cpd_onnx.ir.model import load

RESULT = ROOT / "benchmarks" / "results" / "stored_forms.json"
SEED = 0
CASES = ("resnet20_gtsrb 0.5", "resnet56_jpeg_cifar10 0.5", "vit_cifar10_smmk47 0.5")


def in_constants(proto: ModelProto) -> ModelProto:
    """Return the model with each initializer in a Constant node."""
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    nodes += list(proto.graph.node)
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    return proto


def in_half(kind: str, *, storage_only: bool) -> Callable[[ModelProto], ModelProto]:
    """Return a function that converts a model to a half-precision type."""
    return lambda proto: to_half(load(proto), kind, storage_only=storage_only).complete_proto()


FORMS: dict[str, Callable[[ModelProto], ModelProto]] = {
    "float32 initializers": lambda proto: proto,
    "Constant nodes": in_constants,
    "float16": in_half("float16", storage_only=False),
    "float16, computed in float32": in_half("float16", storage_only=True),
    "bfloat16, computed in float32": in_half("bfloat16", storage_only=True),
}


def rows_of(run: Run, model: Path, data: Data) -> list[dict[str, Any]]:
    """Return what is left of a model in each form."""
    case = next(pair for pair in PAIRS if pair.model == run.model)
    given, images, labels = data.decode(case.data)
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(given))[: run.images])
    tested, rows = resized(images, case.size), []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        np.savez(
            work / "data.npz", **{opened(model).get_inputs()[0].name: case.pixels(resized(given[chosen], case.size))}
        )
        for form, made in FORMS.items():
            original, small = work / "original.onnx", work / "small.onnx"
            onnx.save(made(onnx.load(model)), original)
            words = [
                "prune",
                str(original),
                "-o",
                str(small),
                "--data",
                str(work / "data.npz"),
                "--hold-out",
                "0",
                "--force",
            ]
            words += ["--target", f"macs={run.macs}", "--max-loss", "inf", "--round-to", "1", "--no-check-speed"]
            code, figures = counted(words)
            if code:
                raise RuntimeError(f"{' '.join(words)}: exit code {code}")
            scores = [score(case, path, tested, labels) for path in (original, small)]
            rows.append({"case": run.name, "form": form, "original": scores[0], "score": scores[1], **figures})
            print(rows[-1], flush=True)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the results as a table, a line for each form."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    print(f"| weights | {' | '.join(cases)} |\n|---|{'---|' * len(cases)}")
    for form in FORMS:
        found = {row["case"]: row for row in rows if row["form"] == form}
        cells = [f"{100 * r['original']:.2f} -> {100 * r['score']:.2f}" if r else "" for r in map(found.get, cases)]
        print(f"| {form} | {' | '.join(cells)} |")


def main() -> None:
    """Run the cases, or print the stored results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for run in () if options.table else (run for run in RUNS if run.name in (options.only or CASES)):
        model = options.data_folder / "onnx" / f"{run.model}.onnx"
        for row in rows_of(run, model, Data(options.data_folder)) if model.is_file() else ():
            rows = kept(options.out, rows, row, ("case", "form"), commit=commit())
    show(rows)


if __name__ == "__main__":
    main()
