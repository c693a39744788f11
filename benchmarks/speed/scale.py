"""Time and peak memory of pruning against model size, up to models larger than memory, and of copying the same files.

    python benchmarks/speed/scale.py [--sizes 0.1 0.3 1 3 10] [--work FOLDER] [--out FILE]
    python benchmarks/speed/scale.py --nodes 1000 10000 100000
    python benchmarks/speed/scale.py --table

The first command generates transformers of the given sizes in gigabytes (float32, external weights), prunes each to half
of its channels through the command line (`prune --no-verify`), and proves the result with `verify`. Each command runs in
a separate process, whose peak resident memory is measured, mapped files included. "copy" reads and writes the same files
in blocks and waits for the disk, also in a separate process. The second command inspects, prunes and verifies chains with
the given numbers of nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.accuracy.accuracy import HERE, commit
from tests.support.runs import plain

LAYER_BYTES = 12 * 4
"""Bytes of a layer divided by the square of its width: twelve float32 matrices."""
WIDTHS = {0.1: 512, 0.3: 768, 1.0: 1280, 3.0: 1792, 10.0: 2560}
"""Width of the transformer by size in gigabytes."""
HEAD = 64
"""Width of an attention head."""
MEASURED = """
import resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
seconds = time.perf_counter() - start
print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, done.returncode)
print(done.stdout[-1000:], done.stderr[-1000:])
"""
COPY = """
import os, sys
for source in sys.argv[2:]:
    with open(source, "rb") as old, open(os.path.join(sys.argv[1], os.path.basename(source)), "wb") as new:
        while piece := old.read(1 << 22):
            new.write(piece)
        new.flush()
        os.fsync(new.fileno())
"""


def transformer(path: Path, gigabytes: float) -> list[Path]:
    """Write a transformer of about the given size and return its files."""
    width = WIDTHS.get(gigabytes, 1280)
    layers = max(1, round(gigabytes * 1e9 / (LAYER_BYTES * width**2)))
    side, rng = path.with_suffix(".weights"), np.random.default_rng(0)
    nodes: list[NodeProto] = []
    tensors: list[TensorProto] = []
    with side.open("wb") as stream:

        def weight(name: str, *shape: int, constant: float | None = None) -> str:
            values = rng.standard_normal(shape, np.float32) if constant is None else np.full(shape, constant, "f")
            tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            content = (values / np.float32(np.sqrt(shape[0]))).tobytes() if constant is None else values.tobytes()
            for key, value in (("location", side.name), ("offset", stream.tell()), ("length", len(content))):
                tensor.external_data.add(key=key, value=str(value))
            stream.write(content)
            tensors.append(tensor)
            return name

        def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
            nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
            return output

        split = helper.make_tensor("split", TensorProto.INT64, [4], [0, 0, -1, HEAD])
        merge = helper.make_tensor("merge", TensorProto.INT64, [3], [0, 0, -1])
        tensors += [split, merge]
        scale, shift = weight("norm.scale", width, constant=1.0), weight("norm.shift", width, constant=0.0)
        x = node("MatMul", ["x", weight("embed", 32, width)], "embedded")
        for layer in range(layers):
            at = f"layer{layer}"
            normal = node("LayerNormalization", [x, scale, shift], f"{at}.norm1")
            parts = []
            for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
                flat = node("MatMul", [normal, weight(f"{at}.{part}.weight", width, width)], f"{at}.{part}")
                heads = node("Reshape", [flat, "split"], f"{at}.{part}.heads")
                parts.append(node("Transpose", [heads], f"{at}.{part}.turned", perm=order))
            share = node("Softmax", [node("MatMul", parts[:2], f"{at}.scores")], f"{at}.shares", axis=-1)
            mixed = node(
                "Transpose", [node("MatMul", [share, parts[2]], f"{at}.mixed")], f"{at}.back", perm=[0, 2, 1, 3]
            )
            flat = node("Reshape", [mixed, "merge"], f"{at}.merged")
            out = node("MatMul", [flat, weight(f"{at}.out.weight", width, width)], f"{at}.out")
            x = node("Add", [x, out], f"{at}.sum1")
            normal = node("LayerNormalization", [x, scale, shift], f"{at}.norm2")
            up = node("MatMul", [normal, weight(f"{at}.up.weight", width, 4 * width)], f"{at}.up")
            hidden = node("Relu", [up], f"{at}.relu")
            down = node("MatMul", [hidden, weight(f"{at}.down.weight", 4 * width, width)], f"{at}.down")
            x = node("Add", [x, down], f"{at}.sum2")
        node("MatMul", [x, weight("head", width, 16)], "y")
    graph = helper.make_graph(
        nodes, "transformer", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 16])], tensors,
    )  # fmt: skip  # one call
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return [path, side]


def chain(path: Path, count: int) -> None:
    """Write a residual network of about `count` nodes with small weights."""
    rng, width = np.random.default_rng(0), 8
    nodes, tensors = [helper.make_node("MatMul", ["x", "w"], ["v0"])], []
    tensors.append(helper.make_tensor("w", TensorProto.FLOAT, [4, width], rng.standard_normal(4 * width)))
    for block in range(count // 4):
        for number in range(2):
            values = 0.1 * rng.standard_normal(width * width)
            tensors.append(helper.make_tensor(f"w{block}_{number}", TensorProto.FLOAT, [width, width], values))
        nodes += [
            helper.make_node("MatMul", [f"v{block}", f"w{block}_0"], [f"a{block}"]),
            helper.make_node("Relu", [f"a{block}"], [f"b{block}"]),
            helper.make_node("MatMul", [f"b{block}", f"w{block}_1"], [f"c{block}"]),
            helper.make_node("Add", [f"v{block}", f"c{block}"], [f"v{block + 1}"]),
        ]
    tensors.append(helper.make_tensor("u", TensorProto.FLOAT, [width, 2], rng.standard_normal(2 * width)))
    nodes.append(helper.make_node("MatMul", [f"v{count // 4}", "u"], ["y"]))
    graph = helper.make_graph(
        nodes, "chain", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])], tensors,
    )  # fmt: skip  # one call
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def measured(*command: Any) -> dict[str, float]:
    """Run a command and return its seconds and peak memory in megabytes."""
    line = [sys.executable, "-c", MEASURED, *map(str, command)]
    done = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    seconds, kilobytes, code = done.splitlines()[0].split()
    if int(code):
        raise RuntimeError(f"{command}: {done}")
    return {"seconds": round(float(seconds), 2), "megabytes": round(int(kilobytes) * 1024 / 1e6)}


def row(work: Path, gigabytes: float) -> dict[str, Any]:
    """Copy, prune and verify one transformer; return the row."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        files = transformer(folder / "big.onnx", gigabytes)
        made = time.perf_counter() - started
        small, tool = folder / "small.onnx", (sys.executable, "-m", "cpd_onnx")
        found = {"bytes": sum(f.stat().st_size for f in files), "making": round(made, 1)}
        (folder / "copy").mkdir()
        found["copy"] = measured(sys.executable, "-c", COPY, folder / "copy", *files)
        for file in (folder / "copy").iterdir():
            file.unlink()
        found["prune"] = measured(*tool, *plain(["prune", files[0], "-o", small, "--no-verify"]))
        found["verify"] = measured(*tool, "verify", files[0], small)
    return found


