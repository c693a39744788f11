"""What `sweep` does: several targets in one run, so that one can be picked by what it costs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.progress import BarColumn
from rich.table import Table

from cpd_onnx.channels.combing import comb
from cpd_onnx.cli.arguments import command_line
from cpd_onnx.cli.compress import can_draw, choice_of, compressed, page_kinds, timed, write_page
from cpd_onnx.cli.console import out, progress_line, read_model, require_apart, require_outputs, source_of, write_json
from cpd_onnx.data.metrics import lower_is_better
from cpd_onnx.data.sources import Source, imported
from cpd_onnx.errors import CpdError, TargetError
from cpd_onnx.io import trust
from cpd_onnx.io.files import commit_together, locked_folder
from cpd_onnx.ir.model import Model
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.report import figures as plots
from cpd_onnx.report import tables as report
from cpd_onnx.rewrite.plan import make_plan
from cpd_onnx.runtime.bench import Bench
from cpd_onnx.scores.registry import score, scorer_of
from cpd_onnx.summary import count
from cpd_onnx.workflow import compress as compression
from cpd_onnx.workflow import manifest, recipe

_SECONDS = 2.0
"""For which each model is timed, in turns with the others."""


@dataclass(frozen=True)
class Point:
    """One model of a sweep.

    Attributes:
        name: the target that it was made for.
        file: its file.
        quality: what it scores, None where nobody knows.
        before: what it scored before any training.
        macs, params, bytes: shares of the original's that are left.
        ms, ratio: its median latency, and that of the original's.
        picked: whether it is the fastest that is good enough.
    """

    name: str
    file: Path
    quality: float | None
    before: float | None
    macs: float
    params: float
    bytes: int
    ms: float = 0.0
    ratio: float = 0.0
    picked: bool = False

    def as_json(self) -> dict[str, Any]:
        """As an entry of the report."""
        return {
            "name": self.name, "file": self.file.name, "ms": self.ms, "ratio": self.ratio, "accuracy": self.quality,
            "untrained": self.before, "macs": self.macs, "params": self.params, "bytes": self.bytes,
            "picked": self.picked,
        }  # fmt: skip  # a table


def sweep(options: argparse.Namespace) -> None:
    """Choose channels for each target by the same scores, make the models side by side, and time them in turns."""
    folder: Path = options.output
    targets = _targets(options.targets)
    options.target = next(iter(targets.values()))
    files = {name: folder / f"{name}.onnx" for name in targets}
    pages = [folder / f"sweep.{kind}" for kind in (*page_kinds(), *(["svg"] if can_draw() else []))]
    (folder / "plans").mkdir(parents=True, exist_ok=True)
    beside = [*(folder / "plans" / f"{name}.json" for name in targets), folder / "sweep.recipe.toml"]
    require_outputs(options, *files.values(), *pages, *beside)
    executor = _executor(options)
    model = read_model(options.model, options.input_shape)
    require_apart(options, model)
    source = source_of(options.data, model, options)
    with progress_line(BarColumn()) as line:
        task = line.add_task("comb and score", total=len(targets) + 1)
        plans = _planned(options, model, source, targets)
        line.update(task, advance=1, description=f"{len(targets)} models")
        made = []
        for content in _made(options, files, plans, executor):
            made.append(content)
            line.update(task, advance=1)
    found = timed(options, source, model, files.values(), _SECONDS * (1 + len(files)))
    content = _content(options, _points(options, files, made, found), made, found)
    with locked_folder(folder), commit_together():
        for path in pages:
            if path.suffix == ".svg":
                _draw(content, path, overwrite=options.force)
            else:
                write_page(path, content)
    if not write_json(options, content):
        _show(content, [path for path in pages if path.suffix != ".svg" or content["sweep"]["metric"] is not None])


def _targets(said: Sequence[tuple[str, float]]) -> dict[str, tuple[str, float]]:
    """By the name of their file; the largest first."""
    found = {f"{kind}={fraction:g}": (kind, fraction) for kind, fraction in said}
    if len({kind for kind, _ in found.values()}) > 1:
        raise TargetError("the targets of a sweep are all of one kind: --targets latency=0.7,0.5,0.3")
    return dict(sorted(found.items(), key=lambda pair: -pair[1][1]))


def _planned(
    options: argparse.Namespace, model: Model, source: Source | None, targets: Mapping[str, tuple[str, float]]
) -> dict[str, Path]:
    """A plan for each target, in files: combed, scored and, for latency, measured once."""
    combed = comb(model, dict(options.input_shape))
    kind, wish = choice_of(options, source)
    scores = score(combed, kind, samples=options.samples, data=source, labels=options.score_labels, seed=options.seed)
    step = Allocate(**wish)
    chooser = step.chooser(combed)
    place = options.output / "plans"
    made = {}
    for name, (_, fraction) in targets.items():
        chosen = chooser(combed, scores, fraction, is_loss=scorer_of(kind).is_loss)
        words: dict[str, Any] = replace(step.budget, fraction=fraction).as_words()
        words |= {"latency": dict(chosen.latency)} if chosen.latency else {}
        words |= {"score": kind, "seed": options.seed}
        costs = {"before": chosen.before, "after": chosen.after}
        made[name] = place / f"{name}.json"
        plan = make_plan(combed, chosen.removed, budget=words, **costs)
        plan.save(made[name], overwrite=options.force)
    return made


def _made(
    options: argparse.Namespace, files: Mapping[str, Path], plans: Mapping[str, Path], executor: Executor
) -> Iterator[dict[str, Any]]:
    """The report of each model, in order; they are made in other processes, or machines that see the same folders."""
    written = options.output / "sweep.recipe.toml"
    command = command_line().parse_args(["compress", "model", "-o", "output"]).command
    recipe.write(written, options, overwrite=options.force, command=command)
    fixed = ["--recipe", str(written), "--no-report", *(["--force"] if options.force else [])]
    fixed += ["--threads", "1"] if _jobs(options) > 1 and not options.threads else []  # or they stand in their way
    jobs = [
        ["compress", str(options.model), "-o", str(files[name]), "--like", str(plan), *fixed]
        for name, plan in plans.items()
    ]
    with executor:
        yield from executor.map(_one, jobs)


def _jobs(options: argparse.Namespace) -> int:
    return options.jobs or min(os.cpu_count() or 1, len(options.targets))


def _quiet() -> None:
    """Before anything of ours is imported in a process: only the first one shows where it is."""
    os.environ["TTY_COMPATIBLE"] = "0"


def _executor(options: argparse.Namespace) -> Executor:
    if options.executor is None:
        return ProcessPoolExecutor(_jobs(options), get_context("spawn"), _quiet)
    made = imported(options.executor, "that gives a concurrent.futures.Executor")()
    if not isinstance(made, Executor):
        raise CpdError(
            f"--executor {options.executor} gives a {type(made).__name__}, not a concurrent.futures.Executor"
        )
    return made


def _one(arguments: list[str]) -> dict[str, Any]:
    """Make one model, in a process of its own."""
    parser = command_line()
    options = parser.parse_args(arguments)
    said = recipe.read(options.recipe, options.command)
    options.command.set_defaults(**said)
    options = parser.parse_args(arguments)
    trust.take(options, said, options.recipe)
    content = compressed(options)
    assert content is not None
    return content


def _points(
    options: argparse.Namespace, files: Mapping[str, Path], made: Sequence[Mapping[str, Any]], found: Bench
) -> list[Point]:
    points = []
    for (name, file), content, timing in zip(files.items(), made, found.timings[1:], strict=True):
        values = list((content["accuracy"] or {"values": {}})["values"].values())
        macs, params = (content["after"][kind] / content["before"][kind] for kind in ("macs", "params"))
        quality, before = values[-1] if values else None, values[1] if len(values) > 2 else None
        costs = {"macs": macs, "params": params, "bytes": content["bytes"]["after"]}
        points.append(Point(name, file, quality, before, **costs, ms=timing.p50, ratio=timing.ratio))
    best = _picked(points, made[0]["accuracy"], options.most_lost)
    return [replace(point, picked=point is best) for point in points]


def _picked(points: Sequence[Point], accuracy: Mapping[str, Any] | None, most_lost: float | None) -> Point | None:
    """The fastest that loses no more than that of the original's score."""
    if most_lost is None:
        return None
    if accuracy is None:
        raise CpdError("--most-lost wants to know what a model scores: give --eval, or --data to compare answers on")
    whole = accuracy["values"]["original"]
    sign = -1.0 if lower_is_better(accuracy) else 1.0
    good = [point for point in points if point.quality is not None and sign * (whole - point.quality) <= most_lost]
    return min(good, key=lambda point: point.ms, default=None)


