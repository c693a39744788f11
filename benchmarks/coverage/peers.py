"""cpd-onnx, torch-pruning and onnxsim's pruner on the same models, one after the other.

    python benchmarks/coverage/peers.py --zoo ZOO --torch-python TORCH --onnxsim-python ONNXSIM --out results/peers.jsonl

ZOO contains the exports of benchmarks/zoo; TORCH is a Python with torch, torchvision, timm, transformers and
torch-pruning 1.6.1; ONNXSIM one with onnxsim 0.8.1. For each model cpd-onnx runs first, then torch-pruning on the torch
module followed by an export, then onnxsim on the same file as cpd-onnx. Each job runs in a separate process, forked from
one that has imported the tool, with a limit: 30 CPU seconds for analysis and pruning by torch-pruning, 120 s of wall
time for everything else.

"job" is the time from the trained model (module in memory, or file on disk) to the pruned file on disk; "analysis" the
time until all groups are known (`build_dependency` and `get_all_groups`; fold and comb); "graph" that of
`build_dependency` alone. "start" is the median time in which a process imports the tool, without models; a user waits
for start and job together. `--summary` prints the table of the stored results.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]
RATIO = 0.5
"""Ratio of the channels to keep, or sparsity."""
CPU_SECONDS = 30
"""CPU seconds after which torch-pruning is stopped."""
WALL_SECONDS = 120
"""Wall seconds after which a job is stopped."""


def ours(model: Path, out: Path, tell: Callable[[Result], None]) -> None:
    """Prune the file with cpd-onnx."""
    import cpd_onnx as cpd
    from cpd_onnx.channels.combing import comb
    from cpd_onnx.shapes.inference import fold

    started = time.perf_counter()
    read = cpd.load(model)
    loaded = time.perf_counter()
    comb(fold(read))
    tell({"analysis": time.perf_counter() - loaded})
    started += time.perf_counter() - loaded
    state = cpd.run(f"comb, score, allocate{{channels={RATIO}}}, prune", read)
    state.save(out)
    tell({"job": time.perf_counter() - started})
    found = cpd.run("verify", state).verification
    assert found is not None
    tell({"difference": found.difference})


def torch_pruning(model: Path, out: Path, tell: Callable[[Result], None]) -> None:
    """Prune the torch module by the procedure of torch-pruning's README, and export it."""
    import torch
    import torch_pruning as tp
    from torch import nn
    from torch_models import all_nets

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    net = next(n for n in all_nets() if n.name == model.name.split(".")[0])
    torch.manual_seed(0)
    module, inputs = net.make().eval(), net.args()
    with torch.no_grad():
        outputs = module(*inputs)
    is_image = any(kind == "image" for kind, _ in net.inputs.values())
    ends = {
        s for o in (outputs if isinstance(outputs, (tuple, list)) else [outputs]) for s in (o.shape[1], o.shape[-1])
    }
    heads = [
        m for m in module.modules()
        if is_image and ((isinstance(m, nn.Linear) and m.out_features in ends) or (isinstance(m, nn.Conv2d) and m.out_channels in ends))
    ]  # fmt: skip  # a filter
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU_SECONDS, resource.RLIM_INFINITY))
    started = time.perf_counter()
    graph = tp.DependencyGraph().build_dependency(module, example_inputs=inputs)
    tell({"graph": time.perf_counter() - started})
    for _ in graph.get_all_groups(ignored_layers=heads):
        pass
    tell({"analysis": time.perf_counter() - started})
    started = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        module, inputs, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=RATIO, ignored_layers=heads
    )
    pruner.step()
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with torch.no_grad():
        module(*inputs)
    tell({"pruned": time.perf_counter() - started})
    torch.onnx.export(module, inputs, str(out), dynamo=False, opset_version=17, input_names=list(net.inputs))
    tell({"job": time.perf_counter() - started})


def onnxsim(model: Path, out: Path, tell: Callable[[Result], None]) -> None:
    """Prune the file with onnxsim."""
    import onnx
    from onnxsim import apply_structured_pruning

    started = time.perf_counter()
    pruned = apply_structured_pruning(onnx.load(model), sparsity=RATIO)
    onnx.save(pruned, out)
    tell({"job": time.perf_counter() - started})