def nodes_row(work: Path, count: int) -> dict[str, Any]:
    """Inspect, prune and verify one chain; return the row."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        model, tool = Path(name) / "chain.onnx", (sys.executable, "-m", "cpd_onnx")
        chain(model, count)
        found = {"inspect": measured(*tool, "inspect", model)}
        words = ["prune", model, "-o", Path(name) / "small.onnx", "--no-verify"]
        found["prune"] = measured(*tool, *plain(words))
        found["verify"] = measured(*tool, "verify", model, Path(name) / "small.onnx")
    return found


def show(content: dict[str, Any]) -> None:
    print("| GB | copy, s | prune, s | peak, MB | verify, s | peak, MB |\n|---|---|---|---|---|---|")
    for entry in content["sizes"].values():
        cells = [f"{entry['bytes'] / 1e9:.2f}", f"{entry['copy']['seconds']:.1f}"]
        cells += [f"{entry[job][key]:.{key == 'seconds':d}f}" for job in ("prune", "verify") for key in entry[job]]
        print(f"| {' | '.join(cells)} |")
    print("\n| nodes | inspect, s | prune, s | verify, s | peak, MB |\n|---|---|---|---|---|")
    for count, entry in content["nodes"].items():
        peak = max(job["megabytes"] for job in entry.values())
        print(f"| {count} |", " | ".join(f"{job['seconds']:.1f}" for job in entry.values()), f"| {peak} |")


def main() -> None:
    """Run the requested measurements and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="*", default=[])
    parser.add_argument("--nodes", type=int, nargs="*", default=[])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scale.json")
    options = parser.parse_args()
    content = json.loads(options.out.read_text()) if options.out.exists() else {"sizes": {}, "nodes": {}}
    if options.table:
        show(content)
        return
    content |= {"machine": {"cpus": os.cpu_count(), "system": platform.platform()}, "commit": commit()}
    for size in options.sizes or ([] if options.nodes else list(WIDTHS)):
        content["sizes"][str(size)] = row(options.work, size)
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    for count in options.nodes:
        content["nodes"][str(count)] = nodes_row(options.work, count)
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    show(content)


if __name__ == "__main__":
    main()
