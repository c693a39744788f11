"""Names of the version before still work, and say where they are now."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from cpd_onnx.moved import GONE_IN, MODULES, NAMES
from cpd_onnx.version import __version__

ROOT = Path(__file__).parents[2]


def run(code: str, *flags: str) -> str:
    """What a fresh Python prints, and complains about."""
    line = [sys.executable, *flags, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout + done.stderr


def test_old_names_go_when_they_are_due() -> None:
    assert tuple(map(int, __version__.split(".")[:2])) < tuple(map(int, GONE_IN.split("."))), (
        "delete cpd_onnx/moved.py, this file, and what calls it: the old names are due"
    )


@pytest.mark.parametrize("old", [old for old in MODULES if not old.endswith("olive")])  # its library may not be there
def test_moved_module_is_the_new_one(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=rf"{old} has moved to {MODULES[old]};") as caught:
        module = import_module(old)
    assert module is import_module(MODULES[old])
    assert module.__name__ == MODULES[old]
    assert Path(caught[0].filename).name != "moved.py"


CHECK = """
import importlib
import warnings

from cpd_onnx.moved import NAMES

warnings.simplefilter("error")
for (module, name), (new, new_name) in NAMES.items():
    if new.startswith("cpd_onnx.integrations"):
        continue
    there = importlib.import_module(module)
    kept = name in vars(there)  # a module that uses the name still has it
    try:
        exec(f"from {module} import {name}")
        assert kept, f"{module}.{name} says nothing"
    except DeprecationWarning as warning:
        assert f"{module}.{name} has moved to {new}.{new_name};" in str(warning), warning
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert getattr(there, name) is getattr(importlib.import_module(new), new_name), (module, name)
print(len(NAMES))
"""


def test_moved_names_are_the_new_ones() -> None:
    assert run(CHECK).strip() == str(len(NAMES))


def test_onnx_ir_pass_is_found_where_it_was() -> None:
    pytest.importorskip("onnx_ir")
    code = "from cpd_onnx.ir import CompressPass; print(CompressPass.__module__)"
    said = run(code, "-W", "always::DeprecationWarning")
    assert said.startswith("cpd_onnx.integrations.onnx_ir")
    assert "<string>:1: DeprecationWarning: cpd_onnx.ir.CompressPass has moved" in said


def test_a_name_that_never_was_is_none() -> None:
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec("from cpd_onnx.data import nonsense")
    with pytest.raises(ModuleNotFoundError, match=r"cpd_onnx\.nonsense"):
        import_module("cpd_onnx.nonsense")


def test_nothing_is_loaded_before_somebody_asks() -> None:
    code = "import cpd_onnx, sys; print(sorted(n for n in sys.modules if n.startswith(('cpd_onnx', 'onnx', 'numpy'))))"
    assert run(code).strip() == str(["cpd_onnx", "cpd_onnx.errors", "cpd_onnx.moved", "cpd_onnx.version"])


def test_resources_beside_a_module_that_names_left_are_found() -> None:
    code = "from importlib import resources; import cpd_onnx.report as r; print(resources.files(r) / 'templates')"
    assert run(code).strip().endswith("templates")
