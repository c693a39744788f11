"""A language model and a model of speech, pruned with unlabelled samples and distilled for a short time.

    python benchmarks/accuracy/language.py language --model IGLM --train FILE --test FILE [--work FOLDER] [--out FILE]
    python benchmarks/accuracy/language.py speech --model CREPE [--work FOLDER] [--out FILE]
    python benchmarks/accuracy/language.py --table

IGLM is a causal language model that gives logits [N, length, tokens] for tokens [N, length]; FILE is an .npz with these
tokens. `benchmarks/zoo/export_antibodies.py` makes all three: IgLM, a GPT-2 of 13 million parameters trained on antibodies by
its authors, as the package iglm ships it, and antibodies that the package airrship assembles from human genes. CREPE tells
the pitch of speech from 1,024 samples of sound; the speech is that of espeak-ng, as in max_loss.py.

Each way leaves the same share of the MACs:

* ours: `prune --target macs=SHARE --data`, widths and whole branches, with a repair;
* l2: `--policy uniform --score l2`, with the same repair, and without one;
* depth alone: whole residual branches, removed one by one where the answers change least for what is saved (the
  Kullback-Leibler divergence on some of the samples), with the same repair; for models that have such branches.

All but the one without repair are then distilled alike, without labels, and so is the original, the control. Perplexity is
that of the tokens given those before; agreement is the share of answers, of tokens or of pitch, that are the original's.
Both are measured by onnxruntime and the code of this file, on samples that no run has seen.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from accuracy import commit, macs
from max_loss import frames

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.branches import branches, removable_groups
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.ir.model import load
from cpd_onnx.passes.repair import RepairOptions, repair
from cpd_onnx.rewrite.rewriter import rewrite

RESULT = Path(__file__).parents[1] / "results" / "language.json"
SAMPLES, SEED = 512, 0
COMPARED = 32
"""Samples on which branches are compared."""
CENTS = 50
"""Largest difference of a pitch that counts as the same, in hundredths of a semitone."""
BINS, STEP = 360, 20
"""Classes of CREPE, and hundredths of a semitone between two."""
TRAINING = {
    "language": ("--batch-size", "16", "--lr", "0.0005", "--compare", "outputs"),
    "speech": ("--batch-size", "64", "--lr", "0.0005", "--batch-norm", "train", "--compare", "outputs"),
}
Array = npt.NDArray[Any]


def answers(path: Path, inputs: Array) -> Array:
    """Return the outputs of a model, in float64."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: inputs[at : at + 50]})[0] for at in range(0, len(inputs), 50)]
    return np.asarray(np.concatenate(parts), np.float64)


def logarithms(scores: Array) -> Array:
    """Return the logarithms of the probabilities of scores."""
    scores = scores - scores.max(-1, keepdims=True)
    return np.asarray(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))


class Language:
    """Tokens that are predicted from those before."""

    skipped = 1
    """Tokens at the start that name the kind of a text, of which the last is the first to predict from."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Read the samples."""
        self.train, self.test = (dict(np.load(path)) for path in (options.train, options.test))

    def scored(self, given: Array, original: Array) -> dict[str, float]:
        """Return perplexity and agreement of logits."""
        tokens = next(iter(self.test.values()))
        at = slice(self.skipped, -1)
        own, first = given[:, at], original[:, at]
        lost = -np.take_along_axis(logarithms(own), tokens[:, self.skipped + 1 :, None], -1).mean()
        return {"perplexity": float(np.exp(lost)), "agreement": float((own.argmax(-1) == first.argmax(-1)).mean())}


class Speech:
    """Frames of speech of which the pitch is told."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Let espeak-ng read."""
        made, name = frames(np.random.default_rng(SEED)), load(options.model).graph.input[0].name
        self.train, self.test = {name: made[:-5000]}, {name: made[-5000:]}

    def scored(self, given: Array, original: Array) -> dict[str, float]:
        """Return the agreement of pitches."""
        own, first = (scores.reshape(-1, BINS).argmax(-1) for scores in (given, original))
        return {"agreement": float((abs(own - first) * STEP <= CENTS).mean())}


def without(original: Path, gone: set[int], samples: Array | None, out: Path) -> Path:
    """Write the original without some groups, with a repair if there are samples."""
    combed = comb(load(original))
    keep = KeepMask(combed.atoms, np.concatenate([combed.groups[index].channels for index in sorted(gone)]))
    made = rewrite(combed, keep).model
    if samples is not None:
        source = ArraySource({made.graph.input[0].name: samples})
        made = repair(combed, keep, made, source, RepairOptions(samples=len(samples))).model
    made.save(out, overwrite=True)
    return out


