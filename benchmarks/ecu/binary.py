"""Flash, memory and instructions of original, pruned and int8 programs on a Cortex-M4F: predicted, and measured under QEMU.

    python benchmarks/ecu/binary.py [--data-folder DATA] [--only MODEL]
    python benchmarks/ecu/binary.py --table

The embedded example and, with DATA (a folder with `onnx/` and `load.py`), ResNet-20 on traffic signs. For each model:

1. Its layers are timed: it is written as C at a few random widths, in float32 and int8, and each operator's instructions
   are counted. `cpd-onnx latency --timings` makes a cost table of them.
2. `cpd-onnx prune --target latency=0.5 --cost-table` halves the instructions, with unlabelled samples. A model with dead
   channels is pruned without data and without a target too, so that they alone are removed.
3. The four or six programs are compiled and run. Their flash, memory and instructions stand beside those that `inspect` and the
   cost tables predict; their outputs beside those of onnxruntime; their accuracy is that of the .onnx files on all test
   images, and the fraction of equal answers that of the programs on a few.

Needs arm-none-eabi-gcc and qemu-system-arm (Debian: gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm).
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from emulated import Emulated, emulate, missing

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.foreign import WHOLE, layers_of
from cpd_onnx.budget.latency import CostTable, load_table
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.free import free_channels
from cpd_onnx.channels.groups import Combed
from cpd_onnx.deploy.c_source import c_source
from cpd_onnx.ir.model import Array, Model, load
from cpd_onnx.report.inspection.findings import inspected
from cpd_onnx.rewrite.plan import load_plan, planned
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.sessions import execute, open_model

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "binary.json"
SEED = 0
TIMED = 6
"""Number of random widths besides the original ones at which the layers are timed."""
RUN_ON = 4
"""Number of test samples that the programs run on."""
CLOCK = 1e5
"""Instructions in a millisecond of the cost tables: 100 MHz, and an instruction in each cycle."""
FORMS = ("float32", "int8")
FUSED = "/MatMulAddFusion"
"""What onnxruntime appends to the name of a MatMul that it joins with the Add behind it."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Task:
    """A model with samples, and the command that prunes it.

    Attributes:
        name: Name of the model.
        model: The file.
        given: Samples for pruning and calibration.
        tested: Other samples.
        labels: Classes of the other samples, those of the original's answers, or None if the samples are generated.
        command: The command and its options.
    """

    name: str
    model: Path
    given: Array
    tested: Array
    labels: Array | None
    command: tuple[str, ...] = ("prune",)


def tasks(folder: Path | None) -> Iterator[Task]:
    """Yield the models whose files are there."""
    models = ROOT / "models"
    with np.load(models / "digits_train.npz") as train, np.load(models / "digits_test.npz") as test:
        yield Task("digits", models / "digits.onnx", train["image"][:256], test["image"], test["labels"])
    if folder is None or not (folder / "load.py").is_file():
        return
    module = loaded(folder / "load.py")
    (given, _), (tested, labels) = module.gtsrb("train"), module.gtsrb("test")
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(given))[:512])
    place = folder / "onnx" / "resnet20_gtsrb.onnx"
    yield Task("resnet20_gtsrb", place, pixels(given[chosen]), pixels(tested), labels)


