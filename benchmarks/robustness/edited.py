"""Whether `verify` detects and names every edit of a single value in a file whose plan or manifest is unchanged.

    python benchmarks/robustness/edited.py [--count 200] [--out results/edited.json]

The files are pruned, refitted, trained and deployed models: the example of the README, and a small model with weights in
initializers, Constant nodes, the branches of an If and a local function (`tests/support/edits.py`). Each edit changes one
value of a tensor or attribute, sometimes only its last bit. It counts as named if `cpd-onnx verify` fails and its message
names the tensor, or the node of the attribute. Files without an edit must pass.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from cpd_onnx.cli.main import main as command_line
from cpd_onnx.report.manifest import versions

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.accuracy.accuracy import HERE, commit
from tests.support.edits import KINDS, edited, nested
from tests.support.runs import plain

MODELS = HERE.parent / "models"


@dataclass(frozen=True)
class Group:
    """A group of edits.

    Attributes:
        name: Name of the group.
        original: Name of the original file.
        file: Name of the file to edit.
        kinds: Kinds of places to edit.
    """

    name: str
    original: str
    file: str
    kinds: tuple[str, ...] = KINDS


GROUPS = (
    Group("pruned, initializers", "digits.onnx", "digits_pruned.onnx", ("initializer",)),
    Group("pruned, attributes", "digits.onnx", "digits_pruned.onnx", ("attribute",)),
    Group("pruned, Constant nodes", "nested.onnx", "nested_pruned.onnx", ("constant",)),
    Group("pruned, subgraphs", "nested.onnx", "nested_pruned.onnx", ("subgraph",)),
    Group("pruned, functions", "nested.onnx", "nested_pruned.onnx", ("function",)),
    Group("refitted", "digits.onnx", "digits_refitted.onnx"),
    Group("trained", "digits.onnx", "digits_trained.onnx"),
    Group("trained, with subgraphs", "nested.onnx", "nested_trained.onnx"),
    Group("deployed, fixed sizes and opset", "digits.onnx", "digits_fixed.onnx"),
    Group("deployed, float16", "digits.onnx", "digits_half.onnx"),
    Group("deployed, int8", "digits.onnx", "digits_int8.onnx"),
)


def run(arguments: Sequence[object]) -> tuple[int, str]:
    """Run a command and return its exit code and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command_line(plain(arguments))
    return code, err.getvalue().strip()


def make(work: Path) -> None:
    """Write the files to edit."""
    digits, data = work / "digits.onnx", MODELS / "digits_train.npz"
    digits.write_bytes((MODELS / "digits.onnx").read_bytes())
    onnx.save(nested(), work / "nested.onnx")
    samples = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
    np.savez(work / "nested.npz", x=samples)
    steps = ["--steps", 5, "--threads", 1]
    small = work / "digits_pruned.onnx"
    commands: list[list[object]] = [
        ["prune", digits, "-o", small, "--target", "macs=0.5"],
        ["prune", work / "nested.onnx", "-o", work / "nested_pruned.onnx"],
        ["prune", digits, "-o", work / "digits_refitted.onnx", "--target", "macs=0.5", "--data", data],
        ["distill", digits, small, "-o", work / "digits_trained.onnx", "--data", data, *steps],
        ["distill", work / "nested.onnx", work / "nested_pruned.onnx", "-o", work / "nested_trained.onnx",
         "--data", work / "nested.npz", *steps],
        ["deploy", small, "-o", work / "digits_fixed.onnx", "--batch", 1, "--opset", 18],
        ["deploy", small, "-o", work / "digits_half.onnx", "--half", "float16"],
        ["deploy", small, "-o", work / "digits_int8.onnx", "--int8", "--data", data, "--samples", 32],
    ]  # fmt: skip  # a table
    for command in commands:
        code, message = run(command)
        if code:
            raise SystemExit(f"{' '.join(map(str, command))}: {message}")


def measured(work: Path, group: Group, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the counts of detected and named edits of a group."""
    place, original = work / group.file, work / group.original
    content = place.read_bytes()
    passes = run(["verify", original, place])[0] == 0
    result: dict[str, Any] = {"edits": 0, "named": 0, "refused": 0, "unedited passes": passes, "not named": []}
    for seed in seeds:
        found = edited(onnx.load_from_string(content), seed, group.kinds)
        if found is None:
            raise SystemExit(f"{group.file} has no place of the kinds {', '.join(group.kinds)}")
        place.write_bytes(found[0].SerializeToString())
        code, message = run(["verify", original, place])
        named = code != 0 and f"'{found[1].name}'" in message
        result["edits"] += 1
        result["refused"] += code != 0
        result["named"] += named
        if not named:
            result["not named"].append({"seed": seed, "place": found[1].name, "code": code, "said": message[:300]})
    place.write_bytes(content)
    return result


def main() -> None:
    """Write the files, edit them, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "edited.json")
    options = parser.parse_args()
    groups: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        for number, group in enumerate(GROUPS):
            seeds = range(number, options.count, len(GROUPS))
            groups[group.name] = measured(Path(folder), group, seeds)
            print(f"{group.name}: {groups[group.name]['named']} of {groups[group.name]['edits']}", flush=True)
    totals = {key: sum(group[key] for group in groups.values()) for key in ("edits", "refused", "named")}
    content = {
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()}, "commit": commit(), "versions": versions(),
        **totals, "unedited files that pass": sum(group["unedited passes"] for group in groups.values()),
        "groups": groups,
    }  # fmt: skip  # a table
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(totals))


if __name__ == "__main__":
    main()