def depth_alone(original: Path, samples: Array, share: float, work: Path, out: Path) -> None:
    """Write the original without the branches of least harm, as many as leave the share of the MACs."""
    combed, gone = comb(load(original)), set[int]()
    few, first = samples[:COMPARED], logarithms(answers(original, samples[:COMPARED]))
    full = macs(original)
    while True:
        found = []
        for group in distinct(combed, gone):
            path = without(original, gone | {group}, None, work / "try.onnx")
            left = macs(path) / full
            harm = (np.exp(first) * (first - logarithms(answers(path, few)))).sum(-1).mean()
            found.append((left > share, harm / (max(1 - left, 1e-6) if left > share else 1), left, group))
        is_large, _, _, group = min(found)
        gone.add(group)
        if not is_large:
            without(original, gone, samples, out)
            return


def distinct(combed: Combed, gone: set[int]) -> Iterator[int]:
    """Yield groups that can go as a whole besides others, one for all those of the same nodes."""
    seen = set()
    for group in removable_groups(combed):
        found = branches(combed, gone | {group})
        is_new = found.nodes not in seen and found.nodes != branches(combed, gone).nodes
        if group not in gone and not found.obstacle and is_new:
            seen.add(found.nodes)
            yield group


def run(options: argparse.Namespace, work: Path, known: dict[str, Any]) -> None:
    """Write a row for each way; those of models that the work folder holds are known from an interrupted run."""
    task = Language(options) if options.task == "language" else Speech(options)
    name, train = next(iter(task.train.items()))
    archive, given = work / "train.npz", work / "given.npz"
    np.savez(archive, **{name: train})
    np.savez(given, **{name: train[:SAMPLES]})
    test = next(iter(task.test.values()))
    first = answers(options.model, test)
    rows: dict[str, Any] = {"original": {"macs": 1.0, **task.scored(first, first)}} | known

    def noted(kind: str, path: Path, make: Callable[[], Any]) -> None:
        state = path.stem.rsplit("_", 1)[-1]
        if path.exists() and state in rows.get(kind, {}):
            return
        started = time.monotonic()
        make()
        row = rows.setdefault(kind, {"macs": round(macs(path) / macs(options.model), 3)})
        row[state] = {**task.scored(answers(path, test), first), "seconds": round(time.monotonic() - started)}
        stored = json.loads(options.out.read_text()) if options.out.exists() else {}
        described = {"commit": commit(), "share": options.share, "steps": options.steps, "model": options.model.name}
        options.out.write_text(json.dumps(stored | {options.task: described | {"rows": rows}}, indent=1) + "\n")
        print(kind, row, flush=True)

    fixed = (
        "--target", f"macs={options.share}", "--samples", SAMPLES, "--repair-samples", SAMPLES, "--max-loss", "inf",
        "--no-check-speed", "--round-to", 1, "--keep-anyway", "--data", given, "--force",
    )  # fmt: skip  # options
    uniform = ("--policy", "uniform", "--score", "l2")
    students = {"control": options.model}
    for kind, chosen in (("ours", ()), ("l2", uniform), ("l2, no repair", (*uniform, "--no-repair"))):
        path = work / f"{kind.replace(', ', '-').replace(' ', '-')}_untrained.onnx"
        noted(kind, path, partial(cpd_onnx, "prune", options.model, "-o", path, *fixed, *chosen))
        students |= {kind: path} if "no repair" not in kind else {}
    if any(distinct(comb(load(options.model)), set())):
        path = students["depth alone"] = work / "depth_untrained.onnx"
        noted("depth alone", path, partial(depth_alone, options.model, train[:SAMPLES], options.share, work, path))
    for kind, student in students.items():
        path = work / f"{kind.replace(' ', '-')}_trained.onnx"
        recipe = ("--steps", options.steps, "--teacher-cache", work / "teacher.cache", *TRAINING[options.task])
        line = ("distill", options.model, student, "-o", path, "--data", archive, "--force", *recipe)
        noted(kind, path, partial(cpd_onnx, *line))


def cpd_onnx(*arguments: Any) -> None:
    """Run the command line."""
    line = [sys.executable, "-m", "cpd_onnx", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def show(content: dict[str, Any]) -> None:
    """Print the results as a table."""
    print("| task | way | MACs left | | perplexity | agreement | seconds |\n|---|---|---|---|---|---|---|")
    for task, result in content.items():
        for way, row in result["rows"].items():
            for state in ("untrained", "trained"):
                entry = row.get(state, row if way == "original" and state == "untrained" else None)
                if entry:
                    perplexity = f"{entry['perplexity']:.3f}" if "perplexity" in entry else ""
                    figures = f"{perplexity} | {100 * entry['agreement']:.1f} | {entry.get('seconds', '')}"
                    print(f"| {task} | {way} | {row['macs']:.3f} | {state} | {figures} |")


def main() -> None:
    """Run one task, or print the stored results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=("language", "speech"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="MACs that are left, as a ratio")
    parser.add_argument("--steps", type=int, default=200, help="updates of the training")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    content = json.loads(options.out.read_text()) if options.out.exists() else {}
    if not options.table:
        with tempfile.TemporaryDirectory() as folder:
            work = options.work or Path(folder)
            work.mkdir(parents=True, exist_ok=True)
            run(options, work, content.get(options.task, {}).get("rows", {}) if options.work else {})
        content = json.loads(options.out.read_text())
    show(content)


if __name__ == "__main__":
    main()
