"""Bench: several models, settings, memory and profiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import cpd_onnx as cpd
from cpd_onnx.cli.main import main
from cpd_onnx.report import tables as report
from cpd_onnx.runtime import sessions as runtime
from cpd_onnx.runtime.bench import Bench, Setting, bench
from tests.support.models import from_text
from tests.support.runs import plain

SMALL = "(float[N, 8, 24, 24] x, float[8, 8, 3, 3] w) => (float[N, 8, 22, 22] y) { y = Conv(x, w) }"
LARGE = (
    "(float[N, 8, 24, 24] x, float[64, 8, 3, 3] w, float[64, 64, 3, 3] v, float[8, 64, 1, 1] u) => (float[N, 8, 20, 20] y)"
    " { a = Conv(x, w) b = Conv(a, v) c = Conv(b, u) y = Relu(c) }"
)
FIXED = "(float[2, 8] x, float[8, 4] w) => (float[2, 4] y) { y = MatMul(x, w) }"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for name, text in (("large", LARGE), ("small", SMALL), ("fixed", FIXED)):
        onnx.save(from_text(text), tmp_path / f"{name}.onnx")
    return [tmp_path / f"{name}.onnx" for name in ("large", "small", "fixed")]


def test_models_are_measured_side_by_side(files: list[Path]) -> None:
    found = bench(files[:2], settings=[Setting(1, 1), Setting(4, 1)], seconds=0.2)
    assert [(t.model, t.setting.batch) for t in found.timings] == [
        ("large.onnx", 1), ("small.onnx", 1), ("large.onnx", 4), ("small.onnx", 4)
    ]  # fmt: skip  # pairs
    for first, other in zip(found.timings[::2], found.timings[1::2], strict=True):
        assert first.ratio == 1.0
        assert other.ratio == pytest.approx(other.p50 / first.p50)
        assert other.ratio < 0.5
        assert first.p10 <= first.p50 <= first.p90 <= first.p99
        assert first.runs == other.runs >= 10
        assert first.per_second == pytest.approx(1e3 * (first.setting.batch or 0) / first.p50)
    assert found.timings[2].p50 > 2 * found.timings[0].p50
    assert next(iter(found.profiles["large.onnx"])) in ("Conv", "FusedConv")
    assert sum(found.profiles["large.onnx"].values()) > sum(found.profiles["small.onnx"].values())
    assert min(found.memory.values()) > 0
    assert found.profiled == Setting(1, 1)
    assert found.machine["onnxruntime"]


def test_a_script_that_is_not_guarded_against_being_imported(files: list[Path], tmp_path: Path) -> None:
    """What a reader of the documentation writes first."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom cpd_onnx.runtime.bench import bench\n"
        f"print('memory', bench([Path({str(files[1])!r})], seconds=0.02).memory)\n"
    )
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, env=os.environ | paths
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("memory") == 1


def test_profiles_and_memory_are_those_of_the_first_setting(files: list[Path]) -> None:
    found = [bench(files[:1], settings=[Setting(batch, 2)], seconds=0.05) for batch in (1, 32)]
    assert [one.profiled for one in found] == [Setting(1, 1), Setting(32, 1)]
    few, many = (sum(one.profiles["large.onnx"].values()) for one in found)
    assert many > 4 * few
    assert found[1].memory["large.onnx"] > found[0].memory["large.onnx"]


def test_a_provider_that_does_not_start_is_said(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Fallen:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(runtime.ort, "get_available_providers", lambda: ["Abacus", "CPUExecutionProvider"])
    monkeypatch.setattr(runtime, "_session", lambda *_: Fallen())
    with pytest.raises(cpd.UnsupportedError, match="cannot start provider 'Abacus'"):
        runtime.open_model(files[0], provider="Abacus")


def test_time_by_operator_reads_side_by_side() -> None:
    profiles = {"a": {"Conv": 4.0, "Relu": 1.0}, "b": {"Conv": 1.0, "Relu": 1.5}}
    table = report.profiles_table(Bench((), {}, profiles, Setting(8, 1)))
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert str(table.title) == "Time by operator, ms (CPU, batch 8, one thread)"
    assert rows == [
        ("Conv", "4.000", "1.000 (25.0 %)"), ("Relu", "1.000", "1.500 (150.0 %)"), ("all", "5.000", "2.500 (50.0 %)")
    ]  # fmt: skip  # rows


def test_what_cannot_be_measured_is_said(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(cpd.UnsupportedError, match="fixed batch size of 2"):
        bench(files[2:], settings=[Setting(8)], seconds=0.1)
    with pytest.raises(cpd.UnsupportedError, match=r"no provider 'Abacus'.*CPUExecutionProvider"):
        bench(files[:1], settings=[Setting(provider="Abacus")], seconds=0.1)
    with pytest.raises(cpd.UnsupportedError, match="failed to run"):
        bench([files[0], files[2]], seconds=0.1)
    renamed = from_text(FIXED)
    renamed.graph.input[0].name = renamed.graph.node[0].input[0] = "z"
    onnx.save(renamed, other := tmp_path / "other.onnx")
    with pytest.raises(cpd.DataError, match=r"other.onnx takes inputs \['z'\], but large.onnx takes \['x'\]"):
        bench([files[0], other], seconds=0.1)


def test_command(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones((4, 8, 24, 24), np.float32))
    line = [
        "bench",
        str(files[0]),
        str(files[1]),
        "--seconds",
        "0.1",
        "--batch",
        "1,2",
        "--data",
        str(tmp_path / "data.npz"),
    ]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "small.onnx" in said
    assert "samples/s" in said
    assert main(plain([*line, "--json", "-"])) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["timings"]) == 4
    assert content["machine"]["onnxruntime"]
    assert main(plain([*line, "--json", str(tmp_path / "data.npz"), "--plot", str(tmp_path / "figure.gif")])) == 1
    assert main(plain(["bench", str(tmp_path / "none.onnx")])) == 1
