"""Faults while files are written: the old file or the new one, whole, and nothing else."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cpd_onnx.cli.main import main
from cpd_onnx.io import files
from cpd_onnx.ir.model import load
from cpd_onnx.proof.files import verify_files
from cpd_onnx.rewrite.plan import load_plan
from tests.support.runs import plain

WIDTH = 600
KILLS = int(os.environ.get("CPD_KILLS", "12"))
"""By each of three signals."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of some megabytes with its weights in a file of their own."""
    rng = np.random.default_rng(0)
    nodes, tensors = [], []
    for number in range(6):
        weight = rng.standard_normal((WIDTH, WIDTH), np.float32)
        tensors.append(numpy_helper.from_array(weight, f"w{number}"))
        nodes.append(helper.make_node("MatMul", [f"x{number}", f"w{number}"], [f"x{number + 1}"]))
    inputs = [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [1, WIDTH])]
    outputs = [helper.make_tensor_value_info("x6", TensorProto.FLOAT, [1, WIDTH])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "source" / "model.onnx"
    path.parent.mkdir()
    onnx.save_model(model, path, save_as_external_data=True, location="model.data")
    return path


def in_child(work: Callable[[], object]) -> int:
    """Start something in a process of its own, without output."""
    child = os.fork()
    if child:
        return child
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    code = 70
    try:
        code = int(work() or 0)
    finally:
        os._exit(code)


def prune(source: Path, out: Path, target: float, *, is_forced: bool = True) -> int:
    """Through the command line, by default over what is there."""
    more = ["--force"] if is_forced else []
    return main(plain(["prune", str(source), "-o", str(out), "--target", f"macs={target}", "--no-verify", *more]))


def is_whole(source: Path, out: Path) -> bool:
    """Whether model, data and plan are there, of one run, and nothing else is."""
    model = onnx.load(out, load_external_data=False)
    onnx.checker.check_model(str(out), full_check=True)
    (data,) = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    assert {file.name for file in out.parent.iterdir()} == {out.name, data, f"{out.name}.plan.json"}
    return verify_files(load(source), load(out), load_plan(f"{out}.plan.json")).is_replay


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_at_any_moment(source: Path, tmp_path: Path, kind: signal.Signals) -> None:
    out = tmp_path / "out" / "small.onnx"
    out.parent.mkdir()
    assert prune(source, out, 0.5) == 0
    started = time.perf_counter()
    assert os.waitpid(in_child(lambda: prune(source, out, 0.6)), 0)[1] == 0
    whole, rng = time.perf_counter() - started, np.random.default_rng(kind)
    for number in range(KILLS):
        child = in_child(lambda number=number: prune(source, out, (0.4, 0.5, 0.6)[number % 3]))
        time.sleep(float(rng.uniform(0, 1.1 * whole)))
        os.kill(child, kind)
        os.waitpid(child, 0)
        leftovers = [file for file in out.parent.iterdir() if file.suffix == ".data"]
        model = onnx.load(out)  # with all of its data
        assert len(model.graph.initializer) == 6
        assert load_plan(f"{out}.plan.json").content["groups"]
        # A process that is killed between the moves of a commit cannot clean up; the next run does.
        assert kind == signal.SIGKILL or not list(out.parent.glob("*.part"))
        assert len(leftovers) <= 3  # by their content: what runs that were killed had written lies there until one ends
    assert prune(source, out, 0.5) == 0
    assert is_whole(source, out)


@pytest.mark.parametrize("is_there", [False, True])
def test_killed_between_the_moves_of_a_commit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_there: bool
) -> None:
    """The next run is not refused, unless a model is there, and removes what the killed one has left."""
    for moved in range(4):
        out = tmp_path / f"out{moved}" / "small.onnx"
        out.parent.mkdir()
        if is_there:
            assert prune(source, out, 0.5) == 0
        left, replace = moved, files._PendingFile.replace_target

        def killing(part: files._PendingFile) -> None:
            nonlocal left
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            replace(part)  # noqa: B023  # called within the iteration

        monkeypatch.setattr(files._PendingFile, "replace_target", killing)
        status = os.waitpid(in_child(lambda: prune(source, out, 0.4)), 0)[1]  # noqa: B023
        monkeypatch.undo()
        was_killed = os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        assert was_killed == (moved < 3)  # data, model and plan
        assert was_killed == bool(list(out.parent.glob(".*.part")))
        assert prune(source, out, 0.6, is_forced=out.exists()) == 0
        assert is_whole(source, out)


