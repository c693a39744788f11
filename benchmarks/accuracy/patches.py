"""What a patch at the cut adds where a whole branch is removed, beside the repair of the operators around it.

    python benchmarks/accuracy/patches.py --data-folder DATA [--only MODEL] [--every N]
    python benchmarks/accuracy/patches.py --table

One branch at a time is removed. The tensor behind the cut, the sum that the branch entered, is then changed to be nearest
to the original's on unlabelled images, by least squares: by a constant for each channel, by a factor and a constant, or by
a whole matrix and a constant, as LinearPatch inserts one into a language model. The matrix is a further operator, since it
cannot be absorbed where several operators read the tensor. Instead of these, the repair fits the weights of all operators
behind the cut. Errors are those of the outputs on other images: the mean squared
difference from the original's, relative to their variance, and the share of answers that are the original's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from accuracy import commit
from onnx import ModelProto, NodeProto, helper, numpy_helper
from verdicts import CASES, ROOT, Data

from cpd_onnx.channels.branches import branches, removable_groups
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.free import keep_without
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.ir.model import load
from cpd_onnx.passes.repair import RepairOptions, repair
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.sessions import open_model

RESULT = ROOT / "benchmarks" / "results" / "patches.json"
MODELS = {"resnet20_jpeg_cifar10": 1, "vit_cifar10_smmk47": 5}
"""Models, and which of their branches are removed: each, or each fifth."""
IMAGES, OTHERS, BATCH, SEED = 256, 1024, 64, 0
WAYS = ("removed", "constant", "factor", "matrix", "repair")
Array = npt.NDArray[Any]


class Patched:
    """A model without one branch, and what its sum should have been."""

    def __init__(self, proto: ModelProto, name: str, wanted: Array, found: Array) -> None:
        self.proto, self.name, self.rank = proto, name, wanted.ndim
        self.axis = 1 if wanted.ndim == 4 else wanted.ndim - 1
        rows = (
            np.moveaxis(a, self.axis, -1).reshape(-1, a.shape[self.axis]).astype(np.float64) for a in (wanted, found)
        )
        self.wanted, self.found = rows

    def by(self, way: str) -> ModelProto:
        """Return the model with a patch behind the sum."""
        mean, old = self.wanted.mean(0), self.found.mean(0)
        if way == "matrix":
            padded = np.column_stack([self.found, np.ones(len(self.found))])
            solved = np.linalg.lstsq(padded, self.wanted, rcond=None)[0]
            return self.inserted(solved[:-1], solved[-1])
        factor = np.ones(len(mean))
        if way == "factor":
            covariance = ((self.found - old) * (self.wanted - mean)).mean(0)
            factor = covariance / np.maximum(self.found.var(0), 1e-12)
        return self.inserted(factor, mean - factor * old)

    def inserted(self, factor: Array, constant: Array) -> ModelProto:
        made = ModelProto()
        made.CopyFrom(self.proto)
        shape = [-1 if axis == self.axis else 1 for axis in range(self.rank)]
        names = [f"{self.name}_{part}" for part in ("factor", "constant", "scaled", "patched")]
        kind = "Mul" if factor.ndim == 1 else "Conv" if self.rank == 4 else "MatMul"
        factor = factor.reshape(shape) if kind == "Mul" else factor.T[:, :, None, None] if kind == "Conv" else factor
        for name, array in zip(names, (factor, constant.reshape(shape)), strict=False):
            made.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
        nodes = [NodeProto.FromString(node.SerializeToString()) for node in made.graph.node]
        for node in nodes:
            for slot, name in enumerate(node.input):
                node.input[slot] = names[3] if name == self.name else name
        place = 1 + next(place for place, node in enumerate(nodes) if self.name in node.output)
        nodes[place:place] = [
            helper.make_node(kind, [self.name, names[0]], [names[2]]), helper.make_node("Add", names[2:0:-1], [names[3]])
        ]  # fmt: skip  # in order
        del made.graph.node[:]
        made.graph.node.extend(nodes)
        return made


def outputs(proto: ModelProto, images: Array, name: str = "") -> Array:
    """Return a tensor of a model, the first output if it is not named."""
    made = ModelProto()
    made.CopyFrom(proto)
    if name:
        made.graph.output.append(helper.make_tensor_value_info(name, 1, None))
    session = open_model(made)
    entry, wanted = session.get_inputs()[0].name, name or session.get_outputs()[0].name
    parts = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return np.concatenate([session.run([wanted], {entry: part})[0] for part in parts])


def rows_of(path: Path, every: int, fitted: Array, others: Array) -> Iterator[dict[str, Any]]:
    """Yield the errors of the outputs without each branch."""
    model = load(path)
    combed, whole = comb(model), model.complete_proto()
    expected = outputs(whole, others)

    def error(proto: ModelProto) -> list[float]:
        found = outputs(proto, others)
        same = float((found.argmax(1) == expected.argmax(1)).mean())
        return [float(np.square(found - expected).mean() / expected.var()), same]

    for index in sorted(removable_groups(combed))[::every]:
        cut = branches(combed, [index])
        entries = [*cut.entries, *cut.neutral]
        name = combed.folded.scope.nodes[entries[0][0]].output[0]
        keep = keep_without(combed, [list(range(len(g))) if g.id == index else [] for g in combed.groups])
        small = rewrite(combed, keep).model
        proto = small.complete_proto()
        if len(entries) > 1 or not any(name in node.output for node in proto.graph.node):
            continue
        patched = Patched(proto, name, outputs(whole, fitted, name), outputs(proto, fitted, name))
        source = ArraySource({model.graph.input[0].name: fitted})
        repaired = repair(combed, keep, small, source, RepairOptions(samples=len(fitted))).model.complete_proto()
        made = [proto, *map(patched.by, WAYS[1:4]), repaired]
        yield {"model": path.stem, "branch": combed.groups[index].name} | dict(zip(WAYS, map(error, made), strict=True))


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"| model | branches | {' | '.join(WAYS)} | repair better than the matrix |")
    print(f"|---|---|{'---|' * len(WAYS)}---|")
    for model in MODELS:
        of_model = [row for row in rows if row["model"] == model]
        if not of_model:
            continue
        cells = [
            f"{np.median([row[way][0] for row in of_model]):.3f}, {100 * np.mean([row[way][1] for row in of_model]):.1f} %"
            for way in WAYS
        ]
        better = sum(row["repair"][0] < row["matrix"][0] for row in of_model)
        print(f"| {model} | {len(of_model)} | {' | '.join(cells)} | {better} of {len(of_model)} |")


def main() -> None:
    """Remove, patch, repair and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--only", choices=sorted(MODELS), action="append")
    parser.add_argument("--every", type=int, help="remove each n-th branch only")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for name, every in () if options.table else MODELS.items():
        if options.only and name not in options.only:
            continue
        case = next(case for case in CASES if case.model == name)
        images, _, _ = Data(options.data_folder).decode(case.data)
        chosen = case.pixels(images[np.random.default_rng(SEED).permutation(len(images))[: IMAGES + OTHERS]])
        rows = [row for row in rows if row["model"] != name]
        path = options.data_folder / "onnx" / f"{name}.onnx"
        for row in rows_of(path, options.every or every, chosen[:IMAGES], chosen[IMAGES:]):
            rows.append(row)
            print(name, row["branch"], *(f"{row[way][0]:.3f}" for way in WAYS), flush=True)
            options.out.write_text(json.dumps({"commit": commit(), "rows": rows}, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
