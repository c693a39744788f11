"""Imports point down, and torch is imported only where something is trained."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("errors", "atoms", "version", "wire", "svg"),
    ("streams",),
    ("supervise", "files", "loading", "trust"),
    ("graph", "data"),
    ("evaluate", "tensors"),
    ("differences", "sizes"),
    ("common", "constants"),
    ("contrib",),
    ("shapes",),
    ("rules.api", "runtime"),
    ("rules.elementwise", "metrics"),
    ("rules.attention", "rules.linear", "rules.norm", "rules.reduce", "rules.shape"),
    ("rules.quant", "rules.recurrent"),
    ("rules",),
    ("groups",),
    ("kept", "editing", "operands", "weights", "compare", "profiles", "converting", "sources"),
    (
        "cost",
        "arithmetic",
        "masking",
        "observing",
        "unrounded",
        "recipe",
        "bench",
        "knapsack",
        "linear",
        "quantize",
        "halves",
        "proof_inputs",
    ),
    ("fitting", "deploy"),
    ("rewrite", "plan", "widths", "units"),
    ("stepwise", "replayed"),
    ("report", "latency"),
    ("plots",),
    ("sections",),
    ("document",),
    ("state",),
    ("pipeline",),
    ("",),
    ("training",),
    ("training.losses", "training.cache", "training.world", "training.folded"),
    ("training.feed",),
    ("training.loop",),
    ("passes",),
    ("passes.fold", "passes.comb", "passes.score", "passes.distill"),
    ("passes.activations", "passes.allocate", "passes.gradients", "passes.reconstruction", "passes.repair"),
    ("proving",),
    ("passes.prune", "passes.verify"),
    ("passes.iterate", "passes.sensitivity"),
    ("passes.interleave",),
    ("compression", "manifest"),
    ("api", "chain"),
    ("ir", "olive"),
    ("testing", "demo"),
    ("models",),
    ("options",),
    ("console", "completion"),
    ("cli_compress", "cli_deploy", "cli_verify"),
    ("cli_sweep", "cli_reproduce"),
    ("cli",),
    ("__main__",),
)
"""Each module imports from the lines above its own; "" is the package itself, `torch.…` stands beside them all."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TRAINS = ("torch", "training", "passes.distill", "passes.gradients", "passes.interleave")
"""Where torch is imported."""


def modules() -> dict[str, Path]:
    """The modules of the package by name, without `cpd_onnx.`."""
    found = {}
    for folder, prefix in ((ROOT / "cpd_onnx", ""), (ROOT / "passes", "passes.")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if folder.name == "cpd_onnx" and parts[0] in ("passes", "models"):
                continue  # reached through links
            name = prefix + ".".join(parts)
            found[name.removesuffix("__init__").removesuffix(".")] = path
    return found


MODULES = modules()


def trains(name: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in TRAINS)


def imports(node: ast.AST, *, late: bool = False) -> Iterator[tuple[str, bool]]:
    """Names that are imported, and whether only inside a function; imports for types alone are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield (full if full.removeprefix("cpd_onnx.") in MODULES else str(child.module)), late
        yield from imports(child, late=late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def own(name: str) -> str | None:
    """The module of ours behind an imported name."""
    if name == "cpd_onnx":
        return ""
    return name.removeprefix("cpd_onnx.") if name.startswith("cpd_onnx.") else None


def test_every_module_has_a_layer() -> None:
    beside = {name for name in MODULES if name.split(".")[0] == "torch"}
    assert set(MODULES) - beside - set(LEVEL) == set()
    assert set(LEVEL) - set(MODULES) == {"models"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str) -> None:
    for imported, late in imports(ast.parse(MODULES[name].read_text())):
        target = own(imported)
        if target is None or late:
            continue
        if name.split(".")[0] == "torch":
            assert target.split(".")[0] in ("torch", "errors"), f"{name} imports {target}"
        elif target.split(".")[0] == "torch":
            assert trains(name), f"{name} imports {target}"
        else:
            assert LEVEL[target] < LEVEL[name], f"{name} imports {target}"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if not trains(name)))
def test_torch_is_not_imported(name: str) -> None:
    for imported, late in imports(ast.parse(MODULES[name].read_text())):
        target = own(imported)
        assert imported.split(".")[0] != "torch", f"{name} imports torch"
        assert late or target is None or not trains(target), f"{name} imports {target}, which imports torch"


WITHOUT_TORCH = """
import sys

sys.modules["torch"] = None  # as if it were not installed
from cpd_onnx.cli import main
import cpd_onnx
try:
    cpd_onnx.run("comb, distill", sys.argv[1])
except cpd_onnx.UnsupportedError as error:
    print(error, file=sys.stderr)
sys.exit(main(sys.argv[2:]))
"""


def test_torch_is_not_imported_before_it_is_needed() -> None:
    script = "import sys, cpd_onnx, cpd_onnx.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    model = ROOT / "models" / "digits.onnx"
    line = [sys.executable, "-c", WITHOUT_TORCH, str(model), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)


def test_all_but_training_works_without_torch(tmp_path: Path) -> None:
    model = ROOT / "models" / "digits.onnx"
    done = without_torch("prune", model, "-o", tmp_path / "small.onnx")
    assert (done.returncode, "verified" in done.stdout) == (0, True)
    assert done.stderr == "pass 'distill' needs torch: pip install 'cpd-onnx[torch]'\n"
    done = without_torch(
        "distill", model, model, "-o", tmp_path / "out.onnx", "--data", model.with_name("digits_train.npz")
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: distillation needs torch: pip install 'cpd-onnx[torch]'"
    assert {p.name for p in tmp_path.iterdir()} == {"small.onnx", "small.onnx.plan.json"}


def test_the_demo_works_without_torch() -> None:
    done = without_torch("demo")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "not trained: pip install 'cpd-onnx[torch]'" in done.stdout
    assert "pruned and repaired" in done.stdout
    assert "distilled" not in done.stdout
