"""The page of limits lists the operators of onnxruntime that have no rule."""

from __future__ import annotations

import re
from pathlib import Path

import onnxruntime
import pytest

from cpd_onnx.rules import RULES

PAGE = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()
SECTION = PAGE.split("## Operators of onnxruntime without a rule")[1].split("\n## ")[0]
ROWS = re.findall(r"^\| ([a-z.]+) \| ((?:`\w+` ?)+)\| (.+) \|$", SECTION, re.MULTILINE)
LISTED = [(domain, name) for domain, names, _ in ROWS for name in re.findall(r"`(\w+)`", names)]


def kernels() -> set[tuple[str, str]]:
    """Operators outside the standard, as (domain, name), that onnxruntime runs on the CPU."""
    state = onnxruntime.capi.onnxruntime_pybind11_state
    if not hasattr(state, "get_all_opkernel_def"):
        pytest.skip("this build of onnxruntime cannot list its kernels")
    found = state.get_all_opkernel_def()
    return {(each.domain, each.op_name) for each in found if each.domain and each.provider == "CPUExecutionProvider"}


def test_listed_operators_have_no_rule() -> None:
    assert len(LISTED) == len(set(LISTED)) > 50
    assert set(LISTED) & set(RULES) == set()


def test_every_operator_of_onnxruntime_has_a_rule_or_is_listed() -> None:
    found = kernels()
    (version,) = re.findall(r"\(([0-9.]+)\)", SECTION)
    if not onnxruntime.__version__.startswith(f"{version}."):
        pytest.skip(f"the page lists the operators of onnxruntime {version}")
    assert sorted(found - set(RULES)) == sorted(LISTED)
