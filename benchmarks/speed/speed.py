"""Time of combing and pruning: a given model end to end, and chains of 10 to 1,000 layers.

    python benchmarks/speed/speed.py [--model resnet50.onnx] [--out benchmarks/results/speed.json]

Seconds are wall time, the median of several runs, with reading and writing of files for the model, without imports.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.shapes.inference import fold


def chain(layers: int) -> ModelProto:
    """Return a residual network of `layers` convolutions of 32 channels, each with batch norm and ReLU."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for number in range(layers):
        w = rng.standard_normal((32, 3 if number == 0 else 32, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(w, f"w{number}"))
        for part in "sbmv":
            weights.append(numpy_helper.from_array(rng.random(32).astype(np.float32), f"{part}{number}"))
        names = [f"{part}{number}" for part in "sbmv"]
        nodes.append(helper.make_node("Conv", [last, f"w{number}"], [f"c{number}"], f"conv{number}", pads=[1] * 4))
        nodes.append(helper.make_node("BatchNormalization", [f"c{number}", *names], [f"n{number}"], f"norm{number}"))
        out = f"n{number}"
        if number % 2 == 0 and number:
            nodes.append(helper.make_node("Add", [out, f"r{number - 2}"], [f"a{number}"], f"add{number}"))
            out = f"a{number}"
        nodes.append(helper.make_node("Relu", [out], [f"r{number}"], f"relu{number}"))
        last = f"r{number}"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["p"], "pool"))
    nodes.append(helper.make_node("Flatten", ["p"], ["f"], "flatten"))
    weights.append(numpy_helper.from_array(rng.standard_normal((32, 10)).astype(np.float32), "head"))
    nodes.append(helper.make_node("MatMul", ["f", "head"], ["y"], "head"))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 3, 32, 32]), ("y", [1, 10]))]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def seconds(job: Callable[[], Any], runs: int) -> float:
    """Return the median wall time of a job in seconds."""
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        job()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def end_to_end(path: Path) -> dict[str, float]:
    """Return the seconds of each step for a file."""
    with tempfile.TemporaryDirectory() as folder:

        def everything() -> None:
            state = cpd.run("comb, score, allocate{channels=0.5}, prune", path)
            state.save(Path(folder) / "pruned.onnx", overwrite=True)

        model = cpd.load(path)
        state = cpd.run("comb, score, allocate{channels=0.5}, prune", model)
        return {
            "file to file": seconds(everything, 5),
            "read": seconds(lambda: cpd.load(path), 5),
            "comb": seconds(lambda: comb(fold(model)), 5),
            "score and allocate": seconds(lambda: cpd.run("score, allocate{channels=0.5}", state), 5),
            "verify": seconds(lambda: cpd.run("verify", state), 3),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "speed.json")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python benchmarks/speed/speed.py --model MODEL",
        "machine": platform.processor() or platform.machine(),
    }
    if options.model:
        result["model"] = {options.model.name: end_to_end(options.model)}
    result["chain"] = {}
    for layers in (10, 30, 100, 300, 1000):
        model = cpd.load(chain(layers))
        combing = seconds(lambda model=model: comb(fold(model)), 3)
        result["chain"][layers] = {"comb": combing, "milliseconds a layer": 1e3 * combing / layers}
    counts = np.array(list(result["chain"]), float)
    times = np.array([row["comb"] for row in result["chain"].values()])
    result["exponent"] = float(np.polyfit(np.log(counts[1:]), np.log(times[1:]), 1)[0])
    print(json.dumps(result, indent=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
