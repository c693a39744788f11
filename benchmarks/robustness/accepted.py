"""Whether onnx's checker and onnxruntime accept every written file, and `inspect` accepts every official operator test.

    python benchmarks/robustness/accepted.py --models FOLDER [FOLDER …] [--backend] [--out FILE]

Each model of the folders is pruned to half of its channels by L2 and written; the file must pass the full check of
onnx.checker and load in onnxruntime, unless the original does not. --backend runs `cpd-onnx inspect` on the models of
the official ONNX tests.
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
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx

import cpd_onnx as cpd
from cpd_onnx.cli.main import main as command_line
from cpd_onnx.runtime.sessions import open_model

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.accuracy.accuracy import HERE, commit
from tests.support.models import operator_cases


def complaint(path: Path) -> str | None:
    """Return the error of the checker or of onnxruntime for a file; None if both accept it."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # of several libraries
        return f"checker: {str(error).strip().splitlines()[0][:200]}"
    try:
        open_model(path)
    except cpd.CpdError as error:
        return str(error).replace(f"{path.parent}/", "")
    return None


def outcome(path: Path, work: Path) -> str:
    """Prune one model and return the outcome."""
    small = work / "small.onnx"
    try:
        cpd.run("comb, score, allocate, prune", path).save(small, overwrite=True)
    except cpd.CpdError as error:
        return f"refused: {error}"
    after = complaint(small)
    if after is None:
        return "accepted"
    return f"refused like the original: {after}" if complaint(path) is not None else f"BROKEN: {after}"


def inspected(work: Path) -> Iterator[tuple[str, str]]:
    """Yield name and outcome of `inspect` for the models of the official tests and those shipped with onnx."""
    folder, path = Path(onnx.__file__).parent / "backend" / "test" / "data", work / "case.onnx"
    files = {file.parent.name: file.read_bytes() for file in sorted(folder.glob("*/*/model.onnx"))}
    for name, content in (files | {case.name: case.model.SerializeToString() for case in operator_cases()}).items():
        path.write_bytes(content)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                code = command_line(["inspect", str(path)])
            except Exception as error:
                code, printed = 70, io.StringIO(f"{type(error).__name__}: {error}")
        last = (printed.getvalue().strip().splitlines() or [""])[-1]
        is_expected = code in (0, 1) and "error: internal error" not in last
        yield name, f"exit code {code}" if is_expected else f"CRASH: {last}"


def main() -> None:
    """Run the requested checks and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="*", default=[])
    parser.add_argument("--backend", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "accepted.json")
    options = parser.parse_args()
    content = json.loads(options.out.read_text()) if options.out.exists() else {}
    content |= {"machine": {"cpus": os.cpu_count(), "system": platform.platform()}, "commit": commit()}
    files = [path for folder in options.models for path in sorted(folder.glob("*.onnx"))]
    with tempfile.TemporaryDirectory() as work:
        found = {path.name: outcome(path, Path(work)) for path in files}
        tests = dict(inspected(Path(work))) if options.backend else {}
    if options.backend:
        content["backend"] = dict(Counter(what.split(":")[0] for what in tests.values()))
        content["backend crashes"] = {name: what for name, what in tests.items() if what.startswith("CRASH")}
    if files:
        content["models"] = dict(Counter(what.split(":")[0] for what in found.values()))
        content["not accepted"] = {name: what for name, what in found.items() if what != "accepted"}
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
