"""What share of the weights of files a repair can fit, and why not the others.

    python benchmarks/coverage/repairable.py FOLDER... [--out JSONL]
    python benchmarks/coverage/repairable.py --table [--out JSONL]

A folder has the files of one exporter. Counted are elements of matrices: weights with two axes or more that a node takes
and whose channels are followed. Nothing is run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Weight
from cpd_onnx.errors import CpdError
from cpd_onnx.fitting.units import units_of
from cpd_onnx.ir.model import load

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.accuracy.accuracy import HERE, commit

RESULT = HERE / "results" / "repairable.jsonl"
FITTED = "fitted"


def why(weight: Weight, fitted: Mapping[str, str]) -> str:
    """Return `FITTED`, or what keeps a weight from being fitted."""
    if weight.scope.address or weight.scope.function:
        return "in a body or function"
    if weight.value.name in fitted:
        return fitted[weight.value.name]
    use = weight.uses[0].use
    return f"{use.scope.nodes[use.node].op_type}, input {use.slot}"


def row(path: Path) -> dict[str, Any]:
    """Return the number of elements of a file's matrices by what becomes of them."""
    found: dict[str, Any] = {"exporter": path.parent.name, "file": path.name, "commit": commit()}
    try:
        combed = comb(load(path))
    except CpdError as error:
        return found | {"refused": str(error).splitlines()[0]}
    units = units_of(combed.folded)
    names = dict(units.left) | {each[0].weight: FITTED for each in units.by_weight}
    counts: Counter[str] = Counter()
    for weight in combed.weights:
        if len(weight.shape) > 1 and weight.is_trained and not weight.is_vector:
            counts[why(weight, names)] += math.prod(weight.shape)
    return found | {"elements": dict(counts.most_common())}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the mean share of each exporter's files, and the reasons over all files."""
    shares: dict[str, list[float]] = {}
    reasons: Counter[str] = Counter()
    for entry in rows:
        whole = sum(entry.get("elements", {}).values())
        if whole:
            shares.setdefault(entry["exporter"], []).append(entry["elements"].get(FITTED, 0) / whole)
            reasons.update({reason: count / whole for reason, count in entry["elements"].items()})
    print("| exporter | files | fitted, mean | files in full |")
    print("|---|---|---|---|")
    everything = [share for each in shares.values() for share in each]
    for name, found in [*sorted(shares.items()), ("all", everything)]:
        whole = sum(share > 0.99 for share in found)
        print(f"| {name} | {len(found)} | {sum(found) / len(found):.1%} | {whole} |")
    print("\n| what becomes of a weight | mean share |")
    print("|---|---|")
    for reason, total in reasons.most_common():
        if total / len(everything) >= 5e-4:
            print(f"| {reason} | {total / len(everything):.1%} |")


def main() -> None:
    """Count and print, or print the stored results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--table", action="store_true", help="print the stored results and count nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    for folder in options.folders if not options.table else ():
        made = [row(path) for path in sorted(folder.glob("*.onnx"))]
        rows = [*(each for each in rows if each["exporter"] != folder.name), *made]
        options.out.write_text("".join(json.dumps(each) + "\n" for each in rows))
    show(rows)


if __name__ == "__main__":
    main()
