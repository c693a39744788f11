"""Times of whole models: exact counts, IO binding, CSV, and the runner for targets without Python."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import cpd_onnx as cpd
from cpd_onnx.cli.main import main
from cpd_onnx.runtime.bench import Setting, bench
from cpd_onnx.runtime.sessions import Bound, Method, interleaved, open_model
from cpd_onnx.runtime.times import read_times, runner_source
from tests.support.models import from_text

MODEL = (
    "(float[N, 3, 8, 8] x, float[4, 3, 3, 3] w) => (float[N, 4, 6, 6] y, int64[4] z) { y = Conv(x, w) z = Shape(x) }"
)
SHRINKING = "(float[8] x) => (int64[1, M] y) { y = NonZero(x) }"
HEADER = "model,batch,threads,provider,warmup,run,ms\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(from_text(MODEL), tmp_path / "conv, small.onnx")
    return tmp_path / "conv, small.onnx"


def feed() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)}


def test_bound_outputs_are_those_of_a_run(model: Path) -> None:
    session = open_model(model)
    bound = Bound(session, feed())
    assert bound.run(None, {}) == []
    for made, wanted in zip(bound._binding.copy_outputs_to_cpu(), session.run(None, feed()), strict=True):
        np.testing.assert_array_equal(made, wanted)


def test_outputs_of_sizes_that_depend_on_values_are_bound() -> None:
    session = open_model(from_text(SHRINKING))
    bound = Bound(session, {"x": np.array([0, 1, 0, 2, 0, 0, 0, 3], np.float32)})
    bound.run(None, {})
    assert bound._binding.copy_outputs_to_cpu()[0].tolist() == [[1, 3, 7]]


def test_an_input_that_cannot_be_bound_is_one_line(model: Path) -> None:
    with pytest.raises(cpd.UnsupportedError, match=r"onnxruntime cannot bind input 'k': .*name"):
        Bound(open_model(model), {"k": np.zeros(2, np.float32)})
    with pytest.raises(cpd.UnsupportedError, match="onnxruntime failed to run the model"):
        Bound(open_model(model), {**feed(), "x": np.zeros((2, 5, 8, 8), np.float32)})


@pytest.mark.parametrize("is_bound", [False, True])
def test_exact_counts(model: Path, is_bound: bool) -> None:
    seen = []
    sessions = [open_model(model), open_model(model)]
    method = Method(warmup=0, runs=4, io_binding=is_bound)
    times = interleaved(sessions, feed(), 100.0, method=method, observer=lambda *counts: seen.append(counts))
    assert [len(taken) for taken in times] == [4, 4]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_benchmark_says_how_it_was_timed(model: Path) -> None:
    found = bench([model], settings=[Setting(1, 1)], method=Method(warmup=1, runs=5, io_binding=True))
    assert found.method_text() == "5 runs of each model after 1 warm-up run, inputs and outputs bound to the device"
    assert found.as_json()["method"] == {"warmup": 1, "runs": 5, "io_binding": True}


def test_csv_has_a_row_for_each_setting_and_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.csv"
    line = ["bench", str(model), "--batch", "1,2", "--runs", "3", "--warmup", "0", "--csv", str(table)]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "3 runs of each model after 0 warm-up runs" in said
    assert f"wrote {table}" in said
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["model"], row["batch"], row["runs"], row["warmup"]) for row in rows] == [
        ("conv, small.onnx", "1", "3", "0"), ("conv, small.onnx", "2", "3", "0")
    ]  # fmt: skip  # rows
    assert all(0 < float(row["p10_ms"]) <= float(row["p50_ms"]) <= float(row["p99_ms"]) for row in rows)
    assert main(line) == 1
    assert "t.csv exists" in capsys.readouterr().err


def test_times_of_the_runner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.csv"
    first = "".join(f"big.onnx,2,1,XNNPACK,5,{run},{run}.0\n" for run in (1, 2, 3))
    path.write_text(HEADER + first + HEADER + "small.onnx,2,1,XNNPACK,5,1,0.5\nbig.onnx,1,1,XNNPACK,5,1,8\n")
    found = read_times([path])
    setting = Setting(2, 1, "XnnpackExecutionProvider")
    assert [(t.model, t.setting, t.p50, t.ratio, t.runs) for t in found.timings] == [
        ("big.onnx", setting, 2.0, 1.0, 3), ("small.onnx", setting, 0.5, 0.25, 1),
        ("big.onnx", Setting(1, 1, "XnnpackExecutionProvider"), 8.0, 1.0, 1),
    ]  # fmt: skip  # rows
    assert found.timings[0].per_second == pytest.approx(1000)
    assert main(["bench", "--from", str(path), "--json", str(tmp_path / "o.json")]) == 0
    assert "1 to 3 runs of each model after 5 warm-up runs" in capsys.readouterr().out
    assert json.loads((tmp_path / "o.json").read_text())["machine"] == {"source": str(path)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no column 'model', 'batch'"),
        ("model,ms\na,1\n", "has no column 'batch', 'threads', 'provider', 'warmup'"),
        (HEADER, "has no rows"),
        (HEADER + "a,1,1,CPU,3,1,fast\n", "line 2: ms is 'fast', which is not a number of at least 0"),
        (HEADER + "a,1,1,CPU,3,1,nan\n", "ms is 'nan'"),
        (HEADER + "a,1,1,CPU,3,1,0\n", "cannot take 0 ms"),
        (HEADER + "a,0,1,CPU,3,1,1\n", "batch is '0', which is not a whole number of at least 1"),
        (HEADER + "a,1,1,,3,1,1\n", "provider is empty"),
        (HEADER + "a,1,1,CPU,3,1,1,9\n", "line 2 has more cells"),
        (HEADER + "a,1,1,CPU,3\n", "ms is ''"),
        (HEADER + "a,1,1,cuda:devise=1,3,1,1\n", "no such option"),
        ("model,model,ms,batch,threads,provider,warmup\n", "names a column twice"),
    ],
)
def test_what_is_no_output_of_the_runner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    (tmp_path / "t.csv").write_text(content)
    assert main(["bench", "--from", str(tmp_path / "t.csv")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_one_of_three_things_is_asked_of_bench(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 1
    assert main(["bench", str(model), "--from", str(tmp_path / "t.csv")]) == 1
    assert capsys.readouterr().err.count("bench takes either models to measure, or --from, or --runner") == 2


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runner, built from what `bench --runner` writes against the library of the Python package."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    libraries = sorted((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if compiler is None or not libraries:
        pytest.skip("needs a C++ compiler and the shared library of onnxruntime")
    folder = tmp_path_factory.mktemp("runner")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(libraries[0])
    assert main(["bench", "--runner", str(folder / "runner.cpp")]) == 0
    assert (folder / "runner.cpp").read_text() == runner_source()
    header = Path(__file__).parent / "header"
    command = [
        compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", str(folder / "runner.cpp"), f"-I{header}", f"-L{folder}",
        "-lonnxruntime", f"-Wl,-rpath,{folder}", "-o", str(folder / "runner"),
    ]  # fmt: skip  # a command line
    subprocess.run(command, check=True, timeout=120)
    return folder / "runner"


def ran(runner: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(runner), *arguments], capture_output=True, text=True, timeout=60, env={**os.environ})


def test_the_runner_times_a_model(runner: Path, model: Path, tmp_path: Path) -> None:
    found = ran(runner, str(model), "--shape", "x:2,3,8,8", "--runs", "5", "--warmup", "1")
    assert found.stderr == ""
    assert found.stdout.splitlines()[0] == HEADER.strip()
    (tmp_path / "t.csv").write_text(found.stdout)
    (timing,) = read_times([tmp_path / "t.csv"]).timings
    assert (timing.model, timing.setting, timing.runs) == ("conv, small.onnx", Setting(2, 1), 5)
    assert 0 < timing.p10 <= timing.p99 < 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: runner MODEL"),
        (["none.onnx"], "none.onnx failed"),
        (["MODEL", "--runs", "0"], "--runs 0 is not a whole number of at least 1"),
        (["MODEL", "--shape", "x"], "--shape x is not NAME:SIZE"),
        (["MODEL", "--shape", "q:1"], "the model has no input q"),
        (["MODEL", "--sape", "x:1"], "unknown option --sape"),
        (["MODEL", "--runs"], "--runs needs a value"),
        (["MODEL", "--provider", "Abacus"], "error: "),
    ],
)
def test_the_runner_says_what_is_wrong(runner: Path, model: Path, arguments: list[str], said: str) -> None:
    found = ran(runner, *(str(model) if text == "MODEL" else text for text in arguments))
    assert found.returncode == 1
    assert said in found.stderr
    assert found.stdout == ""
