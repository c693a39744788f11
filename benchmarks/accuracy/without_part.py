"""The command line with one part of the method left out, for `effort.py --without PART`.

    python benchmarks/accuracy/without_part.py PART prune MODEL -o FILE --data DATA …

PART is "combinations" (channels that survive are not replaced by linear combinations) or "curvature" (allocations by the
layers' errors alone are compared at the outputs). The other parts have options: `--effort 0`, `--no-repair`, `--score`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from cpd_onnx.cli.main import main
from cpd_onnx.scores import reconstruction
from cpd_onnx.scores.registry import SCORE_FUNCTIONS


def without_combinations() -> None:
    reconstruction.confirmed_groups = lambda *_: {}  # type: ignore[assignment]


def without_curvature() -> None:
    SCORE_FUNCTIONS["reconstruction"] = replace(SCORE_FUNCTIONS["reconstruction"], rival="")


PARTS = {"combinations": without_combinations, "curvature": without_curvature}

if __name__ == "__main__":
    PARTS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