TOOLS: dict[str, Callable[[Path, Path, Callable[[Result], None]], None]] = {
    "ours": ours, "torch-pruning": torch_pruning, "onnxsim": onnxsim,
}  # fmt: skip  # a table


LABELS = {"ours": "cpd-onnx"}
"""Printed names of tools that the results name differently."""
IMPORTS = {
    "ours": "import cpd_onnx.cli.main, cpd_onnx.passes.verify", "torch-pruning": "import torch, torch_pruning",
    "onnxsim": "import onnx, onnxsim",
}  # fmt: skip  # a table


def start(tool: str, python: str) -> float:
    """Return the median seconds from the start of a process until the tool is imported, of five runs after a warm-up."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        subprocess.run([python, "-c", IMPORTS[tool]], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def serve(tool: str) -> None:
    """Import the tool once, then run a forked job for each line of standard input."""
    if tool == "torch-pruning":
        sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
        import torch_models  # noqa: F401  # the expensive imports
        import torch_pruning as tp  # noqa: F401
    elif tool == "ours":
        import cpd_onnx.passes.prune
        import cpd_onnx.passes.score
        import cpd_onnx.passes.verify  # noqa: F401
    else:
        import onnxsim as imported  # noqa: F401
    gc.freeze()  # imported objects are not collected again in each fork
    for line in sys.stdin:
        model, out = map(Path, json.loads(line))
        print(json.dumps(limited(tool, model, out)), flush=True)


def limited(tool: str, model: Path, out: Path) -> Result:
    """Run one job in a separate process with the time limit and return its result."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_job, args=(tool, model, out, sender))
    process.start()
    sender.close()
    result: Result = {}
    end = time.monotonic() + WALL_SECONDS
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            result |= receiver.recv()
        result["error"] = result.get("error", "out of time")
    except EOFError:
        process.join()
        if process.exitcode:
            result["error"] = result.get("error", f"stopped by the limit ({process.exitcode})")
    process.kill()
    process.join()
    return result


def _job(tool: str, model: Path, out: Path, sender: Any) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the life of the process
    try:
        TOOLS[tool](model, out, sender.send)
    except BaseException as error:  # an exception of a tool is its result
        sender.send({"error": f"{type(error).__name__}: {str(error)[:200]}"})


def weights(path: Path) -> int:
    """Return the number of elements of all float tensors in a file."""
    import onnx

    model = onnx.load(path)
    tensors = [
        *model.graph.initializer,
        *(a.t for n in model.graph.node for a in n.attribute if a.type == onnx.AttributeProto.TENSOR),
    ]
    total = 0
    for tensor in tensors:
        if tensor.data_type in (1, 10, 11, 16):
            size = 1
            for dim in tensor.dims:
                size *= dim
            total += size
    return total


def judged(result: Result, before: int, out: Path) -> Result:
    """Return the result with its status: whether onnxruntime accepts the file, and the ratio of weights left."""
    import onnxruntime as ort

    if not out.exists() or "job" not in result:
        return result | {"status": "refused" if "TargetError" in result.get("error", "") else "failed"}
    try:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        ort.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes
        return result | {"status": "invalid", "error": str(error)[:200]}
    left = weights(out) / before
    status = "full" if left <= 0.4 else "part" if left < 0.97 else "untouched"
    return result | {"status": status, "left": round(left, 4)}


