"""Prune every model of a zoo to half of its channels and prove each result.

    python benchmarks/coverage/breadth.py --models ZOO [--models DATA/onnx] --out results/breadth.jsonl

Each model runs in a separate process with a time limit. Each line of the results has the status of a model: "verified",
"refused" with the reason, or "failed". The proof runs at up to three sizes of what a model leaves open, `sets` says with
how many inputs. `--summary` prints the tables of the stored results by exporter, which is the folder of a zoo: how many
models are proved, and how many are prunable in full (99 % of their weights), in part or not at all, refused or wrong,
and why. `--free-caches` lets the caches of language models lose channels, as `--free-io caches` does.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from isolation import limited

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.shapes.inference import fold
from cpd_onnx.workflow.places import read_model

Result = dict[str, Any]
_FULL = 0.99
"""Part of the weights from which a model counts as prunable in full."""
_LENGTH = 150
"""Characters of a reason that the table shows."""
_NAMES = r"'[^']*'|\"[^\"]*\"|\b\d[\d.,]*\b"
"""Names and numbers, which differ between models that are refused for the same reason."""


def check(path: Path, *, permute: bool, free_caches: bool = False) -> Result:
    """Comb, prune and prove one model; return the row of the results."""
    result: Result = {"status": "failed"}
    started = time.perf_counter()
    try:
        model = cpd.load(path)
        result["producer"] = " ".join(
            [model.proto.producer_name or "unnamed", model.proto.producer_version[:12]]
        ).strip()
        if free_caches:
            with suppress(cpd.DataError):  # it has none
                model = read_model(path, free_io=("caches",))
        loaded = time.perf_counter()
        combed = comb(fold(model))
        result["comb_s"] = round(time.perf_counter() - loaded, 3)
        result["fraction"] = round(combed.prunable_fraction(), 5)
        result["groups"], result["nodes"] = len(combed.groups), len(model.graph.node)
        result["unaccounted"], result["without_rule"] = combed.unaccounted, list(combed.without_rule)
        frozen = sorted(combed.frozen(), key=lambda f: -f.indices)
        result["kept"] = [f"{f.tensor}[{f.axis}] {'; '.join(f.reasons)}"[:160] for f in frozen[:3]]
        if result["fraction"] < _FULL:
            result["lost"] = lost(combed)
        state = cpd.run("comb, score, allocate{channels=0.5}, prune", model)
        result["prune_s"] = round(time.perf_counter() - started, 3)
        before, after = state.allocation.before, state.allocation.after
        result |= {
            kind: round(after.of(kind) / max(1.0, before.of(kind)), 4) for kind in ("macs", "params", "channels")
        }
        found = cpd.run("verify", state).verification
        result |= {"difference": found.difference, "effect": found.effect, "sets": found.runs, "status": "verified"}
        if permute and not model.free_io:  # outputs that lose channels are no symmetry
            from cpd_onnx.testing import permutation_oracle

            outcome = permutation_oracle(model)
            result["permutation"] = outcome.difference
            wrong = {"wrong": "permutation differs", "inconclusive": "inconclusive"}
            result["status"] = wrong.get(outcome.verdict, "verified")
    except cpd.CpdError as error:
        verdicts = {cpd.ProofError: "disproved", cpd.InconclusiveError: "inconclusive"}
        result |= {"status": verdicts.get(type(error), "refused"), "reason": str(error)}
    except Exception:  # a benchmark reports every defect and goes on
        result |= {"status": "failed", "reason": traceback.format_exc()[-600:]}
    result["seconds"] = round(time.perf_counter() - started, 2)
    return result


def lost(combed: Combed) -> list[tuple[float, str]]:
    """Return the parts of the weights that lie on no prunable axis, largest first, each with the reasons."""
    parts: Counter[str] = Counter()
    total = 0.0
    for weight in combed.weights:
        axes = [axis for axis in weight.axes[0] if len(axis) > 1]
        if not weight.is_trained or weight.size <= 1:
            continue
        reasons = dict.fromkeys(reason for axis in axes for reason in combed.atoms.reasons(axis))
        others = [reason for reason in reasons if reason.kind not in ("interface", "no channels")]
        frozen = float(np.prod([combed.atoms.is_frozen(axis).mean() for axis in axes]))
        if frozen == 1.0 and not others:
            continue
        total += weight.size
        if frozen:
            parts["; ".join(others or reasons)[:200]] += weight.size * frozen
    return [(round(size / total, 4), reason) for reason, size in parts.most_common(3)]


def models(folders: list[Path]) -> Iterator[Path]:
    """Yield all ONNX files, smallest first in each folder."""
    for folder in folders:
        yield from sorted(folder.rglob("*.onnx"), key=lambda p: (p.parent, p.stat().st_size))


def by_exporter(results: list[Result]) -> str:
    """Return a table of how many models of each exporter are proved and prunable, and the reasons, without names."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        kind = _kind(result)
        row = table[result["model"].partition("/")[0]]
        row.update(["models", kind, *(["proved"] if result["status"] == "verified" else [])])
        said = [text for _, text in result.get("lost", [])[:1]] if kind in ("part", "untouched") else []
        said = said if kind in ("full", "part", "untouched") else [result.get("reason", result["status"])]
        reasons[kind].update(re.sub(_NAMES, "…", each)[-_LENGTH:] for each in said)
    columns = ["models", "proved", "full", "part", "untouched", "refused", "inconclusive", "out of time", "wrong"]
    lines = [f"{'exporter':>20} " + " ".join(f"{c:>12}" for c in columns)]
    for exporter, row in [*sorted(table.items()), ("all", sum(table.values(), Counter()))]:
        lines.append(f"{exporter:>20} " + " ".join(f"{row[c]:>12}" for c in columns))
    for kind, counts in reasons.items():
        lines += [f"{kind}: {count} x {reason}" for reason, count in counts.most_common(12)]
    return "\n".join(lines)


def _kind(result: Result) -> str:
    """Return how much of a model is prunable, or why there is no answer."""
    if result.get("groups") == 0:
        return "untouched"
    if result["status"] in ("refused", "inconclusive"):
        return str(result["status"])
    if result["status"] != "verified":
        return "out of time" if result.get("reason") == "out of time" else "wrong"
    return "full" if result["fraction"] >= _FULL else "part"


def main() -> None:
    """Run the models without stored results and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", type=re.compile, default=re.compile(""))
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--no-permutation", action="store_true")
    parser.add_argument("--free-caches", action="store_true", help="let caches of language models lose channels")
    parser.add_argument("--again", action="store_true", help="repeat the models that were not verified")
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    known = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {r["model"]: r for r in known if not (options.again and r["status"] != "verified")}
    for path in [] if options.summary else models(options.models):
        name = f"{path.parent.name}/{path.name}"
        if name in done or not options.only.search(name):
            continue
        done[name] = {"model": name} | limited(
            partial(check, path, permute=not options.no_permutation, free_caches=options.free_caches), options.timeout
        )
        print(json.dumps(done[name])[:400], flush=True)
        options.out.write_text("".join(json.dumps(r) + "\n" for r in done.values()))
    print(by_exporter(list(done.values())))


if __name__ == "__main__":
    main()
