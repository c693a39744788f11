"""Closed-form repairs as published, rebuilt on this project's passes, beside its own repair of the same channels.

    python benchmarks/accuracy/published.py --data-folder DATA [--model efficientnet_lite0=FILE] [--only CASE] [--out FILE]
    python benchmarks/accuracy/published.py --table

The cases are those of effort.py: the same unlabelled images, MACs and test images. Channels are chosen by magnitude, the same
ratio of each group, except in the last row, which is a default run. No model is trained.

* none: no repair;
* GRAIL (Tang et al., CPAL 2026, arXiv 2602.23795): the inputs of a weight are reconstructed from those that survive, by a ridge
  regression with their Gram matrix in the original, and the map is multiplied into the weight. That is the least-squares fit
  of the weight, without a constant, to its own outputs in the original from the surviving inputs there.
* affine (the compensation of multilayer perceptrons and values in CORP, Zhang and Yang, arXiv 2602.05243): the same with a
  constant. Its compensation of attention scores is not rebuilt: with this choice of channels, queries and keys are left as cut.
* ours: `--repair`: inputs in the pruned and repaired model, sums and activations that clip taken into account.
* default: `prune` with its defaults.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import commit, macs
from effort import RUNS, Run, counted, score
from verdicts import CASES as PAIRS
from verdicts import ROOT, Data, kept, opened, resized

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.sources import ArraySource, calibration
from cpd_onnx.fitting.least_squares import single
from cpd_onnx.fitting.problem import Block
from cpd_onnx.fitting.units import Unit
from cpd_onnx.ir.model import Model, load
from cpd_onnx.passes.repair import Fit, RepairOptions, Targets, _held_out, _kept, _Repairer
from cpd_onnx.rewrite.plan import load_plan, planned
from cpd_onnx.rewrite.rewriter import in_line, out_of_line
from cpd_onnx.runtime.sessions import sample_count
from cpd_onnx.runtime.stream import Stop, Stream, Tensors, apart, held_feeds

RESULT = ROOT / "benchmarks" / "results" / "published.json"
SEED = 0
BATCH = 32
UNIFORM = ("--score", "l2", "--policy", "uniform", "--effort", "0")
WAYS = {"none": (*UNIFORM, "--no-repair"), "ours": (*UNIFORM, "--repair"), "default": ()}
"""Options of `prune`."""
REBUILT = {"GRAIL": False, "affine": True}
"""Repairs of the channels of `none`, and whether they fit a constant."""


class FromOriginal(_Repairer):
    """Fits each weight to its own outputs in the original, from the inputs there that survive."""

    def __init__(self, combed: Combed, kept: KeepMask, pruned: Model, data: ArraySource, *, constant: bool) -> None:
        """Open the models; `constant` says whether a constant is fitted too."""
        feeds = held_feeds(calibration(combed.folded.model, data, data.count, batch=BATCH, seed=SEED))
        place = len(feeds) - _held_out([*map(sample_count, feeds)])
        samples = feeds[:place], feeds[place:]
        super().__init__(combed, kept, pruned, samples, RepairOptions(samples=data.count, rounds=0), None)
        self.again, self.constant = Stream(combed.folded, combed.folded.model, feeds), constant

    def blocks(self, number: int, targets: Sequence[Sequence[Targets]], cut: int | None) -> list[Block]:
        """Return the surviving inputs and the outputs in the original."""
        units = self.units[number]
        names = [(unit.data, *([unit.other] if unit.other else [])) for unit in units]

        def left(name: str, tensors: Tensors) -> np.ndarray:
            masks = [self.kept.mask(axis) for axis in self.combed.tensors[("", name)].axes or []]
            return _kept(tensors[name], masks)

        def look(stop: int, batch: int, tensors: Tensors) -> Block:
            unit, (places, wanted, *_) = units[stop], targets[batch][stop]
            if unit.other is not None:
                wanted = wanted - unit.linear.targets(left(unit.other, tensors), places)
            return Block(apart(unit.linear.rows(single(left(unit.data, tensors)), places)), apart(wanted))

        stops = [Stop(unit.position - 1, names[number]) for number, unit in enumerate(units)]
        return [Block.joined(blocks) for blocks in self.again.run(stops, look, cut=cut)]

    def fit(self, unit: Unit, blocks: list[Block], held_out: int, *, refits: bool) -> Fit | None:
        """Fit and store a weight."""
        return super().fit(unit if self.constant else replace(unit, bias=None), blocks, held_out, refits=refits)


def rebuilt(original: Path, pruned: Path, inputs: dict[str, np.ndarray], out: Path, *, constant: bool) -> None:
    """Write a pruned model with a published repair."""
    combed, keep = planned(load(original), load_plan(Path(f"{pruned}.plan.json")))
    start = in_line(combed, keep, load(pruned))
    made = FromOriginal(combed, keep, start, ArraySource(inputs), constant=constant).run()
    out_of_line(combed, keep, made.model).save(out, overwrite=True)


def rows_of(run: Run, model: Path, data: Data) -> list[dict[str, Any]]:
    """Return what each way left of a model."""
    case = next(pair for pair in PAIRS if pair.model == run.model)
    given, images, labels = data.decode(case.data)
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(given))[: run.images])
    tested, rows = resized(images, case.size), []
    inputs = {opened(model).get_inputs()[0].name: case.pixels(resized(given[chosen], case.size))}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        np.savez(work / "data.npz", **inputs)

        def noted(how: str, path: Path, seconds: float) -> None:
            found = {"case": run.name, "how": how, "score": score(case, path, tested, labels)}
            rows.append(found | {"original": original, "macs": macs(path) / macs(model), "seconds": seconds})
            print(rows[-1], flush=True)

        original = score(case, model, tested, labels)
        for how, more in WAYS.items():
            words = [
                "prune",
                str(model),
                "-o",
                str(work / f"{how}.onnx"),
                "--data",
                str(work / "data.npz"),
                "--hold-out",
                "0",
            ]
            words += ["--target", f"macs={run.macs}", "--max-loss", "inf", "--round-to", "1", "--no-check-speed", *more]
            code, figures = counted(words)
            if code:
                raise RuntimeError(f"{' '.join(words)}: exit code {code}")
            noted(how, work / f"{how}.onnx", figures["seconds"])
        for how, constant in REBUILT.items():
            started = time.monotonic()
            rebuilt(model, work / "none.onnx", inputs, work / f"{how}.onnx", constant=constant)
            noted(how, work / f"{how}.onnx", time.monotonic() - started)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the results as a table, a line for each case."""
    ways = ("none", *REBUILT, "ours", "default")
    print("| case | original | " + " | ".join(ways) + " |\n|---|---|" + "---|" * len(ways))
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = {row["how"]: row for row in rows if row["case"] == case}
        cells = (f"{100 * mine[way]['score']:.2f}" if way in mine else "" for way in ways)
        print(f"| {case} | {100 * next(iter(mine.values()))['original']:.2f} | " + " | ".join(cells) + " |")


def main() -> None:
    """Run the cases, or print the stored results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="a model that lies elsewhere")
    parser.add_argument("--only", choices=[run.name for run in RUNS], action="append")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    elsewhere = dict(entry.split("=", 1) for entry in options.model)
    data = Data(options.data_folder)
    for run in () if options.table else RUNS:
        model = Path(elsewhere.get(run.model, options.data_folder / "onnx" / f"{run.model}.onnx"))
        if model.is_file() and (not options.only or run.name in options.only):
            for row in rows_of(run, model, data):
                rows = kept(options.out, rows, row, ("case", "how"), commit=commit())
    show(rows)


if __name__ == "__main__":
    main()