def summary(results: list[Result]) -> str:
    """Return the table and the comparison of times."""
    lines = [
        f"{len(results)} models",
        f"{'':16}{'full':>8}{'part':>8}{'untouched':>11}{'invalid':>9}{'failed':>8}{'refused':>9}{'job, median s':>15}{'analysis':>10}",
    ]
    for tool in TOOLS:
        rows = [r[tool] for r in results]
        counts = [
            sum(r["status"] == s for r in rows) for s in ("full", "part", "untouched", "invalid", "failed", "refused")
        ]
        jobs = [r["job"] for r in rows if "job" in r]
        analyses = [r["analysis"] for r in rows if "analysis" in r]
        numbers = "".join(f"{c:>{w}}" for c, w in zip(counts, (8, 8, 11, 9, 8, 9), strict=True))
        lines.append(f"{LABELS.get(tool, tool):16}{numbers}{_median(jobs):>15}{_median(analyses):>10}")
    both = [
        r
        for r in results
        if all("job" in r[t] and r[t]["status"] in ("full", "part") for t in ("ours", "torch-pruning"))
    ]
    if both:
        for what, parts in (("job in a running process", ["job"]), ("start and job", ["start", "job"])):
            ratios = [
                sum(r["torch-pruning"].get(p, 0) for p in parts) / sum(r["ours"].get(p, 0) for p in parts) for r in both
            ]
            lines.append(
                f"{what}, torch-pruning / cpd-onnx, on {len(both)} models that both prune: "
                f"median {statistics.median(ratios):.2f}, {sum(q < 1 for q in ratios)} slower"
            )
    timed = [r for r in results if all("analysis" in r[t] for t in ("ours", "torch-pruning"))]
    if timed:
        ratios = [r["torch-pruning"]["analysis"] / r["ours"]["analysis"] for r in timed]
        slower = [f"{r['model']} {1 / q:.2f}x" for r, q in zip(timed, ratios, strict=True) if q < 1]
        lines.append(
            f"analysis, torch-pruning / cpd-onnx, on {len(timed)} models: median {statistics.median(ratios):.2f}; cpd-onnx slower on {len(slower)}: {', '.join(slower)}"
        )
    graphs = [
        r["torch-pruning"]["graph"] / r["ours"]["analysis"]
        for r in results
        if "graph" in r["torch-pruning"] and "analysis" in r["ours"]
    ]
    if graphs:
        lines.append(
            f"build_dependency alone / analysis of cpd-onnx, on {len(graphs)} models: median {statistics.median(graphs):.2f}"
        )
    slow = [r["model"] for r in results if r["ours"].get("analysis", 0) > 2]
    lines.append(f"analysis of cpd-onnx over 2 s: {', '.join(slow) or 'none'}")
    return "\n".join(lines)


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f}" if values else "-"


def main() -> None:
    """Run the models without stored results, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--onnxsim-python", default=sys.executable)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "peers.jsonl")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    known = {r["model"] for r in done}
    files = (
        {p.name.split(".")[0]: p for p in sorted((options.zoo / "dynamo").glob("*.dynamo.onnx"))} if options.zoo else {}
    )
    files |= (
        {p.name.split(".")[0]: p for p in sorted((options.zoo / "torchscript").glob("*.torchscript.onnx"))}
        if options.zoo
        else {}
    )
    pythons = {"ours": sys.executable, "torch-pruning": options.torch_python, "onnxsim": options.onnxsim_python}
    servers: dict[str, subprocess.Popen[str]] = {}
    starts: dict[str, float] = {}
    for name, path in files.items():
        if name in known or options.summary or (options.only and name not in options.only):
            continue
        for tool, python in pythons.items():
            if tool not in servers:
                starts[tool] = start(tool, python)
                command = [python, __file__, "--serve", tool]
                servers[tool] = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
        result: Result = {"model": name, "file": path.name}
        before = weights(path)
        with tempfile.TemporaryDirectory() as folder:
            for tool, server in servers.items():
                assert server.stdin is not None
                assert server.stdout is not None
                out = Path(folder) / f"{tool}.onnx"
                server.stdin.write(json.dumps([str(path), str(out)]) + "\n")
                server.stdin.flush()
                answer = json.loads(server.stdout.readline())
                result[tool] = judged(answer | {"start": starts[tool]}, before, out)
        done.append(result)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as stream:
            stream.write(json.dumps(result) + "\n")
        print(
            name,
            {
                t: (
                    result[t]["status"],
                    result[t].get("left"),
                    round(result[t].get("job", 0), 2),
                    result[t].get("error", "")[:60],
                )
                for t in TOOLS
            },
            flush=True,
        )
    print(summary(done))


if __name__ == "__main__":
    main()