def loaded(place: Path) -> Any:
    """Return the module in a file."""
    spec = importlib.util.spec_from_file_location("load", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pixels(images: Array) -> Array:
    """Return images [N, H, W, C] as the network takes them, [N, C, H, W] in the scale of ImageNet."""
    values = (images.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def cpd(*words: Any) -> None:
    """Run the program; raises RuntimeError if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "cpd_onnx", *map(str, words), "--force"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{words[0]} failed with {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")


def deployed(model: Path, form: str, data: Path, folder: Path) -> Model:
    """Return a model as `deploy --c-source` prepares it for C."""
    place = folder / f"{model.stem}.{form}.onnx"
    int8 = (
        ("--int8", "--int8-form", "qoperator", "--data", data, "--samples", 128, "--integer-io")
        if form == "int8"
        else ()
    )
    cpd("deploy", model, "-o", place, "--batch", 1, "--fold", *int8)
    return load(place)


def run(model: Model, samples: Array, folder: Path, *, layers: bool = False) -> Emulated:
    """Compile and run the program of a deployed model."""
    entry = model.graph.input[0].name
    with tempfile.TemporaryDirectory(dir=folder) as place:
        feeds = [{entry: sample[None]} for sample in samples]
        return emulate(c_source(model, "model"), feeds, Path(place), layers=layers)


# The cost table.


def random_widths(combed: Combed, seed: int) -> KeepMask:
    """Return a mask in which a random fraction of each group survives, from a fifth to all."""
    rng = np.random.default_rng(seed)
    widths = [max(1, round(len(group) * rng.uniform(0.2, 1.0))) for group in combed.groups]
    gone = [group.channels[width:] for group, width in zip(combed.groups, widths, strict=True)]
    return KeepMask(combed.atoms, np.concatenate([np.zeros(0, np.int64), *gone]).astype(np.int64))


def cost_table(task: Task, combed: Combed, form: str, data: Path, folder: Path) -> CostTable:
    """Return the cost table of a model from the instructions of its layers at some widths."""
    rows = []
    layers = layers_of(combed)
    for number in range(TIMED + 1):
        keep = random_widths(combed, number) if number else KeepMask(combed.atoms)
        path = folder / f"timed{number}.onnx"
        rewrite(combed, keep).model.save(path, overwrite=True)
        model = deployed(path, form, data, folder)
        found = run(model, task.tested[:1], folder, layers=True)
        counts = {name.removesuffix("_quant").removesuffix(FUSED): n for name, n in found.layers.items()}
        for name, layer in layers.items():  # a layer without a node of its own has become part of another
            sizes = {column: keep.count(axis) for column, axis in layer.axes.items()}
            rows.append({"layer": name, "operator": layer.operator, "ms": counts.get(name, 0.0) / CLOCK} | sizes)
        if number == 0:
            rows.append({"layer": WHOLE, "ms": found.instructions / CLOCK})
    timings, table = folder / f"{form}.csv", folder / f"{form}.json"
    with timings.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("layer", "operator", "input_channels", "output_channels", "ms"))
        writer.writeheader()
        writer.writerows(rows)
    cpd("latency", task.model, "-o", table, "--timings", timings, "--source", f"Cortex-M4F under QEMU, {form}")
    return load_table(table)


def predicted_instructions(table: CostTable, combed: Combed, keep: KeepMask) -> float:
    """Return the instructions of a run that a cost table predicts."""
    return CLOCK * sum(ms * np.prod([keep.count(a) for a in axes]) for ms, axes, *_ in table.terms(combed))


# The programs.


def measured(task: Task, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each of the programs of a model."""
    entry = load(task.model).graph.input[0].name
    data = folder / "data.npz"
    np.savez(data, **{entry: task.given})
    combed = comb(load(task.model))
    tables = {form: cost_table(task, combed, form, data, folder) for form in FORMS}
    small = folder / "small.onnx"
    half = ("--target", "latency=0.5", "--cost-table", folder / "float32.json", "--max-loss", "inf")
    cpd(*task.command, task.model, "-o", small, "--data", data, *half, "--hold-out", 0, "--no-check-speed")
    files = {"pruned": small}
    if any(free.dead for free in free_channels(combed)):
        files = {"without dead channels": folder / "free.onnx"} | files
        cpd("prune", task.model, "-o", files["without dead channels"], "--no-check-speed", "--round-to", 1)
    masks = {"original": KeepMask(combed.atoms)}
    for name, path in files.items():
        combed, masks[name] = planned(task.model, load_plan(Path(f"{path}.plan.json")))
    rows = []
    for form in FORMS:
        for name, path in ({"original": task.model} | files).items():
            model = deployed(path, form, data, folder)
            predicted = inspected(comb(load(path)))["deployed"]["int8" if form == "int8" else "as_it_is"]
            predicted["instructions"] = predicted_instructions(tables[form], combed, masks[name])
            samples = task.tested[:RUN_ON]
            found = run(model, samples, folder)
            rows.append(
                {"model": task.name, "program": f"{name}, {form}", "predicted": predicted}
                | {"measured": {k: v for k, v in asdict(found).items() if k not in ("outputs", "layers")}}
                | compared(model, samples, found)
                | {"accuracy": accuracy(model, task)}
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def answers(model: Model, samples: Sequence[Array] | Array) -> list[Array]:
    """Return the first output of onnxruntime for each sample."""
    session, entry = open_model(model), model.graph.input[0].name
    return [execute(session, {entry: sample[None]})[0] for sample in samples]


def compared(model: Model, samples: Array, found: Emulated) -> dict[str, Any]:
    """Return how far the outputs of a program are from those of onnxruntime, relative to their range."""
    expected, got = np.stack(answers(model, samples)), np.stack(found.outputs)
    scale = float(np.ptp(expected))
    return {
        "largest_difference": float(np.abs(expected - got).max()) / scale,
        "rms_difference": float(np.sqrt(np.mean((expected - got) ** 2))) / scale,
    }


def accuracy(model: Model, task: Task) -> float | None:
    """Return the top-1 accuracy on all test samples by onnxruntime; None of generated samples."""
    if task.labels is None:
        return None
    return float(np.mean(np.concatenate(answers(model, task.tested)).argmax(-1) == task.labels))


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    print("| model | program | flash, kB | RAM, kB | instructions, M | top-1 | largest difference from onnxruntime |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        was, now = row["predicted"], row["measured"]
        cells = [
            f"{was[k] / unit:.1f} -> {now[k] / unit:.1f}"
            for k, unit in (("flash", 1e3), ("ram", 1e3), ("instructions", 1e6))
        ]
        right = "" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}"
        cells += [right, f"{row['largest_difference']:.1e} of the range"]
        print(f"| {row['model']} | {row['program']} | {' | '.join(cells)} |")


def recorded(wanted: Iterable[Task], only: Collection[str] | None, out: Path) -> list[dict[str, Any]]:
    """Measure models, all or those of some names, and return all rows of the file to which theirs are written."""
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    for task in wanted:
        if only and task.name not in only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = measured(task, Path(folder))
        rows = [*(row for row in rows if row["model"] != task.name), *found]
        out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--only", action="append", help="name of a model")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.table:
        show(json.loads(options.out.read_text()))
        return
    if missing():
        sys.exit(f"not installed: {', '.join(missing())}")
    show(recorded(tasks(options.data_folder), options.only, options.out))


if __name__ == "__main__":
    main()
