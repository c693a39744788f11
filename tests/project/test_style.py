"""Habits that no linter holds."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
LONGEST = 160
"""Characters of a line of tests: ruff has one length for all files, and rows of a table read best on one line."""


def test_lines_of_tests_fit_on_a_screen() -> None:
    paths = sorted((ROOT / "tests").rglob("*.py"))
    assert paths
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > LONGEST
    ]
    assert long == []