def _content(
    options: argparse.Namespace, points: Sequence[Point], made: Sequence[Mapping[str, Any]], found: Bench
) -> dict[str, Any]:
    """The report of all of it."""
    first = made[0]
    accuracy = first["accuracy"] or {"metric": None, "on": None, "values": {"original": None}}
    whole = accuracy["values"]["original"]
    costs = {"macs": 1.0, "params": 1.0, "bytes": first["bytes"]["before"]}
    dense = Point("the original", options.model, whole, None, **costs, ms=found.timings[0].p50, ratio=1.0)
    pairs = zip(points, made, strict=True)
    return {
        "format": report.REPORT_FORMAT,
        "version": report.REPORT_VERSION,
        "title": options.model.name,
        "source": first["source"],
        "sweep": {
            **{key: accuracy[key] for key in ("metric", "lower_is_better", "on") if key in accuracy},
            "points": [dense.as_json(), *(point.as_json() for point in points)],
        },
        "bench": found.as_json(),
        "notes": [f"{point.name}: {note}" for point, content in pairs for note in content["notes"]],
        "advice": compression.advice(data=options.data, has_labels=options.eval is not None),
        "provenance": manifest.provenance([point.file for point in points], options.seed),
    }


def _draw(content: Mapping[str, Any], path: Path, *, overwrite: bool) -> None:
    """The score against the latency, where there is a score."""
    found = content["sweep"]
    points = [point for point in found["points"] if point["accuracy"] is not None]
    if points:
        choices = [plots.Choice(p["name"], p["ms"], p["accuracy"], p["picked"]) for p in points]
        less = lower_is_better(found)
        plots.pareto(choices, path, metric=found["metric"], is_less_better=less, overwrite=overwrite)


def _show(content: Mapping[str, Any], pages: Sequence[Path]) -> None:
    out.print(table(content["sweep"]))
    for note in (*content["notes"], *content["advice"]):
        out.print(f"note: {note}", soft_wrap=True)
    picked = next((point for point in content["sweep"]["points"] if point["picked"]), None)
    if picked is not None:
        out.print(f"picked {picked['file']}: {picked['ms']:.2f} ms", soft_wrap=True)
    out.print(f"wrote {', '.join(map(str, pages))}", soft_wrap=True)


def table(found: Mapping[str, Any]) -> Table:
    """One row a model."""
    columns = ("target", found["metric"] or "", "untrained", "ms", "times faster", "MACs", "parameters", "file")
    made = report.table_of("Sweep", *columns)
    for point in found["points"]:
        scores = ("" if point[key] is None else f"{point[key]:.4f}" for key in ("accuracy", "untrained"))
        shares = (f"{100 * point[key]:.1f} %" for key in ("macs", "params"))
        name = f"{point['name']} *" if point["picked"] else point["name"]
        faster = f"{1 / point['ratio']:.2f}"
        made.add_row(name, *scores, f"{point['ms']:.2f}", faster, *shares, f"{count(point['bytes'])}B")
    return made
