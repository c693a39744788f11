"""What a run keeps of the quality: its defaults, the bound of the loss, what changes no output, and its verdict.

Nothing is timed: the machine is made up, and takes as long as the weights of a model are large.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import cpd_onnx as cpd
from cpd_onnx.budget import latency
from cpd_onnx.budget.allocation import Allocation, LossCurves
from cpd_onnx.budget.latency import CostTable, LatencyProbe, load_table, measure_table
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.costs import Costs
from cpd_onnx.channels.free import FreeChannels
from cpd_onnx.channels.groups import Combed
from cpd_onnx.cli.main import main
from cpd_onnx.data.agreement import exact_low
from cpd_onnx.data.sources import open_source
from cpd_onnx.io.progress import ProgressEvent
from cpd_onnx.ir.model import Model
from cpd_onnx.passes.refine import Refined
from cpd_onnx.report.verdict import NOT_FASTER, TARGET_MISSED
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.runtime.sessions import open_model
from cpd_onnx.workflow import compress as compression
from cpd_onnx.workflow import sweep as sweeping
from cpd_onnx.workflow.api import run as carry_out
from cpd_onnx.workflow.quality.outcome import demand_of
from cpd_onnx.workflow.quality.samples import Loss, Samples
from cpd_onnx.workflow.quality.search import Candidate, Search
from cpd_onnx.workflow.requests import Prune
from tests.support.digits import small_digits

MODELS = Path(cpd.__file__).parent / "models"
FEW = ("--samples", 64, "--repair-samples", 64, "--effort", 0)
QUICK = (*FEW, "--no-distill", "--no-report")
DEAD = (1, 5, 9)
"""Channels that are planted to be zero for all inputs."""


def milliseconds(model: Model) -> float:
    return sum(kernel.ms for kernel in kernels(model).values())


def kernels(model: Model) -> dict[str, latency.KernelTime]:
    """One kernel for each weight, which takes a nanosecond for each of its numbers."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) > 1}
    return {
        f"of {name}": latency.KernelTime("Conv", 1e-6 * float(np.prod(dims)), dims) for name, dims in weights.items()
    }


class Machine:
    """A made-up machine, on which pruned models take `factor` times as long as they should.

    Every original has a latency of 50 microseconds, too little for other widths to be tried on a slow model.
    """

    factor = 1.0

    def ratio_of(self, probe: LatencyProbe, model: Model, seconds: float = 2.0) -> float:
        probe.ms = 0.05
        return self.factor * milliseconds(model) / milliseconds(probe.combed.folded.model)

    def profile(self, probe: LatencyProbe, model: Model) -> tuple[dict[str, latency.KernelTime], float, float]:
        return kernels(model), milliseconds(model), milliseconds(probe.combed.folded.model)


@pytest.fixture(scope="module")
def table() -> Iterator[CostTable]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatencyProbe, "profile", lambda probe, model: Machine().profile(probe, model))
        yield measure_table(LatencyProbe(comb(small_digits()), Setting()))


