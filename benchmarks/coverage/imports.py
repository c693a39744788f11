"""The torch import on every file of a zoo: agreement with onnxruntime, and whether training lowers the loss.

    python benchmarks/coverage/imports.py --models ZOO [--models DATA/onnx] --out results/imports.jsonl

For each file the outputs of the imported module and of onnxruntime are compared on random inputs that the model accepts,
with a relative tolerance of 1e-4 in float32, or ten times the effect of perturbing the inputs by 1e-6, as in `verify`.
Then a copy whose weights are perturbed by a tenth of their standard deviation is trained for ten updates towards the
original's outputs on one batch; reported is the ratio of the losses after and before. Each file runs in a separate
process. `--compare-only` trains nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import traceback
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isolation import limited

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.proof.comparison import distance, tolerance
from cpd_onnx.runtime.sessions import execute, open_model, working_feeds
from cpd_onnx.shapes.inference import fold
from cpd_onnx.torch import import_model
from cpd_onnx.torch.dtypes import to_numpy, to_torch

Result = dict[str, Any]
STEPS = 10


def check(path: Path, *, trains: bool) -> Result:
    """Compare one model, and train it if asked; return the row of the results."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result: Result = {"status": "failed"}
    started = time.perf_counter()
    try:
        model = cpd.load(path)
        folded = fold(model)
        session = open_model(model, optimise=False)
        (feed,) = working_feeds(folded, session, 1)
        expected = execute(session, feed)
        try:
            module = import_model(model.complete_proto())
        except cpd.UnsupportedError as error:
            return result | {"status": "refused", "reason": str(error)[:300]}
        names = [i.name for i in model.graph.input if not model.has(i.name)]
        inputs = [to_torch(feed[name]) for name in names]
        with torch.no_grad():
            outputs = [to_numpy(output) for output in module.eval()(*inputs)]
        result["difference"] = max(distance(a, b, a) for a, b in zip(expected, outputs, strict=True))
        allowed = tolerance(comb(folded))
        if not result["difference"] <= allowed:
            nudged = {n: (a * (1 + 1e-6)).astype(a.dtype) if a.dtype.kind == "f" else a for n, a in feed.items()}
            again = execute(session, nudged)
            result["noise"] = max(distance(a, b, a) for a, b in zip(expected, again, strict=True))
        result["equal"] = bool(result["difference"] <= max(allowed, 10 * result.get("noise", 0.0)))
        if trains:
            result |= trained(module, inputs, expected)
        result["status"] = "equal" if result["equal"] else "differs"
        if "loss" in result:
            result["status"] += ", learns" if result["loss"] < 1 else ", does not learn"
    except cpd.CpdError as error:
        result |= {"status": "not run by onnxruntime", "reason": str(error)[:300]}
    except Exception:  # a benchmark reports every defect and goes on
        result["reason"] = traceback.format_exc()[-600:]
    result["seconds"] = round(time.perf_counter() - started, 2)
    return result


def trained(module: Any, inputs: list[torch.Tensor], targets: list[np.ndarray]) -> Result:
    """Return the ratio of the losses after and before a few updates from perturbed weights, if anything trains."""
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    wanted = [to_torch(t).float() for t in targets if t.dtype.kind == "f"]
    if not parameters or not wanted:
        return {"trains": False}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            spread = p.float().std().nan_to_num() if p.numel() > 1 else p.float().abs().mean()
            p.add_((0.1 * spread * torch.randn(p.shape, generator=generator)).to(p.dtype))
    scale = [t.square().mean().clamp(min=1e-12) for t in wanted]

    def distances() -> list[torch.Tensor]:
        answers = [o for o in module(*inputs) if o.is_floating_point()]
        return [
            (a.float() - t)[t.isfinite()].square().mean() / s
            for a, t, s in zip(answers, wanted, scale, strict=True)
            if a.shape == t.shape and t.isfinite().any() and a.requires_grad  # detectors find more or fewer things
        ]

    def loss() -> torch.Tensor:
        return torch.stack(distances() or [torch.zeros((), requires_grad=True)]).mean()

    if not distances():
        return {"trains": False}
    best, first = float("inf"), float(loss())
    start = [p.detach().clone() for p in parameters]
    # The learning rate differs from model to model: use the largest of four that lowers the loss.
    for rate in (1e-3, 1e-4, 1e-5, 1e-6):
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
        # As in `distill`, the optimiser moves float32 copies of 16-bit weights.
        moved = [torch.nn.Parameter(p.detach().float()) if p.dtype.itemsize == 2 else p for p in parameters]
        optimizer = torch.optim.Adam(moved, lr=rate)
        for _ in range(STEPS):
            module.zero_grad()
            loss().backward()
            for p, copy in zip(parameters, moved, strict=True):
                copy.grad = None if p.grad is None else p.grad.to(copy.dtype)
            optimizer.step()
            with torch.no_grad():
                for p, copy in zip(parameters, moved, strict=True):
                    p.copy_(copy)
        best = min(best, float(loss().detach()))
        if best < first:
            break
    return {"trains": True, "first_loss": first, "loss": best / first if first > 0 else 0.0}


def summary(results: list[Result]) -> str:
    """Return a table of counts by folder and status."""
    table: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for result in results:
        table[Path(result["model"]).parent.name][result["status"]] += 1
    columns = sorted({status for row in table.values() for status in row})
    lines = [f"{'':14}" + "".join(f"{c:>26}" for c in columns)]
    lines += [f"{folder:14}" + "".join(f"{row[c]:>26}" for c in columns) for folder, row in table.items()]
    return "\n".join(lines)


def main() -> None:
    """Run the models without stored results and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "imports.jsonl")
    parser.add_argument("--only", type=re.compile, default=re.compile(""))
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--compare-only", action="store_true", help="compare the outputs and train nothing")
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    known = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {r["model"]: r for r in known}
    for folder in [] if options.summary else options.models:
        for path in sorted(folder.rglob("*.onnx"), key=lambda p: (p.parent, p.stat().st_size)):
            name = f"{path.parent.name}/{path.name}"
            if name in done or not options.only.search(name):
                continue
            done[name] = {"model": name} | limited(
                partial(check, path, trains=not options.compare_only), options.timeout
            )
            print(json.dumps(done[name])[:300], flush=True)
            options.out.write_text("".join(json.dumps(r) + "\n" for r in done.values()))
    print(summary(list(done.values())))


if __name__ == "__main__":
    main()
