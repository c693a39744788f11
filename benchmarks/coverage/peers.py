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

onnxsim gets each of its entry points for structured pruning that applies to a file, as it is and simplified before, alone
and one after the other; of the files that onnxruntime runs, that with the fewest weights counts, and "masked" says
whether it equals the file before with the removed parts set to zero. `--files FOLDER…` runs other exporters' files, too,
for which torch-pruning has no source, into another `--out`:

    python benchmarks/coverage/peers.py --files ZOO/ort ZOO/keras ZOO/timm … --out results/peers_files.jsonl
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
from contextlib import suppress
from pathlib import Path
from typing import Any

Result = dict[str, Any]
RATIO = 0.5
"""Ratio of the channels to keep, or sparsity."""
CPU_SECONDS = 30
"""CPU seconds after which torch-pruning is stopped."""
WALL_SECONDS = 120
"""Wall seconds after which a job is stopped."""
SAMPLED = 16
"""Numbers by which an index of a tensor is found again in the larger one."""
MASKED = 1e-3
"""Largest difference between a pruned model and the masked original, over the largest output (heuristic, float32)."""


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


def _source(model: Path) -> tuple[Any, Any, list[str], bool]:
    """Return the torch module of a file, its inputs, their names, and whether it reads images."""
    import torch

    torch.manual_seed(0)
    if model.parent.name.startswith("timm"):
        import export_timm

        module, image = export_timm.prepared(model.stem)
        return module.eval(), (image[:1],), ["image"], True
    from torch_models import all_nets

    net = next(n for n in all_nets() if n.name == model.name.split(".")[0])
    return net.make().eval(), net.args(), list(net.inputs), any(kind == "image" for kind, _ in net.inputs.values())


def torch_pruning(model: Path, out: Path, tell: Callable[[Result], None]) -> None:
    """Prune the torch module by the procedure of torch-pruning's README, and export it."""
    import torch
    import torch_pruning as tp
    from torch import nn

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module, inputs, names, is_image = _source(model)
    with torch.no_grad():
        outputs = module(*inputs)
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
    torch.onnx.export(module, inputs, str(out), dynamo=False, opset_version=17, input_names=names)
    tell({"job": time.perf_counter() - started})


