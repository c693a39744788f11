"""Linear runs of files, before and after their branches are removed, and what one operator in their place saves.

    python benchmarks/speed/merging.py FILE.onnx … [--table]

Each file is counted as it is, with a quarter of the channels of each group that forms a branch, and without any branch
that can be removed together with the others. Where something is merged, both models are timed in turns by onnxruntime on
one thread, with random inputs. Files without linear runs in any of these forms are counted only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.branches import removable_groups, removable_together
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.costs import CostModel
from cpd_onnx.channels.free import keep_without
from cpd_onnx.channels.groups import Combed
from cpd_onnx.errors import CpdError
from cpd_onnx.ir.model import Model, load
from cpd_onnx.rewrite.linear_runs import linear_runs
from cpd_onnx.rewrite.merging import merge
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.sessions import judged_feed, latency_ratio, open_model
from cpd_onnx.shapes.inference import fold

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.accuracy.accuracy import commit

RESULT = Path(__file__).parents[1] / "results" / "merging.json"
SECONDS = 4.0
WIDTH = 0.25


def forms(combed: Combed, model: Model) -> Iterator[tuple[str, Model]]:
    """Yield the model as it is, with narrow branches, and without branches."""
    yield "as it is", model
    inner, gone = removable_groups(combed), removable_together(combed)
    if not inner:
        return
    narrow = [list(range(len(g) - max(1, round(WIDTH * len(g))))) if g.id in inner else [] for g in combed.groups]
    yield f"branches at {WIDTH:g} of their width", rewrite(combed, keep_without(combed, narrow)).model
    whole = [list(range(len(g))) if g.id in gone else [] for g in combed.groups]
    yield f"without {len(gone)} branches", rewrite(combed, keep_without(combed, whole)).model


def macs(model: Model) -> float:
    combed = comb(model)
    return CostModel(combed).cost("macs", KeepMask(combed.atoms))


def row(name: str, form: str, model: Model) -> dict[str, Any]:
    """Return the linear runs of a model, and what merging them by MACs saves."""
    found, made = linear_runs(fold(model)), merge(model)
    count = sum(map(len, made.rounds))
    total = macs(model)
    content = {
        "file": name, "form": form, "macs": total, "runs": len(found),
        "exact": sum(run.composition is not None for run in found), "merged": count,
        "saved": (made.before.macs - made.after.macs) / max(total, 1.0),
        "nodes": [len(model.graph.node), len(made.model.graph.node)],
    }  # fmt: skip  # a row
    if count:
        feed = judged_feed(fold(model), open_model(model))
        before, after = latency_ratio([model, made.model], feed, seconds=SECONDS, threads=1)
        content |= {"ms": 1e3 * before, "time": after / before}
    return content


def show(content: dict[str, Any]) -> None:
    rows = content["rows"]
    files = {row["file"] for row in rows}
    shown = {row["file"] for row in rows if row["runs"]}
    print(f"{len(files)} files, {len(files) - len(shown)} of them without linear runs in any form\n")
    print("| file | form | MACs | linear runs | exact as one | merged | of the MACs saved | nodes | latency |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in (row for row in rows if row["file"] in shown):
        time = f"{row['ms']:.2f} ms -> {100 * row['time']:.1f} %" if "time" in row else ""
        print(
            f"| {row['file']} | {row['form']} | {row['macs'] / 1e6:.1f} M | {row['runs']} | {row['exact']} | {row['merged']} | "
            f"{100 * row['saved']:.1f} % | {row['nodes'][0]} -> {row['nodes'][1]} | {time} |"
        )


def main() -> None:
    """Count, time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.table:
        show(json.loads(options.out.read_text()))
        return
    rows = []
    for path in options.files:
        try:
            model = load(path)
            rows += [row(path.stem, form, each) for form, each in forms(comb(model), model)]
        except CpdError as error:
            print(path.name, error, file=sys.stderr)
    machine = {"cpus": os.cpu_count(), "system": platform.platform()}
    content = {"commit": commit(), "machine": machine, "rows": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    show(content)


if __name__ == "__main__":
    main()