def test_temporary_files_in_use_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_open_unnamed", lambda _: None)
    foreign, old = tmp_path / "notes.part", tmp_path / ".cpd-onnx.abc123.part"
    for file in (foreign, old):
        file.write_text("left")
    with files.atomic_stream(tmp_path / "new") as stream:
        stream.write(b"content")
        with files.locked_folder(tmp_path):
            assert not old.exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "notes.part"]
    assert (tmp_path / "new").read_bytes() == b"content"


def test_a_full_disk_leaves_the_old_files(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "small.onnx"
    out.parent.mkdir()
    assert prune(source, out, 0.5) == 0
    before = {file.name: file.read_bytes() for file in out.parent.iterdir()}

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        return prune(source, out, 0.8)

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(limited), 0)[1]) == 1
    assert {file.name: file.read_bytes() for file in out.parent.iterdir()} == before


@pytest.mark.parametrize("kilobytes", [64, 2500, 4500])
def test_a_small_disk(source: Path, tmp_path: Path, kilobytes: int) -> None:
    """A file system of so many kilobytes: the plan does not fit, or the data, or the new data beside the old."""
    out, script = tmp_path / "out", tmp_path / "script"
    out.mkdir()
    base = ["prune", source, "-o", f"{out}/small.onnx", "--no-verify", "--target"]
    small, larger = (
        shlex.join([sys.executable, "-m", "cpd_onnx", *plain([*base, *more])])
        for more in (["macs=0.4"], ["macs=0.6", "--force"])
    )
    script.write_text(
        f"mount -t tmpfs -o size={kilobytes}k tmpfs {out} || exit 99\n"
        f"{small}; echo code $?; ls -A {out}; cat {out}/small.onnx* | sha256sum\n"
        f"{larger}; echo code $?; ls -A {out}; cat {out}/small.onnx* | sha256sum\n"
    )
    done = subprocess.run(["unshare", "-rm", "sh", str(script)], capture_output=True, text=True, check=False)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("no file systems can be mounted here")
    first, second = (part.splitlines() for part in done.stdout.split("code ")[1:])
    fits = kilobytes > 2500
    assert (first[0], second[0]) == (("0", "1") if fits else ("1", "1")), done.stdout
    assert second[1:-1] == first[1:-1] or fits
    assert done.stderr.count("No space left on device") == (1 if fits else 2)
    assert "Traceback" not in done.stderr
    files = [line for line in first[1:-1] if line.startswith((".", "small"))]
    assert len(files) == (3 if fits else 0)
    assert first[-1] == second[-1]  # the old files, byte for byte


def test_runs_that_write_one_output(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "small.onnx"
    out.parent.mkdir()
    for _ in range(3):
        children = [in_child(lambda target=target: prune(source, out, target)) for target in (0.4, 0.5, 0.6, 0.7)]
        assert {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children} == {0}
        assert is_whole(source, out)


def test_a_model_may_take_the_place_of_what_it_was_made_of(source: Path, tmp_path: Path) -> None:
    """Not on the command line, where it would be lost by mistake."""
    assert prune(source, source, 0.5) == 1
    assert prune(source, tmp_path / "small.onnx", 0.5) == 0
    original = load(source)
    before = {t.name: original.array(t.name).copy() for t in original.graph.initializer}
    load(tmp_path / "small.onnx").save(source, overwrite=True)
    small = load(source)
    assert small.data_bytes() < 0.6 * original.data_bytes()
    assert all(np.array_equal(original.array(name), values) for name, values in before.items())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder that nobody can write to")
def test_a_folder_that_cannot_be_written(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plain(["prune", str(source), "-o", "/proc/small.onnx"])) == 1
    assert "cannot write" in capsys.readouterr().err
