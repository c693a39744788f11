"""The comparison of two checkouts, `benchmarks/robustness/unchanged.py`, on checkouts that only write what they are told."""

from __future__ import annotations

import argparse
import importlib.util
import json
import queue
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "benchmarks" / "robustness" / "unchanged.py"
TOOL = """
import json, sys, time
from pathlib import Path
here, folder = Path(__file__).parents[1], Path.cwd()
Path("p.onnx").write_bytes({model!r} + Path("m.onnx").read_bytes()[:9])
Path("p.json").write_text(json.dumps({{"tool": "cpd-onnx {version}", "tree": str(here), "seconds": time.perf_counter()}}))
print("{said}", sys.argv[1:], "in", folder)
sys.exit({code})
"""
SAME: dict[str, Any] = {"model": b"\x00\xff", "version": "1.0", "said": "pruned", "code": 0}


@pytest.fixture(scope="module")
def unchanged() -> ModuleType:
    spec = importlib.util.spec_from_file_location("unchanged", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["unchanged"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_checkout(folder: Path, **differences: Any) -> Path:
    """Write a checkout whose tool copies a few bytes of the model, and writes its version, its folder and the time."""
    settings = SAME | differences
    package = folder / "cpd_onnx"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f'__version__ = "{settings["version"]}"\n')
    (package / "__main__.py").write_text(TOOL.format(**settings))
    return folder


def differences(unchanged: ModuleType, folder: Path, **changed: Any) -> list[str]:
    """Run one command with two checkouts, of which one is changed, and return what differs."""
    case, trees = unchanged.Case("a case", "digits", ("prune m.onnx",)), []
    for name, differing in (("was", {}), ("now", changed)):
        path = write_checkout(folder / "trees" / name, **differing)
        servers: queue.Queue[Any] = queue.Queue()
        servers.put(unchanged.Server(path))
        trees.append(unchanged.Tree(path, folder / name, unchanged.version_of(path), servers, {}))
    try:
        (row,) = unchanged.compared(trees, case, argparse.Namespace(data=folder, words=False))
    finally:
        for tree in trees:
            tree.servers.get().end()
    assert row["files"] == 4  # with standard output and standard error
    found: list[str] = row["differs"]
    return found


def test_what_must_differ_between_checkouts_counts_as_equal(unchanged: ModuleType, tmp_path: Path) -> None:
    assert differences(unchanged, tmp_path, version="1.1") == []


def test_a_changed_byte_a_changed_word_and_an_exit_code_are_found(unchanged: ModuleType, tmp_path: Path) -> None:
    changed = {"model": b"\x00\xfe", "said": "cut", "code": 3}
    assert differences(unchanged, tmp_path, **changed) == ["exit code 0 -> 3", "p.onnx", "stdout"]


@pytest.mark.parametrize(
    ("name", "old", "new", "is_equal"),
    [
        ("p.json", {"policy": "global", "reason": "as told"}, {"spread": "global", "reason": "as said"}, True),
        ("p.json", {"removed": [1, 2]}, {"removed": [1, 3]}, False),
        ("m.json", {"file": "r.md", "sha256": "a"}, {"file": "r.md", "sha256": "b"}, True),
        ("m.json", {"file": "p.onnx", "sha256": "a"}, {"file": "p.onnx", "sha256": "b"}, False),
        ("r.toml", "policy = 1\nseed = 0\n", "seed = 0\nspread = 1\n", True),
        ("r.toml", "seed = 0\n", "seed = 1\n", False),
        ("r.md", "old", "new", True),
        ("p.onnx", "old", "new", False),
    ],
)
def test_values_are_compared_without_their_wording(
    unchanged: ModuleType, name: str, old: Any, new: Any, *, is_equal: bool
) -> None:
    before, after = (
        unchanged.Outcome(0, 0.0, {name: (text if isinstance(text, str) else json.dumps(text)).encode()})
        for text in (old, new)
    )
    assert unchanged.differing(before, after, ignores_wording=True) == ([] if is_equal else [name])
    assert unchanged.differing(before, after, ignores_wording=False) == [name]


def test_a_missing_and_a_new_file_are_found(unchanged: ModuleType) -> None:
    before, after = unchanged.Outcome(0, 0.0, {"a": b""}), unchanged.Outcome(0, 0.0, {"b": b""})
    assert unchanged.differing(before, after, ignores_wording=True) == ["a (missing)", "b (new)"]
