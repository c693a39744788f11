"""The official ONNX backend tests through cpd-onnx's torch import, onnx2torch and onnx2pytorch.

    python benchmarks/coverage/backend.py --runner onnx_backend_runner.py [--peers-python PYTHON] --out results/backend.json

RUNNER is the program that selects the tests and scores a converter (a test passes with equal types and shapes, and
values within the test's own tolerance). PYTHON is an interpreter with onnx2torch, onnx2pytorch, and compatible versions
of torch and torchvision; without it only cpd-onnx is scored.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx

SCOPES = {
    "float node tests": ["--scope", "float"],
    "tensor node tests": ["--scope", "tensor"],
    "simple, pytorch-operator, pytorch-converted": [
        "--kind",
        "simple,pytorch-operator,pytorch-converted",
        "--scope",
        "tensor",
    ],
}
PEERS = ("onnx2torch", "onnx2pytorch")


def convert(model: onnx.ModelProto) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    """Return the imported model as a function, the interface that the runner expects."""
    import torch

    from cpd_onnx.torch import import_model
    from cpd_onnx.torch.dtypes import to_numpy, to_torch

    module = import_model(model).eval()

    def run(inputs: list[np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            return [to_numpy(output) for output in module(*(to_torch(np.asarray(x)) for x in inputs))]

    return run


def score(python: str, runner: Path, converter: str, scope: list[str]) -> dict[str, Any]:
    """Return the number of passed tests, the number of all tests, and the names of the failed ones."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        line = [python, str(runner), "--converter", converter, *scope, "--json", str(out)]
        environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}"}
        subprocess.run(line, capture_output=True, check=False, env=environment)
        tests = json.loads(out.read_text())["tests"]
    failed = sorted(name for name, test in tests.items() if test["status"] != "pass")
    return {"passed": len(tests) - len(failed), "of": len(tests), "failed": failed}


def main() -> None:
    """Score the converters, print and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runner", type=Path, required=True)
    parser.add_argument("--peers-python")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "backend.json")
    options = parser.parse_args()
    converters = {"ours": (sys.executable, "backend:convert")}
    if options.peers_python:
        converters |= {peer: (options.peers_python, peer) for peer in PEERS}
    result: dict[str, Any] = {"onnx": metadata.version("onnx"), "torch": metadata.version("torch"), "counts": {}}
    for scope, arguments in SCOPES.items():
        for name, (python, converter) in converters.items():
            found = score(python, options.runner, converter, arguments)
            result["counts"].setdefault(scope, {})[name] = found if name == "ours" else found | {"failed": None}
            print(
                f"{scope:46} {'cpd-onnx' if name == 'ours' else name:14} {found['passed']:5} of {found['of']}",
                flush=True,
            )
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
