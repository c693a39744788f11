"""Progress: what is reported while a command works, where it is shown, and that it can be interrupted at any step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import cpd_onnx as cpd
from cpd_onnx.cli import console
from cpd_onnx.cli.main import main
from cpd_onnx.io.progress import ProgressEvent, Tracker, advance, announce, reporting, step, tracked
from cpd_onnx.workflow import compress_files
from cpd_onnx.workflow.api import run as carry_out
from cpd_onnx.workflow.requests import Prune
from tests.rules.test_rules import model_of
from tests.support.runs import plain

STEPS = (
    "read",
    "comb",
    "score",
    "prune",
    "repair",
    "verify",
    "latency",
    "sensitivity",
    "evaluate",
    "agreement",
    "write",
)
"""Steps of the command in `arguments`, in order."""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = model_of("conv")
    onnx.save(model, tmp_path / "model.onnx")
    info = model.graph.input[0]
    sizes = [d.dim_value or 1 for d in info.type.tensor_type.shape.dim]
    images = np.random.default_rng(0).standard_normal((24, *sizes[1:])).astype(np.float32)
    np.savez(tmp_path / "data.npz", **{info.name: images})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compress_files, "_BENCH_SECONDS", 0.02)
    return tmp_path


def arguments(*more: str) -> list[str]:
    data = ("--data", "data.npz", "--eval", "data.npz", "--metric", "cosine", "--no-distill", "--threads", "1")
    return plain(["compress", "model.onnx", "-o", "small.onnx", "--target", "macs=0.5", *data, *more])


def test_an_event_is_a_line() -> None:
    event = ProgressEvent(2, 6, "score", 4, 10, seconds_left=72.4)
    assert str(event) == "2/6 score  40 %  1:12 left"
    assert str(ProgressEvent(0, 0, "read")) == "read"
    assert str(ProgressEvent(1, 3, "distill", 1, 4, detail="loss 0.5000")) == "1/3 distill  25 %  loss 0.5000"
    assert str(ProgressEvent(1, 1, "latency", 5, 4)) == "1/1 latency  100 %"


def test_time_left_follows_the_pace_since_the_start_of_the_counting() -> None:
    events: list[ProgressEvent] = []
    clock = Clock()
    track = Tracker(events.append, clock)
    track("distill")
    clock.now = 100.0  # preparations
    track("distill", 40, 100)  # a resumed run
    clock.now = 120.0
    track("distill", 50, 100)
    assert [event.seconds_left for event in events] == [None, None, 100.0]
    clock.now = 120.05
    track("distill", 51, 100)
    assert len(events) == 3, "at most ten reports a second"
    track("distill", 100, 100)
    assert events[-1].seconds_left == 0


def test_rounds_count_on_and_unannounced_steps_keep_the_number() -> None:
    events: list[ProgressEvent] = []
    with reporting(events.append):
        announce("score", "prune", "score", "prune", "verify")
        announce("other")
        for name in ("score", "prune", "score", "extra", "prune", "verify"):
            with step(name):
                pass
    assert [event.title for event in events] == [
        "1/5 score", "2/5 prune", "3/5 score", "3/5 extra", "4/5 prune", "5/5 verify"
    ]  # fmt: skip


def test_steps_inside_a_step() -> None:
    events: list[ProgressEvent] = []
    with reporting(events.append):
        with step("iterate"), step("score"), step("score"):
            advance(1, 1)
        with step("sensitivity", is_whole=True):
            for _ in tracked([1, 2]):
                with step("repair"):
                    advance(5, 5)
        assert [str(event) for event in events] == [
            "iterate", "iterate: score", "iterate: score  100 %", "sensitivity", "sensitivity  0 %",
            "sensitivity  100 %",
        ]  # fmt: skip
    advance(1, 2)
    assert len(events) == 6


def test_python_is_told_the_steps(folder: Path) -> None:
    events: list[ProgressEvent] = []
    cpd.compress("model.onnx", "data.npz", macs=0.5, train=False, progress=events.append)
    assert list(dict.fromkeys(event.name for event in events)) == ["score", "refine", "prune", "repair", "verify"]
    assert {(event.name, event.number, event.steps) for event in events} >= {("score", 1, 5), ("verify", 5, 5)}
    assert max(event.done for event in events if event.name == "repair") > 0
    events.clear()
    half = Prune(model=Path("model.onnx"), output=Path("half.onnx"), target="macs=0.5", blind=True, check_speed=False)
    carry_out(half, events.append)
    assert [event.title for event in events if event.done == 0][-1] == "7/7 repair"
    events.clear()
    cpd.run("comb, score, allocate{macs=0.5}, prune", "model.onnx", progress=events.append)
    assert [event.title for event in events] == ["1/4 comb", "2/4 score", "3/4 allocate", "4/4 prune"]


def test_progress_changes_no_byte(folder: Path) -> None:
    silent = cpd.compress("model.onnx", "data.npz", macs=0.5, train=False)
    shown = cpd.compress("model.onnx", "data.npz", macs=0.5, train=False, progress=lambda _: None)
    assert silent.serialize() == shown.serialize()


def test_a_short_run_says_nothing_on_standard_error(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(plain(["prune", "model.onnx", "-o", "small.onnx"])) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("level", ["quiet", "info", "debug"])
def test_levels(folder: Path, level: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "_LINE_SECONDS", 0.005)
    more = ["--sensitivity"] if level == "debug" else ["--no-report"]
    assert main(arguments("--log-level", level, "--json", "-", *more)) == 0
    printed = capfd.readouterr()
    assert printed.out.startswith("{"), "nothing but the result on standard output"
    lines = printed.err.splitlines()
    durations = [line for line in lines if line.endswith(" s") and ": " in line]
    assert bool(lines) is (level != "quiet")
    assert bool(durations) is (level == "debug")
    if level == "debug":
        named = [line.split(": ")[0].split()[-1] for line in durations]
        assert [name for name in dict.fromkeys(named) if name in STEPS] == list(STEPS)
        assert durations[-1].startswith("10/10 write: ")


class _Stopping(console._Lines):
    """Progress that is interrupted by Ctrl-C as a step begins."""

    at = ""

    def __call__(self, event: ProgressEvent) -> None:
        if event.name == self.at:
            raise KeyboardInterrupt
        super().__call__(event)


@pytest.mark.parametrize("name", STEPS)
def test_ctrl_c_during_each_step(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_Lines", _Stopping)
    monkeypatch.setattr(_Stopping, "at", name)
    assert main(arguments("--sensitivity")) == 130
    said = capfd.readouterr()
    assert said.err.startswith("interrupted")
    assert said.err.count("\n") == 1
    left = {path.name for path in folder.iterdir()} - {"model.onnx", "data.npz"}
    assert all(file in said.err for file in left), "a checkpoint is named, and nothing else is left"
    assert not any(file.startswith("small.onnx") and "checkpoint" not in file for file in left)


def test_no_thread_is_left(folder: Path) -> None:
    import threading

    before: Any = threading.active_count()
    assert main(plain(["prune", "model.onnx", "-o", "small.onnx"])) == 0
    assert main(["prune", "nowhere.onnx", "-o", "other.onnx"]) == 1
    assert threading.active_count() == before