FORMATS = {
    "apply_structured_pruning_qdq": {"DequantizeLinear"},
    "apply_structured_pruning_qoperator": {"QLinearConv", "QLinearMatMul", "QGemm"},
    "apply_structured_pruning_matmul_nbits": {"MatMulNBits"},
    "apply_structured_pruning_matmul_bnb4": {"MatMulBnb4"},
    "apply_structured_pruning_dynamic_quantize_matmul": {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"},
    "apply_structured_pruning_dynamic_quantize_conv": {"ConvInteger"},
    "apply_moe_expert_channel_pruning": {"MoE"},
    "apply_moe_whole_expert_pruning": {"MoE"},
    "apply_qmoe_expert_channel_pruning": {"QMoE"},
    "apply_qmoe_whole_expert_pruning": {"QMoE"},
}
"""Entry points of onnxsim for one format of weights, and the operators, any of which makes them applicable."""
ANY = ("apply_structured_pruning", "apply_structured_pruning_cpp", "apply_attention_head_pruning")
"""Entry points of onnxsim for all models; the second is documented as the dispatcher for all formats of weights."""
BLOCKS = "apply_transformer_block_pruning"
"""Entry point of onnxsim that removes blocks of transformers, a share of those that it recognises."""


def ways(operators: set[str], feeds: list[Any]) -> list[tuple[str, list[tuple[str, Result]]]]:
    """Return the ways in which onnxsim can prune a file: a name, and entry points with options one after the other."""
    ratio: Result = {"sparsity": RATIO}
    blocks = BLOCKS, ratio | {"calibration_data": feeds}
    fitting = [name for name, needed in FORMATS.items() if needed & operators]
    every = [(name, ratio) for name in ("apply_structured_pruning_cpp", *fitting, "apply_attention_head_pruning")]
    return [
        *((name.removeprefix("apply_"), [(name, ratio)]) for name in (*ANY, *fitting)),
        ("transformer_block_pruning", [blocks]),
        ("structured_pruning, global", [("apply_structured_pruning", ratio | {"global_sparsity": True})]),
        ("all that apply", every),
        ("all that apply, and blocks", [*every, blocks]),
    ]


def onnxsim(model: Path, out: Path, tell: Callable[[Result], None]) -> None:
    """Prune the file by each way of onnxsim, as it is and simplified first; tell of each as one of the candidates.

    A candidate has its file and the file whose channels are removed, which is what it is compared with.
    """
    import onnx
    import onnxsim as tool

    feeds = [_feeds(_session(model), model, seed) for seed in range(4)]
    bases: list[tuple[str, Path, float, Any]] = [("", model, 0.0, onnx.load(model))]
    started = time.perf_counter()
    with suppress(Exception):  # then it is pruned as it is
        simplified, _ = tool.simplify(bases[0][3])
        simple = out.with_name("simplified.onnx")
        onnx.save(simplified, simple)
        bases.append(("simplify, then ", simple, time.perf_counter() - started, simplified))
    for kind, path, spent, base in bases:
        for number, (name, steps) in enumerate(ways({node.op_type for node in base.graph.node}, feeds)):
            started, pruned = time.perf_counter(), base
            found: Result = {
                "way": kind + name,
                "base": str(path),
                "file": str(out.with_name(f"{len(kind)}.{number}.onnx")),
            }
            try:
                for entry, settings in steps:
                    pruned = getattr(tool, entry)(pruned, **settings)
                onnx.save(pruned, found["file"])
                found["job"] = spent + time.perf_counter() - started
            except Exception as error:  # an exception of a tool is its result
                found["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            tell({"candidate": found})


TOOLS: dict[str, Callable[[Path, Path, Callable[[Result], None]], None]] = {
    "ours": ours, "torch-pruning": torch_pruning, "onnxsim": onnxsim,
}  # fmt: skip  # a table


TORCH = ("torchscript", "dynamo", "timm", "timm-dynamo")
"""Folders of the zoo whose files come from torch modules."""
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
            told = receiver.recv()
            if "candidate" in told:
                result.setdefault("candidates", []).append(told["candidate"])
            else:
                result |= told
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
    """Return the number of elements of all tensors of floats and of integers of up to 8 bits in a file."""
    import onnx

    model = onnx.load(path)
    tensors = [
        *model.graph.initializer,
        *(a.t for n in model.graph.node for a in n.attribute if a.type == onnx.AttributeProto.TENSOR),
    ]
    total = 0
    for tensor in tensors:
        if tensor.data_type in (1, 2, 3, 10, 11, 16, 21, 22):
            size = 1
            for dim in tensor.dims:
                size *= dim
            total += size
    return total


def judged(result: Result, before: int, out: Path, model: Path) -> Result:
    """Return the result with its status: whether onnxruntime runs the file, and the ratio of weights left.

    Of several candidates, the one that runs and has the fewest weights counts.
    """
    candidates = result.pop("candidates", None)
    if candidates is not None:
        return result | _best(candidates, before, model)
    if not out.exists() or "job" not in result:
        return result | {"status": "refused" if "TargetError" in result.get("error", "") else "failed"}
    try:
        _outputs(out, model)
    except Exception as error:  # onnxruntime's own classes
        return result | {"status": "invalid", "error": str(error)[:200]}
    return result | _left(out, before)


def _left(out: Path, before: int) -> Result:
    left = weights(out) / before
    status = "full" if left <= 0.4 else "part" if left < 0.97 else "untouched"
    return {"status": status, "left": round(left, 4)}


def _best(candidates: list[Result], before: int, model: Path) -> Result:
    """Return the result of the best of several candidates, and how often each end was met."""
    found: list[Result] = []
    ends, errors = dict.fromkeys(("runs", "does not run", "error"), 0), list[str]()
    for each in candidates:
        if "job" not in each:
            ends["error"] += 1
            errors.append(f"{each['way']}: {each['error']}"[:160])
            continue
        try:
            outputs = _outputs(Path(each["file"]), model)
        except Exception as error:  # onnxruntime's own classes
            ends["does not run"] += 1
            found.append(
                {"status": "invalid", "way": each["way"], "error": str(error)[:200], "job": each["job"], "left": 9}
            )
            continue
        ends["runs"] += 1
        said = {"way": each["way"], "job": each["job"]} | _left(Path(each["file"]), before)
        found.append(said | {"outputs": outputs, "base": each["base"], "file": each["file"]})
    if not found:
        return {"status": "failed", "candidates": ends, "error": next((c["error"] for c in candidates), "")}
    found.sort(key=lambda each: each["left"])
    best = found[0]
    if "outputs" in best and best["left"] < 0.97:
        best["masked"] = _is_masked(best, model)
    return {k: v for k, v in best.items() if k not in ("outputs", "base", "file")} | {
        "candidates": ends,
        "errors": errors,
    }


def _shapes(model: Path) -> dict[str, list[int]]:
    """Return the shapes at which the zoo ran a model, by input."""
    manifest = model.with_name("manifest.json")
    entries = json.loads(manifest.read_text()) if manifest.exists() else []
    return next((entry["run_shapes"] for entry in entries if entry["file"] == model.name), {})


def _session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feeds(session: Any, model: Path, seed: int = 0) -> dict[str, Any]:
    """Draw inputs of the sizes at which the zoo ran the model, or of those that the file has."""
    import numpy as np

    rng, shapes, feeds = np.random.default_rng(seed), _shapes(model), {}
    for value in session.get_inputs():
        given = shapes.get(value.name) or [2] * len(value.shape)
        shape = [d if isinstance(d, int) else g for d, g in zip(value.shape, given, strict=False)]
        kind = {"float": "float32", "double": "float64"}.get(value.type[7:-1], value.type[7:-1])
        drawn = rng.standard_normal(shape) if "float" in kind else rng.integers(0, 2, shape)
        feeds[value.name] = drawn.astype(kind)
    return feeds


def _outputs(path: Path, model: Path) -> list[Any]:
    """Run a file once, without optimisations."""
    session = _session(path)
    return list(session.run(None, _feeds(session, model)))


def _is_masked(best: Result, model: Path) -> str:
    """Return whether a pruned file gives what the file before does with all that was removed set to zero.

    A tensor that lost indices is part of the one with its name before; the rest of it is set to zero, and tensors that
    are gone are set to zero as a whole, which silences a block that was removed.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    base, pruned = onnx.load(best["base"]), onnx.load(best["file"])
    after = {t.name: numpy_helper.to_array(t) for t in pruned.graph.initializer}
    fills = _zero_points(base)
    for tensor in base.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.size < 2 or array.dtype.kind not in "fiu" or array.dtype == np.int64:
            continue
        left = after.get(tensor.name)
        if left is not None and left.shape == array.shape and np.array_equal(left, array):
            continue
        kept = _indices(array, left) if left is not None else [np.empty(0, int)] * array.ndim
        if kept is None:
            return f"unknown: {tensor.name} has other values"
        masked = np.full_like(array, fills.get(tensor.name, 0))
        masked[np.ix_(*kept)] = array[np.ix_(*kept)]
        tensor.CopyFrom(numpy_helper.from_array(masked, tensor.name))
    path = Path(best["file"]).with_name("masked.onnx")
    onnx.save(base, path)
    try:
        expected = _outputs(path, model)
    except Exception as error:  # onnxruntime's own classes
        return f"unknown: {str(error)[:80]}"
    furthest = 0.0
    for a, b in zip(expected, best["outputs"], strict=True):
        if not isinstance(a, np.ndarray) or a.shape != b.shape:
            return "no: another shape"
        if a.dtype.kind == "f" and a.size:
            if not np.isfinite(a).all():
                return "unknown: not finite"
            furthest = max(furthest, float(np.abs(a - b).max() / (np.abs(a).max() + 1e-9)))
        elif not np.array_equal(a, b):
            furthest = 1.0
    return "yes" if furthest < MASKED else f"no: {furthest:.1e}"


def _indices(before: Any, after: Any) -> list[Any] | None:
    """Return which indices of each axis of a tensor are left; None if the values are not a part of it."""
    import numpy as np

    if before.ndim != after.ndim:
        return None
    kept = [np.arange(size) for size in after.shape]
    shrunk = [axis for axis in range(before.ndim) if before.shape[axis] != after.shape[axis]]
    for axis in shrunk:
        # a row is known by some of its values, whichever others it has lost
        rows = np.moveaxis(before, axis, 0).reshape(before.shape[axis], -1)
        wanted = np.moveaxis(after, axis, 0).reshape(after.shape[axis], -1)
        found, start = [], 0
        for row in wanted:
            fit = next((i for i in range(start, len(rows)) if np.isin(row[:SAMPLED], rows[i]).all()), None)
            if fit is None:
                return None
            found.append(fit)
            start = fit + 1
        kept[axis] = np.asarray(found)
    return kept if np.array_equal(before[np.ix_(*kept)], after) else None


def _zero_points(model: Any) -> dict[str, int]:
    """Return the numbers that stand for zero in tensors of integers, by name."""
    from onnx import numpy_helper

    arrays = {t.name: t for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) > 2 and node.input[2] in arrays:
            found[node.input[0]] = int(numpy_helper.to_array(arrays[node.input[2]]).ravel()[0])
    return found


def summary(results: list[Result]) -> str:
    """Return the table and the comparison of times."""
    lines = [
        f"{len(results)} models",
        f"{'':16}{'full':>8}{'part':>8}{'untouched':>11}{'invalid':>9}{'failed':>8}{'refused':>9}{'job, median s':>15}{'analysis':>10}{'weights left':>14}{'masked':>8}",
    ]
    for tool in TOOLS:
        rows = [r[tool] for r in results]
        counts = [
            sum(r["status"] == s for r in rows) for s in ("full", "part", "untouched", "invalid", "failed", "refused")
        ]
        jobs = [r["job"] for r in rows if "job" in r]
        analyses = [r["analysis"] for r in rows if "analysis" in r]
        lefts = [r["left"] if r["status"] in ("full", "part") else 1.0 for r in rows if r["status"] != "no source"]
        equal = sum("difference" in r or r.get("masked") == "yes" for r in rows)
        numbers = "".join(f"{c:>{w}}" for c, w in zip(counts, (8, 8, 11, 9, 8, 9), strict=True))
        lines.append(
            f"{LABELS.get(tool, tool):16}{numbers}{_median(jobs):>15}{_median(analyses):>10}{_median(lefts):>14}{equal:>8}"
        )
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
    parser.add_argument(
        "--files",
        type=Path,
        nargs="*",
        default=[],
        help="folders of the zoo, all files of each, without the time to start",
    )
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
    files |= {
        f"{path.parent.name}/{path.stem}": path for folder in options.files for path in sorted(folder.glob("*.onnx"))
    }
    pythons = {"ours": sys.executable, "torch-pruning": options.torch_python, "onnxsim": options.onnxsim_python}
    servers: dict[str, subprocess.Popen[str]] = {}
    starts: dict[str, float] = {}
    for name, path in files.items():
        if name in known or options.summary or (options.only and name not in options.only):
            continue
        for tool, python in pythons.items():
            if tool not in servers:
                starts[tool] = 0.0 if options.files else start(tool, python)
                command = [python, __file__, "--serve", tool]
                servers[tool] = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
        result: Result = {"model": name, "file": path.name}
        before = weights(path)
        with tempfile.TemporaryDirectory() as folder:
            for tool, server in servers.items():
                if tool == "torch-pruning" and path.parent.name not in TORCH:
                    result[tool] = {"status": "no source"}
                    continue
                assert server.stdin is not None
                assert server.stdout is not None
                out = Path(folder) / f"{tool}.onnx"
                server.stdin.write(json.dumps([str(path), str(out)]) + "\n")
                server.stdin.flush()
                answer = json.loads(server.stdout.readline())
                result[tool] = judged(answer | {"start": starts[tool]}, before, out, path)
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
