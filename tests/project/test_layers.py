"""The rooms of the package: what they import, how many files they hold, and torch only where something is trained."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import plain

ROOT = Path(__file__).parents[2]
TRAINS = ("torch", "training", "scores.gradients", "passes.distill", "passes.interleave")
"""Where torch is imported."""
MOST_MODULES, MOST_FILES = 8, 14


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
    return name != "training.options" and any(name == one or name.startswith(f"{one}.") for one in TRAINS)


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


def test_contracts_of_the_rooms_hold() -> None:
    """Late imports and those for types count; the contracts are in pyproject.toml."""
    line = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[done.stdout.find("Contracts") :]
    assert "0 broken" in done.stdout


def test_rooms_are_small() -> None:
    assert len(list((ROOT / "cpd_onnx").glob("*.py"))) <= MOST_MODULES
    folders = [ROOT / "passes", *(path for path in (ROOT / "cpd_onnx").rglob("*") if path.is_dir())]
    crowded = {str(folder): len(files) for folder in folders if len(files := list(folder.glob("*.py"))) > MOST_FILES}
    assert crowded == {}


@pytest.mark.parametrize("name", sorted(name for name in MODULES if not trains(name)))
def test_torch_is_not_imported(name: str) -> None:
    for imported, late in imports(ast.parse(MODULES[name].read_text())):
        target = imported.removeprefix("cpd_onnx.")
        assert imported.split(".")[0] != "torch", f"{name} imports torch"
        assert late or target == imported or not trains(target), f"{name} imports {target}, which imports torch"


WITHOUT_TORCH = """
import functools
import sys

sys.modules["torch"] = None  # as if it were not installed
from cpd_onnx.cli.main import main
import cpd_onnx
from cpd_onnx.cli import demo

demo.compressed = functools.partial(demo.compressed, samples=32, repair_samples=32, effort=0)  # which is quick
try:
    cpd_onnx.run("comb, distill", sys.argv[1])
except cpd_onnx.UnsupportedError as error:
    print(error, file=sys.stderr)
sys.exit(main(sys.argv[2:]))
"""


def test_torch_is_not_imported_before_it_is_needed() -> None:
    script = "import sys, cpd_onnx, cpd_onnx.cli.main; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    model = ROOT / "models" / "digits.onnx"
    line = [sys.executable, "-c", WITHOUT_TORCH, str(model), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)


def test_all_but_training_works_without_torch(tmp_path: Path) -> None:
    model = ROOT / "models" / "digits.onnx"
    done = without_torch(*plain(["prune", model, "-o", tmp_path / "small.onnx"]))
    assert (done.returncode, "verified" in done.stdout) == (0, True)
    assert done.stderr == "pass 'distill' needs torch: pip install 'cpd-onnx[torch]'\n"
    done = without_torch(
        "distill", model, model, "-o", tmp_path / "out.onnx", "--data", model.with_name("digits_train.npz")
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: distillation needs torch: pip install 'cpd-onnx[torch]'"
    assert {p.name for p in tmp_path.iterdir()} == {"small.onnx", "small.onnx.plan.json"}


def test_the_demo_works_without_torch() -> None:
    done = without_torch("demo", "--log-level", "quiet")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "not trained: distillation, which recovers accuracy, needs pip install 'cpd-onnx[torch]'" in done.stdout
    assert "pruned and repaired" in done.stdout
    assert "distilled" not in done.stdout
