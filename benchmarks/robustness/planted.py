"""Planted defects: verdicts of the proof on pruned models with one defect each, and on the correct models.

    python benchmarks/robustness/planted.py

`tests/support/planted.py` contains the networks, which have all kinds of outputs, and the defects. The correct model
should be verified; a defective one must be found wrong, or inconclusive if its outputs cannot reveal the defect. Defective
rules (`tests/rules/test_mutations.py`) are counted separately.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from cpd_onnx.rules import RULES

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.accuracy.accuracy import HERE, commit
from tests.rules.test_mutations import MUTATIONS, is_caught
from tests.rules.test_rules import model_of
from tests.support.planted import DEFECTS, NETWORKS, verdict_of


def mutations() -> dict[str, bool]:
    """Return for each defective rule whether the proof detects it."""
    found = {}
    for operator, mutation, name in MUTATIONS:
        before = RULES[("", operator)]
        RULES[("", operator)] = mutation
        try:
            found[mutation.__name__] = is_caught(model_of(name))
        finally:
            RULES[("", operator)] = before
    return found


def main() -> None:
    """Run all networks and defects and write the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "planted.json")
    options = parser.parse_args()
    right = {name: verdict_of(name) for name in NETWORKS}
    wrong = {name: {defect: verdict_of(name, defect) for defect in DEFECTS} for name in NETWORKS}
    content: dict[str, Any] = {
        "right": right,
        "right_counts": Counter(right.values()),
        "wrong_counts": Counter(verdict for found in wrong.values() for verdict in found.values()),
        "not_wrong": {
            name: {defect: verdict for defect, verdict in found.items() if verdict != "wrong"}
            for name, found in wrong.items()
            if set(found.values()) != {"wrong"}
        },
        "rules_caught": mutations(),
        "command": "python benchmarks/robustness/planted.py",
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        "versions": {name: metadata.version(name) for name in ("onnx", "onnxruntime", "numpy")},
        "commit": commit(),
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({name: content[name] for name in ("right_counts", "wrong_counts")}))


if __name__ == "__main__":
    main()
