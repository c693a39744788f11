"""Prune and distill real trained models through the command line, with an unpruned control and random pruning beside.

    python benchmarks/real_files.py --data DATA [--only vit] [--steps 200] [--out benchmarks/results/real_files.json]

DATA is a folder with `onnx/` and `load.py`, which decodes CIFAR-10, GTSRB and CamVid. Accuracy is that after the last
step, on test images that were not trained on; training has no labels. The recipe is the same for all three students.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Case:
    """A model, its data, and how it is trained."""

    model: str
    data: str
    metric: str
    target: str = "macs=0.5"
    recipe: tuple[str, ...] = ()


CASES = {
    "resnet56": Case(
        "resnet56_jpeg_cifar10",
        "cifar10",
        "top1",
        "macs=0.5",
        ("--batch-norm", "train", "--flip", "--shift", "2", "--lr", "0.001"),
    ),
    "vit": Case("vit_cifar10_smmk47", "cifar10", "top1", "macs=0.5", ("--flip", "--shift", "2", "--lr", "0.0005")),
    "gtsrb": Case(
        "resnet20_gtsrb", "gtsrb", "top1", "macs=0.5", ("--batch-norm", "train", "--shift", "2", "--lr", "0.001")
    ),
    "espnet": Case(
        "espnet_p2_q8_camvid", "camvid", "miou", "macs=0.53", ("--flip", "--lr", "0.0005", "--batch-size", "4")
    ),
}


def images(folder: Path, name: str, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels, the first `count` of a fixed shuffle."""
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x, y = getattr(module, name)(split)
    order = np.random.default_rng(0).permutation(len(x))[:count]
    return x[order], y[order]


def prepared(x: np.ndarray, name: str) -> np.ndarray:
    """As the models were trained: channels first, normalised."""
    if name == "camvid":
        mean, std = np.float32([110.33139, 108.40919, 105.03353]), np.float32([72.125206, 72.68849, 69.902596])
        values = (x[..., ::-1].astype(np.float32) - mean) / std / 255
    else:
        mean, std = (np.float32(v) for v in IMAGENET)
        values = (x.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def archives(folder: Path, work: Path, case: Case, name: str) -> tuple[Path, Path]:
    """Training images without labels and test images with them."""
    train, test = work / f"{case.data}_train.npz", work / f"{case.data}_test.npz"
    if not train.exists():
        few = case.data == "camvid"
        x, _ = images(folder, case.data, "train", 100 if few else 12000)
        np.savez(train, **{name: prepared(x, case.data)})
        x, y = images(folder, case.data, "test", 60 if few else 4000)
        np.savez(test, **{name: prepared(x, case.data), "labels": y})
    return train, test


def command(*arguments: Any) -> Any:
    """Run `cpd-onnx` and read the JSON that it prints."""
    line = [sys.executable, "-m", "cpd_onnx", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line[2:])}: {done.stderr}")
    return json.loads(done.stdout) if "--json" in line else None


def measure(case: Case, folder: Path, work: Path, training: list[Any]) -> dict[str, Any]:
    """All commands on one model."""
    import onnx

    original = folder / "onnx" / f"{case.model}.onnx"
    name = onnx.load(original, load_external_data=False).graph.input[0].name
    train, test = archives(folder, work, case, name)
    result: dict[str, Any] = {"model": case.model, "target": case.target, "recipe": [*map(str, training), *case.recipe]}
    students = {"control": original}
    for score in ("l2", "random"):
        pruned = students[score] = work / f"{case.model}_{score}.onnx"
        report = command(
            "prune", original, "-o", pruned, "--target", case.target, "--score", score, "--force", "--json", "-"
        )
        result[f"{score}_macs"] = report["after"]["macs"] / report["before"]["macs"]
        result[f"{score}_difference"] = report["verification"]["difference"]
    replay = work / "replay.onnx"
    command("apply", original, f"{students['l2']}.plan.json", "-o", replay, "--force")
    result["replay_is_equal"] = replay.read_bytes() == students["l2"].read_bytes()
    for key, student in students.items():
        out = work / f"{case.model}_{key}_distilled.onnx"
        trained = command(
            "distill", original, student, "-o", out, "--data", train, *training, *case.recipe,
            "--eval", test, "--metric", case.metric, "--force", "--json", "-",
        )  # fmt: skip  # one command
        result |= {
            f"{key}_before": trained["student"],
            f"{key}_after": trained["distilled"],
            f"{key}_seconds": trained["seconds"],
        }
        result["dense"] = trained["teacher"]
    plan = f"{students['l2']}.plan.json"
    proof = command("verify", original, work / f"{case.model}_l2_distilled.onnx", "--plan", plan, "--json", "-")
    result["distilled_file_trained_weights"] = len(proof["trained"])
    return result


def main() -> None:
    """Run what was asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("CPD_DATA"), required="CPD_DATA" not in os.environ)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 1 on a busy machine")
    parser.add_argument("--work", type=Path, help="folder for intermediate files (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "real_files.json")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "date": time.strftime("%Y-%m-%d")}
    versions = {name: metadata.version(name) for name in ("onnx", "onnxruntime", "torch", "numpy")}
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(
        describe, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()
    results = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    for key in options.only or CASES:
        line = f"python benchmarks/real_files.py --data DATA --only {key} --steps {options.steps}"
        training = ["--steps", options.steps, "--threads", options.threads]
        results[key] = {"command": line, "commit": commit} | measure(CASES[key], Path(options.data), work, training)
        print(json.dumps(results[key], indent=1), flush=True)
        content = {
            "machine": machine,
            "versions": versions,
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