@pytest.fixture
def machine(table: CostTable, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(LatencyProbe, "ratio_of", lambda probe, model, seconds=2.0: made.ratio_of(probe, model))
    monkeypatch.setattr(LatencyProbe, "profile", lambda probe, model: made.profile(probe, model))
    monkeypatch.setattr("cpd_onnx.passes.allocate.measure_table", lambda probe, **_: table)
    return made


@pytest.fixture
def folder(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a small model, unlabelled samples of it, and labelled ones."""
    onnx.save(small_digits(), tmp_path / "digits.onnx")
    with np.load(MODELS / "digits_train.npz") as arrays:
        np.savez(tmp_path / "data.npz", image=arrays["image"])
    with np.load(MODELS / "digits_test.npz") as arrays:
        np.savez(tmp_path / "test.npz", **{name: array[:400] for name, array in arrays.items()})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plant(dead: Sequence[int] = DEAD, layer: str = "block1.conv1.1", place: Path = Path("digits.onnx")) -> None:
    """Write a model with dead channels."""
    model = onnx.load(place)
    for tensor in model.graph.initializer:
        if tensor.name in (f"{layer}.weight", f"{layer}.bias"):
            values = numpy_helper.to_array(tensor).copy()
            values[[*dead]] = 0.0 if tensor.name.endswith("weight") else -1.0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, "dead.onnx")


def run(*arguments: object) -> int:
    return main([*map(str, arguments)])


def result(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the result of a command."""
    Path("result.json").unlink(missing_ok=True)
    code = run(*arguments, "--json", "result.json")
    return code, json.loads(Path("result.json").read_text())


def answers(content: dict[str, Any]) -> dict[str, str]:
    return {entry["question"]: entry["answer"] for entry in content["verdict"]["answers"]}


def require_reproducible() -> None:
    """The run that wrote small.onnx, repeated, writes the same bytes."""
    assert run("reproduce", "small.onnx.manifest.json", "-o", "again") == 0
    for name in ("small.onnx", "small.onnx.plan.json"):
        assert (Path("again") / name).read_bytes() == Path(name).read_bytes()


# A default run.


@pytest.mark.parametrize("more", [(), ("--rounds", 2, "--cost-table", "table.json")])
def test_a_default_run_is_faster_and_as_good_and_can_be_repeated(
    folder: Path, table: CostTable, more: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    table.save(Path("table.json"))
    code, content = result("compress", "digits.onnx", "-o", "small.onnx", "--data", "data.npz", *QUICK, *more)
    lines = capsys.readouterr().out.splitlines()
    assert content["agreement"]["is_held_out"]
    assert content["agreement"]["samples"] == (200 if more else 133), "a third of those held out are for the search"
    assert content["verdict"]["code"] == code
    assert [line.lower().startswith(name) for line, name in zip(lines[-4:], answers(content), strict=True)] == [
        True
    ] * 4
    if not more:
        assert code == 0
        assert answers(content) == dict.fromkeys(("faster", "as good", "smaller", "proved"), "yes")
    assert "hold-out = 0.2\n" in Path("small.onnx.recipe.toml").read_text()
    require_reproducible()


def test_a_target_gives_way_to_the_bound_also_with_a_cost_table(folder: Path, table: CostTable) -> None:
    """The table is on record, but the search is not: its channels are."""
    table.save(Path("table.json"))
    asked = ("--data", "data.npz", "--max-loss", 0.02, "--cost-table", "table.json", *QUICK)
    code, content = result("compress", "digits.onnx", "-o", "small.onnx", *asked)
    assert code == 0
    assert content["is_bounded"]
    assert 1 - content["agreement"]["value"] <= 0.02
    require_reproducible()


def test_nothing_is_held_out_if_nothing_is_to_be(folder: Path) -> None:
    asked = ("--data", "data.npz", "--hold-out", 0, "--target", "macs=0.7", *QUICK)
    _, content = result("compress", "digits.onnx", "-o", "small.onnx", *asked)
    assert content["agreement"]["samples"] == 1000
    assert not content["agreement"]["is_held_out"]
    assert answers(content)["as good"] in ("no", "unknown"), "it was fitted to them"
    require_reproducible()


# The bound of the loss.


def test_a_bound_is_met_on_labels(folder: Path) -> None:
    asked = ("--data", "data.npz", "--eval", "test.npz", "--max-loss", 0.02, *QUICK)
    code, content = result("compress", "digits.onnx", "-o", "small.onnx", *asked)
    before, after = content["accuracy"]["values"].values()
    assert code == 0
    assert (content["accuracy"]["on"], content["accuracy"]["samples"]) == ("labels", 267)
    assert before - after <= 0.02
    assert content["after"]["macs"] < 0.9 * content["before"]["macs"]
    require_reproducible()


def test_a_loss_beyond_the_bound_is_a_failure_with_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("compress", "digits.onnx", "--data", "data.npz", "--target", "macs=0.05", "--no-repair", *QUICK)
    assert run(*asked, "-o", "small.onnx") == 4
    assert "NOT AS GOOD: answers like the original on at least " in capsys.readouterr().out
    assert Path("small.onnx").exists()
    assert run("verify", "digits.onnx", "small.onnx") == 0
    code, content = result(*asked, "-o", "any.onnx", "--max-loss", "inf")
    assert (code, answers(content)["as good"]) == (0, "no")


def test_python_does_what_the_command_does(folder: Path) -> None:
    options = {"samples": 64, "repair_samples": 64, "effort": 0, "train": False, "max_loss": 0.05}
    asked = ("--data", "data.npz", "--max-loss", 0.05, "--round-to", 1, *QUICK)
    assert run("compress", "digits.onnx", "-o", "small.onnx", *asked) == 0
    made = cpd.compressed("digits.onnx", "data.npz", **options)
    assert made.state.model.serialize() == Path("small.onnx").read_bytes()
    assert made.state.need("plan", "prune").dumps() == Path("small.onnx.plan.json").read_text()
    assert made.state.need("allocation", "prune").latency["measured"] < 0.9


def test_what_is_measured_does_not_break_the_bound(
    folder: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is slower than its table asks for more to be removed than the bound allows."""

    def removed(loss: Loss, model: Model) -> float:
        return 1 - model.data_bytes() / loss.original.data_bytes()

    machine.factor = 1.5
    monkeypatch.setattr(Loss, "__call__", removed)
    asked = ("--data", "data.npz", "--max-loss", 0.4, "--score", "l2", "--no-repair", "--keep-anyway", *FEW)
    _, content = result("prune", "digits.onnx", "-o", "small.onnx", *asked)
    assert content["latency"]["measured"] > 0
    assert 0.3 < removed(Loss(cpd.load("digits.onnx"), Samples(None), "top1"), cpd.load("small.onnx")) <= 0.4


def test_few_samples_are_judged_by_their_outputs_too(folder: Path) -> None:
    """Answers that are the same by luck, of two samples or of forty, do not show that nothing is lost."""
    original, images = cpd.load("digits.onnx"), np.load("data.npz")["image"]
    small = cpd.run("comb, score{kind='l2'}, allocate{macs=0.5}, prune", "digits.onnx").model
    answers = [open_model(model).run(None, {"image": images})[0].argmax(1) for model in (original, small)]
    same = np.flatnonzero(answers[0] == answers[1])
    assert len(same) < 0.8 * len(images)
    np.savez("same.npz", image=images[same[:2]])
    np.savez("some.npz", image=images[same[:40]])
    lost = {
        name: Loss(original, Samples(None, open_source(name, original.proto)), "top1")(small)
        for name in ("same.npz", "some.npz")
    }
    assert lost["same.npz"] > 0.2
    assert 0 < lost["some.npz"] <= 1 - exact_low(40, 40)


def test_a_bound_that_is_asked_for_is_shown_and_the_default_one_is_expected(folder: Path) -> None:
    """One of 34 answers differs: about 3 % are lost, and at most 13 % with 95 % confidence."""
    original, images = cpd.load("digits.onnx"), np.load("data.npz")["image"]
    small = cpd.run("comb, score{kind='l2'}, allocate{macs=0.5}, prune", "digits.onnx").model
    answers = [open_model(model).run(None, {"image": images})[0].argmax(1) for model in (original, small)]
    same, other = np.flatnonzero(answers[0] == answers[1]), np.flatnonzero(answers[0] != answers[1])
    np.savez("mixed.npz", image=images[[*same[:33], other[0]]])
    samples = Samples(None, open_source("mixed.npz", original.proto))
    asked, usual = (
        Prune(model=Path("digits.onnx"), output=Path("small.onnx"), max_loss=bound) for bound in (0.1, None)
    )
    losses = [demand_of(request, has_labels=False).loss(original, samples)(small) for request in (asked, usual)]
    assert losses[0] == pytest.approx(1 - exact_low(33, 34))
    assert losses[1] == pytest.approx(2 / 36)
    assert losses[1] < demand_of(usual, has_labels=False).max_loss < losses[0]  # type: ignore[operator]


def test_without_training_all_that_the_fit_does_not_need_is_held_out(folder: Path) -> None:
    asked = ("prune", "digits.onnx", "-o", "small.onnx", "--data", "data.npz", *FEW, "--target", "macs=0.7", "--force")
    _, content = result(*asked)
    assert content["agreement"]["samples"] == 1000 - 64
    assert content["agreement"]["is_held_out"]
    _, content = result(*asked, "--hold-out", 0)
    assert not content["agreement"]["is_held_out"]


class Compared(Search):
    """A search whose candidates lose three tenths of what they remove, or a tenth with refined curves."""

    def __init__(self) -> None:
        self.tried, self.by = {}, None

    def _candidate(self, progress: float) -> Candidate:
        by = self.by or Refined()
        nothing = Allocation([], Costs(0, 0, 0, 0), Costs(0, 0, 0, 0))
        return Candidate(progress, nothing, progress * (0.3 if by.curves is None else 0.1), by)

    def _refined(self, progress: float) -> Refined:
        assert progress in self.tried
        return Refined(LossCurves(()))


@pytest.mark.parametrize(("bound", "reached"), [(0.02, 0.2), (0.2, 1.0), (0.001, None)])
def test_a_search_that_finds_nothing_by_the_scores_refines_them(bound: float, reached: float | None) -> None:
    found = Compared().furthest(bound)
    assert (found is None) == (reached is None)
    if found is not None and reached is not None:
        assert reached * 0.8 < found.progress <= reached


def test_a_bound_that_nothing_meets_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lose(*_: object) -> float:
        return 0.5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpd_onnx.workflow.quality.samples.Loss.__call__", lose)
        assert run("prune", "digits.onnx", "-o", "small.onnx", "--data", "data.npz", *FEW) == 4
    assert "no smaller model loses at most 0.1: the least that was found is 0.5" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"digits.onnx", "data.npz", "test.npz"}


def test_a_search_says_what_it_does(folder: Path) -> None:
    events: list[ProgressEvent] = []
    few = {"data": "data.npz", "samples": 64, "repair_samples": 64}
    carry_out(Prune(model=Path("digits.onnx"), output=Path("small.onnx"), **few), events.append)
    titles = list(dict.fromkeys(event.title for event in events))
    assert [title for title in titles if ":" not in title] == [
        "1/9 score", "2/9 cost table", "3/9 search", "4/9 refine", "5/9 search", "6/9 prune", "7/9 verify", "8/9 repair",
        "9/9 agreement",
    ]  # fmt: skip


# An interrupted run.


def interrupted(*_: object, **__: object) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("trains", [False, True])
def test_a_resumed_run_does_what_the_whole_one_does(
    folder: Path, machine: Machine, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the machine has another speed by then, on which other channels would have been chosen."""
    training: tuple[object, ...] = ("--no-distill",)
    if trains:
        pytest.importorskip("torch")
        training = ("--steps", 1, "--lr", 1e-9, "--batch-size", 32, "--threads", 1)
    asked = ("--data", "data.npz", "--max-loss", 0.03, "--no-report", *FEW, *training)
    code, whole = result("compress", "digits.onnx", "-o", "whole.onnx", *asked)
    assert code == 0
    with monkeypatch.context() as patch:
        patch.setattr(compression, "verify_files", interrupted)
        assert run("compress", "digits.onnx", "-o", "small.onnx", *asked) == 130
    choices = {path.name for path in folder.glob("small.onnx.checkpoint.choice.*")}
    assert choices == {f"small.onnx.checkpoint.choice.{1 if trains else 2}.json"}
    assert run("compress", "digits.onnx", "-o", "small.onnx", *asked, "--resume", "--hold-out", 0.5) == 1
    machine.factor = 1.0 if trains else 1.3
    code, resumed = result("compress", "digits.onnx", "-o", "small.onnx", *asked, "--resume")
    assert code == 0
    assert not list(folder.glob("*.checkpoint*"))
    assert Path("small.onnx").read_bytes() == Path("whole.onnx").read_bytes()
    assert all(resumed[name] == whole[name] for name in ("agreement", "asked", "latency", "notes"))


# Without data.


def test_without_data_nothing_changes_the_outputs(
    folder: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.factor = 0.5
    plant()
    code, content = result("compress", "dead.onnx", "-o", "small.onnx", "--no-report")
    assert (code, content["is_lossless"], answers(content)["as good"]) == (0, True, "yes")
    removed = {group["name"]: group["kept"] for group in content["groups"] if group["kept"] < group["size"]}
    assert len(removed) == 1
    feed = {"image": np.load("test.npz")["image"][:16]}
    before, after = (open_model(cpd.load(name)).run(None, feed)[0] for name in ("dead.onnx", "small.onnx"))
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)
    require_reproducible()
    capsys.readouterr()
    assert run("prune", "dead.onnx", "-o", "other.onnx", "--rounds", 2) == 1
    assert "takes one round, got 2 rounds" in capsys.readouterr().err
    for command in ("compress", "prune"):
        assert run(command, "digits.onnx", "-o", "none.onnx") == 1
        said = capsys.readouterr().err
        assert said.startswith("error: no channel can be removed without a change of the outputs: give --data")
        assert said.count("\n") == 1
    assert not Path("none.onnx").exists()


@pytest.mark.parametrize("command", ["prune", "compress"])
def test_what_is_free_is_written_unless_it_is_slower(folder: Path, machine: Machine, command: str) -> None:
    """Speed was not asked for: a model that is as fast as before is a success, if only its size is less."""
    plant()
    machine.ratio_of = lambda probe, model, seconds=2.0: 0.99  # type: ignore[method-assign]
    quick = () if command == "prune" else ("--no-report",)
    code, content = result(command, "dead.onnx", "-o", "small.onnx", *quick)
    assert (code, content["verdict"]["code"], content["is_lossless"]) == (0, 0, True)
    assert answers(content) == {"faster": "no", "as good": "yes", "smaller": "yes", "proved": "yes"}
    assert run(command, "dead.onnx", "-o", "asked.onnx", "--target", "latency=0.5", *quick) == NOT_FASTER
    assert run(command, "dead.onnx", "-o", "asked.onnx", "--max-loss", 0.01, *quick) == NOT_FASTER
    machine.ratio_of = lambda probe, model, seconds=2.0: 1.2  # type: ignore[method-assign]
    assert run(command, "dead.onnx", "-o", "asked.onnx", *quick) == NOT_FASTER
    assert not list(Path().glob("asked.onnx*"))
    machine.ratio_of = lambda probe, model, seconds=2.0: 0.9  # type: ignore[method-assign]
    code, content = result(command, "dead.onnx", "-o", "asked.onnx", "--target", "macs=0.5", *quick)
    assert (code, content["asked"]) == (0, [])
    assert any(note.startswith("the target macs=0.5 was not aimed at") for note in content["notes"])


def test_channels_that_are_wrongly_taken_for_free_are_told_by_the_proof(
    folder: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(combed: Combed) -> list[FreeChannels]:
        return [FreeChannels(zero=tuple(range(len(group) // 2))) for group in combed.groups]

    machine.factor = 0.5
    monkeypatch.setattr("cpd_onnx.passes.lossless.free_channels", wrong)
    code, content = result("prune", "digits.onnx", "-o", "small.onnx")
    assert (code, content["is_lossless"], content["is_blind"]) == (0, False, True)
    assert answers(content)["as good"] == "unknown"


def test_free_channels_stay_where_kernels_are_slow_without_them(folder: Path, machine: Machine) -> None:
    plant(range(0, 40, 2), "block2.conv1.1", MODELS / "digits.onnx")

    def ratio_of(probe: LatencyProbe, model: Model, seconds: float = 2.0) -> float:
        is_odd = any(
            tensor.dims[0] % 8 for tensor in model.graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] > 40
        )
        return 1.1 if is_odd else 0.8

    machine.ratio_of = ratio_of  # type: ignore[method-assign]
    code, content = result("compress", "dead.onnx", "-o", "small.onnx", "--round-to", "auto8", "--no-report")
    (pruned,) = (group for group in content["groups"] if group["kept"] < group["size"])
    assert (code, pruned["size"], pruned["kept"]) == (0, 64, 48)
    assert answers(content) == dict.fromkeys(("faster", "as good", "smaller", "proved"), "yes")
    code, content = result("compress", "dead.onnx", "-o", "exact.onnx", "--round-to", 1, "--no-report", "--keep-anyway")
    (pruned,) = (group for group in content["groups"] if group["kept"] < group["size"])
    assert pruned["kept"] == 44


def test_blindly_everything_can_be_removed(folder: Path) -> None:
    code, content = result("prune", "digits.onnx", "-o", "small.onnx", "--blind", "--target", "macs=0.5")
    assert (code, content["is_blind"]) == (0, True)
    assert answers(content) == {"faster": "yes", "as good": "unknown", "smaller": "yes", "proved": "yes"}


@pytest.mark.parametrize("command", ["prune", "compress"])
def test_a_blind_run_that_reaches_its_target_by_free_channels_lost_nothing(
    folder: Path, machine: Machine, command: str
) -> None:
    machine.factor = 0.5
    plant(place=MODELS / "digits.onnx")
    target = ("--target", "channels=0.999", "--blind", "--round-to", 1)
    quick = () if command == "prune" else ("--no-report",)
    code, content = result(command, "dead.onnx", "-o", "small.onnx", *target, *quick)
    assert (code, content["is_lossless"], content["is_blind"]) == (0, True, False)
    assert answers(content)["as good"] == "yes"
    code, content = result(
        command, "dead.onnx", "-o", "smaller.onnx", *target[2:], "--target", "channels=0.5", *quick, *FEW
    )
    assert (code, content["is_lossless"], answers(content)["as good"]) == (0, False, "unknown")


# Speed and targets.


@pytest.mark.parametrize("command", ["prune", "compress"])
def test_the_cost_table_of_a_target_out_of_reach_is_kept(
    folder: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("--blind", "--min-ratio", 0.5, *FEW, *(() if command == "prune" else ("--no-report",)))
    line = (command, "digits.onnx", "-o", "small.onnx", *quick, "--target")
    place = Path("small.onnx.cost-table.json")
    place.write_text("another file")
    assert run(*line, "latency=0.001") == 1
    assert f"error: {place} exists" in capsys.readouterr().err
    code, content = result(*line, "latency=0.001", "--force")
    assert (code, content["cost_table"]) == (TARGET_MISSED, str(place))
    assert any(note.startswith(f"--cost-table {place} tries other targets") for note in content["notes"])
    load_table(place).require(cpd.load("digits.onnx"))
    if command == "compress":
        outputs = json.loads(Path("small.onnx.manifest.json").read_text())["outputs"]
        assert [entry["file"] for entry in outputs if entry["role"] == "cost-table"] == [str(place)]
    capsys.readouterr()
    assert run(*line, "latency=0.7", "--force", "--cost-table", place, "--no-check-speed") == 0
    assert "not measured here" in capsys.readouterr().out
    code, content = result(command, "digits.onnx", "-o", "other.onnx", *quick, "--target", "latency=0.7")
    assert (code, "cost_table" in content) == (0, False)
    assert not Path("other.onnx.cost-table.json").exists()


@pytest.mark.parametrize("command", ["prune", "compress"])
def test_what_is_not_faster_is_not_written(
    folder: Path, machine: Machine, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.factor = 2.5
    before = {path.name for path in folder.iterdir()}
    asked = (command, "digits.onnx", "-o", "small.onnx", "--blind", "--target", "macs=0.5", *FEW)
    asked = (*asked, "--no-report") if command == "compress" else asked
    assert run(*asked, "--json", "result.json") == 3
    said = capsys.readouterr()
    assert "error: NOT FASTER: it takes 1" in said.err
    assert "nothing was written (--keep-anyway writes it)" in said.err
    assert {path.name for path in folder.iterdir()} == before
    assert run(*asked, "--keep-anyway") == 3
    assert "NOT FASTER: it takes 1" in capsys.readouterr().out
    assert run("verify", "digits.onnx", "small.onnx") == 0
    assert run(*asked, "--force", "--no-check-speed") == 0


def test_a_target_out_of_reach_is_missed_with_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--blind", "--target", "macs=0.1", "--min-ratio", 0.6, *FEW)
    code, content = result("prune", "digits.onnx", "-o", "small.onnx", *asked)
    assert (code, content["verdict"]["code"]) == (6, 6)
    assert "TARGET MISSED: macs: asked for 0.1, got " in capsys.readouterr().out
    assert any("cannot be reached" in note for note in content["notes"])
    assert run("verify", "digits.onnx", "small.onnx") == 0
    with pytest.raises(cpd.TargetError, match="cannot be reached"):
        cpd.compress("digits.onnx", macs=0.1, min_ratio=0.6, blind=True)


# A sweep.


def here() -> Executor:
    return ThreadPoolExecutor(1)


def test_a_sweep_picks_by_the_answers_without_labels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweeping, "_SECONDS", 0.05)
    (folder / "executor_of_tests.py").write_text("from tests.workflow.test_quality import here\n")
    monkeypatch.syspath_prepend(str(folder))
    asked = ("sweep", "digits.onnx", "-o", "out", "--data", "data.npz", "--targets", "macs=0.7,0.05", "--no-repair")
    options = ("--executor", "executor_of_tests:here", "--no-check-speed", *FEW, "--no-distill")
    code, content = result(*asked, *options, "--max-loss", 0.1)
    assert (code, content["verdict"]["code"]) == (0, 0)
    first, last = content["sweep"]["points"][1:]
    good = {entry["question"]: entry["answer"] for entry in last["verdict"]["answers"]}
    assert good["as good"] == "no"
    assert last["agreement"]["is_held_out"]
    assert not last["picked"]
    assert first["picked"]
    assert result(*asked, *options, "--max-loss", 0.0001, "--force", "--targets", "macs=0.5")[0] == 4
    said = capsys.readouterr().out
    assert said.rstrip().endswith("NOT AS GOOD: no model was found that loses at most 0.0001")
    assert result(*asked, *options, "--force", "--targets", "macs=0.05")[0] == 4
    assert "NOT AS GOOD: macs=0.05, the best: answers like the original" in capsys.readouterr().out


def test_several_processes_do_not_search(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("compress", "digits.onnx", "-o", "small.onnx", "--data", "data.npz", *QUICK, "--max-loss", 0.1) == 1
    assert "--like" in capsys.readouterr().err
    assert not Path("small.onnx").exists()
