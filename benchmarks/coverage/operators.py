"""Prune and prove all official ONNX operator tests, each between random matrices that make its axes prunable.

    python benchmarks/coverage/operators.py [--only REGEX] [--out benchmarks/results/operators.json]

Run from the repository: the models are built by tests/support/models.py. Every case runs twice: with all float inputs as
activations, and with some of them as weights.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import cpd_onnx as cpd
from tests.support.models import operator_cases, set_free

# onnxruntime updates the running mean of a BatchNormalization in training mode in place, input or not.
EXCLUDED = re.compile("training_mode")


def main() -> None:
    """Count the outcomes of the cases and print the disproved ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=re.compile, default=re.compile(""))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "operators.json")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    started = time.perf_counter()
    warnings.simplefilter("ignore")
    for case in operator_cases():
        if not options.only.search(case.name) or EXCLUDED.search(case.name):
            continue
        for constants in (False, True):
            model = set_free(case, constants=constants)
            if model is not None:
                counts[outcome(case.name, model)] += 1
    result = {"command": "python benchmarks/coverage/operators.py", "counts": dict(sorted(counts.items()))}
    result["seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps(result, indent=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def outcome(name: str, model: object) -> str:
    """How far one case came."""
    try:
        state = cpd.run("comb, score{kind='random'}, allocate, prune", model)  # type: ignore[arg-type]
        assert state.combed is not None
        if state.combed.unaccounted:
            print("unaccounted:", name, state.combed.unaccounted[0])
            return "unaccounted"
        cpd.run("verify", state)
    except cpd.TargetError:
        return "nothing to prune"
    except cpd.UnsupportedError:
        return "not run by onnxruntime"
    except cpd.DataError:
        return "NaN on random inputs"
    except cpd.ProofError as error:
        print("disproved:", name, error)
        return "disproved"
    except cpd.InconclusiveError as error:
        print("inconclusive:", name, error)
        return "inconclusive"
    return "proved"


if __name__ == "__main__":
    main()
